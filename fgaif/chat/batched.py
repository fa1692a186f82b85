"""A chat model over something that answers many requests at a time, such as a vLLM actor."""

import asyncio
from collections.abc import Callable, Sequence

from fgaif.chat.messages import ChatRequest, Reply, RequestFailed

Batch = Callable[[Sequence[ChatRequest]], Sequence[Reply | None]]
"""Answers requests in order; None for one that does not fit. Runs in a thread and may block."""


class BatchedChat:
    """Collects what is asked while ``answer`` is busy and hands it over in batches.

    Two batches are on their way at most: one at work, and one ready so that it never waits.
    """

    def __init__(self, name: str, answer: Batch, *, max_batch: int = 1024) -> None:
        self.name = name
        self._answer = answer
        self._max_batch = max_batch
        self._asked: list[tuple[ChatRequest, asyncio.Future[Reply]]] = []
        self._calls: set[asyncio.Task[None]] = set()

    async def ask(self, request: ChatRequest) -> Reply:
        """Wait for the batch with this request; raises like :meth:`ChatModel.ask`."""
        future = asyncio.get_running_loop().create_future()
        self._asked.append((request, future))
        # Not at once: what is asked in the same turn of the loop belongs to the same batch.
        asyncio.get_running_loop().call_soon(self._start)
        return await future

    def _start(self) -> None:
        while self._asked and len(self._calls) < 2:
            batch = self._asked[: self._max_batch]
            del self._asked[: self._max_batch]
            call = asyncio.create_task(self._call(batch))
            self._calls.add(call)
            call.add_done_callback(self._ended)

    def _ended(self, call: asyncio.Task[None]) -> None:
        self._calls.discard(call)
        self._start()

    async def _call(self, batch: list[tuple[ChatRequest, asyncio.Future[Reply]]]) -> None:
        try:
            replies = await asyncio.to_thread(self._answer, [request for request, _ in batch])
        except Exception as error:
            for _, future in batch:
                if not future.done():
                    future.set_exception(error)
            return
        for (request, future), reply in zip(batch, replies, strict=True):
            if future.done():
                continue
            if reply is None:
                future.set_exception(RequestFailed(_TOO_LONG.format(request.subject[:60])))
            else:
                future.set_result(reply)


_TOO_LONG = (
    "{!r}: the question does not fit the model's context; raise cluster.engine.max_model_len"
)
