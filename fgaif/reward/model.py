"""Reward models: a backbone with LoRA and a 3-class head read at every segment's end."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np
import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from fgaif.lvlm.families.base import ImageFeatures
from fgaif.lvlm.features import FeatureCache
from fgaif.lvlm.model import attach_lora, base_of, last_hidden
from fgaif.reward.inputs import RewardEncoder
from fgaif.types import FloatArray, Response, Segment, SegmentClass

if TYPE_CHECKING:
    from fgaif.config import LoraConfig

HeadType = Literal["linear", "mlp"]


class SegmentModel(Protocol):
    """Anything that gives logits (N, \\*, C) for the N separators of a batch."""

    score_shape: tuple[int, ...]

    def __call__(self, input_ids: Tensor, features: ImageFeatures, separators: Tensor) -> Tensor:
        """Logits for ``input_ids`` (B, L), the images' ``features``, ``separators`` (N, 2)."""
        ...


class RewardModel(nn.Module):
    """Class logits of one kind. The head's bias starts at zero, as in the reference."""

    score_shape = (len(SegmentClass),)

    def __init__(self, backbone: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(self, input_ids: Tensor, features: ImageFeatures, separators: Tensor) -> Tensor:
        """Return float32 logits (N, C) at ``separators`` (N, 2), rows of (batch row, column)."""
        hidden = last_hidden(self.backbone, input_ids, features)
        return self.head(hidden[separators[:, 0], separators[:, 1]]).float()


class SharedRewardModels(nn.Module):
    """All kinds on one backbone: an adapter and a head for each, image features used once.

    Needs the memory of one backbone and gives the same scores as a model for each kind; the
    adapters take turns, so they are not merged. ``adapters`` names those of the kinds, in order.
    """

    def __init__(
        self, backbone: PeftModel, adapters: Sequence[str], heads: Sequence[nn.Module]
    ) -> None:
        super().__init__()
        self.score_shape = (len(heads), len(SegmentClass))
        self.backbone = backbone
        self.adapters = tuple(adapters)
        self.heads = nn.ModuleList(heads)
        # PEFT's own set_adapter searches the whole model, a third of the time of a short text.
        self._adapted = [part for part in backbone.modules() if isinstance(part, BaseTunerLayer)]

    def forward(self, input_ids: Tensor, features: ImageFeatures, separators: Tensor) -> Tensor:
        """Return float32 logits (N, K, C)."""
        logits = []
        for adapter, head in zip(self.adapters, self.heads, strict=True):
            for layer in self._adapted:
                layer.set_adapter(adapter, inference_mode=True)
            hidden = last_hidden(self.backbone, input_ids, features)
            logits.append(head(hidden[separators[:, 0], separators[:, 1]]).float())
        return torch.stack(logits, dim=1)


def new_reward_model(
    backbone: nn.Module, lora: "LoraConfig", head: HeadType, seed: int
) -> RewardModel:
    """Put a fresh adapter and head on a frozen backbone; only these two are trainable."""
    weight = base_of(backbone).get_input_embeddings().weight
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        fresh = make_head(head, weight.shape[1])
    return RewardModel(
        attach_lora(base_of(backbone), lora, seed), fresh.to(weight.device, weight.dtype)
    )


def make_head(head: HeadType, width: int) -> nn.Module:
    """Build a head for hidden states of ``width``: one linear layer, or one hidden layer more."""
    last = nn.Linear(width, len(SegmentClass))
    nn.init.zeros_(last.bias)
    return last if head == "linear" else nn.Sequential(nn.Linear(width, width), nn.GELU(), last)


def trainable_state(model: nn.Module) -> dict[str, Tensor]:
    """Copy the trainable parameters to the CPU, by name."""
    return {
        name: parameter.detach().to("cpu", copy=True)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


@torch.no_grad()
def segment_probs(
    model: SegmentModel,
    encoder: RewardEncoder,
    features: FeatureCache,
    responses: Sequence[Response],
    segments: Sequence[Sequence[Segment]],
    *,
    micro_batch: int,
    device: torch.device,
    advance: Callable[[int], None] = lambda _: None,
) -> list[FloatArray]:
    """Class probabilities (S, C), or (S, K, C) from shared models, of each response in order.

    Responses of similar length share a forward pass, which wastes little on padding; the result
    does not depend on the order. A response without segments gives no rows. ``advance`` is told the
    tokens of each pass before it.
    """
    probs = [np.zeros((0, *model.score_shape), dtype=np.float32)] * len(responses)
    order = sorted(
        (index for index, pieces in enumerate(segments) if pieces),
        key=lambda index: len(responses[index].token_ids),
    )
    for start in range(0, len(order), micro_batch):
        chunk = order[start : start + micro_batch]
        texts = [responses[index] for index in chunk]
        advance(sum(len(response.token_ids) for response in texts))
        batch = encoder.encode(texts, [segments[index] for index in chunk], device)
        pictures = features([response.prompt.image for response in texts])
        logits = model(batch.input_ids, pictures, batch.separators)
        flat = logits.softmax(-1).cpu().numpy()
        cuts = np.cumsum([len(segments[index]) for index in chunk])[:-1]
        for index, rows in zip(chunk, np.split(flat, cuts), strict=True):
            probs[index] = rows
    return probs
