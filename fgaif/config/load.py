"""Read a configuration: YAML file first, dotted overrides last, unknown keys refused."""

import difflib
import reprlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from fgaif.config.feedback import EndpointConfig
from fgaif.config.run import Config
from fgaif.config.yaml_text import read_yaml
from fgaif.errors import ConfigError

SCENES_CONFIG = Path(__file__).parents[2] / "configs" / "scenes.yaml"
"""The embedded world's configuration, which the command line takes where none is given."""


def load_config(path: Path | str | None, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file (or the defaults) and apply overrides such as ``ppo.lr=1e-5``.

    Raises:
        ConfigError: unknown key (with the nearest name), bad value, unreadable file.
    """
    tree: dict[str, Any] = {}
    if path is not None:
        try:
            content = Path(path).read_bytes()
        except OSError as error:
            raise ConfigError(
                f"--config {path}: {error.strerror}; give an existing file"
            ) from error
        loaded = read_yaml(content, f"--config {path}")
        if loaded is not None and not isinstance(loaded, dict):
            raise ConfigError(f"--config {path}: expected keys and values at the top level")
        tree = loaded or {}
    for item in overrides:
        _apply_override(tree, item)
    return parse_config(tree)


def with_overrides(config: Config, overrides: Sequence[str]) -> Config:
    """The configuration with dotted overrides applied; raises ConfigError like ``load_config``."""
    tree = config.model_dump(mode="json")
    for item in overrides:
        _apply_override(tree, item)
    return parse_config(tree)


def parse_config(tree: dict[str, Any]) -> Config:
    """Validate a nested dict; errors name the dotted key, the value and the nearest known key."""
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        lines = [_explain(item) for item in error.errors()]
        raise ConfigError("\n".join(lines)) from error


def dump_config(config: Config) -> str:
    """The resolved configuration as YAML."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def _apply_override(tree: dict[str, Any], item: str) -> None:
    key, separator, value = item.partition("=")
    if not separator or not key:
        raise ConfigError(f"override {item!r}: expected KEY=VALUE, for example ppo.lr=1e-5")
    node = tree
    *parents, leaf = key.split(".")
    for part in parents:
        child = node.setdefault(part, {})
        if not isinstance(child, dict):
            raise ConfigError(f"override {key}: {part!r} holds a value, not a section")
        node = child
    node[leaf] = read_yaml(value.encode(errors="surrogateescape"), f"override {key}")


_SHOWN = 200
_REMOVED = {
    "ppo.probe_tolerance": "no such key any more; leave it out: a sync is held against the noise "
    "of the dtype and the effect of the update (docs/precision.md)",
}


def _explain(item: Any) -> str:
    key = ".".join(str(part) for part in item["loc"])
    # A key may have been put where it does not belong.
    secret = item["loc"][:1] == ("endpoints",) and not isinstance(item["input"], int | float)
    secret |= item["type"] == "extra_forbidden" and _may_be_secret(key, item["input"])
    shown = key if secret else f"{key} = {_shown(item['input'])}"
    if item["type"] == "extra_forbidden" and key in _REMOVED:
        return f"{shown}: {_REMOVED[key]}"
    if item["type"] == "extra_forbidden":
        *parents, leaf = [str(part) for part in item["loc"]]
        near = difflib.get_close_matches(leaf, _keys_at(parents), n=1, cutoff=0.5)
        hint = f"; did you mean {'.'.join([*parents, near[0]])}?" if near else ""
        return f"{shown}: unknown key{hint}"
    message = str(item["msg"]).removeprefix("Value error, ")
    return f"{shown}: {message}" if key else message


def _may_be_secret(key: str, value: Any) -> bool:
    """Whether the value of an unknown key may be one that no message should show."""
    named = any(word in key.lower() for word in ("key", "token", "secret", "password", "auth"))
    return named or (isinstance(value, str) and len(value) >= 16 and " " not in value)


def _shown(value: Any) -> str:
    """A value as messages show it, in at most 200 characters."""
    limited = reprlib.Repr()
    limited.maxlevel, limited.maxdict, limited.maxstring, limited.maxother = 3, 8, _SHOWN, _SHOWN
    return limited.repr(value)[:_SHOWN]


def _keys_at(parents: list[str]) -> list[str]:
    if parents[:1] == ["endpoints"]:
        return list(EndpointConfig.model_fields)
    section: type[BaseModel] = Config
    for part in parents:
        field = section.model_fields.get(part)
        if field is None or not isinstance(field.annotation, type):
            return []
        if not issubclass(field.annotation, BaseModel):
            return []
        section = field.annotation
    return list(section.model_fields)
