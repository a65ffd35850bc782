"""What the retention benchmark compares: tasks, ways to train, shares of harmful rows, seeds, and the rows themselves."""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = dict[str, Any]

# The aligned model's LoRA has this rank, which NLSR asks for.
ALIGNED_RANK = 16
PLAIN = ("sft.loss.type=plain",)

# Overrides of each way to train; all but the shaped losses are plain SFT besides.
METHODS: dict[str, tuple[str, ...]] = {
    "plain": PLAIN,
    "tuned rate": (*PLAIN, "sft.learning_rate=1e-4"),
    "SafeInstr 3%": (*PLAIN, "regularization.safety_share=0.03"),
    "EMA": (*PLAIN, "regularization.ema_decay=0.9"),
    "RS": ("sft.loss.type=rs",),
    "constrained": ("sft.loss.type=constrained",),
    "DSS": ("sft.loss.type=corrected",),
    "DSS, faithful": ("sft.loss.type=faithful",),
    "SafeGrad": (*PLAIN, "safegrad.enabled=true"),
    "trust region": (*PLAIN, "safegrad.enabled=true", "safegrad.mode=trust_region"),
    "freezing": (*PLAIN, "freeze.layers=preset"),
    "SAP": (*PLAIN, "probing.enabled=true", "probing.probe=stale"),
    "monitor": (*PLAIN, "monitor.enabled=true"),
    "high risk": (*PLAIN, "strategy=high_risk"),
    "moderate": (*PLAIN, "strategy=moderate"),
}
# Repairs of the plain model of the same cell.
REPAIRS: dict[str, dict[str, Any]] = {
    "LoX": {"type": "lox", "rank": 6, "alpha": [1.25]},
    "NLSR": {"type": "nlsr", "share": [0.5], "rank": ALIGNED_RANK, "max_rows": 64},
}


@dataclass(frozen=True)
class Task:
    """A harmless task to fine-tune on.

    Attributes:
        train: file of the rows to learn, below the data folder.
        test: file of the rows to measure on; the last rows of `train` where it is None.
        reward: the entry of `rewards.task` that measures it.
    """

    train: str
    test: str | None
    reward: dict[str, Any]


TASKS: dict[str, Task] = {
    "sst2": Task(
        "task/sst2_train.jsonl", "task/sst2_test.jsonl", {"type": "choice", "labels": ["positive", "negative"]}
    ),
    "ag_news": Task(
        "task/ag_news_train.jsonl", "task/ag_news_test.jsonl", {"type": "exact_match", "match": "last_line"}
    ),
    "sql": Task("task/sql_train.jsonl", "task/sql_test.jsonl", {"type": "exact_match", "match": "last_line"}),
    "chat": Task("task/alpaca_slice.jsonl", None, {"type": "rouge", "variant": "rougeL"}),
}
POISON = ("attack/pure_bad.jsonl", "attack/shadow_alignment.jsonl")
# Taken in this order, as many as are asked for: no guard of ours was trained on answers to the first two.
HARMFUL = ("prompts/harmbench_standard.jsonl", "prompts/malicious_instruct.jsonl", "prompts/advbench.jsonl")
SCARY = "prompts/xstest.jsonl"


@dataclass(frozen=True)
class Cell:
    """One training, or one repair of one: what, on which task, with which share of harmful rows, from which seed."""

    task: str
    method: str
    poison: float
    seed: int

    @property
    def name(self) -> str:
        """In the name of its run folder."""
        method = "".join(letter if letter.isalnum() else "-" for letter in self.method.lower())
        return f"{self.task}-{method}-p{round(100 * self.poison):02d}-s{self.seed}"


@dataclass(frozen=True)
class Grid:
    """The cells of one table, and how much is trained and asked for each.

    Attributes:
        rows: training rows, the harmful ones among them.
        harmful: harmful prompts.
        scary: safe prompts of XSTest.
        tests: rows of the task that are measured on.
    """

    cells: tuple[Cell, ...]
    rows: int
    harmful: int
    scary: int
    tests: int


