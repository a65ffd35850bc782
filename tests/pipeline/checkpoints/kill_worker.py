"""The process that `test_kill` starts and kills: a module of its own, so that a fresh interpreter finds it."""

import os
import pkgutil
import signal
from typing import Any


def work(overrides: list[str], place: str | None, call: int) -> None:
    """The process: a whole run, that ends itself at the call of a place."""
    from ballast.pipeline.config_loading import load_config
    from ballast.pipeline.run import run

    os.environ["HF_HUB_OFFLINE"] = "1"
    if place is not None:
        end_at(place, call)
    run(load_config("grpo", overrides), resume=True)


def end_at(place: str, call: int) -> None:
    """The process is killed when a function is called for the n-th time."""
    owner_name, _, name = place.rpartition(".")
    owner = pkgutil.resolve_name(owner_name)
    function, calls = getattr(owner, name), iter(range(1, call))

    def counted(*args: Any, **kwargs: Any) -> Any:
        if next(calls, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)

    setattr(owner, name, counted)
