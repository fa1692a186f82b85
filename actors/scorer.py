"""The scoring role of the service: reward models by version, the next loaded beside the present."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from actors.reward import RewardActor, SharedRewardActor
from fgaif.config import Config
from fgaif.data.images import image_bytes
from fgaif.errors import CheckpointError
from fgaif.feedback.extract import kind_meanings
from fgaif.feedback.facts import SceneFacts
from fgaif.lvlm.hub import model_name
from fgaif.lvlm.model import load_processor, resolve_checkpoint
from fgaif.reward.checkpoint import (
    RewardCard,
    common_image_pixels,
    common_min_words,
    read_cards,
    rewards_version,
)
from fgaif.serving.schema import DEFAULT_PROMPT, CardOut, ModelOut
from fgaif.serving.scoring import Refused, ScoreInput, ScoreOutput, TextScorer
from fgaif.serving.shape import served_shape
from fgaif.types import FloatArray, Kind, Response, Segment

_PROBE = ScoreInput(
    image=image_bytes(b"P6\n8 8\n255\n" + bytes([128]) * 192, "probe"),
    prompt=DEFAULT_PROMPT,
    texts=("There is a dog, and it is small.",),
)


class KindScorer:
    """The reward actor of one kind, or of all, with scores of one layout."""

    def __init__(self, rewards_dir: Path, config: Config, kinds: Sequence[Kind]) -> None:
        self._one = RewardActor(rewards_dir / kinds[0], config) if len(kinds) == 1 else None
        self._all = SharedRewardActor(rewards_dir, config) if self._one is None else None
        actor = self._one or self._all
        assert actor is not None
        self.check_image = actor.check_image
        self.length = actor.length
        self.max_length = actor.max_length

    def probs(
        self, responses: Sequence[Response], segments: Sequence[Sequence[Segment]]
    ) -> list[FloatArray]:
        """Class probabilities (S, kinds, C) per response."""
        if self._one is not None:
            return [probs[:, None] for probs in self._one.score(responses, segments)]
        assert self._all is not None
        return [scores.probs for scores in self._all.score(responses, segments)]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Loaded:
    scorer: TextScorer
    info: ModelOut


class ScoringActor:
    """Scores texts for ``kinds``: one kind, or by default all on one backbone.

    Raises:
        CheckpointError: the reward models do not fit the backbone, or each other.
    """

    def __init__(
        self, rewards_dir: Path, config: Config, kinds: Sequence[Kind] | None = None
    ) -> None:
        cards = read_cards(rewards_dir, config.kind_names)
        limit = {
            "max_image_pixels": config.serve.max_image_pixels,
            "image_pixels": common_image_pixels(list(cards.values())),
        }
        data = config.data.model_copy(update=limit)
        self._config = config.model_copy(update={"data": data})
        self._rewards_dir = rewards_dir
        self._kinds = tuple(kinds or config.kind_names)
        self._now = self._load()
        self._next: _Loaded | None = None
        self.probe()

    def score(self, items: Sequence[ScoreInput]) -> list[ScoreOutput | Refused]:
        """Score items together, in order, with one version."""
        return self._now.scorer.score(items)

    def probe(self) -> str:
        """Score a built-in image and text; return the version that did.

        Raises:
            CheckpointError: the models cannot score it.
        """
        (answer,) = self.score([_PROBE])
        if isinstance(answer, Refused):
            raise CheckpointError(f"{self._rewards_dir}: the probe is refused: {answer.message}")
        return answer.version

    def info(self) -> ModelOut:
        """What is loaded; cards only of this scorer's kinds."""
        return self._now.info

    def found_version(self) -> str:
        """Version that the folder holds now."""
        return rewards_version(self._rewards_dir, self._config.kind_names)

    def prepare(self, version: str) -> None:
        """Load the folder's models beside the present ones, which go on scoring.

        Raises:
            CheckpointError: they are of another version, or do not fit.
        """
        if version == self._now.info.version:
            return
        fresh = self._load()
        if fresh.info.version != version:
            raise CheckpointError(
                f"{self._rewards_dir}: holds version {fresh.info.version}, not {version}"
            )
        self._next = fresh

    def activate(self, version: str) -> None:
        """Score with what was prepared from now on; the models before are let go.

        Raises:
            CheckpointError: this version was not prepared.
        """
        if version == self._now.info.version:
            return
        if self._next is None or self._next.info.version != version:
            raise CheckpointError(f"version {version} was not prepared; reload again")
        self._now, self._next = self._next, None

    def _load(self) -> _Loaded:
        kinds = self._config.kind_names
        cards = read_cards(self._rewards_dir, kinds)
        version = rewards_version(self._rewards_dir, kinds)
        policy = resolve_checkpoint(self._config.policy.model)
        shape, shape_from = served_shape(list(cards.values()), self._config)
        scorer = TextScorer(
            KindScorer(self._rewards_dir, self._config, self._kinds),
            load_processor(policy).tokenizer,
            version=version,
            min_words=common_min_words(list(cards.values())),
            extractor=SceneFacts(kinds) if self._config.feedback.extractor == "scenes" else None,
            shape=shape,
            kinds=self._kinds,
        )
        if rewards_version(self._rewards_dir, kinds) != version:
            raise CheckpointError(f"{self._rewards_dir}: was changed while it was read; try again")
        info = ModelOut(
            name=self._config.name,
            version=version,
            kinds=list(kinds),
            colours=self._config.own_colours,
            meanings=kind_meanings(self._config.kinds),
            backbone=model_name(resolve_checkpoint(self._config.reward_backbone)),
            placement=self._config.serve.placement,
            loaded_at=datetime.now(UTC).isoformat(timespec="seconds"),
            cards={kind: _card_out(card) for kind, card in cards.items()},
            shape=shape.resolved(kinds).model_dump(mode="json"),
            shape_from=shape_from,
        )
        return _Loaded(scorer=scorer, info=info)


def _card_out(card: RewardCard) -> CardOut:
    return CardOut(
        head=card.head,
        min_words=card.min_words,
        backbone_digest=card.backbone_digest,
        input_digest=card.input_digest,
        noise=card.noise.model_dump() if card.noise else None,
        metrics=card.metrics,
    )
