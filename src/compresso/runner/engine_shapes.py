"""Shapes that an engine wants, written into a recipe's budgets before anything is pruned: `--target llama.cpp:q4_k`.

    llama.cpp:q4_k ...   K-quants hold 256 inputs a block; matrices of other widths fall back to larger types
    llama.cpp:q8_0, q4_0 blocks of 32
    awq:gN, gptq:gN      groups of N inputs that share a scale
    vllm:tpN             heads and channels shared out to N devices, the same widths in every layer

A unit of a head axis is a key/value head with its query heads: what o_proj reads of one is head_dim times its query
heads, and counts of heads are held to the multiple that makes those inputs fit. Where query heads leave one by one, so
are they, so that any number of key/value heads fits.
"""

import copy
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, TypeGuard, cast

from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig, PreTrainedModel

from compresso.arch.base import arch_for
from compresso.arch.queries import axes_of
from compresso.checkpoint.load import meta_model
from compresso.checkpoint.source import open_source
from compresso.core.axis import Axis, Kind
from compresso.errors import RecipeError
from compresso.runner.recipe import stages_of, with_knob
from compresso.stage import Removes, card

_BLOCKS = {**dict.fromkeys(("q2_k", "q3_k", "q4_k", "q5_k", "q6_k"), 256), **dict.fromkeys(("q8_0", "q4_0"), 32)}
EXAMPLES = "llama.cpp:q4_k, llama.cpp:q8_0, awq:g128, gptq:g128 or vllm:tp2"
_PLURALS = {
    Kind.HEAD: "heads",
    Kind.QUERY: "query heads of a key/value head",
    Kind.HEAD_CHANNEL: "channels of a head",
    Kind.CHANNEL: "channels",
    Kind.EXPERT_CHANNEL: "channels of experts",
    Kind.HIDDEN: "hidden dimensions",
}


@dataclass(frozen=True)
class ShapeConstraints:
    """What an engine wants of a model's shapes.

    Args:
        engine: as it was asked for.
        inputs: multiple of the inputs of every matrix; 1 for any.
        heads, channels: multiples of their counts, whatever a head's width.
        uniform: the same widths in every layer.
    """

    engine: str
    inputs: int = 1
    heads: int = 1
    channels: int = 1
    uniform: bool = False


def parse_engine(text: str) -> ShapeConstraints:
    """What stands after --target.

    >>> parse_engine("awq:g64").inputs
    64

    Raises RecipeError, naming what is known.
    """
    engine, _, detail = text.partition(":")
    if engine == "llama.cpp" and detail in _BLOCKS:
        return ShapeConstraints(text, inputs=_BLOCKS[detail])
    if engine in ("awq", "gptq") and (group := re.fullmatch(r"g([1-9]\d{0,4})", detail)):
        return ShapeConstraints(text, inputs=int(group[1]))
    if engine == "vllm" and (devices := re.fullmatch(r"tp([1-9]\d{0,2})", detail)):
        return ShapeConstraints(text, heads=int(devices[1]), channels=int(devices[1]), uniform=True)
    raise RecipeError(f"--target {text}: unknown engine; give {EXAMPLES}")


