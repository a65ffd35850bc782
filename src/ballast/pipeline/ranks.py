"""One run in several processes that train together: who writes, who decides, and how all of them learn of it.

Every function here is called by all processes in the same order. In a process that is alone each of them costs nothing and
imports nothing: the value comes back as it was given.

What the processes tell each other is JSON over a gloo group of its own, on the CPU: no tensor on a device waits for it, and a
process may work for hours on what the others wait for (a checkpoint, a judge) without a time-out of the training's own group.
A process that fails ends itself; the launcher then ends the others.
"""

import json
import os
import sys
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

from ballast.errors import BallastError

_TRAINING_PATIENCE = timedelta(minutes=30)  # of the training's own group, as transformers has it
_PATIENCE = timedelta(days=2)  # a launcher ends all when one process is gone, so this is no time that anybody waits
_control: tuple[Any, Any] | None = None  # the group of all, and the one for control beside it

T = TypeVar("T")


class MainProcessError(BallastError):
    """The main process failed, and says why itself."""


def launched() -> int:
    """How many processes a launcher (accelerate, torchrun) started; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def join() -> None:
    """Meet the other processes, where a launcher started several; before anything else here is used."""
    if launched() == 1:
        return
    import torch
    from accelerate import PartialState

    cpu = not torch.cuda.is_available() or os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true"
    # Also makes this process's GPU the current one, so that "cuda" means it everywhere.
    PartialState(cpu=cpu, timeout=_TRAINING_PATIENCE)
    barrier()


def rank() -> int:
    """The number of this process, from 0."""
    group = _group()
    return 0 if group is None else int(group.rank())


def world() -> int:
    """How many processes train together."""
    group = _group()
    return 1 if group is None else int(group.size())


def is_main() -> bool:
    """Whether this process is the one that writes, says and decides."""
    return rank() == 0


def barrier() -> None:
    """Wait for all processes."""
    collected([])


def own_share(items: Sequence[T]) -> Sequence[T]:
    """The part of some items that this process works on: a contiguous one; all parts in order of the ranks are all items."""
    each, more = divmod(len(items), world())
    start = rank() * each + min(rank(), more)
    return items[start : start + each + (rank() < more)]


def collected(values: Sequence[Any]) -> list[Any]:
    """The values of all processes, those of rank 0 first.

    Args:
        values: what JSON knows, NaN and infinities included; tuples come back as lists.
    """
    group = _group()
    if group is None:
        return list(values)
    import torch

    own = torch.frombuffer(bytearray(json.dumps(list(values)).encode()), dtype=torch.uint8)
    lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(world())]
    torch.distributed.all_gather(lengths, torch.tensor([len(own)]), group=group)
    width = max(int(length) for length in lengths)
    texts = [torch.zeros(width, dtype=torch.uint8) for _ in lengths]
    torch.distributed.all_gather(texts, torch.nn.functional.pad(own, (0, width - len(own))), group=group)
    return [
        value
        for text, length in zip(texts, lengths, strict=True)
        for value in json.loads(bytes(text[: int(length)].tolist()))
    ]


def on_main(work: Callable[[], Any]) -> Any:
    """Let the main process alone do something; all get what it gave, as JSON knows it.

    Raises:
        MainProcessError: on all others, where it failed.
    """
    if world() == 1:
        return work()
    told: dict[str, Any] = {}
    failure: BaseException | None = None
    if is_main():
        try:
            told = {"value": work()}
        except BaseException as error:
            failure = error
            told = {"error": type(error).__name__, "exit_code": getattr(error, "exit_code", 1)}
    told = next(iter(collected([told])))
    if failure is not None:
        raise failure
    if "error" in told:
        error_ = MainProcessError(f"the main process ended with {told['error']}; its own message says why")
        error_.exit_code = told["exit_code"]
        raise error_
    return told["value"]


def summed(values: Sequence[float]) -> list[float]:
    """Each value, summed over all processes in the order of their ranks; all give the same number of values."""
    if world() == 1:
        return list(values)
    return [sum(parts) for parts in zip(*collected([list(values)]), strict=True)]


def _group() -> Any:
    """The group for control; None where this process is alone."""
    global _control
    torch = sys.modules.get("torch")
    if torch is None or not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return None
    everyone = torch.distributed.group.WORLD
    if everyone.size() == 1:
        return None
    if _control is None or _control[0] is not everyone:
        _control = (everyone, torch.distributed.new_group(backend="gloo", timeout=_PATIENCE))
    return _control[1]
