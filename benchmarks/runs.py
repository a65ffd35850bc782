"""Runs of the pipeline by the experiments that compare several trainings of one aligned model.

Every stage is a process of its own, `ballast STAGE`, in a run folder of its own; one that is finished is not done again, so that an
experiment goes on where it was interrupted.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from demo_seeds import hardware

from ballast.pipeline.run_folder import versions

# An alignment after which most harmful requests should be declined, for experiments that then break it.
ALIGN = ("align.harmful_share=0.4", "align.opening_tokens=24", "align.epochs=3", "align.learning_rate=5e-4")
# Plain fine-tuning of the aligned model.
PLAIN_SFT = (
    "train.method=sft",
    "sft.loss.type=plain",
    "sft.epochs=2",
    "sft.learning_rate=3e-4",
    "sft.batch_size=8",
    "sft.max_length=192",
)
# For `--fast`: every stage runs, and no figure says anything.
FAST_SFT = (
    "generation.type=transformers",
    "align.max_rows=4",
    "align.rehearse=false",
    "sft.max_rows=8",
    "sft.epochs=0.5",
    "evaluate.samples=1",
    "evaluate.sampling.max_new_tokens=4",
)


def write_record(out: Path | None, **parts: Any) -> None:
    """Write what an experiment found so far, with its command, hardware and versions; None writes nothing."""
    if out is None:
        return
    record = {"command": " ".join(["python", *sys.argv]), "hardware": hardware(), "versions": versions(), **parts}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=2) + "\n")


def arms_parser(description: str | None, arms: Iterable[str]) -> argparse.ArgumentParser:
    """What the experiments with several arms are asked for: seeds, arms, where to write, overrides."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=list(arms), default=list(arms))
    parser.add_argument("--out", type=Path, help="the JSON; --fast writes one only where this is given")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--fast", action="store_true", help="tiny settings, for a smoke test")
    parser.add_argument("overrides", nargs="*", help="a.b=c for all arms, as for `ballast run`")
    return parser


class Runs:
    """The run folders of all seeds and arms.

    Args:
        folder: holds the run folders.
        prefix: begins their names.
        overrides: apply to all of them.
        config: the configuration that they override.
        arms: what each arm overrides besides.
    """

    def __init__(
        self,
        folder: Path,
        prefix: str,
        overrides: Sequence[str],
        config: str,
        arms: Mapping[str, Sequence[str]],
    ) -> None:
        self.folder = folder
        self.prefix = prefix
        self.overrides = overrides
        self.config = config
        self.arms = arms
        self.stage_seconds: dict[str, float] = {}
        self.peak_mb: dict[str, int] = {}  # resident memory; of a stage that was done before, what it takes to see that

    def measure_aligned(self, seed: int) -> Path:
        """Make the aligned model of a seed; its answers to the test prompts, as parquet beside a JSON of the figures."""
        self.stage("align", f"{self.prefix}-seed{seed}-aligned", seed)
        name = f"{self.prefix}-seed{seed}-before"
        self.stage("baseline", name, seed, *self.from_aligned(seed))
        return self.folder / name / "baseline" / "start.parquet"

    def train_and_measure(self, seed: int, arm: str) -> Path:
        """Train an arm from the aligned model of its seed; its answers to the test prompts, as `measure_aligned`."""
        name = f"{self.prefix}-seed{seed}-{arm}"
        for stage in ("train", "evaluate"):
            self.stage(stage, name, seed, *self.from_aligned(seed), *self.arms[arm])
        return self.folder / name / "evaluate" / "final.parquet"

    def restore(self, seed: int, arm: str, *settings: str) -> None:
        """Repair a trained and measured arm; what is repaired from, and how, is for `settings` to say."""
        name = f"{self.prefix}-seed{seed}-{arm}"
        for stage in ("baseline", "restore"):  # a repair is compared with the model that the arm started from
            self.stage(stage, name, seed, *self.from_aligned(seed), *self.arms[arm], *settings)

    def localize(self, seed: int, method: str) -> dict[str, Any]:
        """What the stage `localize` finds in the aligned model of a seed."""
        name = f"{self.prefix}-seed{seed}-{method}"
        self.stage("localize", name, seed, *self.from_aligned(seed), f"localize.method={method}")
        found: dict[str, Any] = json.loads((self.folder / name / "localize" / "layers.json").read_text())
        return found

    def from_aligned(self, seed: int) -> tuple[str, str]:
        """The settings under which a run starts from the aligned model of a seed."""
        model = self.folder / f"{self.prefix}-seed{seed}-aligned" / "align" / "model"
        return f"model.name={json.dumps(str(model))}", "align.enabled=false"

    def stage(self, stage: str, name: str, seed: int, *settings: str) -> None:
        """One stage in a process of its own; ballast keeps it where it is done, and refuses other settings."""
        print(f"[{time.strftime('%H:%M:%S')}] {name}: {stage}", flush=True)
        own = (f"out={json.dumps(str(self.folder))}", f"name={name}", f"seed={seed}")
        command = [sys.executable, "-m", "ballast.pipeline.cli", stage, self.config, "--resume"]
        process = subprocess.Popen([*command, *self.overrides, *settings, *own])
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)  # for Popen, who did not see it end
        if process.returncode:
            raise SystemExit(
                f"stage '{stage}' of '{name}' ended with exit code {process.returncode}; mend what it says above and "
                "start this command again: finished stages are kept"
            )
        record = json.loads((self.folder / name / stage / "record.json").read_text())
        self.stage_seconds[f"{name}/{stage}"] = record["seconds"]
        self.peak_mb[f"{name}/{stage}"] = round(used.ru_maxrss / 1024)
