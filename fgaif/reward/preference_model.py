"""Fact-RLHF's reward model: one number for a whole answer, read at its end.

    <prompt by the chat template, with the image> <answer> <judging prompt, captions> </s>

The judging prompt says what a good answer is; with factual augmentation (Sun et al., arXiv
2309.14525) captions of the image follow, by which the answer is to be supported. The number is a
linear head's on the last hidden state of ``</s>``. The wording is ours.
"""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors.torch import save_file
from torch import Tensor, nn

from fgaif.config import LoraConfig
from fgaif.data.captions import ImageCaptions
from fgaif.errors import CheckpointError, DataError
from fgaif.lvlm.checkpoint_files import read_tensors
from fgaif.lvlm.features import FeatureCache
from fgaif.lvlm.inputs import pad_rows
from fgaif.lvlm.model import attach_lora, base_of, load_adapter, load_lvlm
from fgaif.reward.checkpoint import HEAD, checkpoint_digest
from fgaif.reward.inputs import RewardEncoder, RewardInputs
from fgaif.reward.model import RewardModel
from fgaif.types import Response

PREFERENCE = "preference"
"""Folder of the model below RUN/rewards."""
PREFERENCE_CARD = "preference.json"
JUDGE = "\nIs the answer accurate, helpful and short?"
SUPPORTED = " It must be supported by:"


class PreferenceCard(BaseModel):
    """What a preference reward model is and what it was made from."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    backbone: str
    """Directory of the backbone when the model was trained; for people, not checked."""
    backbone_digest: str
    """`checkpoint_digest` of the backbone; checked on loading."""
    captions: str | None
    """`reward.captions`: the model reads captions, and scores nothing without them."""
    input_digest: str
    """Digest of everything the training depended on; equal inputs need no second training."""
    pairs: dict[str, int]
    """Pairs of training and validation, and what was left out."""
    metrics: dict[str, float]
    """On the images held out."""


class PreferenceEncoder:
    """Lays out answers for the model; ``captions`` None is without factual augmentation."""

    def __init__(self, encoder: RewardEncoder, captions: ImageCaptions | None) -> None:
        self.encoder = encoder.encoder
        self._reads_policy_ids = encoder.reads_policy_ids
        self._captions = captions
        self._end = int(self.encoder.tokenizer.eos_token_id)

    def row(self, response: Response) -> list[int]:
        """Ids of one answer.

        Raises:
            DataError: the image has no captions, or the answer holds the image placeholder.
        """
        ids = self._answer_ids(response)
        if self.encoder.image_token_id in ids:
            raise DataError(f"response {response.id}: holds the image placeholder")
        judged = self.encoder.tokenizer(self.judging(response), add_special_tokens=False)
        return [
            *self.encoder.prompt_ids(response.prompt), *ids, *judged["input_ids"], self._end
        ]  # fmt: skip

    def judging(self, response: Response) -> str:
        """The judging prompt of an answer, with the captions of its image."""
        if self._captions is None:
            return JUDGE
        captions = self._captions.of(response.prompt.image)
        if not captions:
            raise DataError(f"no captions of {response.prompt.image.path}; see reward.captions")
        return self.encoder.plain(" ".join([JUDGE + SUPPORTED, *captions]))

    def encode(self, responses: Sequence[Response], device: torch.device) -> RewardInputs:
        """Right-pad a batch; the one separator of each row is its last token."""
        rows = [self.row(response) for response in responses]
        ends = torch.tensor([(index, len(row) - 1) for index, row in enumerate(rows)])
        return RewardInputs(
            input_ids=pad_rows(rows, self.encoder.pad_id).to(device),
            separators=ends.view(-1, 2).to(device),
        )

    def _answer_ids(self, response: Response) -> list[int]:
        if self._reads_policy_ids:
            ids: list[int] = response.token_ids.tolist()
            return ids[:-1] if response.finish == "stop" else ids
        text = self.encoder.plain(response.text)
        return list(self.encoder.tokenizer(text, add_special_tokens=False)["input_ids"])


def new_preference_model(backbone: nn.Module, lora: LoraConfig, seed: int) -> RewardModel:
    """Put a fresh adapter and a head of one output on a frozen backbone."""
    weight = base_of(backbone).get_input_embeddings().weight
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        head = _head(weight.shape[1])
    return RewardModel(attach_lora(base_of(backbone), lora, seed), head.to(weight.device))


class _ScalarHead(nn.Linear):
    """Computes and learns in float32, whatever the backbone's dtype."""

    def forward(self, hidden: Tensor) -> Tensor:
        return super().forward(hidden.float())


