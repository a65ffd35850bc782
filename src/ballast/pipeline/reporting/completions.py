"""The completions that a report shows: from the parquet tables of a run to rows for the page.

Colours of the heat-map are of policy tokens: each has the risk at the end of the segment that it lies in, which is
what the guard was asked and the trainer used. Where a table has no token ids the segments themselves are coloured,
and where it has the risk of the whole answer alone, the answer is one segment.

Lengths are in Unicode code points, as everywhere in Ballast; the page counts so, too.
"""

import bisect
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ballast.errors import ModelError
from ballast.guardrails.segments import segment_of_tokens, token_char_ends
from ballast.pipeline.reporting.run_record import RunRecord

Row = Mapping[str, Any]

MOST_BYTES = 3_500_000  # of all rows as JSON: with charts and page the file stays below 5 MB
_DIGITS = 3


@dataclass(frozen=True)
class Shown:
    """One completion on the page.

    Attributes:
        source: where it is from: training, or the label of a measured model.
        step: of the training; None for a measured model.
        kind: of its prompt.
        prompt: the last user message.
        text: the completion.
        spans: (length, risk) of each piece of the text; a risk of None is unscored.
        tokens: length of every policy token; empty where they are not known.
        advantages: (count, advantage) of runs of equal tokens; empty where there are none.
        guard: the guard's risk of the whole: the highest at any cut after the first; None is unscored or not asked.
        judge: the judge's risk of the whole; None is unscored or not asked.
        refused: whether it opens with a refusal, by keywords; None where nobody looked.
        rewards: by term; a term that did not apply is left out.
        note: why it is unscored, or how much of it was in the loss.
        hidden: whether it is blurred until it is clicked.
    """

    source: str
    step: int | None
    kind: str
    prompt: str
    text: str
    spans: tuple[tuple[int, float | None], ...]
    tokens: tuple[int, ...] = ()
    advantages: tuple[tuple[int, float], ...] = ()
    guard: float | None = None
    judge: float | None = None
    refused: bool | None = None
    rewards: Mapping[str, float] | None = None
    note: str = ""
    hidden: bool = False


@dataclass(frozen=True)
class Selection:
    """What is shown, and of how much.

    Attributes:
        rows: the completions.
        total: how many there are in the run's tables.
    """

    rows: tuple[Shown, ...]
    total: int


def select_completions(run: RunRecord, most: int, tokenizer: Any = None, most_bytes: int = MOST_BYTES) -> Selection:
    """Completions of a run: some of each measured model, to the same prompts, and some of every stretch of the training.

    Args:
        run: the run.
        most: how many at most; 0 shows none.
        tokenizer: the policy's, which lays tokens over the text; None colours segments.
        most_bytes: how much JSON they may be; long completions are fewer.

    Raises:
        ModelError: the tokenizer is not the one that the completions are from.
    """
    measured = {label: _Table([path]) for label, path in run.models.items()}
    trained = _Table(_training_tables(run))
    threshold = run.config.evaluate.threshold
    # The training's completions are twice the share of a model's, and what those have not.
    share = most // (len(measured) + (2 if len(trained) else 0))
    # By place, since row i of every model has the same prompt.
    shown = [_measured(label, row, threshold) for label, table in measured.items() for row in table.evenly(share)]
    shown += [_trained(row, tokenizer, threshold) for row in trained.evenly(most - len(shown))]
    sizes = [len(as_json([row]).encode()) for row in shown]
    if sum(sizes) > most_bytes:
        shown = [shown[place] for place in _places(len(shown), _fitting(sizes, most_bytes))]
    return Selection(tuple(shown), len(trained) + sum(len(table) for table in measured.values()))


def as_json(rows: Iterable[Shown]) -> str:
    """The rows as the page reads them."""
    return json.dumps([asdict(row) for row in rows], ensure_ascii=False, separators=(",", ":"))


class _Table:
    """Parquet files that are one table, of which a few rows are read."""

    def __init__(self, parts: Sequence[Path]) -> None:
        import pyarrow.parquet as pq

        self._parts = parts
        self._starts = [0, *itertools.accumulate(pq.read_metadata(part).num_rows for part in parts)]

    def __len__(self) -> int:
        return self._starts[-1]

    def evenly(self, most: int) -> Iterator[Row]:
        """At most so many rows, at even distances, in order."""
        import pyarrow.parquet as pq

        places = itertools.groupby(
            _places(len(self), most), key=lambda place: bisect.bisect_right(self._starts, place) - 1
        )
        for part, inside in places:
            rows = [place - self._starts[part] for place in inside]
            yield from pq.read_table(self._parts[part]).take(rows).to_pylist()


def _training_tables(run: RunRecord) -> list[Path]:
    """The completions trained on: GRPO's own, or the scored rollouts that SFT imitated."""
    imitated = run.config.train.method == "sft" and run.config.sft.rows == "rollouts"
    if imitated and run.folder.has("score"):
        return [run.folder.stage("score") / "scores.parquet"]
    return sorted((run.folder.path / "train" / "completions").glob("step-*.parquet"))


