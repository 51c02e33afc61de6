"""Reading a mapping from a YAML or JSON file: safe, strict about repeated keys, the file named in every error."""

from __future__ import annotations

import json
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from kvq.errors import ConfigError, Fault

UNNAMED = "<unicode string>"
"""What yaml calls a text that it parses."""


def load_mapping(path: str | Path) -> dict[Any, Any]:
    """Read the mapping that a file holds; an empty file holds an empty one.

    Args:
        path: a JSON file if its name ends in `.json`, else a YAML file. YAML tags that build Python objects are
            refused.

    Raises:
        ConfigError: the file cannot be read or parsed, repeats a key, or holds no mapping.
    """
    path = Path(path)
    try:
        # A path with a NUL is a ValueError, the home of an unknown user a RuntimeError.
        text = path.expanduser().read_text(encoding="utf-8-sig")
    except (OSError, ValueError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or _one_line(error)  # the path is named behind it
        problem = f"the file cannot be read: {reason}; give the path of a YAML or JSON file"
        raise ConfigError([Fault((), problem)], str(path)) from error
    try:
        values = _parse_json(text) if path.suffix.lower() == ".json" else yaml.load(text, Loader=_StrictLoader)  # noqa: S506  # a SafeLoader
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = _one_line(error).replace(UNNAMED, path.name)
        problem = f"the file cannot be parsed: {reason}"
        raise ConfigError([Fault((), problem)], str(path)) from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        problem = f"the file holds a {type(values).__name__}; a mapping of fields is needed"
        raise ConfigError([Fault((), problem)], str(path))
    return values


class _StrictLoader(yaml.SafeLoader):
    """A safe loader that refuses a key given twice; YAML itself would silently take the last one."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        # Checked before merge keys ("<<") are applied, which may well override a key.
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        seen: set[Hashable] = set()
        for key_node, _ in node.value:
            if isinstance(key_node, yaml.ScalarNode) and key_node.tag != "tag:yaml.org,2002:merge":
                key = self.construct_object(key_node)
                if key in seen:
                    raise yaml.MarkedYAMLError(
                        problem=f"the key {key!r} is given twice", problem_mark=key_node.start_mark
                    )
                seen.add(key)
        return node


def _parse_json(text: str) -> Any:
    return json.loads(text, object_pairs_hook=_refuse_repeats) if text.strip() else None


def _refuse_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values:
            raise ValueError(f"the key {key!r} is given twice")
        values[key] = value
    return values


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
