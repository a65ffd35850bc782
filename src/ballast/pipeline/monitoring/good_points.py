"""The good points of a training: kept as checkpoints, and gone back to."""

import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from ballast.errors import BallastError
from ballast.pipeline.checkpoints.store import BEST, GOOD, CheckpointStore
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

    def keep(self, safety: float | None = None, events: Sequence[Mapping[str, Any]] = ()) -> None:
        """The present point is a good one; that of the last step is the model itself, and needs no checkpoint.

        Args:
            safety: as it was measured here, None after turning back. The highest is tagged `best`, the later one of two equal ones;
                the start model takes no part, for going back to it would undo all that was trained.
            events: of the monitor so far, with the safety of the former best.

        Raises:
            CheckpointError: the checkpoints of three steps in a row could not be written.
        """
        step = self.trainer.state.global_step
        tags = [GOOD, BEST] if safety is not None and safety >= self._highest(events) else [GOOD]
        # A point that could not be written is none to go back to: what was trained on since the one before it is still of interest.
        if step >= self.trainer.state.max_steps or self.store.try_save(self.trainer, step, tags) is not None:
            self._seen.forget()

    def _highest(self, events: Sequence[Mapping[str, Any]]) -> float:
        """Safety of the best checkpoint that is there to go back to."""
        best = self.store.best()
        there = [e["safety"] for e in events if best and (e["event"], e["step"]) == ("monitor", best.step)]
        return there[-1] if there else -math.inf

    def turn_back(self, leave: Collection[Any], best: bool = False) -> int:
        """Turn the training back to the last good point, and give its step.

        Args:
            leave: callbacks whose own state is not turned back.
            best: to the best one instead, where one is whole.

        Raises:
            BallastError: there is no whole checkpoint of one.
        """
        good = (self.store.best() if best else None) or self.store.last_good()
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
