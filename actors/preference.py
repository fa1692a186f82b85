"""The reward role with one number for a whole answer: Fact-RLHF's preference model."""

from collections.abc import Sequence
from pathlib import Path

import torch

from actors.progress import advance
from actors.settings import BackboneSettings
from fgaif.data.captions import ImageCaptions
from fgaif.errors import CheckpointError
from fgaif.lvlm.features import FeatureCache
from fgaif.lvlm.model import resolve_checkpoint
from fgaif.reward.inputs import load_reward_encoder
from fgaif.reward.preference_model import (
    PREFERENCE,
    PreferenceEncoder,
    answer_rewards,
    load_preference_model,
    read_preference_card,
)
from fgaif.types import Response, Segment


class PreferenceActor:
    """Scores answers; ``rewards_dir`` is RUN/rewards. Whether it reads captions says its card."""

    def __init__(self, rewards_dir: Path, config: BackboneSettings) -> None:
        backbone = resolve_checkpoint(config.reward_backbone)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        card = read_preference_card(rewards_dir / PREFERENCE)
        source = config.reward.captions
        if (card.captions is None) != (source is None):
            raise CheckpointError(
                f"{rewards_dir / PREFERENCE}: trained with captions {card.captions}, but "
                f"reward.captions = {source}; set the same, or train it again"
            )
        captions = None if source is None else ImageCaptions(source)
        shared = load_reward_encoder(
            backbone,
            resolve_checkpoint(config.policy.model),
            max_image_pixels=config.data.max_image_pixels,
        )
        self._encoder = PreferenceEncoder(shared, captions)
        self._model = load_preference_model(
            rewards_dir / PREFERENCE,
            backbone,
            dtype=config.policy.dtype,
            device=device,
            attention=config.policy.attention,
        )
        self._features = FeatureCache(self._model.backbone, shared.encoder)
        self._micro_batch = config.reward.micro_batch

    @torch.no_grad()
    def score_pairs(self, pairs: Sequence[tuple[Response, Sequence[Segment]]]) -> list[float]:
        """Reward of each response, in order; its segments do not matter."""
        responses = [response for response, _ in pairs]
        order = sorted(range(len(responses)), key=lambda index: len(responses[index].token_ids))
        found = [0.0] * len(responses)
        for start in range(0, len(order), self._micro_batch):
            chunk = order[start : start + self._micro_batch]
            texts = [responses[index] for index in chunk]
            advance(sum(len(response.token_ids) for response in texts))
            rewards = answer_rewards(self._model, self._encoder, self._features, texts)
            for index, reward in zip(chunk, rewards.tolist(), strict=True):
                found[index] = reward
        return found
