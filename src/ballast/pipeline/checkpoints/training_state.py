"""All that a training goes on from, to a folder and back. The one place that touches how a Trainer saves itself.

Of processes that train together the main one writes all of it; of the others it needs their random numbers alone, for weights,
optimizer and the parts' own states are the same on all of them. Each reads for itself.

Read against transformers 5.17, whose `_save_*` and `_load_*` methods write and read optimizer, schedule and random numbers; a
contract test fails when they move (`tests/pipeline/checkpoints/test_seams.py`). What `Trainer._save_checkpoint` adds to
them, a pickle of the arguments and a model card, is left out.

Weights are safetensors; what is not is read with `weights_only=True`.
"""

import base64
import tempfile
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from transformers import TrainerState

from ballast.pipeline import ranks

_STATE = "trainer_state.json"  # the name under which `Trainer.train(resume_from_checkpoint=...)` looks for it
_PARTS = "parts.pt"
# Of TRL's SFT, whose resumed trainings count their tokens from 0.
_COUNTERS = ("_total_train_tokens",)

# The Trainer asks for the optimizer's tensors on "cpu:0" where several processes train on a CPU, which torch knows as "cpu" alone.
torch.serialization.register_package(
    0, lambda storage: None, lambda storage, location: storage if location.startswith("cpu:") else None
)


@runtime_checkable
class Resumable(Protocol):
    """A callback, or a trainer, with a state of its own that a training goes on from."""

    def checkpoint_state(self) -> dict[str, Any]:
        """Tensors, numbers, strings, and lists and dicts of them; the class's name is its key, so one of each class."""

    def restore_checkpoint_state(self, state: dict[str, Any]) -> None:
        """Go on from it; called after `on_train_begin`."""


def write_training(trainer: Any, folder: Path) -> None:
    """Weights, optimizer, schedule, scaler, random numbers, trainer state and the parts' own states.

    Raises:
        OSError: the disk is full, or may not be written.
    """
    trainer.model.save_pretrained(folder)  # safetensors, of an adapter or of the whole
    trainer._save_optimizer_and_scheduler(str(folder))
    trainer._save_scaler(str(folder))
    trainer._save_rng_state(str(folder))
    trainer.state.save_to_json(str(folder / _STATE))
    states = {name: part.checkpoint_state() for name, part in _parts(trainer)}
    counters = {name: getattr(trainer, name) for name in _COUNTERS if hasattr(trainer, name)}
    torch.save({"parts": states, "counters": counters}, folder / _PARTS)


def random_states(trainer: Any) -> list[str]:
    """The random numbers of every process but the main one, for `write_random_states`; all processes call it."""
    own: list[str] = []
    if not ranks.is_main():
        with tempfile.TemporaryDirectory() as folder:
            trainer._save_rng_state(folder)
            own = [base64.b64encode(path.read_bytes()).decode() for path in Path(folder).iterdir()]
    return ranks.collected(own)


def write_random_states(states: Sequence[str], folder: Path) -> None:
    """Put them beside those of the main process, under the names by which each process looks for its own."""
    for rank, state in enumerate(states, 1):
        (folder / f"rng_state_{rank}.pth").write_bytes(base64.b64decode(state))


def resume_parts(trainer: Any, folder: Path) -> None:
    """What `Trainer.train(resume_from_checkpoint=...)` does not restore: the parts' own states, and counters of TRL's."""
    for name, value in _read(folder)["counters"].items():
        setattr(trainer, name, value)
    _restore_states(trainer, folder)


def _read(folder: Path) -> dict[str, dict[str, Any]]:
    read: dict[str, dict[str, Any]] = torch.load(folder / _PARTS, map_location="cpu", weights_only=True)
    return read


def _restore_states(trainer: Any, folder: Path, leave: Collection[Any] = ()) -> None:
    states = _read(folder)["parts"]
    for name, part in _parts(trainer):
        if name in states and not any(part is other for other in leave):
            part.restore_checkpoint_state(states[name])


def load_training(trainer: Any, folder: Path, leave: Collection[Any] = ()) -> None:
    """Turn a training that is under way back to a checkpoint, in place.

    Weights, optimizer, schedule, scaler, what the trainer's state keeps for callbacks (the dual variable) and the parts' own
    states, but for those of the callbacks in `leave`, are those of the checkpoint. The step count, the logged history, the
    place in the data and the random numbers go on, so that what follows is not what followed before.
    """
    trainer._load_from_checkpoint(str(folder))
    trainer._load_optimizer_and_scheduler(str(folder))
    trainer._load_scaler(str(folder))
    then = TrainerState.load_from_json(str(folder / _STATE))
    trainer.state.stateful_callbacks = then.stateful_callbacks
    _restore_states(trainer, folder, leave)


def _parts(trainer: Any) -> Iterator[tuple[str, Resumable]]:
    for part in (trainer, *trainer.callback_handler.callbacks):
        if isinstance(part, Resumable):
            yield type(part).__name__, part
