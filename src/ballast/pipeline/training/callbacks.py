"""Trainer callbacks of every stage that trains: a line in metrics.jsonl a step, and a line for the reader."""

import time
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

if TYPE_CHECKING:
    from ballast.pipeline.context import RunContext

_SHOWN = {
    "loss": "loss",
    "reward/total": "reward",
    "risk/mean": "risk",
    "risk/violation_rate": "unsafe",
    "risk/unscored_share": "unscored",
    "completions/mean_length": "length",
}


class MetricsCallback(TrainerCallback):
    """Writes what the trainer logs into the run folder and shows the main figures."""

    def __init__(self, context: "RunContext", stage: str) -> None:
        self.context = context
        self.stage = stage
        self._begun = time.perf_counter()
        self._first = 0  # steps that an earlier process made

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock for the time left."""
        self._begun, self._first = time.perf_counter(), state.global_step

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """One line a logging step."""
        logs = logs or {}
        if "loss" not in logs:  # the summary at the end of training
            return
        self.context.folder.log({"event": "step", "stage": self.stage, "step": state.global_step, **logs})
        shown = "  ".join(f"{name} {float(logs[key]):.3g}" for key, name in _SHOWN.items() if logs.get(key) is not None)
        elapsed = time.perf_counter() - self._begun
        left = elapsed / max(1, state.global_step - self._first) * (state.max_steps - state.global_step)
        self.context.say(
            f"  step {state.global_step}/{state.max_steps}  {shown}  ({elapsed:.0f} s, about {left:.0f} s left)"
        )
