"""Recipes: YAML in, checked stages out, before any weight is read.

    name: compresso
    title: learned structured pruning
    paper: "2310.05015"
    data: {source: null, max_length: 512, prompt: true}
    stages:
      - learn_gates: {keep: 0.7, kinds: [head, channel]}
      - recover: {rank: 8}

YAML is read by a safe loader with size, depth and alias limits; duplicate keys are errors. An unknown recipe, stage or knob names the nearest.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as validated_dataclass

from compresso.errors import RecipeError, nearest
from compresso.job import Effects, Stage, card, check_order

MAX_BYTES = 1_000_000
MAX_DEPTH = 12
_TOP_LEVEL = ("name", "title", "paper", "description", "data", "stages", "run")


@validated_dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class DataKnobs:
    """What a recipe says of its data.

    Args:
        source: used when the command line gives none; null means that data must be given.
        max_length: tokens an example is truncated to, prompt included.
        prompt: whether the collaborative prompt stands before each instruction.
        pack: whether plain text is cut into full windows instead of one document a row.
        limit: examples read at most.
        held: examples kept out of training for the before/after loss.
    """

    source: str | None = None
    max_length: int = 512
    prompt: bool = True
    pack: bool = True
    limit: int | None = None
    held: int = 32


@dataclass(frozen=True)
class Recipe:
    """A checked recipe: names and stages in order of execution.

    Args:
        name: of the recipe; stages of the same name may occur once.
        stages: (stage name, stage) in order.
        data: data knobs.
        title, paper, description: for people.
    """

    name: str
    stages: tuple[tuple[str, Stage], ...]
    data: DataKnobs
    title: str = ""
    paper: str = ""
    description: str = ""

    def needs(self, what: str) -> bool:
        """Whether any stage needs "data", "gradients" or "training"."""
        return any(what in card(name).needs for name, _ in self.stages)

    def to_dict(self) -> dict[str, Any]:
        """The recipe with every knob spelled out, as it can be run again."""
        return {
            "name": self.name,
            "title": self.title,
            "paper": self.paper,
            "description": self.description,
            "data": dataclasses.asdict(self.data),  # type: ignore[call-overload]
            "stages": [{name: TypeAdapter(type(one)).dump_python(one, mode="json")} for name, one in self.stages],
        }


class _Loader(yaml.SafeLoader):
    """Safe YAML without aliases (no bombs) and with duplicate keys refused."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise RecipeError("recipe uses a YAML alias (*name), which is not supported; write the value out")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise RecipeError(f"recipe has the key '{key}' twice in one mapping (line {node.start_mark.line + 1}); keep one")
        return super().construct_mapping(node, deep)


def names() -> list[str]:
    """The recipes that ship, sorted: `compresso`, `compresso/paper`, ... (a folder's `default.yaml` goes by the folder's name)."""
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
        text = (resources.files("compresso") / "recipes" / folder / f"{stem or 'default'}.yaml").read_text("utf-8")
    else:
        path = Path(recipe)
        if not path.is_file():
            raise RecipeError(f"unknown recipe '{name}': neither a shipped recipe nor a file; {nearest(name, names())}")
        if path.stat().st_size > MAX_BYTES:
            raise RecipeError(f"recipe {name} has {path.stat().st_size} bytes; at most {MAX_BYTES} are read")
        text = path.read_bytes().decode("utf-8", errors="replace")
    return parse(text, name)


def parse(text: str, name: str) -> dict[str, Any]:
    """YAML text to a mapping with known top-level keys. Raises RecipeError."""
    try:
        data = yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader with more refusals
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        raise RecipeError(f"recipe {name}{where} is not plain YAML: {getattr(error, 'problem', None) or error}") from error
    except RecursionError as error:
        raise RecipeError(f"recipe {name} is nested too deeply; at most {MAX_DEPTH} levels are read") from error
    if not isinstance(data, dict) or "stages" not in data:
        raise RecipeError(f"recipe {name} must be a mapping with the key 'stages'; see `compresso recipes compresso` for one in full")
    if _depth(data) > MAX_DEPTH:
        raise RecipeError(f"recipe {name} is nested {_depth(data)} levels deep; at most {MAX_DEPTH} are read")
    for key in data:
        if key not in _TOP_LEVEL:
            raise RecipeError(f"recipe {name}: unknown key '{key}'; {nearest(str(key), _TOP_LEVEL)}")
    return data


