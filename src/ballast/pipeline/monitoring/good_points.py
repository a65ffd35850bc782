"""The good points of a training: kept as checkpoints, and gone back to."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

from ballast.errors import BallastError
from ballast.pipeline.checkpoints.store import GOOD, CheckpointStore
from ballast.pipeline.monitoring.review import SeenRows


class GoodPoints:
    """Those of one trainer, whose collator then remembers which rows it was given.

    Args:
        store: where they are kept.
        trainer: it.
    """

    def __init__(self, store: CheckpointStore, trainer: Any) -> None:
        self.store = store
        self.trainer = trainer
        self._seen = SeenRows(trainer.data_collator, trainer.processing_class)
        trainer.data_collator = self._seen

    def keep(self) -> None:
        """The present point is a good one; that of the last step is the model itself, and needs no checkpoint.

        Raises:
            CheckpointError: the checkpoints of three steps in a row could not be written.
        """
        step = self.trainer.state.global_step
        # A point that could not be written is none to go back to: what was trained on since the one before it is still of interest.
        if step >= self.trainer.state.max_steps or self.store.try_save(self.trainer, step, [GOOD]) is not None:
            self._seen.forget()

    def turn_back(self, leave: Collection[Any]) -> int:
        """Turn the training back to the last good point, and give its step.

        Args:
            leave: callbacks whose own state is not turned back.

        Raises:
            BallastError: there is no whole checkpoint of one.
        """
        good = self.store.last_good()
        if good is None:
            raise BallastError(
                f"the monitor tripped at step {self.trainer.state.global_step}, and '{self.store.folder}' has no whole checkpoint of a good "
                "point to turn back to, so the model is not kept; free space or mend the disk, and run again"
            )
        self.store.load(self.trainer, good, leave)
        return good.step

    def write_rows(self, path: Path) -> int:
        """The rows trained on since the last good point, a line of JSON each; gives how many."""
        return self._seen.write(path)
