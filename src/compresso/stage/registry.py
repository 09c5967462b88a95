"""The registry of stages: what each is called, what it does to a model, and in which orders they work.

A stage is a frozen dataclass whose fields are the knobs of a recipe; calling it on a `Job` returns the next `Job`.
`@stage(...)` registers it under its recipe name with the paper it comes from. Stages are found by importing every
module of `compresso.methods`; an import error is an error. Order on a recipe's page is order of execution.
"""

import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Flag, auto
from typing import TypeVar

from compresso.errors import RecipeError, ResourceError, nearest
from compresso.stage.flat import Knob, knobs_of, with_flat_knobs


class Effects(Flag):
    """What a stage does to the model; a recipe's order is checked by it before any weight is read."""

    NONE = 0
    SHAPES = auto()
    """Tensors get smaller."""
    WEIGHTS = auto()
    """Values change."""
    FORWARD = auto()
    """The computation is patched."""


@dataclass(frozen=True)
class Card:
    """The catalogue's row of one stage.

    Args:
        name: the key in a recipe.
        type: the frozen dataclass.
        paper: arXiv id, or "" for common practice.
        title: one line.
        effects: what it does to the model.
        needs: of "data", "gradients", "training".
        when: when to use it, and when not.
        failures: how it fails, and what shows it.
        any_task: whether it takes loss and examples from the job's task; others work on next tokens.
        makes_dense: whether what it leaves is the dense model of the run: teacher, baseline and `original`.
        once: why it is not repeated in rounds; "" where it may be.
        alone: why it runs in one process; "" where several may share its work.
        zeroes: knobs with which it leaves zeros that a later stage can keep; None for a stage that leaves none.
    """

    name: str
    type: type
    paper: str
    title: str
    effects: Effects
    needs: tuple[str, ...] = ()
    when: str = ""
    failures: str = ""
    any_task: bool = False
    makes_dense: bool = False
    once: str = ""
    alone: str = ""
    zeroes: Mapping[str, object] | None = None

    @property
    def knobs(self) -> Mapping[str, Knob]:
        """Its knobs by their names in recipes, in the order in which recipes show them."""
        return {knob.name: knob for knob in knobs_of(self.type)}


_CARDS: dict[str, Card] = {}
_T = TypeVar("_T")


def stage(
    name: str,
    *,
    title: str,
    effects: Effects,
    paper: str = "",
    needs: Sequence[str] = (),
    when: str = "",
    failures: str = "",
    any_task: bool = False,
    makes_dense: bool = False,
    once: str = "",
    alone: str = "",
    zeroes: Mapping[str, object] | None = None,
) -> Callable[[type[_T]], type[_T]]:
    """Register a class as a stage: its annotated fields become validated knobs, `name` its key in recipes.

    Raises:
        RecipeError: if the name is taken.
        ValueError: as `with_flat_knobs`.
    """

    def register(cls: type[_T]) -> type[_T]:
        if name in _CARDS:
            raise RecipeError(
                f"stage '{name}' is registered twice: by {_CARDS[name].type.__qualname__} and {cls.__qualname__};"
                " rename one"
            )
        made = with_flat_knobs(cls)
        _CARDS[name] = Card(
            name, made, paper, title, effects, tuple(needs), when, failures, any_task, makes_dense, once, alone, zeroes
        )
        return made

    return register


def cards() -> Mapping[str, Card]:
    """All stages by name, sorted; imports every module of `compresso.methods` the first time."""
    package = importlib.import_module("compresso.methods")
    for found in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"compresso.methods.{found.name}")
    return dict(sorted(_CARDS.items()))


def card(name: str) -> Card:
    """The card of one stage. Raises RecipeError naming the nearest valid name."""
    known = cards()
    if name not in known:
        raise RecipeError(f"unknown stage '{name}'; {nearest(name, known)}")
    return known[name]


def zeroing(*, any_task: bool) -> list[str]:
    """The stages that leave zeros, each with the knobs that it takes where its own leave none; with `any_task`, those
    alone that run under any task.
    """
    found = [one for one in cards().values() if one.zeroes is not None and (one.any_task or not any_task)]
    return [f"{one.name}{_given(one.zeroes or {})}" for one in found]


def _given(knobs: Mapping[str, object]) -> str:
    """Knobs as a recipe has them, in brackets; nothing for none."""
    return f" ({', '.join(f'{name}: {value}' for name, value in knobs.items())})" if knobs else ""


def refuse_together(stages: Sequence[str], processes: int) -> None:
    """Refuse stages that one process runs to several.

    Raises:
        ResourceError: naming the stage.
    """
    for name in stages if processes > 1 else ():
        if why := card(name).alone:
            raise ResourceError(
                f"stage '{name}' runs in one process, since it {why}, and {processes} were asked for; start it without"
                " torchrun"
            )


def check_order(effects: Sequence[tuple[str, Effects]]) -> None:
    """Refuse stages in an order that cannot work: SHAPES after FORWARD.

    Raises:
        RecipeError: naming both stages.
    """
    patched = ""
    for name, effect in effects:
        if patched and Effects.SHAPES in effect:
            raise RecipeError(
                f"stage '{name}' changes shapes after '{patched}' patched the forward pass; put '{name}' before it"
            )
        patched = name if Effects.FORWARD in effect else patched