def build(raw: Mapping[str, Any], name: str = "recipe") -> Recipe:
    """Check a raw mapping and make its stages.

    Raises:
        RecipeError: an unknown stage or knob (nearest named), a value outside its range, a repeated stage, an illegal order.
    """
    listed = raw["stages"]
    if not isinstance(listed, list) or not listed:
        raise RecipeError(f"recipe {name}: 'stages' must be a list such as [{{learn_gates: {{keep: 0.7}}}}], got {type(listed).__name__}")
    stages: list[tuple[str, Stage]] = []
    effects: list[tuple[str, Effects]] = []
    for entry in listed:
        if isinstance(entry, str):
            entry = {entry: {}}
        if not isinstance(entry, dict) or len(entry) != 1:
            raise RecipeError(f"recipe {name}: a stage is one name with its knobs, such as {{recover: {{rank: 8}}}}; got {entry!r}")
        ((key, knobs),) = entry.items()
        if any(key == other for other, _ in stages):
            raise RecipeError(f"recipe {name}: stage '{key}' stands twice; give it once")
        row = card(str(key))
        stages.append((str(key), _validated(row.type, knobs or {}, f"recipe {name}: stage '{key}'")))
        effects.append((str(key), row.effects))
    check_order(effects)
    data = _validated(DataKnobs, raw.get("data") or {}, f"recipe {name}: data")
    texts = {key: str(raw.get(key) or "") for key in ("title", "paper", "description")}
    return Recipe(str(raw.get("name") or name), tuple(stages), data, **texts)


def override(raw: Mapping[str, Any], path: str, value: Any) -> dict[str, Any]:
    """A copy of a raw recipe with `stages.learn_gates.mask_lr` (a dotted path) set to a value. Raises RecipeError for an unknown path."""
    result = _copied(raw)
    parts = path.split(".")
    if parts[0] == "stages" and len(parts) >= 3:
        for entry in result["stages"]:
            if isinstance(entry, dict) and parts[1] in entry:
                entry[parts[1]] = dict(entry[parts[1]] or {})
                _set(entry[parts[1]], parts[2:], value, path)
                return result
        have = [next(iter(entry)) if isinstance(entry, dict) else str(entry) for entry in result["stages"]]
        raise RecipeError(f"--set {path}: the recipe has no stage '{parts[1]}'; {nearest(parts[1], have)}")
    if parts[0] == "data" and len(parts) == 2:
        result["data"] = {**(result.get("data") or {}), parts[1]: value}
        return result
    raise RecipeError(f"--set {path}: wanted stages.STAGE.KNOB=value or data.KNOB=value, such as stages.learn_gates.mask_lr=0.02")


def with_knob(raw: Mapping[str, Any], knob: str, value: Any) -> dict[str, Any]:
    """A copy with a knob set in every stage that has it. Raises RecipeError if none has."""
    result = _copied(raw)
    hits = 0
    for entry in result["stages"]:
        for key in list(entry):
            if any(field.name == knob for field in dataclasses.fields(card(key).type)):
                entry[key] = {**(entry[key] or {}), knob: value}
                hits += 1
    if not hits:
        raise RecipeError(
            f"no stage of recipe '{raw.get('name', '')}' has the knob '{knob}'; see `compresso recipes {raw.get('name', '')}`"
        )
    return result


def _copied(raw: Mapping[str, Any]) -> dict[str, Any]:
    stages = [{entry: {}} if isinstance(entry, str) else dict(entry) for entry in raw["stages"]]
    return {**raw, "stages": stages}


def _set(target: dict[str, Any], parts: Sequence[str], value: Any, path: str) -> None:
    for part in parts[:-1]:
        target[part] = dict(target.get(part) or {})
        target = target[part]
    target[parts[-1]] = value


def _depth(value: Any) -> int:
    if isinstance(value, dict):
        return 1 + max((_depth(one) for one in value.values()), default=0)
    if isinstance(value, list):
        return 1 + max((_depth(one) for one in value), default=0)
    return 0


def _validated(kind: type, knobs: Any, where: str) -> Any:
    """An instance of a validated dataclass; its first validation error as one line."""
    if not isinstance(knobs, dict):
        raise RecipeError(f"{where}: knobs must be a mapping, got {knobs!r}")
    known = [field.name for field in dataclasses.fields(kind)]
    for key in knobs:
        if key not in known:
            raise RecipeError(f"{where}: unknown knob '{key}'; {nearest(str(key), known)}")
    try:
        return TypeAdapter(kind).validate_python(knobs)
    except ValidationError as error:
        first = error.errors()[0]
        knob = ".".join(str(part) for part in first["loc"]) or "knobs"
        raise RecipeError(f"{where}: {knob}={first['input']!r}: {first['msg'].removeprefix('Value error, ')}") from error
