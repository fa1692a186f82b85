"""Kinds of hallucination: which there are, how a kind is asked for, and how it is coloured."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from fgaif.errors import DataError, FgaifError
from fgaif.types import DEFAULT_KINDS, CaptionMetrics, Kind

PALETTE = (
    "#2a78d6", "#d97706", "#8b5cf6", "#0f9d8a", "#d6457f", "#6b8e23", "#0891b2", "#a3522a",
)  # fmt: skip
"""Colours of kinds without one of their own, by place; after the last comes the first again."""

_TAKEN = frozenset(
    {"all", "any", "policy", "none", "unknown", "segment", "task", "total"}
    | {"accuracy", "facts", "faithscore", "faithscore_s"}
    # keys of result files and of the service's answers
    | {
        "benchmark",
        "counts",
        "groups",
        "intervals",
        "items",
        "level",
        "provenance",
        "seed",
        "units",
    }
    | {"penalty", "segments"}
    | {field.name for field in dataclasses.fields(CaptionMetrics)}
)
"""Words that stand beside the kinds in options, metrics, figures and prompts."""


class KindConfig(BaseModel):
    """A kind of hallucination; in the configuration a name alone, or a mapping."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True
    )

    name: str = Field(pattern="^[a-z][a-z0-9_]*$", max_length=32)
    """One word in small letters: it names folders, metrics, JSON keys and lines of prompts."""
    description: str | None = None
    """What a fact of this kind is and how it is worded, for the extraction prompt: a text, or a
    file that holds it. fgaif/feedback/prompts/kinds has those of object, attribute and relation."""
    prompt: str | None = None
    """Verification prompt of its facts, instead of `feedback.prompt`: a text with {fact}, a file
    name in fgaif/feedback/prompts, or a path."""
    colour: str | None = Field(None, pattern="^#[0-9a-fA-F]{6}$")
    """In reports, plots and pages; default: the next one of a palette."""

    @model_validator(mode="before")
    @classmethod
    def _name_alone(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @model_serializer(mode="wrap")
    def _as_written(self, dump: SerializerFunctionWrapHandler) -> Any:
        given = {key: value for key, value in dump(self).items() if value is not None}
        return self.name if given.keys() == {"name"} else given

    @field_validator("name")
    @classmethod
    def _not_taken(cls, name: str) -> str:
        if name in _TAKEN:
            raise ValueError(
                f"{name!r} stands for something else beside the kinds; take another name, none of "
                f"{', '.join(sorted(_TAKEN))}"
            )
        return name

    @classmethod
    def default(cls) -> tuple[Self, ...]:
        """FGAIF's kinds."""
        return tuple(cls(name=name) for name in DEFAULT_KINDS)


def words(kind: Kind) -> str:
    """A kind's name as it stands in a sentence."""
    return kind.replace("_", " ")


def own_colours(kinds: Iterable[KindConfig]) -> dict[Kind, str]:
    """Colours of the kinds that have one of their own."""
    return {kind.name: kind.colour for kind in kinds if kind.colour is not None}


def kind_colours(kinds: Iterable[Kind], own: Mapping[Kind, str] | None = None) -> dict[Kind, str]:
    """The colour of each kind: its own, else the palette's by its place among the kinds."""
    given = own or {}
    return {k: given.get(k, PALETTE[i % len(PALETTE)]) for i, k in enumerate(kinds)}


def check_kinds(
    where: object,
    found: Sequence[Kind],
    wanted: Sequence[Kind],
    error: type[FgaifError] = DataError,
) -> None:
    """Refuse what was made for other kinds, or for the same ones in another order.

    Raises:
        FgaifError: of type ``error``; names both lists.
    """
    if tuple(found) != tuple(wanted):
        raise error(
            f"{where}: made for the kinds {', '.join(found)}, but the kinds here are "
            f"{', '.join(wanted)}: set kinds=[{','.join(found)}] to use it, or make it anew"
        )
