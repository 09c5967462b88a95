"""What is advised after a run, from what its stages noted: recommendations of published work on trust under
compression, each with its source, and only those that apply to what was done.

arXiv 2403.15447 ("Decoding Compressed Trust") compared 13B models at half of their weights and at 8, 4 and 3 bits;
arXiv 2401.10862 ("Pruning for Protection") pruned attention alone in 7B chat models. What neither tried is said to be
open, not read off them.
"""

import re
from collections.abc import Mapping

from compresso.metrics.record import ModelResults
from compresso.report.done import removed_kinds
from compresso.report.records import RunRecords
from compresso.report.stage_facts import StageFacts, filled, ranks_of
from compresso.tasks.base import task_named

FEW_BITS = 4
"""Bits a weight below which trust was found to fall where accuracy did not show it."""
HALF = 0.5
"""Share of zeros at which pruning was found to cost trust."""
GAIN, TURN = 0.2, 0.3
"""Shares of attention's weights up to which refusals were found to rise, and from which the gain turned."""
_TRUST, _REFUSAL = "arXiv 2403.15447", "arXiv 2401.10862"
_ATTENTION = re.compile(r"attn|attention")
_ROUNDING = 0.005
"""What a share may differ from a recipe's by: rows lose whole numbers of weights."""


def advice(records: RunRecords, results: ModelResults) -> list[str]:
    """The recommendations that apply to a run, a sentence or two each; none where nothing was compressed, or where the
    model writes no text.

    Args:
        records: of the run.
        results: of the model it wrote: whether trust was measured.
    """
    if not task_named(records.recipe.task).writes_text:
        return []
    told = [line for name, facts in records.stages.items() for line in _of_stage(name, facts, records.stages)]
    if kinds := removed_kinds(records):
        told.append(
            f"What it costs in trust to remove {' and '.join(kinds)} is open: neither {_TRUST} nor {_REFUSAL} tried it."
        )
    if any(ranks_of(facts) or (facts.model_extra or {}).get("stream_width") for facts in records.stages.values()):
        told.append(f"What a low rank or a narrower stream costs in trust is open: {_TRUST} tried neither.")
    if not told:
        return []
    if results.changes:
        told.append(
            "Evaluate every dimension again after further compression or tuning: none follows from another, or from"
            f" accuracy ({_TRUST})."
        )
    else:
        told.append(
            f"Trust was not measured, and {_TRUST} found that accuracy does not show it: compresso evaluate"
            " path/to/this/folder --suite trust --against DENSE."
        )
    return told


def _of_stage(name: str, facts: StageFacts, stages: Mapping[str, StageFacts]) -> list[str]:
    """What is advised for the zeros and the bits that a stage left."""
    told: list[str] = []
    if facts.bits and facts.bits < FEW_BITS:
        told.append(
            f"{name} left {facts.bits:.3g} bits a weight. {_TRUST} found trust kept at {FEW_BITS} bits and lost at 3,"
            f" where accuracy does not show it: prefer {FEW_BITS}; a result that was calibrated"
            " wants several calibration seeds evaluated."
        )
    elif facts.bits:
        told.append(
            f"{name} left {facts.bits:.3g} bits, {FEW_BITS} or more: there {_TRUST} found the trust of 13B kept."
        )
    share = facts.sparsity
    if not share or filled(stages, name):
        return told
    if _is_attention_alone(facts) and share < HALF:
        told.append(f"{_attention(name, share)} Measure both: --suite refusal --prompts FILE --benign FILE.")
    elif share >= HALF - _ROUNDING:
        told.append(
            f"{name} left {share:.0%} of zeros. ".replace("%", " %")
            + f"{_TRUST} found that pruning half of the weights costs trust where {FEW_BITS} bits do not: at equal"
            " bytes, prefer bits."
        )
    else:
        told.append(
            f"{name} left {share:.0%} of zeros: ".replace("%", " %")
            + f"what that costs in trust is open, as {_TRUST} tried half of the weights alone."
        )
    return told


def _is_attention_alone(facts: StageFacts) -> bool:
    """Whether the matrices that a stage zeroed all belong to attention."""
    zeros = (facts.model_extra or {}).get("zeros")
    return isinstance(zeros, dict) and bool(zeros) and all(_ATTENTION.search(str(one)) for one in zeros)


def _attention(name: str, share: float) -> str:
    """What was found at a share of zeros in attention alone."""
    shown = f"{name} zeroed {share:.0%} of the attention's weights alone. ".replace("%", " %")
    if share <= GAIN + _ROUNDING:
        return (
            f"{shown}{_REFUSAL} found that 10 to 20 % make 7B chat models refuse more jailbreaks, the more the safer"
            " they were before; a model that refuses more may also answer less."
        )
    if share >= TURN - _ROUNDING:
        return f"{shown}{_REFUSAL} found its gain in refusals to peak near 20 % and to turn at 30 %: prefer 20 %."
    return f"{shown}{_REFUSAL} found its gain in refusals to peak near 20 %: prefer 20 %."
