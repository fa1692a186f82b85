"""Every key of the configuration with its type, default and docstring, for people."""

import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, TypeAdapter
from pydantic.fields import FieldInfo

from fgaif.config.run import Config

_NAMES = {int: "integer", float: "number", str: "text", bool: "true or false", type(None): "null"}
_HEAD = """\
Every key with its default. `fgaif config` prints the same, `fgaif config ppo.shape` a part of it,
and with `--config FILE` the file's values in the place of the defaults. A key is set in a YAML file
or on the command line, as in `fgaif train ppo.lr=1e-5`; one that is not known is refused. What a
changed key does to a run that is there: [runs](runs.md). This page is made by
`fgaif config --markdown`."""
_JSON = TypeAdapter[Any](Any)
_BOUNDS = {"ge": ">= ", "gt": "> ", "le": "<= ", "lt": "< "}


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyDoc:
    """A key, as it is written in overrides (``NAME`` stands for a name of the user's choice)."""

    key: str
    kind: str
    """What may stand there, with its bounds."""
    default: str
    """As in YAML; ``required`` where there is none."""
    doc: str


def key_docs(
    model: type[BaseModel] = Config, values: BaseModel | None = None, above: str = ""
) -> Iterator[KeyDoc]:
    """Yield all keys in the order of the sections, sections themselves left out.

    Args:
        values: configuration whose values are shown as defaults; default: the model's own.
    """
    for name, field in model.model_fields.items():
        key = f"{above}{name}"
        required = values is None and field.is_required()
        default = None if required else field.get_default(call_default_factory=True)
        value = default if values is None else getattr(values, name)
        sections = _sections(field.annotation)
        if not sections or value is None:
            shown = "required" if required else _shown(value)
            yield KeyDoc(key=key, kind=_kind(field), default=shown, doc=_line(field.description))
        for section, middle in sections:
            inner = value if isinstance(value, section) else None
            yield from key_docs(section, inner, f"{key}{middle}.")


def section_doc(section: str) -> str:
    """The first line of a section's docstring."""
    for model, _ in _sections(Config.model_fields[section].annotation):
        return _line((model.__doc__ or "").split("\n\n")[0])
    return ""


def markdown() -> str:
    """The page docs/configuration.md."""
    docs = list(key_docs())
    lines = ["# Configuration", "", _HEAD]
    top = [doc for doc in docs if not _is_section(doc.key.partition(".")[0])]
    lines += ["", "## The run", "", *_table(top)]
    for section in filter(_is_section, Config.model_fields):
        own = [doc for doc in docs if doc.key.startswith(f"{section}.")]
        lines += ["", f"## {section}", "", section_doc(section), "", *_table(own)]
    return "\n".join(lines) + "\n"


def _is_section(key: str) -> bool:
    return bool(_sections(Config.model_fields[key].annotation)) and key != "kinds"


def _table(docs: list[KeyDoc]) -> list[str]:
    rows = [
        f"| `{doc.key}` | {_cell(doc.kind)} | {_code(doc.default)} | {_cell(doc.doc)} |"
        for doc in docs
    ]
    return ["| key | value | default | meaning |", "|---|---|---|---|", *rows]


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _code(text: str) -> str:
    return text if text == "required" else f"`{_cell(text)}`"


def _line(text: str | None) -> str:
    return " ".join((text or "").split())


def _shown(value: Any) -> str:
    plain = _JSON.dump_python(value, mode="json")
    dumped = yaml.safe_dump(plain, default_flow_style=True, width=10_000, allow_unicode=True)
    return dumped.removesuffix("\n").removesuffix("\n...")


def _kind(field: FieldInfo) -> str:
    bounds = [
        f"{sign}{getattr(item, name):g}"
        for item in field.metadata
        for name, sign in _BOUNDS.items()
        if hasattr(item, name)
    ]
    return ", ".join([_type(field.annotation), *bounds])


def _type(annotation: Any) -> str:
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " or ".join(map(str, inner))
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(map(_type, inner)))
    if origin is tuple:
        return f"list of {_type(inner[0])}"
    if origin is dict:
        return f"names to {_type(inner[1])}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "section"
    return _NAMES.get(annotation, getattr(annotation, "__name__", str(annotation)).lower())


def _sections(annotation: Any) -> list[tuple[type[BaseModel], str]]:
    """Sections in an annotation, and what stands between its key and theirs."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [(annotation, "")]
    if origin is dict:
        return [(model, ".NAME") for model, _ in _sections(inner[1])]
    if origin in (Union, types.UnionType):
        return [found for each in inner for found in _sections(each)]
    return []
