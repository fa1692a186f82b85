"""YAML of people: read strictly, within limits, with messages that say where."""

from collections.abc import Hashable
from typing import Any

import yaml

from fgaif.errors import ConfigError

_LARGEST = 2**20
_NODES = 100_000


class _StrictLoader(yaml.SafeLoader):
    """Refuses a key that is there twice, where YAML would let the last one win."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: dict[Any, int] = {}
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                continue
            name, line = key.value, key.start_mark.line + 1
            if isinstance(name, str) and name in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"{name!r} is there twice, in line {seen[name]} and line {line}; put "
                    "what belongs together under one"
                )
            if isinstance(name, str):
                seen[name] = line
        return super().construct_mapping(node, deep)


def read_yaml(content: bytes, where: str) -> Any:
    """Parse one YAML document in UTF-8, with or without a byte order mark.

    Raises:
        ConfigError: another encoding, no YAML, a key twice, more than 1 MiB, deeper nesting or more
            nodes (aliases followed) than any configuration has.
    """
    if len(content) > _LARGEST:
        raise ConfigError(f"{where}: larger than {_LARGEST:,} bytes; no configuration is")
    try:
        text = content.decode("utf-8-sig")
        loader = _StrictLoader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            if _size(node, {}) > _NODES:
                raise ConfigError(f"{where}: aliases multiply its content; write it out")
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{where}: byte {error.start} is not UTF-8; save the file in UTF-8"
        ) from error
    except RecursionError as error:
        raise ConfigError(f"{where}: nested too deep, or an alias within itself") from error
    except (yaml.YAMLError, ValueError, TypeError) as error:
        raise ConfigError(f"{where}: not valid YAML: {str(error)[:500]}") from error


def _size(node: yaml.Node, known: dict[int, int]) -> int:
    """Number of nodes with every alias written out."""
    if id(node) not in known:
        children: list[yaml.Node] = []
        if isinstance(node, yaml.MappingNode):
            children = [part for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            children = node.value
        known[id(node)] = 1 + sum(_size(child, known) for child in children)
    return known[id(node)]
