"""Rows for the two shipped guards: sources, labels, the split by prompt, and the held-out sets.

Every training prompt belongs to one half ("guard" or "judge") and to one part ("fit", or "dev" for choosing
and calibrating), by hashes of the prompt alone; the small PyRIT objective set is the guard's whole. Neither a
prompt nor a response of a held-out set trains anything.
"""

import json
import random
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import guard_phrases as phrases
import guard_requests

from ballast.rewards.refusal import refusal_score

LICENCES = {
    "responses/gptfuzz_train.jsonl": "MIT",
    "responses/pyrit_objective.jsonl": "MIT",
    "task/gpteacher_roleplay.jsonl": "MIT",
    "task/gsm8k_train_2k.jsonl": "MIT",
    "prompts/advbench.jsonl": "MIT",
    "prompts/jbb_harmful.jsonl": "MIT",
    "prompts/jbb_benign.jsonl": "MIT",
    "prompts/do_not_answer.jsonl": "Apache-2.0",
    "prompts/harmfulqa.jsonl": "Apache-2.0",
    "requests.jsonl (shipped, split train)": "Apache-2.0",
    "sampled answers": "Apache-2.0 (outputs of SmolLM2-135M-Instruct)",
    "composed requests, refusals and advice": "Apache-2.0 (ours)",
}
HELD_OUT = {
    "gptfuzz_test": "responses/gptfuzz_test.jsonl",
    "pyrit_harm": "responses/pyrit_harm.jsonl",
    "xstest_completions": "responses/xstest_completions.jsonl",
    "saferlhf_mini": "responses/saferlhf_mini.jsonl",
}
CHAT = ("gpteacher_roleplay", "gsm8k_train_2k")
MAX_RESPONSE = 700
MAX_PROMPT = 1200
STOCK_PHRASE = 12  # words; a shorter response (a stock refusal) may stand in a training and in a held-out set


@dataclass(frozen=True)
class Row:
    """One response with its label.

    Attributes:
        label: P(unsafe) as labelled: 0 or 1, in between for weak labels of sampled answers.
        group: what kind of row it is; groups are weighted, not rows.
        turn: character offset before which the response is still safe.
        harmful: whether the prompt asks for harm; None where unknown.
    """

    prompt: str
    response: str
    label: float
    group: str
    turn: int = 0
    harmful: bool | None = None

    @property
    def half(self) -> str:
        """Which of the two models may train on this row; of the human labels the guard gets most."""
        if self.group == "pyrit_objective":
            return "guard"
        if self.group == "gptfuzz_train":
            return "judge" if _hash("question", self.prompt) % 4 == 0 else "guard"
        return half_of(self.prompt)

    @property
    def part(self) -> str:
        """Whether it fits weights or chooses and calibrates."""
        return "dev" if _hash("part", self.prompt) % 6 == 0 else "fit"


def normalise(prompt: str) -> str:
    """Lower case, letters and digits only: prompts that differ in less count as one."""
    return " ".join(re.findall(r"\w+", prompt.lower()))


def half_of(prompt: str) -> str:
    """Which of the two models may train on a prompt."""
    return "guard" if _hash("half", prompt) % 2 == 0 else "judge"


def _hash(salt: str, prompt: str) -> int:
    return zlib.crc32(f"{salt}:{normalise(prompt)}".encode()) >> 4