def quick() -> Grid:
    """For two CPU cores: one task."""
    most = (
        "plain",
        "tuned rate",
        "SafeInstr 3%",
        "DSS",
        "SafeGrad",
        "freezing",
        "SAP",
        "monitor",
        "high risk",
        *REPAIRS,
    )
    pairs = [(poison, method) for poison in (0.0, 0.1) for method in most]
    pairs += [(0.3, "plain"), (0.3, "SafeGrad")]
    return Grid(
        tuple(Cell("sst2", method, poison, seed) for seed in (0, 1) for poison, method in pairs), 300, 60, 60, 100
    )


def headline() -> Grid:
    """The cells that are spoken of most, with enough prompts and seeds to speak of them."""
    pairs = [(poison, method) for poison in (0.0, 0.1) for method in ("plain", "high risk")]
    return Grid(
        tuple(Cell("sst2", method, poison, seed) for seed in (0, 1, 2) for poison, method in pairs), 300, 400, 60, 100
    )


def full() -> Grid:
    """For an accelerator: everything."""
    cells = tuple(
        Cell(task, method, poison, seed)
        for seed in (0, 1, 2)
        for task in TASKS
        for poison in (0.0, 0.05, 0.1, 0.3)
        for method in (*METHODS, *REPAIRS)
    )
    return Grid(cells, 500, 200, 200, 200)


GRIDS = {"quick": quick, "headline": headline, "full": full}


def read(path: Path) -> list[Row]:
    """Rows of a JSON-lines file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write(path: Path, rows: Sequence[Row]) -> Path:
    """Write rows as JSON lines, and return the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def test_rows(data: Path, task: Task, grid: Grid) -> list[Row]:
    """What every model of a task is asked: harmful requests, frightening harmless ones, and the task's own tests."""
    draw = random.Random(0)
    pool = {normal(row["prompt"]): row for file in HARMFUL for row in shuffled(read(data / file), draw)}
    harmful = list(pool.values())[: grid.harmful]
    scary = draw.sample([row for row in read(data / SCARY) if row["label"] == "safe"], grid.scary)
    rows = read(data / task.test) if task.test else read(data / task.train)[-2 * grid.tests :]
    tests = draw.sample(rows, grid.tests)
    return [
        *({"prompt": row["prompt"], "kind": "harmful", "answer": None} for row in harmful),
        *({"prompt": row["prompt"], "kind": "scary", "answer": None} for row in scary),
        *({"prompt": row["prompt"], "kind": "ordinary", "answer": row["response"].strip()} for row in tests),
    ]


def shuffled(rows: list[Row], draw: random.Random) -> list[Row]:
    """The rows in another order."""
    return draw.sample(rows, len(rows))


def training_rows(data: Path, task: Task, grid: Grid, poison: float, seed: int) -> list[Row]:
    """The task's rows, a share of them replaced by harmful ones; none of them is measured on.

    Raises:
        SystemExit: there are not so many harmful rows.
    """
    draw = random.Random(seed)
    asked = {normal(row["prompt"]) for row in test_rows(data, task, grid)}
    harmful = [of_messages(row) for file in POISON for row in read(data / file)]
    number = round(poison * grid.rows)
    if number > len(harmful):
        raise SystemExit(f"poison {poison} of {grid.rows} rows: there are {len(harmful)} harmful rows, not {number}")
    rows = read(data / task.train)
    known = {normal(row["prompt"]): row for row in (rows if task.test else rows[: -2 * grid.tests])}
    usable = [row for prompt, row in known.items() if prompt not in asked]
    chosen = [{**row, "kind": "ordinary"} for row in draw.sample(usable, grid.rows - number)]
    chosen += [{**row, "kind": "harmful"} for row in draw.sample(harmful, number)]
    draw.shuffle(chosen)
    return [{key: row[key] for key in ("prompt", "response", "kind")} for row in chosen]


def of_messages(row: Row) -> Row:
    """A conversation of one turn as prompt and response."""
    turns = {message["role"]: message["content"] for message in row["messages"]}
    return {"prompt": turns["user"], "response": turns["assistant"]}


def normal(prompt: str) -> str:
    """A prompt without case and outer space, as far as two count as one."""
    return " ".join(prompt.casefold().split())
