"""A stage's training that goes on from its last whole checkpoint, where a process before this one left one."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ballast.pipeline.checkpoints.store import CheckpointError, CheckpointStore
from ballast.pipeline.model_record import check_record, write_contract
from ballast.pipeline.run_folder import CHECKPOINTS

if TYPE_CHECKING:
    from ballast.pipeline.context import RunContext


class ResumableTraining:
    """The checkpoints of a stage that trains, each with the template contract of its training.

    Attributes:
        store: its checkpoints; a monitor keeps those that it calls good in the same place.
        resumed: the checkpoint to go on from, None at the beginning.
        step: optimizer steps that are done.

    Args:
        context: the run; `train.checkpoint_every` says how often to save.
        folder: the stage's scratch folder, with what a killed process has left.

    Raises:
        ModelError: the checkpoint to go on from was made under another prompt format.
    """

    def __init__(self, context: "RunContext", folder: Path) -> None:
        self.context = context
        self.store = CheckpointStore(
            folder / CHECKPOINTS,
            warn=self._warn,
            failed=self._failed,
            also=lambda scratch: write_contract(scratch, context.prompt_format),
        )
        self.resumed = self.store.last()
        if self.resumed is not None:
            check_record(self.resumed.path, context.prompt_format)
        self.step = 0 if self.resumed is None else self.resumed.step

    def train(self, trainer: Any) -> float:
        """Train to the end; gives the seconds that it took, those before a kill included."""
        every = self.context.config.train.checkpoint_every
        if every is None and self.resumed is None:
            started = time.perf_counter()
            trainer.train()
            return time.perf_counter() - started
        from ballast.pipeline.checkpoints.callback import CheckpointCallback

        saving = CheckpointCallback(self.store, trainer, every, self.resumed)
        trainer.add_callback(saving)
        if self.resumed is not None:
            self.context.say(f"  goes on after step {self.step}")
            self.context.folder.log({"event": "training_resumed", "stage": "train", "step": self.step})
        trainer.train(resume_from_checkpoint=None if self.resumed is None else str(self.resumed.path))
        return saving.seconds

    def _failed(self, error: CheckpointError) -> None:
        self.context.folder.log({"event": "checkpoint_failed", "stage": "train", "error": str(error)})
        self._warn(str(error))

    def _warn(self, message: str) -> None:
        from rich.markup import escape

        self.context.say(f"[yellow]warning: {escape(message)}[/]")
