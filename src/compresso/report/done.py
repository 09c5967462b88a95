"""What was done to a model, in words, from what its stages noted: not from what a recipe is called."""

import re

from compresso.report.records import RunRecords

_PARTS = (
    (re.compile(r"\.queries$"), "query heads"),
    (re.compile(r"\.heads$"), "heads"),
    (re.compile(r"\.channels$"), "FFN channels"),
    (re.compile(r"^hidden$"), "hidden dimensions"),
    (re.compile(r"^layers$"), "layers"),
    (re.compile(r"attention"), "attention sub-layers"),
    (re.compile(r"mlp|ffn"), "FFN sub-layers"),
    (re.compile(r"^vocab$"), "tokens of the vocabulary"),
)
_SERVED = 8
"""Bits of activations that engines with integers compute."""


def removed_kinds(records: RunRecords) -> list[str]:
    """What left, such as ["heads", "FFN channels"]; kinds of which every unit stayed are not named."""
    gone: list[str] = []
    for facts in records.stages.values():
        for axis, fraction in facts.units_kept.items():
            kept, _, size = fraction.partition("/")
            if int(kept) < int(size):
                name = next((words for pattern, words in _PARTS if pattern.search(axis)), "other units")
                gone.append(name)
    return sorted(set(gone), key=gone.index)


def participle(records: RunRecords) -> str:
    """Those of "pruned", "quantised" and "truncated" that were done, with "and" between; "trained" where none was."""
    pruned = bool(removed_kinds(records)) or any(facts.sparsity for facts in records.stages.values())
    quantised = any(facts.bits for facts in records.stages.values())
    truncated = any((facts.model_extra or {}).get("ranks") for facts in records.stages.values())
    told = (("pruned", pruned), ("quantised", quantised), ("truncated", truncated))
    return " and ".join(word for word, done in told if done) or "trained"


def deeds(records: RunRecords) -> list[str]:
    """A sentence for everything that was done."""
    told: list[str] = []
    if kinds := removed_kinds(records):
        *first, last = kinds
        names = f"{', '.join(first)} and {last}" if first else last
        filled = " and filled up with zeros to one width" if records.layout == "padded" else ""
        told.append(f"{names[0].upper()}{names[1:]} were removed{filled}.")
    for name, facts in records.stages.items():
        if facts.sparsity:
            told.append(f"{facts.sparsity:.1%} of the weights that {name} worked on are zeros.".replace("%", " %"))
        if facts.bits:
            group = (facts.model_extra or {}).get("group")
            groups = f", in groups of {group} inputs" if group else ""
            told.append(f"Weights were rounded by {name} to what takes {facts.bits:.3g} bits each once packed{groups}.")
        if ranks := (facts.model_extra or {}).get("ranks"):
            whole, own = ((facts.model_extra or {})[key] for key in ("weights", "factored"))
            after = _full_again(records, name)
            told.append(
                f"{len(ranks)} linears got a low rank by {name}, and their full rank back by {after}: nothing is left"
                " that low-rank would factor."
                if after
                else f"{len(ranks)} linears got a low rank by {name} and are stored multiplied out; compresso export"
                f" --format low-rank writes their factors, {own:,} numbers in place of {whole:,}."
            )
        if (bits := (facts.model_extra or {}).get("activation_bits")) and bits < _SERVED:
            told.append(
                f"Activations of {bits} bits by {name} are simulated: compresso.load computes them with full numbers,"
                " and other engines do not round them."
            )
    return told


def _full_again(records: RunRecords, truncating: str) -> str:
    """The first stage that rounded or zeroed every linear that an earlier one gave a low rank; "" for none."""
    stages = list(records.stages.items())
    at = next(i for i, (name, _) in enumerate(stages) if name == truncating)
    ranks = (stages[at][1].model_extra or {})["ranks"]
    for name, facts in stages[at + 1 :]:
        worked_on = (facts.model_extra or {}).get("zeros")
        if not (facts.bits or facts.sparsity) or not isinstance(worked_on, dict):
            continue
        if all(f"{linear}.weight" in worked_on for linear in ranks):
            return name
    return ""
