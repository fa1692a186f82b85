"""Saved reward models: a PEFT adapter directory with a head, a card, and checks on loading."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from peft import PeftModel
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from fgaif.config import Config, RewardShapeConfig
from fgaif.errors import CheckpointError
from fgaif.files import readable, write_whole
from fgaif.kinds import check_kinds
from fgaif.lvlm.adapters import check_adapter_loaded, read_adapter
from fgaif.lvlm.checkpoint_files import read_tensors
from fgaif.lvlm.hub import name_base, reference, split_name
from fgaif.lvlm.model import (
    base_of,
    check_adapter_anchored,
    load_adapter,
    load_lvlm,
    resolve_checkpoint,
)
from fgaif.reward.dataset import RewardData
from fgaif.reward.model import HeadType, RewardModel, SharedRewardModels, make_head
from fgaif.types import DEFAULT_KINDS, Kind, SegmentClass

CARD = "reward.json"
HEAD = "reward_head.safetensors"
CLASSES = tuple(c.name for c in SegmentClass)
_BLOCK = 2**20
_BLOCKS_PER_FILE = 64
_ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
SAVED_FILES = tuple(f"*/{name}" for name in (CARD, HEAD, *_ADAPTER))
"""Of a folder with a reward model of each kind."""
_VERSION_CHARS = 16


class NoiseCard(BaseModel):
    """Labels that were made wrong on purpose, training and validation images together."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    ok_to_hallu: float
    """Probability that an OK segment was labelled HALLU."""
    hallu_to_ok: float
    seed: int
    flipped_ok: int
    """OK segments that were labelled HALLU, of ``ok`` in all."""
    flipped_hallu: int
    ok: int
    hallu: int


class RewardCard(BaseModel):
    """What a reward model is and what it was made from; the content of ``reward.json``."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    kind: Kind
    kinds: tuple[Kind, ...] = DEFAULT_KINDS
    """All kinds of the run that it was trained in, in order; earlier versions named none."""
    head: HeadType
    classes: tuple[str, ...] = CLASSES
    """Order of the head's outputs."""
    backbone: str
    """Directory of the backbone when the model was trained, or its name and commit at the Hugging
    Face Hub; for people, not checked."""
    backbone_digest: str
    """`checkpoint_digest` of the backbone; checked on loading."""
    tokenizer_digest: str
    min_words: int
    """Splitting of the training data (segment.min_words)."""
    shape: RewardShapeConfig | None = None
    """`ppo.shape` of the training's configuration: what the service makes rewards with. Cards of
    earlier versions have none, which counts as the default shape."""
    image_pixels: int | None = None
    """`data.image_pixels` of the training: at which size it saw images."""
    input_digest: str
    """Digest of everything the training depended on; equal inputs need no second training."""
    noise: NoiseCard | None = None
    """Label noise of the training, if any; the metrics are measured with it."""
    metrics: dict[str, float]
    """On the images held out for early stopping."""


