"""Trainer callbacks of every stage that trains: a line in metrics.jsonl a step, and a line for the reader."""

import time
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ballast.pipeline.live_view import SHOWN, Pace

if TYPE_CHECKING:
    from ballast.pipeline.context import RunContext


class MetricsCallback(TrainerCallback):
    """Writes what the trainer logs into the run folder and, where no table is drawn of that, shows the main figures."""

    def __init__(self, context: "RunContext", stage: str) -> None:
        self.context = context
        self.stage = stage
        self._pace = Pace(0, time.perf_counter())

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock for the time left."""
        self._pace = Pace(state.global_step, time.perf_counter())

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
        step, steps = state.global_step, state.max_steps
        self.context.folder.log({"event": "step", "stage": self.stage, "step": step, "steps": steps, **logs})
        if self.context.shows_table:
            return
        shown = "  ".join(f"{name} {float(logs[key]):.3g}" for key, name in SHOWN.items() if logs.get(key) is not None)
        now = time.perf_counter()
        elapsed, left = self._pace.elapsed(now), self._pace.left(step, steps, now)
        self.context.say(f"  step {step}/{steps}  {shown}  ({elapsed:.0f} s, about {left:.0f} s left)")
