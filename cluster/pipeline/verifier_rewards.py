"""Rewards of PPO by the verifier itself: the feedback step on every response, no reward model.

Dearer than reward models, which learn these verdicts once: each step extracts facts and puts each
of them to the verifier. What was asked before of the same image costs nothing again.
"""

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Self

import numpy as np

from cluster.launch import Cluster
from fgaif.chat.batched import BatchedChat
from fgaif.chat.messages import ChatRequest, Reply, gather_all
from fgaif.chat.store import ReplyStore
from fgaif.config import Config
from fgaif.feedback.annotate import Annotator
from fgaif.feedback.models import FeedbackModels
from fgaif.lvlm.model import resolve_checkpoint
from fgaif.pending import Pending, Then
from fgaif.reward.checkpoint import checkpoint_digest
from fgaif.types import (
    UNKNOWN,
    FloatArray,
    IntArray,
    Response,
    Segment,
    SegmentClass,
    SegmentScores,
)

_AT_A_TIME = 256
Asked = Callable[[], int]
"""Questions that models were asked so far."""


class VerifierRewards:
    """The reward role: labels of the feedback step as class probabilities of 0 and 1.

    A segment whose facts could not all be judged counts as one without facts: a failure earns and
    costs nothing. Calls are answered one after the other, by a loop of their own.
    """

    def __init__(self, annotator: Annotator, asked: Asked) -> None:
        self._annotator, self._asked = annotator, asked
        self._before, self._seconds = asked(), 0.0
        self._room = asyncio.Semaphore(_AT_A_TIME)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    def score(
        self, responses: Sequence[Response], segments: Sequence[Sequence[Segment]]
    ) -> Pending[list[SegmentScores]]:
        """Label every response; raises ServiceError where a model cannot be asked at all."""
        rows = list(zip(responses, segments, strict=True))
        future = asyncio.run_coroutine_threadsafe(self._score(rows), self._loop)
        return Then(future.result)

    def metrics(self) -> dict[str, float]:
        """What was asked since the last call, and the seconds that it took."""
        asked, seconds = self._asked(), self._seconds
        found = {"verifier/questions": float(asked - self._before), "verifier/seconds": seconds}
        self._before, self._seconds = asked, 0.0
        return found

    def close(self) -> None:
        """End the loop."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _score(
        self, rows: Sequence[tuple[Response, Sequence[Segment]]]
    ) -> list[SegmentScores]:
        start = time.monotonic()
        scores = await gather_all(self._one(*row) for row in rows)
        self._seconds += time.monotonic() - start
        return scores

    async def _one(self, response: Response, segments: Sequence[Segment]) -> SegmentScores:
        async with self._room:
            labeled = await self._annotator.annotate(response, segments)
        return SegmentScores(probs=one_hot(labeled.labels))


def one_hot(labels: IntArray) -> FloatArray:
    """Labels (S, K) as probabilities (S, K, C); UNKNOWN as NONE."""
    known = np.where(labels == UNKNOWN, SegmentClass.NONE, labels)
    return np.eye(len(SegmentClass), dtype=np.float32)[known]


class OpenVerifier:
    """The rewards of a run while its training lasts: engines, store of replies, loop."""

    def __init__(self, config: Config, cluster: Cluster) -> None:
        self._config, self._cluster = config, cluster
        self._sent = 0
        self._open = ExitStack()

    def __enter__(self) -> Self:
        config = self._config
        with ExitStack() as stack:
            store = ReplyStore(config.run_dir / "feedback" / "replies.sqlite")
            models = FeedbackModels(config, stack.enter_context(store), self._local(stack))
            self.rewards = VerifierRewards(
                models.annotator(), lambda: models.usage().requests + self._sent
            )
            stack.callback(self.rewards.close)
            self._open = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def _local(self, stack: ExitStack) -> BatchedChat | None:
        name = self._config.feedback.local_verifier
        if name is None:
            return None
        judges = self._cluster.judges()
        stack.callback(self._cluster.stop, "judge")

        def answer(requests: Sequence[ChatRequest]) -> Sequence[Reply | None]:
            self._sent += len(requests)
            return judges.answer(requests).result()

        return BatchedChat(checkpoint_digest(resolve_checkpoint(name))[:16], answer)
