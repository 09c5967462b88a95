"""A job and its stages: what flows from stage to stage, what a stage may do to it, and the registry of stages.

A stage is a frozen dataclass whose fields are the knobs of a recipe; calling it on a `Job` returns the next `Job`. `@stage(...)` registers it
under its recipe name with the paper it comes from. Stages are found by importing every module of `compresso.methods`; an import error is an
error. Order on a recipe's page is order of execution.
"""

import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Flag, auto
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass as validated_dataclass
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from compresso.arch.base import Arch
from compresso.core.plan import Plan
from compresso.errors import RecipeError, nearest

KNOBS = ConfigDict(extra="forbid", allow_inf_nan=False, use_enum_values=False)
"""How a stage's fields are validated: an unknown knob, a NaN or a wrong type is an error."""


class Effects(Flag):
    """What a stage does to the model; a recipe's order is checked by it before any weight is read."""

    NONE = 0
    SHAPES = auto()
    """Tensors get smaller."""
    WEIGHTS = auto()
    """Values change."""
    FORWARD = auto()
    """The computation is patched."""
    FORMAT = auto()
    """Storage changes (quantized weights): nothing but measuring and exporting may follow."""


@dataclass(frozen=True)
class Job:
    """The state that stages hand on. Immutable but for `model`, which the last stage to touch it owns.

    Args:
        model: the live model, on its device.
        arch: its description.
        tokenizer: None for ready token windows.
        rows: training examples {"input_ids": list[int], "labels": list[int]}; empty where the recipe needs no data.
        held: a few examples that no stage trains on, for before/after losses.
        plan: everything removed so far, in terms of the original model.
        records: facts for records.json, by stage.
        identity: what a resume must agree on (recipe, model, data, versions).
        seed: of every random draw.
        out: the folder of the running stage, for training checkpoints.
        resume: whether training checkpoints found in `out` are continued.
        quiet: whether progress is shown.
    """

    model: PreTrainedModel
    arch: Arch
    tokenizer: PreTrainedTokenizerBase | None
    rows: Sequence[Mapping[str, Any]]
    held: Sequence[Mapping[str, Any]]
    plan: Plan
    records: Mapping[str, Any]
    identity: Mapping[str, Any]
    seed: int
    out: Path
    resume: bool = False
    quiet: bool = False
    patches: tuple[str, ...] = ()
    pad_id: int = 0

    @property
    def device(self) -> torch.device:
        """Where the model lies."""
        return self.model.device

    def note(self, **facts: Any) -> "Job":
        """The same job with more facts in its records."""
        return replace(self, records={**self.records, **facts})


@runtime_checkable
class Stage(Protocol):
    """One act of a recipe."""

    def __call__(self, job: Job) -> Job:
        """Do it and return the job that follows."""
        ...


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
    """

    name: str
    type: type
    paper: str
    title: str
    effects: Effects
    needs: tuple[str, ...] = ()
    when: str = ""
    failures: str = ""


_CARDS: dict[str, Card] = {}
_T = TypeVar("_T")


def stage(
    name: str, *, title: str, effects: Effects, paper: str = "", needs: Sequence[str] = (), when: str = "", failures: str = ""
) -> Callable[[type[_T]], type[_T]]:
    """Register a class as a stage: its annotated fields become validated knobs, `name` its key in recipes.

    Raises:
        RecipeError: if the name is taken.
    """

    def register(cls: type[_T]) -> type[_T]:
        if name in _CARDS:
            raise RecipeError(f"stage '{name}' is registered twice: by {_CARDS[name].type.__qualname__} and {cls.__qualname__}; rename one")
        made = validated_dataclass(cls, frozen=True, config=KNOBS)
        _CARDS[name] = Card(name, made, paper, title, effects, tuple(needs), when, failures)
        return made  # type: ignore[return-value]

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


def check_order(effects: Sequence[tuple[str, Effects]]) -> None:
    """Refuse stages in an order that cannot work: anything after FORMAT, and SHAPES after FORWARD.

    Raises:
        RecipeError: naming both stages.
    """
    formatted = patched = ""
    for name, effect in effects:
        if formatted and effect is not Effects.NONE:
            raise RecipeError(f"stage '{name}' follows '{formatted}', which changes the storage format; put '{name}' before it")
        if patched and Effects.SHAPES in effect:
            raise RecipeError(f"stage '{name}' changes shapes after '{patched}' patched the forward pass; put '{name}' before it")
        formatted = name if Effects.FORMAT in effect else formatted
        patched = name if Effects.FORWARD in effect else patched
