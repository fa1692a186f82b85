"""Image features of a frozen vision tower, computed once per image."""

import threading
from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import nn

from fgaif.lvlm.families.base import ImageFeatures, join_features
from fgaif.lvlm.inputs import Encoder
from fgaif.lvlm.model import base_of, image_features, model_family, vision_features
from fgaif.types import ImageRef

_LIMIT_BYTES = 2**30


def set_vision_aside(model: nn.Module, *, projector: bool) -> None:
    """Take the vision tower, and with ``projector`` the projector, out of the model's modules.

    They stay where the model calls them, but what shards a model's parameters over ranks passes
    them by. The caches of two ranks miss different images, and a forward pass of sharded weights
    that only one rank makes hangs for ever.
    """
    family = model_family(model)
    paths = [family.tower, *family.loose]
    paths += [family.projector] if projector and family.projector else []
    for path in paths:
        owner, _, name = path.rpartition(".")
        parent = base_of(model).get_submodule(owner)
        part = getattr(parent, name)
        delattr(parent, name)
        parent.__dict__[name] = part  # an attribute set in the usual way would be a module again


class FeatureCache:
    """Features by image content, in host memory up to a limit; the least recently used go first.

    Projected ones, or those that a projector in training is given. Threads may share it.
    """

    def __init__(
        self,
        model: nn.Module,
        encoder: Encoder,
        *,
        projected: bool = True,
        limit_bytes: int = _LIMIT_BYTES,
    ) -> None:
        self._compute = image_features if projected else vision_features
        self._model = model
        self._encoder = encoder
        self._like = base_of(model).get_input_embeddings().weight
        self._free = limit_bytes
        self._kept: OrderedDict[str, ImageFeatures] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, images: Sequence[ImageRef]) -> ImageFeatures:
        """Features of the images, in order, on the model's device."""
        with self._lock:
            found = self._found(images)
        device = self._like.device
        return join_features([moved(found[image.sha256], device) for image in images])

    def __len__(self) -> int:
        return len(self._kept)

    def _found(self, images: Sequence[ImageRef]) -> dict[str, ImageFeatures]:
        wanted = {image.sha256: image for image in images}
        missing = [image for digest, image in wanted.items() if digest not in self._kept]
        found = {digest: self._kept[digest] for digest in wanted if digest in self._kept}
        if missing:
            fresh = [each for part in self._parts(missing) for each in self._fresh(part)]
            found |= {image.sha256: each for image, each in zip(missing, fresh, strict=True)}
        for digest, features in found.items():
            self._keep(digest, features)
        return found

    def _parts(self, images: list[ImageRef]) -> list[list[ImageRef]]:
        """What is computed together. Below float32 an image's features are rounded by how many
        others came along, and who those are depends on what was kept before: a run that is resumed
        has kept nothing."""
        if self._like.dtype == torch.float32:
            return [images]
        return [[image] for image in images]

    def _fresh(self, images: list[ImageRef]) -> list[ImageFeatures]:
        tensors = [self._encoder.tensors(image, self._like) for image in images]
        return self._compute(self._model, tensors)

    def _keep(self, digest: str, features: ImageFeatures) -> None:
        if digest in self._kept:
            self._kept.move_to_end(digest)
            return
        self._kept[digest] = moved(features, torch.device("cpu"), copy=True)
        self._free -= features.rows.nbytes
        while self._free < 0:
            self._free += self._kept.popitem(last=False)[1].rows.nbytes


def moved(features: ImageFeatures, device: torch.device, *, copy: bool = False) -> ImageFeatures:
    """The features on a device, of their own memory with ``copy``."""
    grids = features.grids
    return ImageFeatures(
        rows=features.rows.to(device, copy=copy),
        grids=None if grids is None else grids.to(device, copy=copy),
    )