def checkpoint_digest(path: Path) -> str:
    """SHA-256 over a checkpoint's config and the content of its weight files.

    Files up to 64 MiB are read whole; of larger ones, 64 evenly spaced blocks of 1 MiB, which
    takes a second for any size and still tells a retrained checkpoint from its ancestor.
    """
    digest = hashlib.sha256((path / "config.json").read_bytes())
    for file in sorted(path.glob("*.safetensors")):
        size = file.stat().st_size
        digest.update(f"{file.name}:{size}".encode())
        blocks = min(_BLOCKS_PER_FILE, -(-size // _BLOCK))
        with file.open("rb") as stream:
            for index in range(blocks):
                stream.seek(index * (size - _BLOCK) // (blocks - 1) if blocks > 1 else 0)
                digest.update(stream.read(_BLOCK))
    return digest.hexdigest()


def make_card(
    kind: Kind,
    config: Config,
    data: RewardData,
    *,
    backbone_digest: str,
    tokenizer_digest: str,
    input_digest: str,
    metrics: dict[str, float],
) -> RewardCard:
    """The card of a reward model that was trained on ``data`` with this configuration."""
    return RewardCard(
        kind=kind,
        kinds=config.kind_names,
        head=config.reward.head,
        backbone=reference(resolve_checkpoint(config.reward_backbone)),
        backbone_digest=backbone_digest,
        tokenizer_digest=tokenizer_digest,
        min_words=config.segment.least_words,
        shape=config.ppo.shape,
        image_pixels=config.data.image_pixels,
        input_digest=input_digest,
        noise=_noise_card(kind, config, data),
        metrics=metrics,
    )


def _noise_card(kind: Kind, config: Config, data: RewardData) -> NoiseCard | None:
    noise, flips = config.reward.noise.get(kind), data.flips
    if noise is None or flips is None:
        return None
    return NoiseCard(
        ok_to_hallu=noise.rate_ok_to_hallu,
        hallu_to_ok=noise.rate_hallu_to_ok,
        seed=config.reward.noise_seed,
        flipped_ok=flips.ok_to_hallu,
        flipped_hallu=flips.hallu_to_ok,
        ok=flips.ok,
        hallu=flips.hallu,
    )


def save_reward_model(
    directory: Path, model: RewardModel, state: dict[str, Tensor], card: RewardCard
) -> None:
    """Write adapter, head and card beside ``directory`` and rename; an older one is replaced.

    ``state`` holds the trainable parameters by their names in ``model``.
    """
    aside = directory.with_name(f".{directory.name}.{os.getpid()}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    name_base(model.backbone, card.backbone)
    model.backbone.save_pretrained(aside, state_dict=_part(state, "backbone."))
    save_file(_part(state, "head."), aside / HEAD)
    (aside / "README.md").write_text(_readme(card), encoding="utf-8")
    (aside / CARD).write_text(card.model_dump_json(indent=2) + "\n", encoding="utf-8")
    readable(aside)
    shutil.rmtree(directory, ignore_errors=True)
    aside.rename(directory)


def read_card(directory: Path) -> RewardCard:
    """Read and check ``reward.json``.

    Raises:
        CheckpointError: missing, not valid, or of another class order.
    """
    file = directory / CARD
    if not file.is_file():
        raise CheckpointError(f"{file} does not exist; train it with `fgaif train-reward`")
    try:
        card = RewardCard.model_validate_json(file.read_bytes())
    except ValidationError as error:
        raise CheckpointError(f"{file}: not the card of a reward model: {error}") from error
    if card.classes != CLASSES:
        raise CheckpointError(f"{file}: classes {card.classes}, this version reads {CLASSES}")
    return card


def read_cards(directory: Path, kinds: Sequence[Kind]) -> dict[Kind, RewardCard]:
    """Read ``directory/KIND/reward.json`` of all kinds.

    Raises:
        CheckpointError: one is missing, not valid, or was trained among other kinds.
    """
    there = [kind for kind in kinds if (directory / kind / CARD).is_file()]
    cards = {kind: read_card(directory / kind) for kind in there}
    for kind, card in cards.items():  # before one that is missing: of other kinds it is bound to be
        check_kinds(directory / kind, card.kinds, kinds, CheckpointError)
    return {kind: cards.get(kind) or read_card(directory / kind) for kind in kinds}


def saved_kinds(directory: Path) -> tuple[Kind, ...]:
    """The kinds, in order, that the reward models under ``directory`` were trained for.

    Without any, those of FGAIF, which are then missing.

    Raises:
        CheckpointError: the only model there is one of preferences.
    """
    cards = sorted(directory.glob(f"*/{CARD}"))
    if not cards and (directory / "preference" / "preference.json").is_file():
        raise CheckpointError(
            f"{directory}: holds a preference model, which scores no sub-sentences; train reward "
            "models of kinds with `fgaif train-reward --form segment` in another run (name=NEW)"
        )
    return read_card(cards[0].parent).kinds if cards else DEFAULT_KINDS


def rewards_version(directory: Path, kinds: Sequence[Kind]) -> str:
    """Digest of the cards, adapters and heads of all kinds under ``directory``.

    Raises:
        CheckpointError: a file is missing.
    """
    digest = hashlib.sha256()
    for kind in kinds:
        for name in (CARD, HEAD, *_ADAPTER):
            file = directory / kind / name
            try:
                with file.open("rb") as stream:
                    part = hashlib.file_digest(stream, "sha256").digest()
            except OSError as error:
                raise CheckpointError(
                    f"{file}: {error.strerror}; give the folder that `fgaif train-reward` wrote, "
                    f"with {', '.join(kinds)} in it"
                ) from error
            digest.update(f"{kind}/{name}".encode() + part)
    return digest.hexdigest()[:_VERSION_CHARS]


def common_min_words(cards: Sequence[RewardCard]) -> int:
    """The splitting that all kinds were trained with.

    Raises:
        CheckpointError: they were trained with different ones.
    """
    found = {card.kind: card.min_words for card in cards}
    if len(set(found.values())) > 1:
        raise CheckpointError(
            f"reward models of different splitting (segment.min_words): {found}; train them again "
            "with one"
        )
    return cards[0].min_words


def common_image_pixels(cards: Sequence[RewardCard]) -> int | None:
    """The ``data.image_pixels`` that reward models were trained with.

    Raises:
        CheckpointError: they were trained with different ones.
    """
    found = {card.kind: card.image_pixels for card in cards}
    if len(set(found.values())) > 1:
        raise CheckpointError(
            f"reward models that saw images at different sizes (data.image_pixels): {found}; train "
            "them with one configuration"
        )
    return cards[0].image_pixels


def common_shape(cards: Sequence[RewardCard]) -> RewardShapeConfig:
    """The reward's shape that all cards name; the default shape where they name none.

    Raises:
        CheckpointError: they name different ones.
    """
    kinds = [card.kind for card in cards]
    shapes = {
        card.kind: (card.shape or RewardShapeConfig()).resolved(kinds).model_dump()
        for card in cards
    }
    first = next(iter(shapes.values()))
    for key in first:
        found = {kind: shape[key] for kind, shape in shapes.items()}
        if any(value != first[key] for value in found.values()):
            raise CheckpointError(
                f"reward models of different shapes of the reward (ppo.shape.{key}): {found}; run "
                "`fgaif train-reward` with one configuration, which writes it into all of them, or "
                "set serve.shape to config"
            )
    return cards[0].shape or RewardShapeConfig()


def record_shape(directory: Path, shape: RewardShapeConfig) -> None:
    """Write the reward's shape into the card of a finished reward model, if it is another."""
    card = read_card(directory)
    if card.shape != shape:
        told = card.model_copy(update={"shape": shape})
        write_whole(directory / CARD, told.model_dump_json(indent=2) + "\n")


def load_reward_model(
    directory: Path, backbone: Path, *, dtype: str, device: str = "cpu", attention: str = "sdpa"
) -> RewardModel:
    """Load a reward model for inference, its adapter merged into the backbone.

    Raises:
        CheckpointError: the card, adapter or head is missing or does not fit the backbone.
    """
    card = checked_card(directory, backbone)
    model = load_lvlm(backbone, dtype=dtype, device=device, attention=attention)
    merged = load_adapter(model, directory).merge_and_unload()
    return RewardModel(merged, _load_head(directory, card, merged)).eval().requires_grad_(False)


def load_shared_reward_models(
    directory: Path,
    backbone: Path,
    kinds: Sequence[Kind],
    load: Callable[..., PreTrainedModel] = load_lvlm,
    *,
    dtype: str,
    device: str = "cpu",
    attention: str = "sdpa",
) -> SharedRewardModels:
    """Load ``directory/KIND`` for all kinds onto one backbone, all in ``dtype``.

    ``load`` gives the backbone, whose modules must be the caller's own.

    Raises:
        CheckpointError: as ``load_reward_model``, for any kind.
    """
    cards = checked_cards(directory, backbone, kinds)
    model = load(backbone, dtype=dtype, device=device, attention=attention)
    # Not the bare kind: PyTorch refuses modules named like a method of theirs.
    adapters = {kind: f"kind_{kind}" for kind in kinds}
    # Of its own accord PEFT holds adapters of a bfloat16 model in float32: twice the memory, every
    # layer's input converted, and scores no nearer to those in float32.
    own = {"autocast_adapter_dtype": False}
    tensors = {kind: read_adapter(directory / kind)[1] for kind in kinds}
    try:
        first, *rest = adapters.items()
        shared = PeftModel.from_pretrained(
            model, directory / first[0], adapter_name=first[1], **own
        )
        for kind, name in rest:
            shared.load_adapter(str(directory / kind), adapter_name=name, **own)
    except (KeyError, OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{directory}: adapters do not fit: {error}") from error
    check_adapter_anchored(shared)
    for kind, name in adapters.items():
        check_adapter_loaded(shared, directory / kind, tensors[kind], name)
    heads = [_load_head(directory / kind, card, model) for kind, card in cards.items()]
    return SharedRewardModels(shared, list(adapters.values()), heads).eval().requires_grad_(False)


def checked_cards(directory: Path, backbone: Path, kinds: Sequence[Kind]) -> dict[Kind, RewardCard]:
    """Read the cards of all kinds for ``backbone``; raises CheckpointError as :func:`read_cards`
    and :func:`checked_card` do."""
    cards, digest = read_cards(directory, kinds), checkpoint_digest(backbone)
    for kind, card in cards.items():
        _check_card(directory / kind, card, backbone, digest)
    return cards


def checked_card(directory: Path, backbone: Path) -> RewardCard:
    """Read the card of ``.../KIND`` and check it against the backbone and the folder's name.

    Raises:
        CheckpointError: trained on another backbone, or of another kind.
    """
    card = read_card(directory)
    _check_card(directory, card, backbone, checkpoint_digest(backbone))
    return card


def _check_card(directory: Path, card: RewardCard, backbone: Path, digest: str) -> None:
    if card.kind != directory.name:
        raise CheckpointError(
            f"{directory}: holds the reward model of the kind {card.kind!r}; each kind's model "
            "belongs in the folder of its name: was it renamed or swapped with another?"
        )
    if card.backbone_digest != digest:
        raise CheckpointError(
            f"{directory}: trained on {card.backbone} (digest {card.backbone_digest[:12]}), but "
            f"{backbone} has digest {digest[:12]}; set reward.backbone to the checkpoint it was "
            "trained on, or train the reward models again"
        )


def _load_head(directory: Path, card: RewardCard, backbone: nn.Module) -> nn.Module:
    weight = base_of(backbone).get_input_embeddings().weight
    head = make_head(card.head, weight.shape[1])
    try:
        head.load_state_dict(read_tensors(directory / HEAD))
    except RuntimeError as error:
        raise CheckpointError(f"{directory / HEAD}: does not fit: {error}") from error
    return head.to(weight.device, weight.dtype)


def _part(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): tensor.contiguous()
        for name, tensor in state.items()
        if name.startswith(prefix)
    }


def _readme(card: RewardCard) -> str:
    figures = "\n".join(f"| {name} | {value:.4f} |" for name, value in card.metrics.items())
    return f"""---
library_name: peft
{_base_line(card.backbone)}tags: [fgaif, reward-model]
---
# FGAIF reward model: {card.kind}

LoRA adapter (PEFT) and a {card.head} head (`{HEAD}`) that classify each sub-sentence of a response
as {", ".join(card.classes)} with respect to its {card.kind} facts, read at the separator after the
sub-sentence. It fits only the backbone `{card.backbone}`, whose digest is in `{CARD}`. Load it with
`fgaif.load_rewards` on the folder above this one, or serve it with `fgaif serve --rewards`.

{_noise_note(card.noise)}Held-out images of the training data, labels by AI feedback:

| metric | value |
|---|---|
{figures}
"""


def _base_line(backbone: str) -> str:
    """The base as the hub's cards name it; none for what is not on the hub."""
    parts = split_name(backbone)
    return f"base_model: {json.dumps(parts[0])}\n" if parts else ""


def _noise_note(noise: NoiseCard | None) -> str:
    if noise is None:
        return ""
    return (
        f"Trained with label noise on purpose (seed {noise.seed}): of {noise.ok} OK segments "
        f"{noise.flipped_ok} labelled HALLU (rate {noise.ok_to_hallu}), of {noise.hallu} HALLU "
        f"segments {noise.flipped_hallu} labelled OK (rate {noise.hallu_to_ok}).\n\n"
    )
