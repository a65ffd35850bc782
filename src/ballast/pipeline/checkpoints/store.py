"""The checkpoints of one training: written whole, checked before they are used, and no more of them than needed.

checkpoints/
  step-00000020/   adapter, optimizer.pt, ..., manifest.json, and tags.json where it is tagged
  step-00000030/
"""

import json
import logging
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ballast.errors import BallastError
from ballast.pipeline import ranks
from ballast.pipeline.checkpoints.manifest import PARTIAL, damage, whole_folder
from ballast.pipeline.run_folder import write_text

GOOD, BEST = "good", "best"
_TAGS = "tags.json"
_BESIDE = frozenset({_TAGS, _TAGS + PARTIAL})
_MOST_FAILED = 3  # steps in a row whose checkpoint could not be written

_Found = tuple[int, list[str]]  # step and tags of a checkpoint, as the main process tells them to the others

logger = logging.getLogger(__name__)


class CheckpointError(BallastError, RuntimeError):
    """A checkpoint could not be written; those before it are as they were."""


@dataclass(frozen=True)
class Checkpoint:
    """One that is whole.

    Attributes:
        step: optimizer steps done when it was made.
        path: its folder.
        tags: what is said of it, `good` and `best` among it.
    """

    step: int
    path: Path
    tags: frozenset[str]


