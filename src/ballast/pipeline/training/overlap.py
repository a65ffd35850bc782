"""The guard at work while the other rewards are computed: one thread, one call a batch, rows in their order."""

import asyncio
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Any

from ballast.errors import GuardError
from ballast.rewards.guard_reward import GuardReward


class OverlappedGuard:
    """A `GuardReward` as an asynchronous reward function of TRL's.

    TRL calls the ordinary reward functions first, in the main thread, and collects the asynchronous ones after
    them; `scoring` starts the guard before the first. The answer is one list in the order of the completions, so
    which reward is ready first changes nothing.

    Args:
        reward: what is asked; its `last` holds the batch once `scoring` is left.
    """

    def __init__(self, reward: GuardReward) -> None:
        self.reward = reward
        self.__name__ = reward.__name__
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="guard")
        self._pending: Future[list[float | None]] | None = None

    @contextmanager
    def scoring(self, prompts: Sequence[Any], completion_ids: Sequence[Sequence[int]]) -> Iterator[None]:
        """Have the batch judged in the thread while the block runs; at its end the guard is idle again."""
        self._pending = self._pool.submit(self.reward, prompts, completion_ids)
        try:
            yield
        finally:
            wait([self._pending])
            self._pending = None

    async def __call__(self, **_: Any) -> list[float | None]:
        """The rewards of the batch that `scoring` was given; what the guard raised is raised here.

        Raises:
            GuardError: no batch was given.
        """
        if self._pending is None:
            raise GuardError("the guard was not given this batch; call inside `with guard.scoring(...)`")
        return await asyncio.wrap_future(self._pending)
