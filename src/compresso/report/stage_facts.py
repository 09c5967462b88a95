"""What the stages of a run noted, as records.json has it, and what a later one undid of it.

Each method has facts of its own, so these are open; those that reports show are typed.
"""

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import ConfigDict, Field, FiniteFloat

from compresso.metrics.record import Measurement, Strict

Fraction = Annotated[str, Field(pattern=r"^\d+/\d+$")]
"""Units kept of those that were there, "3/4"."""


class HeldCurve(Strict):
    """Losses on held-out examples while a stage trained, after how many updates the state is that was kept, after how
    many training ended, and why.
    """

    update: list[int]
    loss: list[FiniteFloat]
    best: int
    ended: int
    why: str


class Left(Strict):
    """What a stage left: all parameters and multiply-accumulates a token, and on held-out examples the loss, in nats a
    label, and the task's metric; None without data. `zeros` is the share of zeros in the matrices of its blocks, from
    the first stage on that notes zeros.
    """

    parameters: int
    macs_per_token: int
    held_loss: FiniteFloat | None
    score: Measurement | None
    zeros: FiniteFloat | None = None


class StageFacts(Strict):
    """What a stage noted, facts of its own among it.

    `curve` has columns of equal length, "update" the horizontal one; `sparsity` is the share of zeros in the weights it
    worked on, of which `zero_before` were there when it began; `bits` what one of these would take if they were packed.
    `seconds` is what the stage took, over all pieces of a run that was resumed; `since_resume` where a version that did
    not save the time ran it before, which is then not in it. `left` is absent where an older version ran it.
    """

    model_config = ConfigDict(extra="allow", frozen=True, allow_inf_nan=False)

    units_kept: dict[str, Fraction] = Field(default_factory=dict[str, Fraction])
    kept_share_of_blocks: FiniteFloat | None = None
    curve: dict[str, list[FiniteFloat | None]] = Field(default_factory=dict[str, list[FiniteFloat | None]])
    seconds: FiniteFloat | None = None
    since_resume: bool = False
    sparsity: FiniteFloat | None = None
    zero_before: FiniteFloat | None = None
    bits: FiniteFloat | None = None
    held: HeldCurve | None = None
    left: Left | None = None

    @property
    def zeroed(self) -> float | None:
        """`sparsity`, where the stage made some of the zeros."""
        return self.sparsity if self.sparsity and self.sparsity > (self.zero_before or 0) else None


def ranks_of(facts: StageFacts) -> Mapping[str, int]:
    """Ranks of the linears that a stage gave a low one."""
    return (facts.model_extra or {}).get("ranks") or {}


def filled(stages: Mapping[str, StageFacts], zeroing: str) -> str:
    """The first stage behind one that zeroed weights that left less than half of the zeros; "" for none."""
    names = list(stages)
    at = names.index(zeroing)
    before = _zeros(stages[zeroing])
    for name in names[at + 1 :]:
        now = _zeros(stages[name])
        if before is not None and now is not None and now < before / 2:
            return name
    return ""


def filled_now(stages: Mapping[str, Mapping[str, Any]], name: str) -> str:
    """The stage whose zeros were filled by this one, the last of what a run noted so far; "" for none."""
    known = {one: StageFacts.model_validate(facts) for one, facts in stages.items()}
    return next((one for one in known if known[one].sparsity and filled(known, one) == name), "")


def _zeros(facts: StageFacts) -> float | None:
    """Share of zeros that a stage left."""
    return None if facts.left is None else facts.left.zeros


def full_again(stages: Mapping[str, StageFacts], truncating: str) -> str:
    """The first stage that rounded or zeroed every linear that an earlier one gave a low rank; "" for none."""
    names = list(stages)
    ranks = ranks_of(stages[truncating])
    for name in names[names.index(truncating) + 1 :]:
        worked_on = (stages[name].model_extra or {}).get("zeros")
        if not (stages[name].bits or stages[name].sparsity) or not isinstance(worked_on, dict):
            continue
        if all(f"{linear}.weight" in worked_on for linear in ranks):
            return name
    return ""
