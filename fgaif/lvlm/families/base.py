"""What must be known of a family of models, and what most families have in common.

All of fgaif reads a model through the functions of its ``Family``; CONTRIBUTING.md tells how one is
added. Names of parameters and modules are those that transformers has in memory
(``model.language_model.layers.0...``) unless they are called public.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from fgaif.errors import CheckpointError, ConfigError
from fgaif.types import Json

Pixels = Mapping[str, NDArray[Any]]
"""One preprocessed image: arrays by the names that transformers has for them, floats and integers.
Several images of a batch are joined along the first axis."""
Tensors = Mapping[str, Tensor]
"""The same on the model's device and in its dtype."""


class Shown(Protocol):
    """An image that is looked at no further than is asked."""

    def size(self) -> tuple[int, int]:
        """Height and width, from the file's header."""
        ...

    def pixels(self) -> Pixels:
        """The preprocessed arrays."""
        ...


LORA_LEAVES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageFeatures:
    """What the language model gets for I images, in order.

    ``rows`` (N, W) hold all of their image tokens; W may be a multiple of the model's width where
    several layers get a share. ``grids`` (I, 3) are each image's patches in time, height and width,
    for families whose positions depend on them.
    """

    rows: Tensor
    grids: Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class VisionFacts:
    """What memory depends on, for the largest image that a checkpoint takes.

    ``image_tokens`` of the language model; ``pixel_values`` of the preprocessed image; ``tokens``
    of the vision tower, and its ``hidden`` and ``ffn`` width and ``layers``.
    """

    image_tokens: int
    pixel_values: int
    tokens: int
    hidden: int
    ffn: int
    layers: int


