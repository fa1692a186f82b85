"""Who judges: an endpoint with its reply store, a local verifier, or a stand-in that counts."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from cluster.evaluation.settings import judge_settings
from cluster.launch import Cluster
from fgaif.chat.batched import BatchedChat
from fgaif.chat.cached import CachedChat
from fgaif.chat.endpoint import Endpoint
from fgaif.chat.limits import Budget, Spend, estimate, price
from fgaif.chat.messages import ChatModel, ChatRequest, Reply, RequestFailed
from fgaif.chat.store import ReplyStore
from fgaif.config import Config, EndpointConfig
from fgaif.reward.checkpoint import checkpoint_digest


@asynccontextmanager
async def open_judge(
    config: Config, entry: str | None, replies: Path, say: Callable[[str], None]
) -> AsyncIterator[ChatModel]:
    """Open the judge ``endpoints.ENTRY`` over the store of replies; ``say`` gets the bill.

    Raises:
        ConfigError: no such entry, or its key is missing.
    """
    settings = judge_settings(config, entry)
    budget = Budget(config.feedback.max_cost, config.feedback.max_tokens)
    pixels = config.data.max_image_pixels
    endpoint = Endpoint(str(entry), settings, budget, max_image_pixels=pixels)
    with ReplyStore(replies) as store:
        budget.charge(price(settings, *store.tokens(endpoint.name)))
        try:
            yield CachedChat(endpoint, store)
        finally:
            await endpoint.close()
            say(budget.usage().line())


def local_verifier(cluster: Cluster, checkpoint: Path, store: ReplyStore) -> ChatModel:
    """A LLaVA checkpoint on the cluster's judge engines, as a chat model over the store."""
    judges = cluster.judges()
    name = checkpoint_digest(checkpoint)[:16]
    return CachedChat(BatchedChat(name, lambda asked: judges.answer(asked).result()), store)


@dataclass
class CountingJudge:
    """Answers nothing; adds up what the requests would cost at most."""

    settings: EndpointConfig
    requests: int = 0
    spend: Spend = field(default_factory=Spend)
    name: str = "dry run"

    async def ask(self, request: ChatRequest) -> Reply:
        """Count the request and fail it, so that nobody asks again."""
        self.requests += 1
        self.spend += estimate(request, self.settings)
        raise RequestFailed("dry run: nothing was asked")
