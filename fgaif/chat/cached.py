"""A chat model with a memory: nothing that was answered is asked, or paid for, again."""

import asyncio

from fgaif.chat.messages import ChatModel, ChatRequest, Reply, RequestFailed
from fgaif.chat.store import ReplyStore


class CachedChat:
    """Looks every request up before it asks, and stores every reply before it is used.

    The same question asked twice at the same time is put once. A request that failed is stored as
    failed and not put again by this process; the next run tries it anew. ``hits`` counts replies
    that came from the store.
    """

    def __init__(self, model: ChatModel, store: ReplyStore) -> None:
        self._model = model
        self._store = store
        self._waiting: dict[str, asyncio.Task[Reply]] = {}
        self._failed: dict[str, str] = {}
        self.name = model.name
        self.hits = 0

    async def ask(self, request: ChatRequest) -> Reply:
        """Return the stored reply, or ask; raises like :meth:`ChatModel.ask`."""
        key = request.key(self.name)
        if key in self._failed:
            raise RequestFailed(self._failed[key])
        if task := self._waiting.get(key):
            return await asyncio.shield(task)
        if (known := self._store.get(key)) is not None:
            self.hits += 1
            return known
        task = asyncio.create_task(self._fetch(key, request))
        self._waiting[key] = task
        task.add_done_callback(lambda _: self._waiting.pop(key))
        # Whoever stops waiting does not throw away a reply that is being paid for.
        return await asyncio.shield(task)

    async def _fetch(self, key: str, request: ChatRequest) -> Reply:
        try:
            reply = await self._model.ask(request)
        except RequestFailed as error:
            self._failed[key] = str(error)
            self._store.add(self.name, request, str(error), key)
            raise
        self._store.add(self.name, request, reply, key)
        return reply