def tower_facts(
    config: Any, *, image_tokens: int, tiles: int = 1, class_tokens: int = 0
) -> VisionFacts:
    """Of a tower that sees square tiles, all of an image's at once; ``class_tokens`` has each tile
    beside its patches."""
    vision = config.vision_config
    patches = (vision.image_size // vision.patch_size) ** 2
    return VisionFacts(
        image_tokens=image_tokens,
        pixel_values=tiles * 3 * vision.image_size**2,
        tokens=tiles * (patches + class_tokens),
        hidden=vision.hidden_size,
        ffn=vision.intermediate_size,
        layers=vision.num_hidden_layers,
    )


def check_feature_strategy(processor: Any, config: Any) -> None:
    """Hold the processor's ``vision_feature_select_strategy`` against the model's.

    Raises:
        CheckpointError: they are not the same.
    """
    strategy = config.vision_feature_select_strategy
    if processor.vision_feature_select_strategy != strategy:
        raise CheckpointError(
            "processor_config.json: vision_feature_select_strategy = "
            f"{processor.vision_feature_select_strategy!r}, but config.json has {strategy!r}; set "
            f"it to {strategy!r}"
        )


def join_features(parts: Sequence[ImageFeatures]) -> ImageFeatures:
    """Features of several images as one."""
    grids = [part.grids for part in parts if part.grids is not None]
    return ImageFeatures(
        rows=torch.cat([part.rows for part in parts]), grids=torch.cat(grids) if grids else None
    )


def preprocess(processor: Any, image: Image.Image) -> Pixels:
    """All arrays that the image processor makes of one image."""
    made = processor.image_processor(images=[image], return_tensors="np")
    return {name: np.asarray(value) for name, value in made.items()}


def expand(processor: Any, config: Any, image: Shown) -> str:
    """What transformers' processor itself writes for an image, which it must preprocess first."""
    text: str = processor.replace_image_token(image.pixels(), 0)
    return text


def image_token(processor: Any) -> str:
    """What a rendered chat template holds once for each image."""
    token: str = processor.image_token
    return token


def no_positions(model: Any, input_ids: Tensor, features: ImageFeatures) -> dict[str, Any]:
    """The language model counts tokens by itself."""
    return {}


def nothing_to_check(processor: Any, config: Any) -> None:
    """There is nothing beyond what is checked of every checkpoint."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """A family of models. Functions are given processors, configurations and models of
    transformers."""

    name: str
    """As people write it."""
    model_types: tuple[str, ...]
    """``model_type`` of the config.json files that belong to it."""
    public: tuple[tuple[str, str], ...]
    """Prefixes of parameter names in memory, and in published checkpoints."""
    features: Callable[[Any, Sequence[Tensors]], list[ImageFeatures]]
    """Image features from model and images, one for each. Vision tower and projector are frozen."""
    vision: Callable[[Any, int | None], VisionFacts]
    """What an image costs at most, from the configuration and the bound on its pixels."""
    language: str = "model.language_model"
    """The language model: LoRA goes there and nowhere else."""
    tower: str = "model.vision_tower"
    """What turns pixels into features; frozen."""
    projector: str | None = "model.multi_modal_projector"
    """What turns those into the language model's space, where it is a module of its own."""
    loose: tuple[str, ...] = ()
    """Parameters beside these modules that image features depend on."""
    preprocess: Callable[[Any, Image.Image], Pixels] = preprocess
    """An image's arrays, from the processor and the decoded image."""
    expand: Callable[[Any, Any, Shown], str] = expand
    """What the placeholder becomes in a prompt's text, from processor, configuration, image."""
    image_token: Callable[[Any], str] = image_token
    """The placeholder of one image in a rendered chat template, from the processor."""
    written: Callable[[Any], str] = image_token
    """The placeholder in a text without a chat template, with what belongs around it."""
    positions: Callable[[Any, Tensor, ImageFeatures], dict[str, Any]] = no_positions
    """What the language model is told beside the embeddings, from model, ids (B, L), features."""
    bound: Callable[[int], Json] | None = None
    """Settings of the image processor that shrink larger images to so many pixels; None where
    images are of one size or tiled."""
    check: Callable[[Any, Any], None] = nothing_to_check
    """Raise CheckpointError where processor and configuration do not fit together."""
    serves_adapters: bool = True
    """Whether vLLM serves LoRA adapters on such a model; else engines merge them."""
    unprojected: Callable[[Any, Sequence[Tensors]], list[ImageFeatures]] | None = None
    """What a projector in training is given, from model and images; None where it stays frozen.
    Rows may be cut into tiles (tiles, tokens, W), to be joined along the first axis."""
    project: Callable[[Any, ImageFeatures], ImageFeatures] | None = None
    """Project those, with gradient."""

    @property
    def lora_targets(self) -> str:
        """Pattern of the linear layers that LoRA adapts.

        Anchored: short names such as "q_proj" also match vision towers, where engines would ignore
        them without a word.
        """
        part = self.language.rpartition(".")[2]
        return rf".*{part}\..*\.({'|'.join(LORA_LEAVES)})"

    def is_language(self, name: str) -> bool:
        """Whether a parameter or module belongs to the language model or its head."""
        return name.startswith((f"{self.language}.", "lm_head."))

    def public_name(self, name: str) -> str:
        """The name of a parameter, or of its module, in published checkpoints.

        Raises:
            CheckpointError: the name belongs to no part of such a model.
        """
        for prefix, public in self.public:
            if name.startswith(prefix):
                return public + name.removeprefix(prefix)
        raise CheckpointError(f"weight {name!r} belongs to no part of a {self.name} model")

    def public_of_file(self, name: str) -> str:
        """The public name of a tensor in a checkpoint's file, which may have the name in memory."""
        return next(
            (out + name.removeprefix(held) for held, out in self.public if name.startswith(held)),
            name,
        )

    def require_projector(self) -> str:
        """The projector, to be trained.

        Raises:
            ConfigError: of this family it stays frozen.
        """
        if self.projector is None or self.project is None:
            raise ConfigError(
                f"policy.train_projector: the projector of {self.name} models stays frozen; set it "
                "to false"
            )
        return self.projector


def require_served_adapters(family: Family) -> None:
    """See that engines may serve adapters unmerged on models of a family.

    Raises:
        ConfigError: vLLM has no LoRA for it.
    """
    if not family.serves_adapters:
        raise ConfigError(
            f"cluster.engine.adapters: vLLM serves no adapters on {family.name} models; set it to "
            "merged (docs/precision.md says what that costs in bfloat16)"
        )


def projected(model: Any, tensors: Tensors) -> Tensor:
    """``get_image_features`` of one image: its rows (N, W)."""
    rows = model.get_image_features(**tensors, return_dict=True).pooler_output
    return torch.cat(list(rows)) if isinstance(rows, list | tuple) else rows.flatten(0, -2)


def into_projector(model: Any, projector: str, tensors: Tensors) -> Tensor:
    """What ``get_image_features`` of one image gives its projector: (tiles, tokens, width)."""
    given: list[Tensor] = []
    module = model.get_submodule(projector)
    hook = module.register_forward_pre_hook(lambda _, arguments: given.append(arguments[0]))
    try:
        model.get_image_features(**tensors, return_dict=True)
    finally:
        hook.remove()
    return given[0]


def tile_features(
    model: Any, images: Sequence[Tensors], *, tensors: Callable[[Tensors], Tensors]
) -> list[ImageFeatures]:
    """Features of images one by one; ``tensors`` are what the model is called with for one."""
    return [ImageFeatures(rows=projected(model, tensors(image))) for image in images]


def tile_inputs(
    model: Any, images: Sequence[Tensors], *, projector: str, tensors: Callable[[Tensors], Tensors]
) -> list[ImageFeatures]:
    """What a projector in training is given for each of the images."""
    return [
        ImageFeatures(rows=into_projector(model, projector, tensors(image))) for image in images
    ]


def project_tiles(model: Any, features: ImageFeatures, *, projector: str) -> ImageFeatures:
    """Rows (tiles, tokens, width) of :func:`tile_inputs` in the language model's space."""
    return ImageFeatures(rows=model.get_submodule(projector)(features.rows).flatten(0, -2))


def pixels_alone(image: Tensors) -> Tensors:
    """Of an image's tensors only the pixels."""
    return {"pixel_values": image["pixel_values"]}
