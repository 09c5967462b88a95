"""What was done to a model, in words, from what its stages noted: not from what a recipe is called."""

import re
from collections.abc import Iterator, Mapping

from compresso.report.records import RunRecords
from compresso.report.stage_facts import filled, full_again, ranks_of

_PARTS = (
    (re.compile(r"\.queries$"), "query heads"),
    (re.compile(r"\.(matches|values)$"), "channels of heads"),
    (re.compile(r"\.heads$"), "heads"),
    (re.compile(r"\.channels$"), "FFN channels"),
    (re.compile(r"\.experts$"), "experts"),
    (re.compile(r"\.expert_channels$"), "channels of experts"),
    (re.compile(r"^hidden$"), "hidden dimensions"),
    (re.compile(r"(^|\.)layers$"), "layers"),
    (re.compile(r"\.wide$"), "channels inside blocks"),
    (re.compile(r"\.features$"), "channels of feature maps"),
    (re.compile(r"\.(projected|fused)$"), "channels of the head"),
    (re.compile(r"attention"), "attention sub-layers"),
    (re.compile(r"mlp|ffn"), "FFN sub-layers"),
    (re.compile(r"^vocab$"), "tokens of the vocabulary"),
)
_SERVED = 8
"""Bits of activations that engines with integers compute."""


def removed_kinds(records: RunRecords) -> list[str]:
    """What left, such as ["heads", "FFN channels"]; kinds of which every unit stayed are not named."""
    gone = [
        _kind(axis)
        for facts in records.stages.values()
        for axis, (kept, size) in _fractions(facts.units_kept)
        if kept < size
    ]
    return list(dict.fromkeys(gone))


def kept_of(records: RunRecords) -> list[str]:
    """How many of each kind are left of those that there were, such as ["FFN channels: 608 of 1,216"]; kinds of which
    every unit stayed are not named.
    """
    before: dict[str, int] = {}
    after: dict[str, int] = {}
    for facts in records.stages.values():
        for axis, (kept, size) in _fractions(facts.units_kept):
            before.setdefault(axis, size)
            after[axis] = kept
    totals: dict[str, tuple[int, int]] = {}
    for axis, size in before.items():
        kept, there = totals.get(_kind(axis), (0, 0))
        totals[_kind(axis)] = kept + after[axis], there + size
    return [f"{name}: {kept:,} of {there:,}" for name, (kept, there) in totals.items() if kept < there]


def _kind(axis: str) -> str:
    """What the units of an axis are."""
    return next((words for pattern, words in _PARTS if pattern.search(axis)), "other units")


def _fractions(units_kept: Mapping[str, str]) -> Iterator[tuple[str, tuple[int, int]]]:
    """Axis, and units that it keeps and had."""
    for axis, fraction in units_kept.items():
        kept, _, size = fraction.partition("/")
        yield axis, (int(kept), int(size))


def participle(records: RunRecords) -> str:
    """Those of "pruned", "quantised", "truncated" and "sliced" that were done, with "and" between; "trained" where none
    was.
    """
    stages = records.stages
    zeros = any(stages[name].zeroed and not filled(stages, name) for name in stages)
    pruned = bool(removed_kinds(records)) or zeros
    quantised = any(facts.bits for facts in records.stages.values())
    truncated = any((facts.model_extra or {}).get("ranks") for facts in records.stages.values())
    sliced = any((facts.model_extra or {}).get("stream_width") for facts in records.stages.values())
    told = (("pruned", pruned), ("quantised", quantised), ("truncated", truncated), ("sliced", sliced))
    return " and ".join(word for word, done in told if done) or "trained"


def deeds(records: RunRecords) -> list[str]:
    """A sentence for everything that was done."""
    told: list[str] = []
    if kinds := removed_kinds(records):
        *first, last = kinds
        names = f"{', '.join(first)} and {last}" if first else last
        padded = " and filled up with zeros to one width" if records.layout == "padded" else ""
        told.append(f"{names[0].upper()}{names[1:]} were removed{padded}.")
    for name, facts in records.stages.items():
        if facts.zero_before and not facts.zeroed:
            there = f"{facts.zero_before:.1%} of the weights that {name} worked on were zeros before, and stay zeros."
            told.append(there.replace("%", " %"))
        if facts.zeroed:
            told.append(_zeros(records, name).replace("%", " %"))
        if facts.bits:
            group = (facts.model_extra or {}).get("group")
            groups = f", in groups of {group} inputs" if group else ""
            told.append(f"Weights were rounded by {name} to what takes {facts.bits:.3g} bits each once packed{groups}.")
        if ranks_of(facts):
            told.append(_low_rank(records, name))
        if (facts.model_extra or {}).get("stream_width"):
            told.append(_sliced(records, name))
        if (bits := (facts.model_extra or {}).get("activation_bits")) and bits < _SERVED:
            told.append(
                f"Activations of {bits} bits by {name} are simulated: compresso.load computes them with full numbers,"
                " and other engines do not round them."
            )
    return told


def forgets(records: RunRecords) -> str:
    """A sentence on a cache that forgets, and on who serves it; empty where it holds everything."""
    facts = records.stages.get("context_gates")
    if facts is None:
        return ""
    live = (facts.model_extra or {}).get("live_fraction")
    share = f" to {100 * live:.0f} % of the context" if isinstance(live, float) else ""
    return (
        f"No engine serves its pruned context: its cache forgets{share} by learned gates that compresso.load alone"
        " applies, and others open the model with its whole cache."
    )


def _zeros(records: RunRecords, name: str) -> str:
    """A sentence on the zeros that a stage made."""
    share = f"{records.stages[name].sparsity or 0:.1%} of the weights that {name} worked on"
    after = filled(records.stages, name)
    if not after:
        return f"{share} are zeros."
    left = list(records.stages.values())[-1].left
    now = "" if left is None or left.zeros is None else f": {left.zeros:.1%} of the matrices are zeros in the end"
    return f"{share} became zeros, which {after} filled again{now}."


def _sliced(records: RunRecords, name: str) -> str:
    """A sentence on the stream that a stage cut."""
    extra = records.stages[name].model_extra or {}
    untied = ", its head untied" if extra["untied"] else ""
    grown = ", which is MORE" if extra["sliced_parameters"] >= extra["dense_parameters"] else ""
    return (
        f"The stream was cut from {extra['dense_width']:,} dimensions to {extra['stream_width']:,} by {name}. The files"
        " hold the dense weights: compresso.load cuts the stream, and engines compute the dense model. compresso export"
        f" --format sliced writes the narrower one, {extra['sliced_parameters']:,} parameters in place of"
        f" {extra['dense_parameters']:,}{untied}{grown}, which transformers alone opens."
    )


def _low_rank(records: RunRecords, name: str) -> str:
    """A sentence on the linears that a stage gave a low rank."""
    facts = records.stages[name]
    ranks, extra = ranks_of(facts), facts.model_extra or {}
    done = f"{len(ranks)} linears got a low rank by {name}"
    if after := full_again(records.stages, name):
        return f"{done}, and their full rank back by {after}: nothing is left that low-rank would factor."
    if records.layout == "native":
        return f"{done} and are stored multiplied out; low-rank writes no factors of layers of their own widths."
    return (
        f"{done} and are stored multiplied out; compresso export --format low-rank writes their factors,"
        f" {extra['factored']:,} numbers in place of {extra['weights']:,}."
    )
