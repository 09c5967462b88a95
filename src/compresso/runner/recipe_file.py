"""Reading a recipe's YAML without trusting it, and the recipes that ship.

A safe loader with size, depth and alias limits; duplicate keys and tags are errors. What comes out is a raw mapping
whose stages are still unchecked. The `recipe.yaml` of a result has a further key, `run`: facts of the run that wrote
it, passed over when it is run again.
"""

from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from compresso.core.strict_yaml import OneOfEachKey, Refused
from compresso.errors import RecipeError, alike, nearest
from compresso.runner.repairs import expanded

MAX_BYTES = 65_536
MAX_DEPTH = 12
_TOP_LEVEL = ("name", "title", "paper", "description", "task", "data", "cost", "stages", "run")


def names() -> list[str]:
    """The recipes that ship, sorted: `compresso`, `compresso/paper`, ... (a folder's `default.yaml` goes by the
    folder's name).
    """
    root = resources.files("compresso") / "recipes"
    found: list[str] = []
    for folder in root.iterdir():
        if folder.is_dir():
            for file in folder.iterdir():
                if file.name.endswith(".yaml"):
                    stem = file.name.removesuffix(".yaml")
                    found.append(folder.name if stem == "default" else f"{folder.name}/{stem}")
    return sorted(found)


def read(recipe: str | Path) -> dict[str, Any]:
    """The raw mapping of a shipped recipe or a YAML file.

    Raises:
        RecipeError: if there is none, it is too large or deep, or is not a mapping with known keys.
    """
    name = str(recipe)
    if name in names():
        folder, _, stem = name.partition("/")
        return parse(
            (resources.files("compresso") / "recipes" / folder / f"{stem or 'default'}.yaml").read_text("utf-8"), name
        )
    path = _path(recipe)
    if path is not None and path.is_dir():
        raise RecipeError(
            f"recipe '{name}' is a folder; wanted a recipe file (YAML){_held(path)} or a shipped name; see `compresso"
            " recipes`"
        )
    if path is None or not path.is_file():
        raise RecipeError(f"unknown recipe '{name}': neither a shipped recipe nor a file; {_alike(name)}")
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise RecipeError(
                f"recipe {name} has more than the {MAX_BYTES} bytes that are read; give a recipe, not data"
            )
        raw = parse(content.decode("utf-8"), name)
        return {**raw, "name": raw.get("name") or path.stem}
    except UnicodeDecodeError as error:
        raise RecipeError(f"recipe {name} is not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    except OSError as error:
        raise RecipeError(f"recipe {name} cannot be read: {error.strerror}; check its permissions") from error


def _held(folder: Path) -> str:
    """Of a result's folder, the recipe that its run wrote, as a message shows it."""
    held = folder / "recipe.yaml"
    return f" such as {held}" if held.is_file() else ""


def _alike(name: str) -> str:
    """The tail of a message about an unknown recipe: the closest one. A family without a recipe of its own name is
    shown whole, for which of its recipes is meant nobody can tell.
    """
    families = {one.partition("/")[0] for one in names()}
    close = alike(name, {*names(), *families})
    if close and close not in names():
        members = [one for one in names() if one.startswith(f"{close}/")]
        return f"did you mean one of {', '.join(members)}?" if len(members) > 1 else f"did you mean '{members[0]}'?"
    return nearest(name, names(), shown=families)


def _path(recipe: str | Path) -> Path | None:
    """A recipe as a path; None if it can be none."""
    try:
        path = Path(recipe).expanduser()
        return path if path.exists() else None
    except (OSError, RuntimeError, ValueError):  # too long, another's home, a NUL
        return None


def parse(text: str, name: str) -> dict[str, Any]:
    """YAML text to a mapping with known top-level keys. Raises RecipeError."""
    data = plain(text, f"recipe {name}")
    if not isinstance(data, dict) or "stages" not in data:
        raise RecipeError(
            f"recipe {name} must be a mapping with the key 'stages'; see `compresso recipes compresso` for one in full"
        )
    stages_of(data, name)
    return data


def plain(text: str, what: str) -> Any:
    """The value of a YAML text without tags, aliases, duplicate keys and deep nesting; `what` begins the message of its
    RecipeError.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except (RecipeError, Refused) as error:
        raise RecipeError(f"{what} cannot be read: {error}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: numbers and dates out of range
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        raise RecipeError(
            f"{what}{where} is not plain YAML: {' '.join(str(getattr(error, 'problem', None) or error).split())}"
        ) from error


def stages_of(raw: Mapping[str, Any], name: str = "") -> list[tuple[str, Any]]:
    """Name and knobs of each stage of a raw recipe, that of a knob `repair` among them. Raises RecipeError if it has
    none, or an unknown top-level key.
    """
    name = name or str(raw.get("name", "recipe"))
    for key in raw:
        if key not in _TOP_LEVEL:
            raise RecipeError(f"recipe {name}: unknown key '{key}'; {nearest(str(key), _TOP_LEVEL)}")
    listed = raw.get("stages")
    if not isinstance(listed, list) or not listed:
        got = "an empty list; name at least one stage" if listed == [] else type(listed).__name__
        raise RecipeError(f"recipe {name}: 'stages' must be a list such as [{{learn_gates: {{keep: 0.7}}}}], got {got}")
    stages: list[tuple[str, Any]] = []
    for entry in listed:
        if isinstance(entry, str):
            stages.append((entry, {}))
        elif isinstance(entry, dict) and len(entry) == 1:
            stages.extend((str(key), {} if knobs is None else knobs) for key, knobs in entry.items())
        else:
            raise RecipeError(
                f"recipe {name}: a stage is one name with its knobs, such as {{recover: {{rank: 8}}}}; got"
                f" {short(entry)}"
            )
    return expanded(stages, name)


def short(value: Any) -> str:
    """A value as a message shows it: at most 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


class _Loader(OneOfEachKey, yaml.SafeLoader):
    """Safe YAML without aliases (no bombs), duplicate keys or deep nesting."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise RecipeError("it uses a YAML alias (*name), which is not supported; write the value out")
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise RecipeError(f"it is nested too deeply; at most {MAX_DEPTH} levels are read")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_yaml_int(self, node: Any) -> Any:
        """2:4 is a pattern; YAML 1.1 reads it as 124, counting in sixties."""
        return node.value if ":" in node.value else super().construct_yaml_int(node)

    def construct_yaml_float(self, node: Any) -> Any:
        """As `construct_yaml_int`."""
        return node.value if ":" in node.value else super().construct_yaml_float(node)


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.construct_yaml_float)