def read(path: Path) -> list[dict[str, Any]]:
    """Rows of a JSON-lines file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def held_out(data: Path) -> dict[str, list[Row]]:
    """The held-out sets, whole."""
    return {
        name: [Row(row["prompt"], row["response"], float(row["unsafe"]), name) for row in read(data / file)]
        for name, file in HELD_OUT.items()
    }


def training_rows(
    data: Path,
    requests: Path,
    answers: list[Path],
    more: list[Path],
    cap: int,
    caps: Mapping[str, int],
    seed: int,
    longest: int = MAX_RESPONSE,
) -> list[Row]:
    """All rows of both halves; none has a prompt of the shipped test split, nor prompt or response of a held-out set.

    At most `cap` rows a group, label and half, or what `caps` says of the group, but every row that comes from the
    answers in `more`.
    """
    usable = _filter(data, requests)
    rng = random.Random(seed)
    given = [*_labelled(data), *_chat(data), *_shipped(requests)]
    rows = list(filter(usable, given + _with_contrasts(given, answers, rng)))
    rng.shuffle(rows)
    kept, count = list[Row](), Counter[tuple[str, str, bool]]()
    for row in rows:
        key = (row.half, row.group, row.label > 0.5)
        count[key] += 1
        if count[key] <= caps.get(row.group, cap):
            kept.append(row)
    kept += filter(usable, _with_contrasts(given, more, rng))
    return [replace(row, response=row.response[:longest]) for row in kept]


def _filter(data: Path, requests: Path) -> Callable[[Row], bool]:
    tests = [row for file in HELD_OUT.values() for row in read(data / file)]
    prompts = {normalise(row["prompt"]) for row in tests}
    prompts |= {normalise(row["prompt"]) for row in read(requests) if row["split"] == "test"}
    responses = {text for row in tests if len((text := normalise(row["response"])).split()) >= STOCK_PHRASE}

    def usable(row: Row) -> bool:
        return (
            bool(row.response.strip())
            and len(row.prompt) <= MAX_PROMPT
            and normalise(row.prompt) not in prompts
            and normalise(row.response) not in responses
        )

    return usable


def _with_contrasts(given: list[Row], answers: list[Path], rng: random.Random) -> list[Row]:
    sampled = [row for path in answers for row in _sampled(path)]
    return [*sampled, *_composed(sampled, given, rng)]


def _labelled(data: Path) -> Iterator[Row]:
    for name in ("gptfuzz_train", "pyrit_objective"):
        for row in read(data / f"responses/{name}.jsonl"):
            yield Row(
                row["prompt"],
                row["response"],
                float(row["unsafe"]),
                name,
                harmful=True if name == "gptfuzz_train" else None,
            )


def _chat(data: Path) -> Iterator[Row]:
    for name in CHAT:
        for row in read(data / f"task/{name}.jsonl"):
            yield Row(row["prompt"], row["response"], 0.0, name, harmful=False)


def _shipped(requests: Path) -> Iterator[Row]:
    for row in read(requests):
        if row["split"] == "train":
            yield Row(row["prompt"], row["response"], 0.0, f"shipped_{row['kind']}", harmful=row["kind"] == "harmful")


def label_answer(kind: str, prompt: str, response: str) -> float:
    """Label by construction of a sampled answer; see `phrases.compliance` for answers to harmful prompts."""
    if kind != "harmful":
        return 0.0
    refused = refusal_score(response)
    return 0.0 if refused == 1.0 else phrases.compliance(prompt, response) * (1.0 - refused)


def _sampled(path: Path) -> Iterator[Row]:
    for row in read(path):
        source = row["source"] if row["source"] in ("shipped", "composed") else "permissive"
        harmful = row["kind"] == "harmful"
        label = label_answer(row["kind"], row["prompt"], row["response"])
        yield Row(row["prompt"], row["response"].strip(), label, f"sampled_{source}_{row['kind']}", harmful=harmful)


def _composed(sampled: list[Row], rows: list[Row], rng: random.Random) -> Iterator[Row]:
    """Contrasts at the same prompt: refusals, advice, refusals that turn, answers that open by complying."""
    plain = [row.response for row in rows if row.group == "gpteacher_roleplay"]
    for row in sampled:
        if not row.harmful:
            if rng.random() < 0.5:
                yield Row(row.prompt, phrases.refusal(rng, row.prompt), 0.0, "refused_ordinary", harmful=False)
            continue
        yield Row(row.prompt, phrases.refusal(rng, row.prompt), 0.0, "refused_harmful", harmful=True)
        if rng.random() < 0.5:
            yield Row(row.prompt, phrases.advice(rng), 0.0, "advice", harmful=True)
        if rng.random() < 0.2:
            yield Row(row.prompt, rng.choice(plain), 0.0, "off_topic", harmful=True)
        if row.label > 0.7:
            opening = phrases.affirmation(rng, row.prompt)
            yield Row(row.prompt, opening + row.response, max(row.label, 0.95), "affirmed", harmful=True)
            refused = phrases.refusal(rng, row.prompt) + phrases.turn(rng)
            yield Row(row.prompt, refused + row.response, row.label, "turned", turn=len(refused), harmful=True)


def prompt_rows(data: Path, half: str) -> list[tuple[str, bool]]:
    """Prompts of one half and whether they ask for harm: what the n-gram guard's prompt model learns from."""
    forbidden = {normalise(row["prompt"]) for file in HELD_OUT.values() for row in read(data / file)}
    kinds = {"advbench": True, "jbb_harmful": True, "do_not_answer": True, "harmfulqa": True, "jbb_benign": False}
    prompts = [
        (row["prompt"], harmful) for name, harmful in kinds.items() for row in read(data / f"prompts/{name}.jsonl")
    ]
    return [
        (prompt, harmful)
        for prompt, harmful in [*prompts, *guard_requests.requests(seed=0)]
        if half_of(prompt) == half and normalise(prompt) not in forbidden
    ]


def request_rows(data: Path, half: str, cap: int, seed: int) -> list[Row]:
    """Prompts of one half without a response, labelled by what they ask for; at most `cap` harmful ones."""
    rng, rows = random.Random(seed), prompt_rows(data, half)
    rng.shuffle(rows)
    harmful = [Row(prompt, "", 1.0, "prompt", harmful=True) for prompt, is_harmful in rows if is_harmful]
    harmless = [Row(prompt, "", 0.0, "prompt", harmful=False) for prompt, is_harmful in rows if not is_harmful]
    return harmful[:cap] + harmless
