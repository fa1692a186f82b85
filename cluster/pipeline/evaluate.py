"""Who judges the captions of an evaluation, and how each of them is asked.

The truth of the embedded world where it is known; else the verifier, by the feedback step on the
captions, and beside it the reward models, which PPO has optimised; last a second verifier, on the
facts that the first one had. Engines of verifiers take the place of the PPO roles while they judge.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from cluster.launch import Cluster
from fgaif.chat.batched import BatchedChat
from fgaif.chat.messages import ChatModel, ChatRequest, Reply, gather_all
from fgaif.chat.store import ReplyStore
from fgaif.config import API, Config
from fgaif.data.scenes.facts import SCENE_KINDS
from fgaif.data.sources import Source, of_scenes
from fgaif.errors import ConfigError
from fgaif.eval.captions import JudgedCaption, judged_by_scores
from fgaif.eval.policy import Judge, Review
from fgaif.eval.run_results import ORACLE, REWARDS
from fgaif.eval.scenes import SceneJudge
from fgaif.feedback.annotate import Annotator
from fgaif.feedback.facts import ExtractedFacts
from fgaif.feedback.models import FeedbackModels
from fgaif.lvlm.hub import model_name
from fgaif.lvlm.model import resolve_checkpoint
from fgaif.reward.checkpoint import checkpoint_digest
from fgaif.types import Response, Segment

Segmenter = Callable[[Response], tuple[Segment, ...]]
_AT_A_TIME = 256
_TRAINING = ("learner", "reference", "reward")


def truth_known(config: Config) -> bool:
    """Whether the held-out images are of the embedded world, with its kinds alone."""
    return of_scenes(config.data.held_out) and set(config.kind_names) <= set(SCENE_KINDS)


def verifier_judges(config: Config) -> bool:
    """Whether the models of the feedback judge the captions."""
    if truth_known(config):
        return False
    wanted = config.eval.judge
    return wanted == "verifier" or (wanted == "auto" and config.feedback.extractor != "scenes")


def judging_engines(config: Config) -> list[str]:
    """Checkpoints that run on our own engines while captions are judged."""
    asked = [config.feedback.local_verifier] if verifier_judges(config) else []
    second = config.eval.second_verifier
    if second is not None and not second.startswith(API):
        asked.append(second)
    return [name for name in asked if name is not None]


@dataclass
class CaptionJudges:
    """The judges of one evaluation over a run's cluster.

    Captions are judged by sub-sentences (``segmenter``), whatever the run's unit is; reward models
    score the unit that they were trained on (``unit``).
    ``judging`` adds up what they asked: requests (of stored replies none), tokens and cost of
    endpoints, and seconds.
    """

    config: Config
    cluster: Cluster
    source: Source
    segmenter: Segmenter
    unit: Segmenter
    judging: dict[str, float] = field(default_factory=dict)

    def judge(self) -> tuple[str, Judge]:
        """Name of the judge and the judge."""
        config = self.config
        if truth_known(config):
            return ORACLE, SceneJudge(self.source.scene_of, self.segmenter, config.kind_names)
        if verifier_judges(config):
            return f"the verifier {_named(config, config.feedback.verifiers)}", self._by_feedback
        if config.reward.form == "preference":
            raise ConfigError(
                "reward.form = 'preference': its reward model cannot say what is hallucinated, so "
                "nobody judges the captions: set eval.judge=verifier"
            )
        return REWARDS, self._by_rewards

    def others(self) -> dict[str, Review]:
        """Further judges by their names, in the order in which they look."""
        config, reviews = self.config, dict[str, Review]()
        if config.eval.second_verifier is not None:
            name = _named(config, [config.eval.second_verifier])
            reviews[f"the second verifier {name}"] = self._by_second
        if verifier_judges(config) and config.reward.form == "segment":
            reviews[REWARDS] = lambda judged: self._by_rewards([c.labeled.response for c in judged])
        return reviews

    def _by_rewards(self, responses: Sequence[Response]) -> list[JudgedCaption]:
        segments = [self.unit(response) for response in responses]
        scorers = self.cluster.rewards(self.config.run_dir / "rewards")
        scores = scorers.score(responses, segments).result()
        return [
            judged_by_scores(*item, self.config.kind_names)
            for item in zip(responses, segments, scores, strict=True)
        ]

    def _by_feedback(self, responses: Sequence[Response]) -> list[JudgedCaption]:
        def annotator(models: FeedbackModels) -> Annotator:
            return models.annotator()

        rows = [(response, self.segmenter(response)) for response in responses]
        return self._annotated(self.config, rows, annotator)

    def _by_second(self, judged: Sequence[JudgedCaption]) -> list[JudgedCaption]:
        config, known = self.config, {c.labeled.response.id: c for c in judged}
        second = config.feedback.model_copy(update={"verifier": config.eval.second_verifier})
        theirs = config.model_copy(update={"feedback": second})

        def annotator(models: FeedbackModels) -> Annotator:
            minimum = config.segment.min_words
            return Annotator(_Known(known), models.verifier(), minimum, config.kind_names)

        rows = [(c.labeled.response, c.labeled.segments) for c in judged]
        found = self._annotated(theirs, rows, annotator)
        return [replace(old, labeled=new.labeled) for old, new in zip(judged, found, strict=True)]

    def _annotated(
        self,
        config: Config,
        rows: Sequence[tuple[Response, Sequence[Segment]]],
        annotator: Callable[[FeedbackModels], Annotator],
    ) -> list[JudgedCaption]:
        """The feedback step on captions; facts that any earlier step asked about are not asked
        again, and money counts towards the run's budget."""
        local, checkpoint = None, config.feedback.local_verifier
        if checkpoint is not None:
            local = self._engine(resolve_checkpoint(checkpoint))
        with ReplyStore(config.run_dir / "feedback" / "replies.sqlite") as store:
            models = FeedbackModels(config, store, local)
            asks = annotator(models)
            before, start = models.usage(), time.monotonic()
            room = asyncio.Semaphore(_AT_A_TIME)

            async def one(response: Response, segments: Sequence[Segment]) -> JudgedCaption:
                async with room:
                    labeled = await asks.annotate(response, segments)
                stated = config.feedback.extractor != "segment"
                return JudgedCaption(labeled=labeled, facts_judged=stated)

            async def all_of_them() -> list[JudgedCaption]:
                return await gather_all(one(*row) for row in rows)

            try:
                return asyncio.run(all_of_them())
            finally:
                used = models.usage()
                self._add("requests", used.requests - before.requests)
                self._add("tokens", used.tokens - before.tokens)
                self._add("cost", round(used.cost - before.cost, 6))
                self._add("seconds", round(time.monotonic() - start, 1))
                self.cluster.stop("judge")

    def _engine(self, checkpoint: Path) -> ChatModel:
        for role in _TRAINING:  # their GPUs are the judge's meanwhile
            self.cluster.stop(role)
        judges = self.cluster.judges(checkpoint)
        name = checkpoint_digest(checkpoint)[:16]

        def answer(requests: Sequence[ChatRequest]) -> Sequence[Reply | None]:
            self._add("requests", len(requests))
            return judges.answer(requests).result()

        return BatchedChat(name, answer)

    def _add(self, name: str, amount: float) -> None:
        self.judging[name] = self.judging.get(name, 0) + amount


class _Known:
    """An extractor of facts that are known already."""

    name = "facts of the first judge"

    def __init__(self, captions: dict[str, JudgedCaption]) -> None:
        self._captions = captions

    async def extract(self, response: Response, segments: Sequence[Segment]) -> ExtractedFacts:
        """The facts that the first judge checked."""
        labeled = self._captions[response.id].labeled
        malformed = labeled.provenance.get("malformed", "")
        return ExtractedFacts(
            facts=labeled.facts, malformed=tuple(map(int, filter(None, malformed.split(","))))
        )


def _named(config: Config, names: Sequence[str]) -> str:
    """Short names of models: of checkpoints the folder, of endpoints the model asked for."""
    return " + ".join(
        config.endpoints[name.removeprefix(API)].model
        if name.startswith(API)
        else model_name(resolve_checkpoint(name))
        for name in names
    )
