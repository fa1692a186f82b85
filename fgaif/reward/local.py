"""Train reward models in this process, with torch alone: for small data, and to look inside.

``fgaif train-reward`` trains the same models with Ray Train and DeepSpeed.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from fgaif.config import Config, RewardConfig
from fgaif.errors import ConfigError
from fgaif.lvlm.families.base import ImageFeatures
from fgaif.lvlm.features import FeatureCache
from fgaif.lvlm.model import load_lvlm, resolve_checkpoint
from fgaif.reward.checkpoint import checkpoint_digest, make_card, save_reward_model
from fgaif.reward.dataset import read_data
from fgaif.reward.inputs import load_reward_encoder, tokenizer_digest
from fgaif.reward.model import RewardModel, new_reward_model, trainable_state
from fgaif.reward.train import make_optimizer, planned_steps, train_reward_model
from fgaif.types import Kind, LabeledResponse


class PlainEngine:
    """One process, torch alone: what DeepSpeed does with one rank."""

    def __init__(
        self, model: RewardModel, config: RewardConfig, steps: int, rank: int = 0, world: int = 1
    ) -> None:
        self.rank, self.world_size = rank, world
        self.model, self._clip = model, config.max_grad_norm
        self._optimizer, self._schedule = make_optimizer(model, config, steps)
        self.steps = 0

    def __call__(self, input_ids: Tensor, features: ImageFeatures, separators: Tensor) -> Tensor:
        """See :class:`fgaif.reward.train.Engine`, here and below."""
        return self.model(input_ids, features, separators)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradient of ``loss``."""
        loss.backward()

    def step(self) -> None:
        """Clip, update, advance the learning rate, clear gradients."""
        trainable = [p for p in self.model.parameters() if p.requires_grad]
        torch.nn.utils.clip_grad_norm_(trainable, self._clip)
        self._optimizer.step()
        self._schedule.step()
        self._optimizer.zero_grad()
        self.steps += 1

    def state(self) -> dict[str, Tensor]:
        """Copy the trainable parameters to the CPU."""
        return trainable_state(self.model)

    def agree(self, value: float) -> float:
        """There is nobody to agree with."""
        return value


def train_rewards(
    rows: Sequence[LabeledResponse],
    folder: str | Path,
    config: Config,
    *,
    device: str | None = None,
    report: Callable[[Kind, int, int, dict[str, float]], None] = lambda *_: None,
) -> dict[Kind, dict[str, float]]:
    """Train a reward model of each kind, one after another; ``load_rewards`` loads the folder.

    Args:
        rows: labelled responses of at least two images.
        folder: gets a folder of each kind; older ones are replaced.
        config: its sections ``reward``, ``policy``, ``data``, ``segment`` and ``seed``.
        device: such as ``cpu`` or ``cuda:1``; default: a GPU if there is one.
        report: told kind, steps done, steps planned and figures.

    Returns:
        by kind, the figures on the images held out.

    Raises:
        DataError: too little is labelled, or training diverged.
        ConfigError: ``policy.dtype`` is not float32, which plain AdamW needs, or ``reward.form`` is
            not ``segment``.
    """
    if config.reward.form != "segment":
        raise ConfigError(
            f"reward.form = {config.reward.form!r}: this trains a model of each kind; use `fgaif "
            "train-reward` for one of preferences"
        )
    if config.policy.dtype != "float32":
        raise ConfigError(
            f"policy.dtype = {config.policy.dtype!r}: this trains in float32 alone; set it to "
            "float32, or use `fgaif train-reward`, which keeps a float32 copy of what it trains"
        )
    path = resolve_checkpoint(config.reward_backbone)
    encoder = load_reward_encoder(
        path,
        resolve_checkpoint(config.policy.model),
        **config.data.image_limits,
    )
    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    backbone = load_lvlm(path, device=where, attention=config.policy.attention)
    features = FeatureCache(backbone, encoder.encoder)
    backbone_digest = checkpoint_digest(path)
    vocabulary = tokenizer_digest(encoder.encoder.tokenizer)
    settings, found = config.reward, {}
    kinds = config.kind_names
    for number, kind in enumerate(kinds):
        data = read_data(kind, rows, config)
        seed = config.seed * len(kinds) + number
        model = new_reward_model(backbone, settings.lora, settings.head, seed)
        engine = PlainEngine(model, settings, planned_steps(len(data.train), settings))
        with torch.random.fork_rng():
            torch.manual_seed(seed)  # of dropout
            result = train_reward_model(
                data, model, engine, encoder, features, settings,
                seed=seed, report=lambda *told, kind=kind: report(kind, *told),
            )  # fmt: skip
        found[kind] = result.metrics.as_floats() | {"val_loss": result.val_loss}
        card = make_card(
            kind,
            config,
            data,
            backbone_digest=backbone_digest,
            tokenizer_digest=vocabulary,
            input_digest="",  # equal to no other's: `fgaif train-reward` trains anew
            metrics=found[kind],
        )
        save_reward_model(Path(folder) / kind, model, result.state, card)
        model.backbone.unload()
    return found
