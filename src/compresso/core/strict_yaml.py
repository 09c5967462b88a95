"""Mappings of YAML whose keys are plain words that stand once: its own reader keeps the last of two equal ones."""

from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    _Constructor = yaml.constructor.SafeConstructor
else:
    _Constructor = object


class Refused(ValueError):
    """What is YAML, and holds what no file of ours may hold."""


class OneOfEachKey(_Constructor):
    """To be mixed into a safe loader, before it."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """As the loader's. Raises Refused, naming key and line."""
        seen: set[str] = set()
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                raise Refused(f"it has a key that is no plain word (line {line}); write a name")
            if key.value in seen:
                raise Refused(f"it has the key '{key.value}' twice in one mapping (line {line}); keep one")
            seen.add(key.value)
        return super().construct_mapping(node, deep)
