"""What a guard says of a data set as a whole: how much of it is risky, where, and how much could not be judged.

Made for a look at data before training on it. It counts rows and names them by id; it holds no text. The
counts are of the whole data set and no sample of it, so they have no intervals; how far the guard itself is
right is another question, and its threshold does not carry over from other data: calibrate it there.

A row is *risky* where one of its cuts reaches the threshold, *unscored* where none does and one was left
unscored (the missing one might have), and otherwise *below*.
"""

import re
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from ballast.guardrails.licences import Licence
from ballast.guardrails.types import RiskTrace

_BINS = 10
_SHOWN = 20  # groups, reasons and rows that a table lists
_LONGEST = 60  # characters of an id, a group or a reason in a table
LOW_LABEL_MASS = 0.9

Standing = Literal["risky", "below", "unscored"]


@dataclass(frozen=True)
class ScoredRow:
    """One row of a data set with its trace.

    Attributes:
        line: line of the input, from 1.
        id: what the data set calls it, else the line.
        trace: the guard's judgement.
        group: the data set's own category of it; None where it has none.
    """

    line: int
    id: str
    trace: RiskTrace
    group: str | None = None

    @property
    def peak(self) -> float | None:
        """The highest scored risk, in [0, 1]; None where no cut was scored."""
        return max((risk for risk in self.trace.risk if risk is not None), default=None)

    def standing(self, threshold: float) -> Standing:
        """Whether the row is risky, below the threshold, or cannot be said to be either."""
        peak = self.peak
        if peak is not None and peak >= threshold:
            return "risky"
        return "below" if self.trace.scored else "unscored"


@dataclass(frozen=True)
class Count:
    """Rows of one group by their standing."""

    rows: int
    risky: int
    unscored: int

    @property
    def share(self) -> float | None:
        """Risky rows among those that were judged, in [0, 1]; None where none was."""
        return self.risky / (self.rows - self.unscored) if self.rows > self.unscored else None


@dataclass(frozen=True)
class RiskyRow:
    """One of the riskiest rows.

    Attributes:
        id: as in `ScoredRow`.
        line: as in `ScoredRow`.
        risk: its highest risk.
        cut: character offset of the first cut that reaches the threshold, or of the highest risk below it.
        length: characters of its response.
    """

    id: str
    line: int
    risk: float
    cut: int
    length: int