def _places(rows: int, most: int) -> list[int]:
    """At most so many places of a list of rows, at even distances."""
    return [number * rows // most for number in range(most)] if rows > most else list(range(rows))


def _fitting(sizes: Sequence[int], most_bytes: int) -> int:
    """How many rows at even distances stay within the bytes."""
    count = len(sizes)
    while sum(sizes[place] for place in _places(len(sizes), count)) > most_bytes:
        count = int(count * 0.95)
    return count


def _measured(label: str, row: Row, threshold: float) -> Shown:
    whole = ((len(row["completion"]), _short(row["risk"])),) if row["completion"] else ()
    return Shown(
        source=label,
        step=None,
        kind=row["kind"],
        prompt=row["prompt"],
        text=row["completion"],
        spans=whole,
        guard=_short(row["guard_risk"]),
        judge=_short(row["risk"]),
        refused=row["refused"],
        rewards=_rewards(row),
        note=f"judge: {row['reason']}" if row["reason"] else "",
        hidden=_hidden(row["kind"], [row["risk"], row["guard_risk"]], threshold),
    )


def _trained(row: Row, tokenizer: Any, threshold: float) -> Shown:
    spans, tokens = _of_tokens(row, tokenizer)
    risks = [risk for cut, risk in zip(row["cuts"], row["risk"], strict=True) if cut or len(row["cuts"]) == 1]
    scored = None not in risks
    tokens_in_loss, count = row.get("tokens_in_loss"), len(row["token_ids"])
    left_out = "" if tokens_in_loss in (None, count) else f"{tokens_in_loss} of {count} tokens in the loss"
    unscored = f"guard: {row['unscored_reason']}" if row["unscored_reason"] else ""
    step = row.get("step")
    return Shown(
        source="training",
        step=None if step is None else step + 1,  # as the charts count: the step that it is the batch of
        kind=row["kind"],
        prompt=row["prompt"],
        text=row["completion"],
        spans=spans,
        tokens=tokens,
        advantages=tuple(_runs(row.get("advantages") or ())),
        guard=_short(max(risks)) if scored else None,
        rewards=_rewards(row),
        note="; ".join(part for part in (unscored, left_out) if part),
        hidden=_hidden(row["kind"], risks, threshold),
    )


def _hidden(kind: str, risks: Iterable[float | None], threshold: float) -> bool:
    """Whether a text is blurred: what could not be scored may be anything."""
    return kind == "harmful" or any(risk is None or risk >= threshold for risk in risks)


def _of_tokens(row: Row, tokenizer: Any) -> tuple[tuple[tuple[int, float | None], ...], tuple[int, ...]]:
    """Pieces of whole tokens with their risk, and the length of every token."""
    text, cuts, risks = row["completion"], row["cuts"], row["risk"]
    if tokenizer is None or not text:
        return _segments(text, cuts, risks), ()
    decoded, ends = token_char_ends(tokenizer, row["token_ids"])
    if decoded != text:
        raise ModelError(
            "the tokenizer in the trained model's folder decodes a completion of the training to another text than the one on record, "
            "so its tokens cannot be shown; put the tokenizer's files of the training back"
        )
    lengths = tuple(end - start for start, end in zip((0, *ends), ends, strict=False))
    inner, inner_risks = _without_empty(cuts, risks)
    pieces = zip(segment_of_tokens(ends, inner), lengths, strict=True)
    return tuple(
        (sum(length for _, length in group), _short(inner_risks[segment]))
        for segment, group in itertools.groupby(pieces, key=lambda piece: piece[0])
    ), lengths


def _segments(text: str, cuts: Sequence[int], risks: Sequence[float | None]) -> tuple[tuple[int, float | None], ...]:
    if not text:
        return ()
    inner, inner_risks = _without_empty(cuts, risks)
    return tuple((end - start, _short(risk)) for start, end, risk in zip((0, *inner), inner, inner_risks, strict=False))


def _without_empty(cuts: Sequence[int], risks: Sequence[float | None]) -> tuple[Sequence[int], Sequence[float | None]]:
    """Without the cut 0, which is the prompt's own risk and owns no text."""
    return (cuts[1:], risks[1:]) if cuts[0] == 0 and len(cuts) > 1 else (cuts, risks)


def _runs(values: Sequence[float]) -> Iterator[tuple[int, float]]:
    for value, group in itertools.groupby(round(value, _DIGITS) for value in values):
        yield sum(1 for _ in group), value


def _rewards(row: Row) -> dict[str, float]:
    named = {key.removeprefix("reward_"): value for key, value in row.items() if key.startswith("reward_")}
    named |= {"reward": row["reward"]} if row.get("reward") is not None else {}
    return {name: round(value, _DIGITS) for name, value in named.items() if value is not None and value == value}


def _short(risk: float | None) -> float | None:
    return None if risk is None else round(risk, _DIGITS)


class _SavedTokenizer:
    """What laying tokens over text asks of a tokenizer, from its file alone: transformers takes longer to import than
    a whole report takes to write.
    """

    def __init__(self, file: Path) -> None:
        from tokenizers import Tokenizer

        self._tokenizer = Tokenizer.from_file(str(file))
        self.added_tokens_decoder = self._tokenizer.get_added_tokens_decoder()

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False, **_: bool) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)

    def convert_ids_to_tokens(self, ids: Sequence[int]) -> list[str | None]:
        return [self._tokenizer.id_to_token(token) for token in ids]


def tokenizer_of(run: RunRecord) -> Any:
    """The tokenizer beside the trained weights; None where the folder has none."""
    file = run.folder.path / "train" / "model" / "tokenizer.json"
    return _SavedTokenizer(file) if file.is_file() else None
