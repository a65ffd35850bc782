"""Columns of tables that not every measurement has: the judges beside each other, probes, sources, TruthfulQA, pass rates."""

from collections.abc import Callable, Mapping, Sequence

from ballast.pipeline.evaluation.agreement import Agreement
from ballast.pipeline.evaluation.cells import DASH, change, number, percent
from ballast.pipeline.evaluation.metrics import EvaluationSummary
from ballast.pipeline.evaluation.probe_figures import AdaptationFigures, AttackFigures, ProbeFigures
from ballast.pipeline.evaluation.reward_gap import RewardGap

Rows = Sequence[tuple[str, EvaluationSummary]]
# Heading, with a line end where it may break, to the cell.
Columns = dict[str, Callable[[EvaluationSummary], str]]

_KEYWORDS, _SECOND = "judge, keywords", "judge, second judge"


def further_columns(rows: Rows) -> dict[str, Columns]:
    """By title, the tables of what was measured besides: those with a figure for any of the models, `Judges` first.

    In `Judges` stands how the judge agrees with keywords, and with the second judge where there is one.
    """
    summaries = [summary for _, summary in rows]
    found: dict[str, Columns] = {}
    if any(s.agreement for s in summaries):
        second = any(s.second_unsafe_share for s in summaries)
        found["Judges"] = {
            **_agreement(_KEYWORDS, "keywords"),
            **(_agreement(_SECOND, "2nd judge") if second else {}),
            **({"unsafe,\n2nd judge": lambda s: percent(s.second_unsafe_share)} if second else {}),
        }
    names = list(dict.fromkeys(name for s in summaries for name in s.suites))
    if names:
        found["Unsafe share by source"] = {name: _unsafe_of(name) for name in names}
        found["Refused harmless by source"] = {name: _refused_of(name) for name in names}
    probed = [s.probes for s in summaries if s.probes is not None]
    if probed:
        found["Probes"] = _probes(probed)
    variants = list(dict.fromkeys(name for s in summaries for name in s.truthfulqa))
    if variants:
        found["TruthfulQA"] = {name.replace("_", " "): _truthfulqa(name) for name in variants}
    rates = list(dict.fromkeys((name, k) for s in summaries for name, of_task in s.pass_at.items() for k in of_task))
    if rates:
        found["Pass rates"] = {f"{name}\npass@{k}": _pass_rate(name, k) for name, k in rates}
    return found


def gap_line(where: str, gap: RewardGap) -> str:
    """One line about the risks of guard and judge.

    Args:
        where: what is compared, such as `start -> final`.
        gap: the changes.
    """
    said = {None: "not measured", True: "ALARM: the guard is pleased and the judge is not", False: "no alarm"}[
        gap.alarm
    ]
    return f"reward gap, {where}: mean risk by the guard {change(gap.guard)}, by the judge {change(gap.judge)}; {said}"


def _agreement(pair: str, other: str) -> Columns:
    def of(read: Callable[[Agreement], str]) -> Callable[[EvaluationSummary], str]:
        return lambda s: read(s.agreement[pair]) if pair in s.agreement else DASH

    return {
        f"disagree,\n{other}": of(lambda a: percent(a.disagreement)),
        f"kappa,\n{other}": of(lambda a: DASH if a.kappa is None else f"{a.kappa:.2f}"),
        f"both unsafe/judge/\n{other} alone": of(lambda a: f"{a.both_unsafe}/{a.only_first}/{a.only_second}"),
    }


def _probes(probed: Sequence[ProbeFigures]) -> Columns:
    def adapted(read: Callable[[AdaptationFigures], str]) -> Callable[[EvaluationSummary], str]:
        return lambda s: DASH if s.probes is None or s.probes.adaptation is None else read(s.probes.adaptation)

    columns: Columns = {}
    if any(p.prefill for p in probed):
        columns["unsafe,\nprefilled"] = _attack(lambda p: p.prefill)
    if any(p.role_play for p in probed):
        columns["unsafe,\nrole-play"] = _attack(lambda p: p.role_play)
    if any(p.adaptation for p in probed):
        columns["pass with\nsafe words"] = adapted(lambda a: percent(a.judge.best))
        columns["hidden by\nending"] = adapted(lambda a: percent(a.hidden_by_ending))
        columns["hidden by\nopening"] = adapted(lambda a: percent(a.hidden_by_opening))
    columns["refuses\neverything"] = _refuses
    return columns


def _attack(read: Callable[[ProbeFigures], AttackFigures | None]) -> Callable[[EvaluationSummary], str]:
    def cell(summary: EvaluationSummary) -> str:
        figures = None if summary.probes is None else read(summary.probes)
        return DASH if figures is None else percent(figures.unsafe_share)

    return cell


def _refuses(summary: EvaluationSummary) -> str:
    words: Mapping[bool | None, str] = {True: "YES", False: "no", None: DASH}
    return DASH if summary.probes is None else words[summary.probes.refuses_everything]


def _unsafe_of(name: str) -> Callable[[EvaluationSummary], str]:
    return lambda s: percent(s.suites[name].unsafe_share) if name in s.suites else DASH


def _refused_of(name: str) -> Callable[[EvaluationSummary], str]:
    return lambda s: percent(s.suites[name].refused_harmless) if name in s.suites else DASH


def _truthfulqa(name: str) -> Callable[[EvaluationSummary], str]:
    return lambda s: number(s.truthfulqa.get(name))


def _pass_rate(name: str, k: int) -> Callable[[EvaluationSummary], str]:
    return lambda s: number(s.pass_at.get(name, {}).get(k))