class CheckpointStore:
    """The checkpoints in a folder.

    Kept are the last `keep`, the last one tagged `good` and the last one tagged `best`.

    Processes that train together call every method together: the main one writes, chooses and tells, and all get what it found.

    Args:
        folder: it is made at the first `save`.
        keep: how many of the last ones; one more than 1, so that one is left when the last is damaged.
        warn: is told, once each, which checkpoints are damaged and passed over; None logs it.
        failed: is told by `try_save` of a checkpoint that could not be written; None lets `warn` say so.
        also: writes what else belongs into a checkpoint's folder.
    """

    def __init__(
        self,
        folder: Path,
        keep: int = 2,
        warn: Callable[[str], None] | None = None,
        failed: Callable[[CheckpointError], None] | None = None,
        also: Callable[[Path], None] | None = None,
    ) -> None:
        self.folder = folder
        self.keep = keep
        self._also = also
        self._warn = warn or logger.warning
        self._warned: set[Path] = set()
        self._tell = failed or (lambda error: self._warn(str(error)))
        self._failed: set[int] = set()

    def save(self, trainer: Any, step: int, tags: Iterable[str] = ()) -> Checkpoint:
        """Write a checkpoint, replacing one of the same step, and remove what need not be kept.

        Best called from `on_log`: the step is then done, logged and counted.

        Args:
            trainer: a transformers Trainer in training, whose model is whole on every process.
            step: optimizer steps done.
            tags: what is to be said of it, as with `tag`.

        Raises:
            CheckpointError: it could not be written, for want of space or of permission.
        """
        return self._found(self._by_main(lambda states: self._save(trainer, states, step, tags), trainer))

    def _save(self, trainer: Any, states: Sequence[str], step: int, tags: Iterable[str]) -> _Found:
        from ballast.pipeline.checkpoints.training_state import write_random_states, write_training

        path = self._path(step)
        with _clear_errors(step, path):
            with whole_folder(path) as scratch:
                write_training(trainer, scratch)
                write_random_states(states, scratch)
                if self._also is not None:
                    self._also(scratch)
            self._remove_spare()
        return self._tag(step, *tags) if tags else (step, [])

    def _by_main(self, work: Callable[[Sequence[str]], Any], trainer: Any) -> Any:
        from ballast.pipeline.checkpoints.training_state import random_states

        states = random_states(trainer)
        return ranks.on_main(lambda: work(states))

    def try_save(self, trainer: Any, step: int, tags: Iterable[str] = ()) -> Checkpoint | None:
        """`save`, for a training that goes on without this one: those before it are whole.

        Args:
            trainer: a transformers Trainer in training, whose model is whole on every process.
            step: optimizer steps done.
            tags: what is to be said of it, as with `tag`.

        Returns:
            None where it could not be written.

        Raises:
            CheckpointError: that is the third step in a row, whoever asked for the checkpoints.
        """
        found = self._by_main(lambda states: self._try_save(trainer, states, step, tags), trainer)
        return None if found is None else self._found(found)

    def _try_save(self, trainer: Any, states: Sequence[str], step: int, tags: Iterable[str]) -> _Found | None:
        try:
            saved = self._save(trainer, states, step, tags)
        except CheckpointError as error:
            self._failed.add(step)
            if len(self._failed) >= _MOST_FAILED:
                raise
            self._tell(error)
            return None
        self._failed.clear()
        return saved

    def tag(self, step: int, *tags: str) -> Checkpoint:
        """Say something of a checkpoint; `best` is taken from the others, for there is one best.

        Raises:
            CheckpointError: there is none of this step, or the tags could not be written.
        """
        return self._found(ranks.on_main(lambda: self._tag(step, *tags)))

    def _tag(self, step: int, *tags: str) -> _Found:
        path = self._path(step)
        if not path.is_dir():
            raise CheckpointError(f"there is no checkpoint of step {step} in '{self.folder}' to tag; save it first")
        now = _tags(path) | set(tags)
        with _clear_errors(step, path / _TAGS):
            # This one first: after a failure in between there are two of which the later counts, rather than none.
            write_text(path / _TAGS, json.dumps(sorted(now)))
            for other in self._paths() if BEST in tags else ():
                if other != path and BEST in (had := _tags(other)):
                    write_text(other / _TAGS, json.dumps(sorted(had - {BEST})))
            self._remove_spare()
        return step, sorted(now)

    def at(self, step: int) -> Checkpoint | None:
        """That of a step, where it is whole."""
        path = self._path(step)
        whole = ranks.on_main(lambda: sorted(_tags(path)) if damage(path, _BESIDE) is None else None)
        return None if whole is None else self._found((step, whole))

    def last(self) -> Checkpoint | None:
        """The latest one that is whole."""
        return self._latest(None)

    def last_good(self) -> Checkpoint | None:
        """The latest whole one that is tagged `good`."""
        return self._latest(GOOD)

    def best(self) -> Checkpoint | None:
        """The one tagged `best`, where it is whole."""
        return self._latest(BEST)

    def load(self, trainer: Any, checkpoint: Checkpoint, leave: Collection[Any] = ()) -> None:
        """Turn a training that is under way back to a checkpoint, in place; see `load_training`.

        Args:
            trainer: it.
            checkpoint: of this store.
            leave: callbacks whose own state is not turned back, such as the one that counts the rollbacks.
        """
        from ballast.pipeline.checkpoints.training_state import load_training

        load_training(trainer, checkpoint.path, leave)

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def _paths(self) -> list[Path]:
        """All there are, whole or not, the latest first."""
        folders = (p for p in self.folder.glob("step-*") if p.is_dir() and p.suffix != PARTIAL)
        return sorted(folders, key=_step, reverse=True)

    def _latest(self, tag: str | None) -> Checkpoint | None:
        found = ranks.on_main(lambda: self._search(tag))
        return None if found is None else self._found(found)

    def _search(self, tag: str | None) -> _Found | None:
        for path in self._paths():
            tags = _tags(path)
            if tag is not None and tag not in tags:
                continue
            wrong = damage(path, _BESIDE)
            if wrong is None:
                return _step(path), sorted(tags)
            if path not in self._warned:
                self._warned.add(path)
                self._warn(f"checkpoint '{path}' is damaged and passed over: {wrong}")
        return None

    def _found(self, found: _Found) -> Checkpoint:
        step, tags = found
        return Checkpoint(step, self._path(step), frozenset(tags))

    def _remove_spare(self) -> None:
        paths = self._paths()
        kept = set(paths[: self.keep])
        for tag in (GOOD, BEST):
            kept |= set([path for path in paths if tag in _tags(path)][:1])
        for path in set(paths) - kept:
            shutil.rmtree(path)
        for partial in self.folder.glob(f"step-*{PARTIAL}"):
            shutil.rmtree(partial)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _tags(path: Path) -> frozenset[str]:
    try:
        return frozenset(json.loads((path / _TAGS).read_text()))
    except (OSError, ValueError):
        return frozenset()


@contextmanager
def _clear_errors(step: int, path: Path) -> Iterator[None]:
    """What the system says while a checkpoint is written, as an error that names it."""
    try:
        yield
    # torch.save turns the system's error into a RuntimeError, safetensors into one of its own.
    except Exception as error:
        if not _of_the_disk(error):
            raise
        raise CheckpointError(
            f"the checkpoint of step {step} could not be written to '{path}' ({type(error).__name__}: {str(error).splitlines()[0]}); "
            "make room on the disk or give write permission; the checkpoints before it are whole, and --resume goes on from them"
        ) from error


def _of_the_disk(error: BaseException) -> bool:
    """Whether an error of one of the libraries that write comes from the system."""
    return (
        isinstance(error, OSError) or type(error).__name__ == "SafetensorError" or "PytorchStreamWriter" in str(error)
    )