def multiples(want: ShapeConstraints, model: str, queries: bool = False) -> dict[Kind, int]:
    """The multiple of each kind's counts in a model; kinds that may have any count are absent.

    queries: whether query heads leave one by one.
    """
    live = meta_model(open_source(model, weights=False))
    found = {Kind.CHANNEL: math.lcm(want.inputs, want.channels), Kind.HIDDEN: want.inputs}
    if any(axis.kind == Kind.EXPERT_CHANNEL for axis in _axes(live)):
        found[Kind.EXPERT_CHANNEL] = found[Kind.CHANNEL]
    widths = {gate.width for axis in _axes(live) if axis.kind == Kind.HEAD for gate in axis.gates}
    found[Kind.HEAD] = math.lcm(want.heads, *(want.inputs // math.gcd(want.inputs, width) for width in widths))
    if queries:
        one = {gate.width for axis in _axes(live) if axis.kind == Kind.QUERY for gate in axis.gates}
        found[Kind.QUERY] = math.lcm(1, *(want.inputs // math.gcd(want.inputs, width) for width in one))
    return {kind: multiple for kind, multiple in found.items() if multiple > 1}


def for_engine(raw: Mapping[str, Any], want: ShapeConstraints, held: Mapping[Kind, int]) -> dict[str, Any]:
    """The raw recipe whose budgets are held to these multiples as well as their own, and to equal widths if the engine
    wants them.
    """
    changed = held_to(raw, held)
    return with_knob(changed, "layout", "uniform", required=False) if want.uniform else changed


def held_to(raw: Mapping[str, Any], held: Mapping[Kind, int]) -> dict[str, Any]:
    """The raw recipe whose budgets are held to these multiples as well as their own; to those of query heads where they
    leave one by one.
    """
    stages: list[dict[str, Any]] = []
    for name, knobs in stages_of(raw):
        knob = card(name).knobs.get("multiple_of")
        here = {kind: multiple for kind, multiple in held.items() if kind != Kind.QUERY or _queries(name, knobs)}
        own = knobs.get("multiple_of") or {}
        if knob is not None and knob.group is Removes and here and _is_counts(own):
            both = {str(kind): math.lcm(multiple, own.get(str(kind), 1)) for kind, multiple in here.items()}
            knobs = {**knobs, "multiple_of": {**own, **both}}
        stages.append({name: knobs})
    return {**raw, "stages": stages}


def removes_queries(raw: Mapping[str, Any]) -> bool:
    """Whether query heads leave one by one in a stage of a raw recipe."""
    return any(_queries(name, knobs) for name, knobs in stages_of(raw))


def writable_heads(config: PreTrainedConfig) -> int:
    """The smallest divisor of a config's key/value heads whose multiples it takes all: some want query heads to divide
    the hidden size.
    """
    if (found := _grouped(config)) is None:
        return 1  # no such config holds fewer heads; `check_plain` says so
    groups, slots = found
    every = (one for one in _divisors(groups) if _takes(config, range(one, groups + 1, one), [slots]))
    return next(every, 1)


def writable_queries(config: PreTrainedConfig) -> int:
    """Likewise of the query heads that share a key/value head, where those are held to `writable_heads`."""
    if (found := _grouped(config)) is None:
        return 1
    (groups, slots), heads = found, writable_heads(config)
    kept = range(heads, groups + 1, heads)
    return next((one for one in _divisors(slots) if _takes(config, kept, range(one, slots + 1, one))), 1)


def without_multiple(raw: Mapping[str, Any], kind: Kind, multiple: int) -> dict[str, Any]:
    """The raw recipe whose budgets are not held to one of the multiples that `for_engine` gave."""
    stages: list[dict[str, Any]] = []
    for name, knobs in stages_of(raw):
        own = knobs.get("multiple_of")
        if isinstance(own, dict) and own.get(str(kind), 1) % multiple == 0:
            knobs = {**knobs, "multiple_of": {key: value for key, value in own.items() if key != str(kind)}}
        stages.append({name: knobs})
    return {**raw, "stages": stages}


def misfits(want: ShapeConstraints, held: Mapping[Kind, int], model: str) -> list[str]:
    """Sentences on sizes of the dense model that are no such multiple: what keeps all of them keeps that size."""
    live = meta_model(open_source(model, weights=False))
    told: list[str] = []
    for kind, multiple in held.items():
        sizes = {axis.size for axis in _axes(live) if axis.kind == kind} - {0}
        if not sizes and kind == Kind.HIDDEN:
            sizes = {int(live.config.hidden_size)}
        for size in sorted(size for size in sizes if size % multiple):
            told.append(
                f"{want.engine}: {size} {_PLURALS[kind]} are no multiple of {multiple}; where all of them stay, that"
                " size stays"
            )
    return told


def words(want: ShapeConstraints, kind: Kind, multiple: int) -> str:
    """A constraint in words."""
    return f"{want.engine}: {_PLURALS[kind]} in multiples of {multiple}"


def _is_counts(own: Any) -> TypeGuard[Mapping[str, int]]:
    """Whether a knob holds a number for each kind; the recipe's own check refuses what does not."""
    return isinstance(own, Mapping) and all(isinstance(value, int) for value in cast(Mapping[Any, Any], own).values())


def _queries(name: str, knobs: Mapping[str, Any]) -> bool:
    """Whether query heads leave one by one in a stage of these knobs."""
    knob = card(name).knobs.get("kinds")
    kinds = None if knob is None else knobs.get("kinds", knob.default)
    return isinstance(kinds, list | tuple) and Kind.QUERY in kinds


def _axes(live: PreTrainedModel) -> tuple[Axis, ...]:
    """All axes of a model."""
    return axes_of(arch_for(live.config), live, tuple(Kind))


def _divisors(number: int) -> Iterator[int]:
    """The divisors of a number, ascending."""
    return (one for one in range(1, number + 1) if number % one == 0)


def _grouped(config: PreTrainedConfig) -> tuple[int, int] | None:
    """A config's key/value heads, and the query heads that share one; None where it cannot say that some are gone."""
    heads = getattr(config, "num_attention_heads", None)
    groups = getattr(config, "num_key_value_heads", None) or heads
    if not heads or not groups or heads % groups or getattr(config, "head_dim", None) is None:
        return None
    return groups, heads // groups


def _takes(config: PreTrainedConfig, groups: Sequence[int], slots: Sequence[int]) -> bool:
    """Whether a config takes all these numbers of key/value heads with all these numbers of query heads each."""
    for kept, of_each in product(groups, slots):
        tried = copy.deepcopy(config)
        try:
            tried.num_attention_heads, tried.num_key_value_heads = kept * of_each, kept
            tried.validate()
        except (ValueError, StrictDataclassError):
            return False
    return True