@dataclass(frozen=True)
class Audit:
    """A data set as one guard sees it.

    Attributes:
        guard: the guard's name.
        licence: the guard's licence, since filtering data by a guard uses its outputs as a reward does.
        threshold: risk in [0, 1] from which a row is risky.
        total: all rows.
        groups: rows by the data set's own category, most risky first; empty where it has none.
        reasons: why cuts were left unscored, numbers replaced by N, with the rows of each.
        categories: the guard's own category at the riskiest cut of the risky rows.
        histogram: rows by peak risk, ten equal bins from 0 to 1; rows that are unscored are in none.
        quantiles: peak risk of judged rows at 0.5, 0.9 and 0.99.
        onset: median share of the response, in [0, 1], that is written when the threshold is first reached, over
            risky rows with more than one cut; None without such rows.
        empty: rows with an empty response, whose risk is the prompt's own.
        lowest_label_mass: lowest label mass of any trace; None for guards without labels.
        low_label_mass: rows below 0.9, where the guard's template likely does not fit.
        riskiest: the rows with the highest risk, highest first.
    """

    guard: str
    licence: Licence
    threshold: float
    total: Count
    groups: dict[str, Count]
    reasons: dict[str, int]
    categories: dict[str, int]
    histogram: tuple[int, ...]
    quantiles: dict[str, float]
    onset: float | None
    empty: int
    lowest_label_mass: float | None
    low_label_mass: int
    riskiest: tuple[RiskyRow, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; the shares that follow from the counts are included."""
        values = asdict(self)
        values["total"]["share"] = self.total.share
        for name, count in self.groups.items():
            values["groups"][name]["share"] = count.share
        return values


def audit(rows: Sequence[ScoredRow], guard: str, licence: Licence, threshold: float = 0.5, riskiest: int = 20) -> Audit:
    """Sum up what a guard said of a data set.

    Args:
        rows: all rows.
        guard: the guard's name.
        licence: the guard's licence.
        threshold: risk in [0, 1] from which a row is risky.
        riskiest: how many of the riskiest rows to name.
    """
    standing = {row.line: row.standing(threshold) for row in rows}
    judged = [(peak, row) for row in rows if standing[row.line] != "unscored" and (peak := row.peak) is not None]
    risky = [row for row in rows if standing[row.line] == "risky"]
    peaks = sorted(peak for peak, _ in judged)
    masses = [row.trace.label_mass for row in rows if row.trace.label_mass is not None]
    named: dict[str, list[ScoredRow]] = {}
    for row in rows:
        if row.group is not None:
            named.setdefault(row.group, []).append(row)
    groups = {name: _count(members, threshold) for name, members in named.items()}
    worst = sorted(judged, key=lambda item: (-item[0], item[1].line))[:riskiest]
    return Audit(
        guard=guard,
        licence=licence,
        threshold=threshold,
        total=_count(rows, threshold),
        groups=dict(sorted(groups.items(), key=lambda item: (-(item[1].share or 0.0), item[0]))),
        reasons=_counted(re.sub(r"\d+", "N", row.trace.reason or "") for row in rows if not row.trace.scored),
        categories=_counted(name for row in risky if (name := _category(row))),
        histogram=_histogram(peaks),
        quantiles={str(q): peaks[min(int(q * len(peaks)), len(peaks) - 1)] for q in (0.5, 0.9, 0.99) if peaks},
        onset=_onset(risky, threshold),
        empty=sum(row.trace.cuts[-1] == 0 for row in rows),
        lowest_label_mass=min(masses, default=None),
        low_label_mass=sum(mass < LOW_LABEL_MASS for mass in masses),
        riskiest=tuple(
            RiskyRow(row.id, row.line, peak, _first(row, min(peak, threshold)), row.trace.cuts[-1])
            for peak, row in worst
        ),
    )


def _count(rows: Sequence[ScoredRow], threshold: float) -> Count:
    found = Counter(row.standing(threshold) for row in rows)
    return Count(len(rows), found["risky"], found["unscored"])


def _counted(names: Iterable[str]) -> dict[str, int]:
    return dict(Counter(names).most_common())


def _histogram(peaks: Sequence[float]) -> tuple[int, ...]:
    bins = Counter(min(int(peak * _BINS), _BINS - 1) for peak in peaks)  # 1.0 belongs to the last
    return tuple(bins[i] for i in range(_BINS))


def _first(row: ScoredRow, risk: float) -> int:
    return next(cut for cut, r in zip(row.trace.cuts, row.trace.risk, strict=True) if r is not None and r >= risk)


def _onset(risky: Sequence[ScoredRow], threshold: float) -> float | None:
    shares = [_first(row, threshold) / row.trace.cuts[-1] for row in risky if len(row.trace.cuts) > 1]
    return statistics.median(shares) if shares else None


def _category(row: ScoredRow) -> str | None:
    if not row.trace.category:
        return None
    return row.trace.category[row.trace.risk.index(row.peak)]


def audit_markdown(found: Audit, source: str) -> str:
    """The audit as a page to read: counts, tables, ids; no text of the data.

    Args:
        found: the audit.
        source: what to call the data set.
    """
    total, threshold = found.total, found.threshold
    lines = [
        f"# Audit of {_cell(source)}",
        "",
        f"By the guard `{_cell(found.guard)}` (licence: {found.licence.name}); a row is risky where one of its cuts has risk "
        f"{threshold:g} or more.",
        "",
        *_table(
            ("rows", "risky", "share of the judged", "unscored", "empty responses"),
            [(total.rows, total.risky, _percent(total.share), total.unscored, found.empty)],
        ),
    ]
    if found.quantiles:
        lines.append("Highest risk of a row: " + ", ".join(f"{v:.3f} at {q}" for q, v in found.quantiles.items()) + ".")
    if found.onset is not None:
        lines.append(f"Risky rows reach the threshold after {found.onset:.0%} of the response (median).")
    if found.lowest_label_mass is not None:
        lines.append(
            f"Label mass: lowest {found.lowest_label_mass:.3f}; below {LOW_LABEL_MASS} in {found.low_label_mass} rows."
        )
    lines += ["", "## Risk", ""]
    most = max(found.histogram) or 1
    lines += _table(
        ("highest risk", "rows", ""),
        [
            (f"{i / _BINS:.1f} to {(i + 1) / _BINS:.1f}", n, "█" * round(20 * n / most))
            for i, n in enumerate(found.histogram)
        ],
    )
    if found.groups:
        groups = [(name, c.rows, c.risky, _percent(c.share), c.unscored) for name, c in found.groups.items()]
        lines += ["## By category of the data", "", *_table(("category", "rows", "risky", "share", "unscored"), groups)]
    for title, counts in (("Risky rows by category of the guard", found.categories), ("Unscored", found.reasons)):
        if counts:
            lines += [
                f"## {title}",
                "",
                *_table(("why" if title == "Unscored" else "category", "rows"), [*counts.items()]),
            ]
    if found.riskiest:
        lines += ["## Riskiest rows", ""]
        lines += _table(
            ("id", "line", "risk", "at character", "of"),
            [(row.id, row.line, f"{row.risk:.3f}", row.cut, row.length) for row in found.riskiest],
        )
    return "\n".join(lines)


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    shown = [f"| {' | '.join(_cell(value) for value in row)} |" for row in rows[:_SHOWN]]
    more = [f"... and {len(rows) - _SHOWN} more, in the JSON file.", ""] if len(rows) > _SHOWN else []
    return [f"| {' | '.join(head)} |", "|" + " --- |" * len(head), *shown, "", *more]


def _cell(value: object) -> str:
    text = " ".join(str(value).split())
    text = text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"
    return re.sub(r"([\\|`*_<\[])", r"\\\1", text)


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{share:.1%}"
