"""One copy of a base model's weights for everything in a process that runs it."""

import copy
import threading
from itertools import chain
from pathlib import Path

from transformers import PreTrainedModel

from fgaif.lvlm.features import FeatureCache
from fgaif.lvlm.inputs import Encoder
from fgaif.lvlm.model import load_lvlm


class BaseModels:
    """The base models of a process: each checkpoint's frozen weights are loaded once.

    Whoever asks gets modules of its own over them, and can put an adapter, a head or hooks on them
    that others do not see; several may compute at the same time, in threads. Image features are
    computed once for all as well. Weights that somebody shares must not be changed in place:
    adapters are not merged into them, and ZeRO-3 does not divide them.
    """

    def __init__(self) -> None:
        self._loaded: dict[tuple[Path, str, str, str, str], PreTrainedModel] = {}
        self._features: dict[tuple[int, bool], FeatureCache] = {}
        self._lock = threading.Lock()

    def load(
        self,
        path: Path,
        *,
        dtype: str = "float32",
        device: str = "cpu",
        attention: str = "sdpa",
        quantization: str = "none",
    ) -> PreTrainedModel:
        """As `fgaif.lvlm.model.load_lvlm`, on the weights that are here already."""
        key = (path, dtype, device, attention, quantization)
        with self._lock:
            if key not in self._loaded:
                self._loaded[key] = load_lvlm(
                    path,
                    dtype=dtype,
                    device=device,
                    attention=attention,
                    quantization=quantization,
                )
            return with_own_modules(self._loaded[key])

    def features(
        self, model: PreTrainedModel, encoder: Encoder, *, projected: bool = True
    ) -> FeatureCache:
        """The cache of image features of all that share this model's weights."""
        key = (id(model.get_input_embeddings().weight), projected)
        with self._lock:
            if key not in self._features:
                self._features[key] = FeatureCache(model, encoder, projected=projected)
            return self._features[key]


def with_own_modules(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of the modules over the same parameters and buffers."""
    kept = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
    return copy.deepcopy(model, kept)
