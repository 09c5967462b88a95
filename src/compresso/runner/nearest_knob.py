"""What is said of an option that no stage of a recipe has the knob of: why, and which knob of theirs comes nearest."""

from collections.abc import Sequence
from typing import Any

from compresso.core.quantities import QUANTITIES
from compresso.stage import card
from compresso.wording import SHARES

_NEAREST = {
    "keep": ("sparsity", "pattern", "bits", "weight_bits", "skip", "most"),
    "max_steps": ("epochs",),
}
"""Knobs that do to size or length what another does, the nearest first."""


def without_knob(recipe: str, stages: Sequence[tuple[str, Any]], knob: str, asked: str) -> str:
    """The message for a knob that no stage has.

    Args:
        recipe: its name.
        stages: of it: name and knobs as the recipe sets them.
        knob: which none has.
        asked: the option that sets it, as it was given; empty if the knob itself was.
    """
    named = f"recipe '{recipe}' ({', '.join(name for name, _ in stages)})"
    sized = any("keep" in card(name).knobs for name, _ in stages)
    match knob:
        case "max_steps":
            return (
                f"{asked or knob}: no stage of {named} trains in steps that it could cap; {_cure(stages, knob, asked)}"
            )
        case "of" if sized:
            return f"{asked or knob}: no stage of {named} {_share(stages)}; give --keep in its place"
        case "keep" | "of":
            return (
                f"{asked or knob}: no stage of {named} takes a share of the units away; {_cure(stages, 'keep', asked)}"
            )
        case _:
            return f"no stage of recipe '{recipe}' has the knob '{knob}'; see `compresso recipes {recipe}`"


def share_of(stages: Sequence[tuple[str, Any]]) -> str:
    """What `keep` is a share of in the stages that have it, in words; block parameters where none has.

    stages: name and knobs as a recipe sets them.
    """
    found: list[str] = []
    for name, knobs in stages:
        known = card(name).knobs
        if "keep" not in known:
            continue
        of = knobs.get("of") if isinstance(knobs, dict) else None
        of = of or (known["of"].default if "of" in known else "blocks")
        words = "all parameters" if of == "total" else QUANTITIES[of].words if of in QUANTITIES else ""
        found.append(SHARES.get(name, words))
    return " and ".join(dict.fromkeys(filter(None, found))) or QUANTITIES["blocks"].words


def in_place_of_memory(stages: Sequence[tuple[str, Any]]) -> str:
    """The cure of a budget of memory that is none of texts: the options that the recipe takes in its place."""
    sized = [card(name).knobs for name, _ in stages if "keep" in card(name).knobs]
    if any("of" in knobs for knobs in sized):
        return "give --bytes-at-context and --keep"
    return "give --keep in its place" if sized else "leave it out"


def _share(stages: Sequence[tuple[str, Any]]) -> str:
    """Why the share that a stage takes is none of what is asked for."""
    words = next((SHARES[name] for name, _ in stages if name in SHARES and name != "svd"), None)
    if words is None:
        return "counts anything but parameters of what it factors"
    return f"has a budget of that, its keep is a share of {words}"


def _cure(stages: Sequence[tuple[str, Any]], knob: str, asked: str) -> str:
    """Without the option, or with the nearest knob: one that the recipe sets before one that it leaves as it is."""
    able = [(name, near) for near in _NEAREST[knob] for name, _ in stages if near in card(name).knobs]
    given = {(name, near): value for name, knobs in stages if isinstance(knobs, dict) for near, value in knobs.items()}
    found = next((one for one in able if one in given), next(iter(able), None))
    if found is None:
        return "leave it out"
    path = ".".join(("stages", *found))
    if found[1] == "sparsity" and asked.startswith("--keep ") and 0 < (keep := float(asked.split()[1])) < 1:
        return f"leave it out, or set the share of zeros: --set {path}={1 - keep:.4g}"
    now = f", now {str(given[found])[:40]}," if found in given else ""
    return f"leave it out, or set {path}{now} with --set"
