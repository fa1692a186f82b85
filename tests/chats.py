"""A chat model that says what it is told to, and remembers what it was asked."""

from collections.abc import Callable

from fgaif.chat.messages import ChatRequest, Reply, RequestFailed
from fgaif.errors import ServiceError

Said = str | Reply | Exception


class Scripted:
    """Answers from a list, in order, or from a function of the request."""

    def __init__(self, *script: Said, by: Callable[[ChatRequest], Said] | None = None) -> None:
        self.name = "scripted"
        self.asked: list[ChatRequest] = []
        self._script = iter(script)
        self._by = by

    async def ask(self, request: ChatRequest) -> Reply:
        self.asked.append(request)
        said = self._by(request) if self._by else next(self._script)
        if isinstance(said, Exception):
            raise said
        return said if isinstance(said, Reply) else Reply(text=said)


FAILED = RequestFailed("no reply after 10 tries")
STOPPED = ServiceError("the key is refused; set OPENAI_API_KEY")
