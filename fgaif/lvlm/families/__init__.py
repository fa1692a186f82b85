"""The families of models that can be aligned: one module each, and one line here."""

import re
from typing import Any

from fgaif.errors import CheckpointError
from fgaif.lvlm.families.base import Family
from fgaif.lvlm.families.gemma3 import GEMMA3
from fgaif.lvlm.families.idefics3 import IDEFICS3
from fgaif.lvlm.families.internvl import INTERNVL
from fgaif.lvlm.families.llava import LLAVA, OLD_NAMES, in_original_layout
from fgaif.lvlm.families.llava_next import LLAVA_NEXT
from fgaif.lvlm.families.llava_onevision import LLAVA_ONEVISION
from fgaif.lvlm.families.qwen3_vl import QWEN3_VL
from fgaif.lvlm.families.qwen_vl import QWEN_VL

FAMILIES: tuple[Family, ...] = (
    *(LLAVA, LLAVA_NEXT, LLAVA_ONEVISION, QWEN_VL, QWEN3_VL),
    *(IDEFICS3, INTERNVL, GEMMA3),
)

__all__ = (
    "FAMILIES",
    "OLD_NAMES",
    "family_of",
    "family_of_type",
    "in_memory",
    "in_original_layout",
)

_BY_TYPE = {model_type: family for family in FAMILIES for model_type in family.model_types}
LANGUAGE_PARTS = tuple(dict.fromkeys(each.language.rpartition(".")[2] for each in FAMILIES))
PROJECTOR_PARTS = tuple(
    dict.fromkeys(each.projector.rpartition(".")[2] for each in FAMILIES if each.projector)
)
"""Last names of the modules that adapters may hold."""


def family_of_type(model_type: object) -> Family:
    """The family of a config.json's ``model_type``.

    Raises:
        CheckpointError: it is not supported; says which are.
    """
    family = _BY_TYPE.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        known = "; ".join(f"{each.name} ({', '.join(each.model_types)})" for each in FAMILIES)
        raise CheckpointError(f"model_type is {model_type!r}; supported are {known}")
    return family


def family_of(config: Any) -> Family:
    """The family of a loaded configuration, raising as :func:`family_of_type`."""
    return family_of_type(config.model_type)


def in_memory(name: str) -> bool:
    """Whether some family has a parameter or module of this name in memory."""
    return any(name.startswith(prefix) for each in FAMILIES for prefix, _ in each.public)


def is_language(name: str) -> bool:
    """Whether a PEFT name lies in the language model of some family."""
    return re.search(rf"\.({'|'.join(LANGUAGE_PARTS)})\.", name) is not None