def _head(width: int) -> nn.Linear:
    head = _ScalarHead(width, 1)
    nn.init.zeros_(head.bias)
    return head


def answer_rewards(
    model: RewardModel,
    encoder: PreferenceEncoder,
    features: FeatureCache,
    responses: Sequence[Response],
) -> Tensor:
    """Rewards (B,) of answers, in float32, with a graph where gradients are on."""
    device = next(model.parameters()).device
    batch = encoder.encode(responses, device)
    pictures = features([response.prompt.image for response in responses])
    rewards: Tensor = model(batch.input_ids, pictures, batch.separators)[:, 0]
    return rewards


def save_preference_model(
    directory: Path, model: RewardModel, state: dict[str, Tensor], card: PreferenceCard
) -> None:
    """Write adapter, head and card beside ``directory`` and rename; an older one is replaced."""
    aside = directory.with_name(f".{directory.name}.{os.getpid()}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    parts = {
        part: {
            name.removeprefix(part): tensor.contiguous()
            for name, tensor in state.items()
            if name.startswith(part)
        }
        for part in ("backbone.", "head.")
    }
    model.backbone.save_pretrained(
        aside, state_dict=parts["backbone."], save_embedding_layers=False
    )
    save_file(parts["head."], aside / HEAD)
    (aside / PREFERENCE_CARD).write_text(card.model_dump_json(indent=2) + "\n", encoding="utf-8")
    shutil.rmtree(directory, ignore_errors=True)
    aside.rename(directory)


def read_preference_card(directory: Path) -> PreferenceCard:
    """Read and check ``preference.json``.

    Raises:
        CheckpointError: missing or not valid.
    """
    file = directory / PREFERENCE_CARD
    try:
        return PreferenceCard.model_validate_json(file.read_bytes())
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{file} does not exist; train it with `fgaif train-reward --form preference`"
        ) from error
    except (OSError, ValidationError) as error:
        raise CheckpointError(f"{file}: not the card of a preference model: {error}") from error


def load_preference_model(
    directory: Path, backbone: Path, *, dtype: str, device: str = "cpu", attention: str = "sdpa"
) -> RewardModel:
    """Load a preference model for inference, its adapter merged into the backbone.

    Raises:
        CheckpointError: card, adapter or head is missing or does not fit the backbone.
    """
    card, digest = read_preference_card(directory), checkpoint_digest(backbone)
    if card.backbone_digest != digest:
        raise CheckpointError(
            f"{directory}: trained on {card.backbone} (digest {card.backbone_digest[:12]}), but "
            f"{backbone} has digest {digest[:12]}; set reward.backbone to the checkpoint it was "
            "trained on, or train it again"
        )
    model = load_lvlm(backbone, dtype=dtype, device=device, attention=attention)
    merged = load_adapter(model, directory).merge_and_unload()
    head = _head(base_of(merged).get_input_embeddings().weight.shape[1])
    try:
        head.load_state_dict(read_tensors(directory / HEAD))
    except RuntimeError as error:
        raise CheckpointError(f"{directory / HEAD}: does not fit: {error}") from error
    return RewardModel(merged, head.to(device)).eval().requires_grad_(False)
