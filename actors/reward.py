"""The reward role: scores segments for one hallucination kind, or for all on one backbone."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from actors.progress import advance
from actors.settings import RewardSettings
from fgaif.errors import CheckpointError
from fgaif.kinds import check_kinds
from fgaif.lvlm.features import FeatureCache
from fgaif.lvlm.model import base_of, resolve_checkpoint
from fgaif.lvlm.shared import BaseModels
from fgaif.reward.checkpoint import (
    RewardCard,
    load_reward_model,
    load_shared_reward_models,
    read_card,
)
from fgaif.reward.inputs import load_reward_encoder
from fgaif.reward.model import RewardModel, SharedRewardModels, segment_probs
from fgaif.types import FloatArray, ImageRef, Response, Segment, SegmentScores


class _Scorer:
    """A loaded model with its encoder and feature cache."""

    def __init__(self, config: RewardSettings) -> None:
        self._backbone = resolve_checkpoint(config.reward_backbone)
        self._micro_batch = config.reward.micro_batch
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._encoder = load_reward_encoder(
            self._backbone,
            resolve_checkpoint(config.policy.model),
            **config.data.image_limits,
        )
        self._load = {
            "dtype": config.policy.dtype,
            "device": str(self._device),
            "attention": config.policy.attention,
        }

    def check_image(self, image: ImageRef) -> None:
        """Decode an image and keep its pixels; raises DataError if it is broken."""
        self._encoder.encoder.pixels(image)

    def length(self, response: Response, segments: Sequence[Segment]) -> int:
        """Tokens that the model reads for a response; raises DataError if it cannot read it."""
        return len(self._encoder.row(response, segments)[0])

    @property
    def max_length(self) -> int:
        """Tokens that the backbone was made for, image and separators included."""
        config = base_of(self._model.backbone).config
        return int(config.text_config.max_position_embeddings)

    def _use(self, model: RewardModel | SharedRewardModels, features: FeatureCache) -> None:
        self._model = model
        self._features = features

    def _probs(
        self, responses: Sequence[Response], segments: Sequence[Sequence[Segment]]
    ) -> list[FloatArray]:
        return segment_probs(
            self._model,
            self._encoder,
            self._features,
            responses,
            segments,
            micro_batch=self._micro_batch,
            device=self._device,
            advance=advance,
        )


class RewardActor(_Scorer):
    """One reward model, its adapter merged."""

    def __init__(self, reward_dir: Path, config: RewardSettings) -> None:
        super().__init__(config)
        self._kinds = config.kind_names
        self.load(reward_dir)

    def load(self, reward_dir: Path) -> RewardCard:
        """Load (or replace) the reward model; raises CheckpointError if it does not fit."""
        card = read_card(reward_dir)
        check_kinds(reward_dir, card.kinds, self._kinds, CheckpointError)
        model = load_reward_model(reward_dir, self._backbone, **self._load)
        self._use(model, FeatureCache(model.backbone, self._encoder.encoder))
        self._card = card
        return card

    def info(self) -> RewardCard:
        """The card of the loaded model."""
        return self._card

    def score(
        self, responses: Sequence[Response], segments: Sequence[Sequence[Segment]]
    ) -> list[FloatArray]:
        """Class probabilities (S, C) of each response's segments, in order."""
        return self._probs(responses, segments)

    def score_pairs(self, pairs: Sequence[tuple[Response, Sequence[Segment]]]) -> list[FloatArray]:
        """Like ``score``, for responses paired with their segments."""
        return self.score([response for response, _ in pairs], [pieces for _, pieces in pairs])


class SharedRewardActor(_Scorer):
    """All kinds on one backbone, for where memory is short; ``rewards_dir`` holds the kinds, and
    ``models`` are those of other roles in this process."""

    def __init__(
        self, rewards_dir: Path, config: RewardSettings, models: BaseModels | None = None
    ) -> None:
        super().__init__(config)
        self._models = models or BaseModels()
        self._quantization = config.policy.quantization
        self._kinds = config.kind_names
        self.load(rewards_dir)

    def load(self, rewards_dir: Path) -> list[RewardCard]:
        """Load (or replace) all reward models; raises CheckpointError if one does not fit."""
        model = load_shared_reward_models(
            rewards_dir,
            self._backbone,
            self._kinds,
            partial(self._models.load, quantization=self._quantization),
            **self._load,
        )
        self._use(model, self._models.features(base_of(model.backbone), self._encoder.encoder))
        self._cards = [read_card(rewards_dir / kind) for kind in self._kinds]
        return self._cards

    def info(self) -> list[RewardCard]:
        """The cards of the loaded models."""
        return self._cards

    def score(
        self, responses: Sequence[Response], segments: Sequence[Sequence[Segment]]
    ) -> list[SegmentScores]:
        """Class probabilities (S, K, C) of each response's segments, in order."""
        return [SegmentScores(probs=probs) for probs in self._probs(responses, segments)]

    def score_pairs(self, pairs: Sequence[tuple[Response, Sequence[Segment]]]) -> list[FloatArray]:
        """Class probabilities (S, K, C) of responses paired with their segments."""
        return self._probs([response for response, _ in pairs], [pieces for _, pieces in pairs])
