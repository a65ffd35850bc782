"""When a checkpoint is made: every n optimizer steps, where nothing is half-way."""

import time
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ballast.pipeline.checkpoints.store import Checkpoint, CheckpointStore
from ballast.pipeline.checkpoints.training_state import resume_parts


class CheckpointCallback(TrainerCallback):
    """Saves a training and, where it goes on from a checkpoint, gives the other callbacks their states back.

    Add it to a trainer that is made, so that it is the last: what it saves then has what the others did at the step. It
    saves when a step is logged, which it asks for where it is time, the last step of a training excepted.

    Args:
        store: where to.
        trainer: the trainer that it is added to.
        every: optimizer steps between checkpoints; a GRPO that learns several times from one batch of completions is saved
            when it is through with it. None only restores.
        resumed: the checkpoint that the training goes on from.

    Raises:
        CheckpointError: in training, those of three steps in a row could not be written; the store tells of those before.
    """

    def __init__(
        self,
        store: CheckpointStore,
        trainer: Any,
        every: int | None,
        resumed: Checkpoint | None = None,
    ) -> None:
        self.store = store
        self.trainer = trainer
        self.every = every
        self.resumed = resumed
        self._due = False
        self._before = 0.0
        self._begun = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Time in training, that of killed processes up to their last checkpoint included."""
        return self._before + time.perf_counter() - self._begun

    def checkpoint_state(self) -> dict[str, Any]:
        """The time so far."""
        return {"seconds": self.seconds}

    def restore_checkpoint_state(self, state: dict[str, Any]) -> None:
        """Count on from it, or from the present time where a training under way is turned back."""
        self._before, self._begun = max(self.seconds, state["seconds"]), time.perf_counter()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Restore what the Trainer does not."""
        self._begun = time.perf_counter()
        if self.resumed is not None:
            resume_parts(self.trainer, self.resumed.path)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Ask for a log where it is time: the step is then done and counted."""
        if self.every is None:
            return
        self._due = self._due or state.global_step % self.every == 0
        if self._due and _at_border(args, state.global_step):
            control.should_log = True

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Save, where it is time."""
        step = state.global_step
        # At the last step the model itself is written next. One that a monitor stops would train on from a checkpoint of it.
        if not self._due or control.should_training_stop or "loss" not in (logs or {}) or not _at_border(args, step):
            return
        if self.store.at(step) is not None or self.store.try_save(self.trainer, step) is not None:
            self._due = False


def _at_border(args: Any, step: int) -> bool:
    """Whether GRPO's buffer of completions is used up after so many optimizer steps, so that nothing of it is lost."""
    micro_batches = getattr(args, "steps_per_generation", None)
    if micro_batches is None:
        return True
    return bool(step * args.gradient_accumulation_steps % (micro_batches * args.num_iterations) == 0)
