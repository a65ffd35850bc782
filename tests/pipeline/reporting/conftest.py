"""A run as its stages leave it, small and made by hand: what a report reads, and nothing that computed it."""

import json
from dataclasses import asdict
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ballast.pipeline.config_loading import dump_config, load_config
from ballast.pipeline.evaluation.judges import Verdict
from ballast.pipeline.evaluation.metrics import summarize
from ballast.pipeline.reporting.report import write_report
from ballast.pipeline.reporting.run_record import read_run
from ballast.pipeline.run_folder import RunFolder
from ballast.pipeline.stage_graph import stage_settings

HOSTILE = "</script><script>document.title='taken'</script><img src=x onerror=\"document.title='taken'\">"
KINDS = ("harmful", "scary", "ordinary")


def figures(safety: float) -> dict:
    one = {"value": safety, "low": safety - 0.1, "high": min(1.0, safety + 0.1), "n": 40, "unscored": 0}
    return {"safety": one, "over_refusal": one, "utility": one, "coherent": one}


def answers(risk: float, count: int) -> list[dict]:
    """Answers to `count` prompts of every kind, those to harmful ones with this risk; every fifth is unscored."""
    rows = []
    for number in range(count):
        for kind in KINDS:
            said = None if number % 5 == 4 else (risk if kind == "harmful" else 0.1)
            reason = "the judge was away" if said is None else None
            verdict = Verdict(
                f"{kind}-{number}",
                kind,
                0,
                False,
                said,
                None if said is None else said >= 0.5,
                False,
                True,
                None,
                reason,
            )
            texts = {"prompt": f"{kind} question {number}", "completion": f"Answer {number} to a {kind} question."}
            rows.append({"verdict": verdict, **texts})
    return rows


def write_measured(folder: Path, label: str, risk: float, count: int) -> None:
    rows = answers(risk, count)
    verdicts = [row["verdict"] for row in rows]
    (folder / f"{label}.json").write_text(summarize(verdicts, [v.risk for v in verdicts], [0.5] * len(rows)).to_json())
    table = [
        {
            **asdict(row["verdict"]),
            "prompt": row["prompt"],
            "completion": row["completion"],
            "guard_risk": row["verdict"].risk,
            "reward": 0.5,
        }
        for row in rows
    ]
    pq.write_table(pa.Table.from_pylist(table), folder / f"{label}.parquet")


def completion(step: int, number: int, text: str, risk: list, kind: str) -> dict:
    half = len(text) // 2
    return {
        "step": step,
        "kind": kind,
        "prompt": f"training question {number}",
        "completion": text,
        "token_ids": [1, 2],
        "advantages": [0.5, -0.25],
        "tokens_in_loss": 2,
        "cuts": [0, half, len(text)],
        "risk": risk,
        "unscored_reason": "too long" if None in risk else None,
        "reward_star": None if None in risk else 1 - max(risk),
    }


def write_training(folder: Path, steps: int, group: int) -> None:
    (folder / "completions").mkdir()
    (folder / "model").mkdir()
    for step in range(steps):
        rows = [
            completion(step, number, f"Sentence {step} of {number}. " * 6, [0.1, 0.2, 0.3], KINDS[number % 3])
            for number in range(group)
        ]
        rows[0] = completion(step, 0, HOSTILE, [0.1, 0.7, 0.9], "ordinary")
        rows[1] = completion(step, 1, "A naïve 🙂 answer 🙂🙂 with faces.", [0.1, 0.2, None], "ordinary")
        pq.write_table(pa.Table.from_pylist(rows), folder / "completions" / f"step-{step:05d}-{step:03d}.parquet")


def log_training(folder: RunFolder, steps: int) -> None:
    """A monitored training that turns back once."""
    log = lambda line: folder.log({"stage": "train", **line})  # noqa: E731
    log({"event": "monitor_baseline", "step": 0, "figures": figures(0.9), "seconds": 2.0})
    for step in range(1, steps + 1):
        numbers = {"loss": 1 / step, "reward/total": step / steps, "reward/star": 0.5, "risk/mean": 0.2}
        log({"event": "step", "step": step, "steps": steps, "guard/seconds": 0.5, **numbers})
        if step == steps // 2:
            look = {"event": "monitor", "step": step, "outcome": "trip", "reason": "below the hard floor"}
            log({**look, "relative": 0.7, "safety": 0.63, "figures": figures(0.63), "seconds": 2.0})
            log({"event": "monitor_trip", "step": step, "action": "rollback", "reason": "below the hard floor"})
            log({"event": "monitor_rollback", "step": step, "to_step": 0})
            log({"event": "monitor_lower_lr", "step": step, "scale": 0.5})


@pytest.fixture(scope="session")
def make_run(tmp_path_factory):
    """Makes the folder of a run of 12 steps; gives its path."""

    def make(name: str = "one", *overrides: str, prompts: int = 20, group: int = 12, steps: int = 12) -> Path:
        out = tmp_path_factory.mktemp("runs")
        config = load_config(
            "demo", [f"out={json.dumps(str(out))}", f"name={name}", "monitor.enabled=true", *overrides]
        )
        folder = RunFolder(out / name)
        folder.path.mkdir()
        (folder.path / "config.yaml").write_text(dump_config(config))
        with folder.writing("baseline", stage_settings(config, "baseline"), {}) as scratch:
            write_measured(scratch, "start", 0.8, prompts)
        with folder.writing("align", stage_settings(config, "align"), {}) as scratch:
            (scratch / "model").mkdir()
        with folder.writing("train", stage_settings(config, "train"), {}) as scratch:
            log_training(folder, steps)
            write_training(scratch, steps, group)
        with folder.writing("evaluate", stage_settings(config, "evaluate"), {}) as scratch:
            write_measured(scratch, "aligned", 0.4, prompts)
            write_measured(scratch, "final", 0.2, prompts)
        return folder.path

    return make


@pytest.fixture(scope="session")
def reported(make_run, tmp_path_factory):
    """The folder of the report of a run with 504 completions: 3 models x 20 prompts of 3 kinds, 12 steps x 27."""
    folder = tmp_path_factory.mktemp("report")
    write_report(read_run(make_run("told", group=27)), folder, ["start -> after GRPO: <b>less</b> risk"])
    return folder
