"""What acting a recipe out on shapes shows: each stage as it would find its model, and budgets as they are met."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedConfig

from compresso.edit.merge_experts import Merging
from compresso.runner.rounds import Act
from compresso.stage import Learning, Passes
from compresso.sweep.compressed import Compressed


@dataclass(frozen=True)
class Acted:
    """A stage as it would find its model.

    Args:
        name: in the recipe.
        config: of the model it works on.
        parameters, macs: of that model, in all and per token.
        passes: that the stage runs it through.
        learning: what it trains; None where it trains nothing.
        trainable: parameters that learn by group: "lora" or, where all weights do, "all", and "gates" where there are
            any.
        compressed: what it zeroes or rounds; None where it does neither.
        held: bytes beside the weights that a sweep takes, at their largest; None for what is no sweep.
        offloaded: bytes that it takes in all where weights stay on disk; None for what is no sweep.
        act: the stage in its round.
        in_blocks: of the parameters, those of its blocks.
        merging: experts that it averages; None for none.
    """

    name: str
    config: PreTrainedConfig
    parameters: int
    macs: int
    passes: Sequence[Passes]
    learning: Learning | None = None
    trainable: Mapping[str, int] = field(default_factory=dict[str, int])
    compressed: Compressed | None = None
    held: int | None = None
    offloaded: int | None = None
    act: Act | None = None
    in_blocks: int = 0
    merging: Merging | None = None


@dataclass(frozen=True)
class Met:
    """A budget, and what shapes make of it: the share of `of` that stays, and the one that was wanted."""

    stage: str
    of: str
    share: float
    wanted: float


@dataclass
class DryRun:
    """What acting a recipe out showed.

    Args:
        before, after: counts as `inspect` gives them.
        shapes: axis -> [kept, size] of the axes that lose units.
        notes: a sentence for each budget, and for what a stage does otherwise than asked.
        budgets: each as it was met.
        stages: each as it finds its model.
        layouts: layout -> why it could not hold these shapes, or None if it can.
        lacking: stage -> which of its kinds the model has no units of, and what that does to its budget.
        lost: what is lost of what an earlier run did to the model; "" for nothing.
        dense: what a recipe for mixtures of experts does to a model without any; "" for others.
        own_zeros: stages that keep zeros where none before them makes any, so that the model has to bring its own.
    """

    before: dict[str, Any]
    after: dict[str, Any]
    shapes: dict[str, list[int]] = field(default_factory=dict[str, list[int]])
    notes: list[str] = field(default_factory=list[str])
    budgets: list[Met] = field(default_factory=list[Met])
    stages: list[Acted] = field(default_factory=list[Acted])
    layouts: dict[str, str | None] = field(default_factory=dict[str, str | None])
    lacking: dict[str, str] = field(default_factory=dict[str, str])
    lost: str = ""
    dense: str = ""
    own_zeros: list[str] = field(default_factory=list[str])
