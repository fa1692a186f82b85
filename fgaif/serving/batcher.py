"""Dynamic batching: requests that arrive while a batch is being scored form the next one.

Ray Serve's ``serve.batch`` closes a batch a fixed time after its first request even while the one
before still runs, so that under load small batches queue up. Here a batch is closed when its turn
has come.
"""

import asyncio
import contextvars
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Generic, TypeVar

T = TypeVar("T")
R = TypeVar("R")

_Waiting = tuple[T, asyncio.Future[R]]


class Batcher(Generic[T, R]):
    """Calls ``work`` with up to ``size`` items at a time; used in one event loop.

    Args:
        work: returns one result per item, in order; what it raises, all its callers get.
        calls: batches in work at the same time.
        wait_s: longest wait for a batch to fill, once its turn has come.
    """

    def __init__(
        self,
        work: Callable[[list[T]], Awaitable[Sequence[R]]],
        *,
        size: int,
        calls: int = 1,
        wait_s: float = 0.0,
    ) -> None:
        self._work = work
        self._size = size
        self._calls = calls
        self._wait_s = wait_s
        self._waiting: deque[_Waiting[T, R]] = deque()
        self._full = asyncio.Event()
        self._workers: set[asyncio.Task[None]] = set()
        self._filling = False

    async def __call__(self, item: T) -> R:
        """Return the item's result; a caller that stops waiting takes a waiting item along."""
        future: asyncio.Future[R] = asyncio.get_running_loop().create_future()
        self._waiting.append((item, future))
        if len(self._waiting) >= self._size:
            self._full.set()
        self._staff()
        return await future

    def _staff(self) -> None:
        # One worker at a time fills a batch; as soon as it has it, the next may begin.
        if self._waiting and not self._filling and len(self._workers) < self._calls:
            self._filling = True
            # Not in the context of this request, which is one of many.
            task = asyncio.create_task(self._run(), context=contextvars.Context())
            self._workers.add(task)
            task.add_done_callback(self._left)

    def _left(self, worker: "asyncio.Task[None]") -> None:
        self._workers.discard(worker)
        self._staff()

    async def _run(self) -> None:
        if self._wait_s and len(self._waiting) < self._size:
            self._full.clear()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._full.wait(), self._wait_s)
        batch = self._next()
        self._filling = False
        self._staff()
        if batch:
            await self._answer(batch)

    def _next(self) -> list[_Waiting[T, R]]:
        batch: list[_Waiting[T, R]] = []
        while self._waiting and len(batch) < self._size:
            item, future = self._waiting.popleft()
            if not future.done():
                batch.append((item, future))
        return batch

    async def _answer(self, batch: list[_Waiting[T, R]]) -> None:
        try:
            results = await self._work([item for item, _ in batch])
            for (_, future), result in zip(batch, results, strict=True):
                if not future.done():
                    future.set_result(result)
        except Exception as error:
            for _, future in batch:
                if not future.done():
                    future.set_exception(error)
