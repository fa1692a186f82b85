"""Which shape the service's rewards have: that of the models' cards or of the configuration."""

from collections.abc import Sequence

from fgaif.config import Config, RewardShapeConfig
from fgaif.reward.checkpoint import RewardCard, common_shape
from fgaif.serving.schema import ShapeSource

_SOURCES = {
    "card": "the ppo.shape in the models' cards",
    "default": "the default ppo.shape (the models' cards are of a version that stored none)",
    "config": "the configuration's ppo.shape",
}


def served_shape(
    cards: Sequence[RewardCard], config: Config
) -> tuple[RewardShapeConfig, ShapeSource]:
    """The shape and where it is from, as ``serve.shape`` says.

    Raises:
        CheckpointError: it is to be from the cards, which name different ones.
    """
    if config.serve.shape == "config":
        return config.ppo.shape, "config"
    return common_shape(cards), "card" if any(card.shape for card in cards) else "default"


def shape_note(cards: Sequence[RewardCard], config: Config) -> str:
    """Sentence that says which shape is served, and where the configuration's is another."""
    shape, source = served_shape(cards, config)
    served, own = (
        each.resolved(config.kind_names).model_dump() for each in (shape, config.ppo.shape)
    )
    differ = ", ".join(f"{key} {own[key]}" for key in served if served[key] != own[key])
    other = f"; the configuration differs: {differ} (serve.shape=config takes it)" if differ else ""
    return f"rewards: {_SOURCES[source]}{other}"
