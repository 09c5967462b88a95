"""The knob `repair` of every stage that removes units: short for the stage `repair` right behind it.

    stages: [drop_layers: {keep: 0.8, repair: residual}]  ==  [drop_layers: {keep: 0.8}, repair: {target: residual}]

So there is one implementation, with a journal and records of its own, whatever chose the units.
"""

from collections.abc import Sequence
from typing import Any

from compresso.errors import RecipeError, nearest
from compresso.stage import Effects, card

STAGE = "repair"
KNOB = "repair"
NONE = "none"
VALUES = (NONE, "input", "residual")


def expanded(stages: Sequence[tuple[str, Any]], recipe: str) -> list[tuple[str, Any]]:
    """Name and knobs of each stage, those of the knob among them.

    Raises:
        RecipeError: an unknown value, a stage that removes nothing, or a second repair.
    """
    found: list[tuple[str, Any]] = []
    for name, knobs in stages:
        if name == STAGE or not isinstance(knobs, dict) or KNOB not in knobs:
            found.append((name, knobs))
            continue
        if Effects.SHAPES not in card(name).effects:
            raise RecipeError(
                f"recipe {recipe}: stage '{name}' removes no units, so there is nothing to repair behind it; give"
                " repair to the stage that does"
            )
        value = NONE if knobs[KNOB] is None else str(knobs[KNOB])
        if value not in VALUES:
            raise RecipeError(
                f"recipe {recipe}: stage '{name}': repair={value}: wanted none, input or residual;"
                f" {nearest(value, VALUES)}"
            )
        found.append((name, {key: one for key, one in knobs.items() if key != KNOB}))
        if value != NONE:
            found.append((STAGE, {"target": value}))
    if sum(name == STAGE for name, _ in found) > 1 and any(KNOB in knobs for _, knobs in stages if knobs):
        raise RecipeError(
            f"recipe {recipe}: two repairs; one behind the last stage that removes units makes up for all of them"
        )
    return found
