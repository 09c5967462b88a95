"""Recipes: raw mapping in, checked stages out, before any weight is read.

    name: compresso
    title: learned structured pruning
    paper: "2310.05015"
    task: causal-lm
    data: {source: null, max_length: 512, prompt: true}
    stages:
      - learn_gates: {keep: 0.7, kinds: [head, channel]}
      - recover: {rank: 8}

Reading YAML is `recipe_file`'s part. An unknown recipe, stage or knob names the nearest.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import TypeAdapter, ValidationError

from compresso.core.faults import said
from compresso.core.measures import NONE, Measures
from compresso.errors import RecipeError, nearest
from compresso.runner.data_knobs import DataKnobs, refuse_unread, told
from compresso.runner.measured_budget import cost_knobs, measures_of
from compresso.runner.nearest_knob import without_knob
from compresso.runner.recipe_file import names, parse, read, short, stages_of
from compresso.runner.round_knobs import ROUNDS, TARGETS, Steps, stepped, without_knobs
from compresso.runner.rounds import Act, acts, check_rounds
from compresso.stage import Effects, Follows, NeedsMore, Stage, card, cards, check_order, dumped, knobs_of
from compresso.stage.flat import without_field
from compresso.tasks.base import DEFAULT, Task, task_named
from compresso.tasks.causal_lm import CAUSAL_LM

__all__ = ["DataKnobs", "Recipe", "build", "names", "override", "parse", "read", "with_knob"]


@dataclass(frozen=True)
class Recipe:
    """A checked recipe: names and stages in order of execution.

    Args:
        name: of the recipe; stages of the same name may occur once.
        stages: (stage name, stage) in order.
        data: data knobs.
        task: what the run trains and judges by.
        title, paper, description: for people.
        measures: what a budget may be a share of beside counts of shapes.
        rounds: stage -> where its budgets step, of those that cut more than once.
    """

    name: str
    stages: tuple[tuple[str, Stage], ...]
    data: DataKnobs
    task: Task = CAUSAL_LM
    title: str = ""
    paper: str = ""
    description: str = ""
    measures: Measures = NONE
    rounds: Mapping[str, Steps] = field(default_factory=dict[str, Steps])

    @property
    def acts(self) -> tuple[Act, ...]:
        """The stages in the order in which a run takes them, round by round."""
        return acts(self.stages, self.rounds)

    def needs(self, what: str) -> bool:
        """Whether any stage needs "data", "gradients" or "training"."""
        return any(
            what in card(name).needs or (isinstance(one, NeedsMore) and what in one.needs_more())
            for name, one in self.stages
        )

    def to_dict(self) -> dict[str, Any]:
        """The recipe with every knob spelled out, as it can be run again; of its data those that its task reads."""
        return {
            "name": self.name,
            "title": self.title,
            "paper": self.paper,
            "description": self.description,
            "task": self.task.name,
            "data": told(self.data, self.task),
            **({} if self.measures == NONE else {"cost": cost_knobs(self.measures)}),
            "stages": [
                {name: dumped(one) | (self.rounds[name].to_dict() if name in self.rounds else {})}
                for name, one in self.stages
            ],
        }


def build(raw: Mapping[str, Any], name: str = "recipe") -> Recipe:
    """Check a raw mapping and make its stages.

    Raises:
        RecipeError: an unknown stage or knob (nearest named), a value outside its range, a repeated stage, an illegal
            order, rounds of what cannot be repeated, a setting of the data that the task does not read.
    """
    stages: list[tuple[str, Stage]] = []
    effects: list[tuple[str, Effects]] = []
    rounds: dict[str, Steps] = {}
    task = task_of(raw)
    check_task(task, [stage for stage, _ in stages_of(raw, name)], name)
    for key, knobs in stages_of(raw, name):
        if any(key == other for other, _ in stages):
            raise RecipeError(f"recipe {name}: stage '{key}' stands twice; give it once")
        row = card(key)
        knobs, asked = without_knobs(key, knobs, name)
        made, steps = stepped(key, _validated(row.type, knobs, f"recipe {name}: stage '{key}'"), asked, name)
        rounds |= {} if steps is None else {key: steps}
        stages.append((key, made))
        effects.append((key, row.effects))
    check_order(effects)
    for place, (key, made) in enumerate(stages):
        wanted, why = made.follows() if isinstance(made, Follows) else ("", "")
        if wanted and wanted not in (other for other, _ in stages[:place]):
            raise RecipeError(f"recipe {name}: stage '{key}': {why}")
    given = {} if raw.get("data") is None else raw["data"]
    data = _validated(DataKnobs, given, f"recipe {name}: data")
    if "run" not in raw:  # what an earlier release wrote of its result spells out what its task did not read
        refuse_unread(task, data, given, f"recipe {name}: data")
    texts = {key: str(raw.get(key) or "") for key in ("title", "paper", "description")}
    measures = measures_of(raw.get("cost"), f"recipe {name}: cost")
    check_rounds(acts(stages, rounds), name)
    return Recipe(str(raw.get("name") or name), tuple(stages), data, task, **texts, measures=measures, rounds=rounds)


def task_of(raw: Mapping[str, Any]) -> Task:
    """The task that a raw recipe names, else the default. Raises RecipeError for an unknown one."""
    return task_named(str(raw.get("task") or DEFAULT))


def check_task(task: Task, stages: list[str], recipe: str) -> None:
    """Refuse stages that work on next tokens under another task, and one that makes the dense model after others.

    Raises RecipeError naming the stage.
    """
    for place, name in enumerate(stages):
        if task.name != DEFAULT and not card(name).any_task:
            able = ", ".join(other for other, known in cards().items() if known.any_task)
            raise RecipeError(
                f"recipe {recipe}: stage '{name}' works on next tokens, and task {task.name} has none; under it run"
                f" {able}"
            )
        if card(name).makes_dense and place:
            raise RecipeError(
                f"recipe {recipe}: stage '{name}' makes the dense model that others start from; put it first, before"
                f" '{stages[0]}'"
            )


def override(raw: Mapping[str, Any], path: str, value: Any) -> dict[str, Any]:
    """A copy of a raw recipe with `stages.learn_gates.mask_lr` (a dotted path) set to a value. Raises RecipeError for
    an unknown path.
    """
    parts = path.split(".")
    if parts[0] == "stages" and len(parts) >= 3:
        stages = stages_of(raw)
        have = [name for name, _ in stages]
        if parts[1] not in have:
            raise RecipeError(f"--set {path}: the recipe has no stage '{parts[1]}'; {nearest(parts[1], have)}")
        changed = [(name, _set(knobs, parts[2:], value, path) if name == parts[1] else knobs) for name, knobs in stages]
        return {**raw, "stages": [{name: knobs} for name, knobs in changed]}
    if parts[0] == "data" and len(parts) == 2:
        return {**raw, "data": _set({} if raw.get("data") is None else raw["data"], parts[1:], value, path)}
    raise RecipeError(
        f"--set {path}: wanted stages.STAGE.KNOB=value or data.KNOB=value, such as stages.learn_gates.mask_lr=0.02"
    )


def with_knob(raw: Mapping[str, Any], knob: str, value: Any, required: bool = True, asked: str = "") -> dict[str, Any]:
    """A copy with a knob set in every stage that has it.

    Args:
        raw: a recipe's mapping.
        knob: its name.
        value: of it.
        required: whether some stage has to have it.
        asked: the option that sets it, as it was given; empty if the knob itself was.

    Raises RecipeError if no stage has it and it is required.
    """
    stages = stages_of(raw)
    having = [knob in card(name).knobs for name, _ in stages]
    if required and not any(having):
        raise RecipeError(without_knob(str(raw.get("name", "recipe")), stages, knob, asked))
    changed = [
        {name: _set(knobs, [knob], value, knob) if has else knobs}
        for (name, knobs), has in zip(stages, having, strict=True)
    ]
    return {**raw, "stages": changed}


def with_targets(raw: Mapping[str, Any], targets: Mapping[str, float], asked: str) -> dict[str, Any]:
    """A copy with several targets, name -> share that stays, in the stage that has the budget.

    asked: the option that names them. Raises RecipeError if no stage, or more than one, has a budget.
    """
    stages = stages_of(raw)
    having = [name for name, _ in stages if {"keep", "of"} <= card(name).knobs.keys()]
    if len(having) != 1:
        raise RecipeError(
            f"{asked}: several targets are those of one stage, and recipe '{raw.get('name', 'recipe')}' has"
            f" {len(having)} with a budget ({', '.join(having) or 'none'}); give one target"
        )
    changed = [
        {name: {**{key: one for key, one in knobs.items() if key != ROUNDS}, TARGETS: dict(targets)}}
        if name in having
        else {name: knobs}
        for name, knobs in stages
    ]
    return {**raw, "stages": changed}


def _set(target: Any, parts: Sequence[str], value: Any, path: str) -> dict[str, Any]:
    """A copy of nested mappings with one value set."""
    if not isinstance(target, dict):
        raise RecipeError(f"--set {path}: {short(target)} holds no '{parts[0]}'; set the whole value instead")
    if len(parts) == 1:
        return {**target, parts[0]: value}
    inner = target.get(parts[0])
    return {**target, parts[0]: _set({} if inner is None else inner, parts[1:], value, path)}


def _validated(kind: type, knobs: Any, where: str) -> Any:
    """An instance of a validated dataclass; its first validation error as one line."""
    if not isinstance(knobs, dict):
        raise RecipeError(f"{where}: knobs must be a mapping such as {{rank: 8}}, got {short(knobs)}")
    known = [knob.name for knob in knobs_of(kind)]
    for key in knobs:
        if key not in known:
            raise RecipeError(f"{where}: unknown knob '{key}'; {nearest(str(key), known)}")
    try:
        made = TypeAdapter(kind).validate_python(knobs)
        if found := _truth_for_number(knobs, dumped(made)):
            raise RecipeError(f"{where}: {found}")
        return made
    except ValidationError as error:
        found = [(_place(without_field(kind, one["loc"]), knobs), one) for one in error.errors()]
        path, first = found[0]
        words = said([one for place, one in found if place == path])  # several, where a value may be one of several
        given = f"{path}={short(first['input'])}: " if path else ""  # of several knobs together the message names them
        raise RecipeError(f"{where}: {given}{words}") from error


def _truth_for_number(given: Any, taken: Any, path: str = "") -> str:
    """Where true or false was given for a number, and what was wanted; "" for nowhere. A validator takes it for 1 or 0.

    Args:
        given: knobs.
        taken: the same as a stage has them, plain.
        path: of both.
    """
    if isinstance(given, bool):
        wanted = {int: "a whole number", float: "a number"}.get(type(taken))
        return f"{path}={given}: wanted {wanted}" if wanted else ""
    held: list[tuple[Any, Any, Any]] = []
    if isinstance(given, Mapping) and isinstance(taken, Mapping):
        held = [(key, one, taken[str(key)]) for key, one in given.items() if str(key) in taken]
    elif isinstance(given, list | tuple) and isinstance(taken, list | tuple) and len(given) == len(taken):
        held = [(i, one, two) for i, (one, two) in enumerate(zip(given, taken, strict=True))]
    each = (_truth_for_number(one, two, f"{path}.{key}" if path else str(key)) for key, one, two in held)
    return next(filter(None, each), "")


def _place(path: Sequence[int | str], knobs: Any) -> str:
    """A validation error's place as far as it leads into what was given: behind it stands what the value was tried
    as.
    """
    known: list[int | str] = []
    for part in path:
        held: dict[Any, Any] = dict(enumerate(knobs)) if isinstance(knobs, list) else knobs
        if not isinstance(held, dict) or part not in held:
            break
        known.append(part)
        knobs = held[part]
    return ".".join(map(str, known))
