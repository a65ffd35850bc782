"""All that a training goes on from, to a folder and back. The one place that touches how a Trainer saves itself.

Read against transformers 5.17, whose `_save_*` and `_load_*` methods write and read optimizer, schedule and random numbers; a
contract test fails when they move (`tests/pipeline/checkpoints/test_seams.py`). What `Trainer._save_checkpoint` adds to
them, a pickle of the arguments and a model card, is left out.

Weights are safetensors; what is not is read with `weights_only=True`.
"""

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from transformers import TrainerState

_STATE = "trainer_state.json"  # the name under which `Trainer.train(resume_from_checkpoint=...)` looks for it
_PARTS = "parts.pt"
# Of TRL's SFT, whose resumed trainings count their tokens from 0.
_COUNTERS = ("_total_train_tokens",)


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
