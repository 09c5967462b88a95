"""The cure of a budget that cannot be met, in knobs that the stage at hand has; each was tried before it is named.

What holds a budget up is told where it is counted, of a budget alone. Which knobs a stage has, which kinds it can
choose among, what a later stage needs and what a family's config can hold is known to the recipe as a whole. A floor
may be a share of the budget, too, and a second thing may stand behind the first: so it is acted out under each cure.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from compresso.core.axis import Kind
from compresso.core.budget import Refused, Shortfall
from compresso.errors import BudgetError, CompressoError
from compresso.stage import card

Again = Callable[[Mapping[str, Any]], object]
"""Acts a recipe out under other options. Raises CompressoError."""
TRIES = 7
"""Shares that are tried at most, each past what held the one before up."""
_STEP, _CREEPS = 1.05, 3
"""How much more the next is than the one before, at least, once so many took what the refusals told."""
ABLE = "gate_taylor"
"""A stage that chooses among most kinds."""
_BY_IT = (Kind.CHANNEL, Kind.EXPERT, Kind.EXPERT_CHANNEL, Kind.HEAD)
"""Kinds that it takes in every family that has them, in the order in which they are tried, before all others."""


def shortfall_of(error: BaseException | None) -> Shortfall | None:
    """How far a refused budget is from what can be met, as the error or one behind it tells."""
    while error is not None:
        found = getattr(error, "shortfall", None)
        if isinstance(found, Shortfall):
            return found
        error = error.__cause__
    return None


def cured(error: BudgetError, given: Mapping[str, Any], again: Again) -> BudgetError:
    """A refusal with cures that `again` takes; as it is where nobody told what was refused, or no cure is known.

    Args:
        error: of a stage's budget.
        given: the options of a run, by the names of its arguments: a share or none.
        again: acts the recipe out.
    """
    refused = error.refused
    if refused is None:
        return error
    found, knobs = shortfall_of(error), card(refused.stage).knobs
    ways: list[str] = []
    least, last = _least(given, again, refused.stage, found)
    if least is not None and least < 1:
        ways.append(f"raise keep to {least:g}")
    if found is not None and (sets := _lowered(found, given, again, refused.stage, knobs)):
        ways.append(f"give {' '.join(sets)}")
    keep = 1.0 if found is None else found.keep
    other = _other_kinds(refused, keep, given, again, raised=not ways) if "kinds" in knobs else ""
    if last is not None and not ways and not other:
        wall = f"stage '{refused.stage}': {refused.uncured}. With a larger share it is refused, too: {last}"
        return BudgetError(wall, found, refused)
    none = "; no keep below 1 does here" if least == 1 else ""
    ways += [way for way in (other or _elsewhere(refused, keep),) if way]
    said = ", or ".join(ways) or "choose another recipe"
    there = "" if refused.kinds or not refused.others else f"; it has {', '.join(sorted(refused.others))}"
    there += ": name some of those" if there and ways else ""
    told = f"stage '{refused.stage}': {refused.uncured}{there}{none}. {said[0].upper()}{said[1:]}"
    return BudgetError(told, found, refused)


def _least(
    given: Mapping[str, Any], again: Again, stage: str, found: Shortfall | None
) -> tuple[float | None, CompressoError | None]:
    """A share that nothing speaks against, in ten-thousandths, at most 1: the least that the refusals tell of, or a
    twentieth more where they creep. None, with what speaks against more, where it is not the share that is refused.
    """
    tried: float | None = None
    last: CompressoError | None = None
    for n in range(TRIES):
        if found is None:
            return None, last
        least = 0.0 if tried is None else tried * _STEP if n > _CREEPS else tried + 1e-4
        share = found.share if tried is None else tried * found.share / found.keep
        tried = max(math.ceil(share * 1e4 - 1e-6) / 1e4, math.ceil(least * 1e4 - 1e-6) / 1e4)
        if tried >= 1:
            return 1.0, None
        try:
            again(with_keep(given, stage, tried))
            return tried, None
        except CompressoError as error:
            found, last = shortfall_of(error), error
    return None, last


def with_keep(given: Mapping[str, Any], stage: str, keep: float) -> dict[str, Any]:
    """The options with another share, given as the one before was."""
    own = f"stages.{stage}.keep="
    sets = [own + f"{keep:g}" if one.replace(" ", "").startswith(own) else one for one in _sets(given)]
    return {**given, "sets": sets} if sets != _sets(given) else {**given, "keep": keep}


def _sets(given: Mapping[str, Any]) -> list[str]:
    return list(given.get("sets") or ())


def _lowered(
    found: Shortfall | None, given: Mapping[str, Any], again: Again, stage: str, knobs: Iterable[str]
) -> list[str]:
    """Options that let go what holds a budget up, one after the other; none where that does not help."""
    lowered: dict[str, int] = {}
    while found is not None and found.knobs.keys() - lowered.keys():
        lowered = {**found.knobs, **lowered}  # none is set twice: two could undo each other for ever
        if not {name.partition(".")[0] for name in lowered} <= {*knobs}:
            return []
        sets = [f"stages.{stage}.{name}={value}" for name, value in lowered.items()]
        try:
            again({**given, "sets": [*_sets(given), *sets]})
            return [f"--set {one}" for one in sets]
        except CompressoError as error:
            found = shortfall_of(error)
    return []


def _other_kinds(refused: Refused, keep: float, given: Mapping[str, Any], again: Again, *, raised: bool) -> str:
    """A kind of the model that the stage chooses among and that meets the budget beside its own; "" for none.

    keep: the share that is to stay, which no kind is tried for that leaves more.
    raised: also propose one that meets a larger budget.
    """
    able = [kind for kind, least in refused.others.items() if least <= keep or raised]
    for kind in sorted(able, key=lambda one: (_BY_IT.index(one) if one in _BY_IT else len(_BY_IT), one)):
        one = f"stages.{refused.stage}.kinds=[{','.join((*refused.kinds, kind))}]"
        more = {**given, "sets": [*_sets(given), one]}
        try:
            again(more)
            return f'give --set "{one}"'
        except CompressoError as error:
            least, _ = _least(more, again, refused.stage, shortfall_of(error)) if raised else (None, None)
            if least is not None and least < 1:
                return f'give --set "{one}" and raise keep to {least:g}'
    return ""


def _elsewhere(refused: Refused, keep: float) -> str:
    """Another stage, for a mixture whose experts meet the budget beside the stage's own kinds; "" for others."""
    named = [kind for kind in (Kind.EXPERT, Kind.EXPERT_CHANNEL) if refused.others.get(kind, math.inf) <= keep]
    if not named or refused.stage == ABLE or not {*refused.kinds} <= {*_BY_IT}:
        return ""
    return f"take {ABLE} in its place, which can remove {' or '.join(named)}, too"
