"""FGAIF: fine-grained AI feedback for vision-language models (arXiv 2404.05046).

What stands in ``__all__`` is the Python API, see docs/library.md. Every name is imported when it is
first used, so that ``import fgaif`` takes no time and needs no torch; ``__init__.pyi`` tells type
checkers and editors what each is.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "fgaif.client": ("RewardClient",),
    "fgaif.config": ("Config", "RewardShapeConfig", "load_config"),
    "fgaif.errors": ("FgaifError",),
    "fgaif.feedback.annotate": ("label_response",),
    "fgaif.feedback.external": ("make_response",),
    "fgaif.feedback.segment": ("segment_response", "split"),
    "fgaif.lvlm.model": ("load_lvlm", "load_processor"),
    "fgaif.pipeline": ("run",),
    "fgaif.ppo.advantages": ("gae",),
    "fgaif.reward.dense": ("RewardCenters", "dense_rewards"),
    "fgaif.reward.local": ("train_rewards",),
    "fgaif.serving.rewards": ("Rewards", "TextScores", "load_rewards"),
    "fgaif.types": ("LabeledResponse", "Response", "Segment", "SegmentScores"),
}
_MODULES = {name: module for module, names in _HOMES.items() for name in names}

__all__ = ["__version__", *sorted(_MODULES)]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_MODULES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
