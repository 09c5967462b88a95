"""The knobs `rounds` and `family` of a stage that removes units, read and checked; `runner/rounds.py` acts on them.

gate_taylor: {keep: 0.5, rounds: 4}
gate_taylor: {family: [0.8, 0.65, 0.5]}         results in OUTPUT/0.8, OUTPUT/0.65, OUTPUT/0.5
ziplm: {family: {1.2x: 0.83, 2x: 0.5}}         results in OUTPUT/1.2x, OUTPUT/2x: what --speedup 1.2x,2x sets
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

from compresso.core.plain_values import whole_number
from compresso.errors import RecipeError
from compresso.solve.gradual import geometric_share
from compresso.stage import Effects, Shrinks, Stage, card

ROUNDS, TARGETS = "rounds", "family"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,31}")
"""What a folder of a target may be called."""
Asked = int | Mapping[str, float]
"""Rounds, or name -> share of each target."""


@dataclass(frozen=True)
class Steps:
    """Where the budgets of a stage in rounds step.

    Args:
        shares: of what the first round received, that stay after each; falling.
        names: of the results that are written after each; none where only the last is.
    """

    shares: tuple[float, ...]
    names: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The knob that says so."""
        if not self.names:
            return {ROUNDS: len(self.shares)}
        return {TARGETS: dict(zip(self.names, self.shares, strict=True))}


def without_knobs(name: str, knobs: Any, recipe: str) -> tuple[Any, Asked]:
    """The knobs of a stage without `rounds` and `family`, and what these ask for; 1 for neither.

    Raises:
        RecipeError: for what is no number of rounds, or no targets, and for a stage that removes nothing.
    """
    if not isinstance(knobs, dict) or not {ROUNDS, TARGETS} & knobs.keys():
        return knobs, 1
    given, where = cast(dict[str, Any], knobs), f"recipe {recipe}: stage '{name}'"
    knob = ROUNDS if ROUNDS in given else TARGETS
    if Effects.SHAPES not in card(name).effects:
        raise RecipeError(
            f"{where} removes no units, so there is nothing to cut in rounds; give {knob} to the stage that does"
        )
    rest = {key: one for key, one in given.items() if key not in (ROUNDS, TARGETS)}
    if ROUNDS in given and TARGETS in given:
        raise RecipeError(f"{where}: rounds and family both say where budgets step; give one")
    value = given[knob]
    if knob == TARGETS:
        return rest, _targets(value, where)
    if (asked := whole_number(value)) is None or asked < 1:
        raise RecipeError(f"{where}: rounds={value!r}: wanted a whole number of at least 1, such as 4")
    return rest, asked


def stepped(name: str, stage: Stage, asked: Asked, recipe: str) -> tuple[Stage, Steps | None]:
    """The stage, with the budget of its last round, and its rounds; None for a single one.

    Raises:
        RecipeError: for a stage that cannot be repeated.
    """
    if asked == 1:
        return stage, None
    knob = f"rounds={asked}" if isinstance(asked, int) else f"family={', '.join(asked)}"
    where = f"recipe {recipe}: stage '{name}': {knob}"
    if once := card(name).once:
        raise RecipeError(f"{where}: it is not repeated, since {once}; leave {knob.partition('=')[0]} out")
    budget = stage.budget() if isinstance(stage, Shrinks) else None
    if budget is None or budget.keep == 1:
        raise RecipeError(
            f"{where} step down to a share that stays, and it has none below 1; give keep, such as keep: 0.5, or leave"
            f" {knob.partition('=')[0]} out"
        )
    if isinstance(asked, int):
        return stage, Steps(tuple(geometric_share(budget.keep, turn, asked) for turn in range(1, asked + 1)))
    shares = tuple(asked.values())
    return cast(Stage, replace(cast(Any, stage), keep=shares[-1])), Steps(shares, tuple(asked))


def _targets(value: Any, where: str) -> dict[str, float]:
    """Name -> share. Raises RecipeError."""
    given = (
        {f"{one:g}" if isinstance(one, float) else str(one): one for one in value} if isinstance(value, list) else value
    )
    wanted = "wanted falling shares that stay, such as [0.8, 0.5] or {1.2x: 0.83, 2x: 0.5}"
    if not isinstance(given, dict) or len(given) < 2 or len(given) < len(value):
        raise RecipeError(f"{where}: family={value!r}: {wanted}; for one result give keep")
    found: dict[str, float] = {}
    for key, share in cast(dict[Any, Any], given).items():
        before = min(found.values(), default=1.0)
        if not isinstance(share, int | float) or isinstance(share, bool) or not 0 < share < before:
            raise RecipeError(f"{where}: family: {key}={share!r}: {wanted}, each below the one before")
        if not _NAME.fullmatch(str(key)):
            raise RecipeError(
                f"{where}: family: {key!r} is to name a folder; wanted at most 32 letters, digits, '.', '_' or '-'"
            )
        found[str(key)] = float(share)
    return found
