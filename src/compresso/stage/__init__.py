"""What a stage is: its registration and knobs, what it may offer to a run, and what it costs.

contract    what a stage must do and may offer
work        what it costs: the passes it takes, and what it trains
sweep_work  the same of stages that go through the blocks one by one
registry    `@stage`, the catalogue's cards, what a stage does to a model, which orders work
knobs       knobs that many stages share, as values that a stage is composed of
flat        how those knobs stand flat in recipes: {keep: 0.5, rank: 8}
tuning      the part that stages which train have in common
"""

from compresso.stage.contract import (
    ChecksData,
    ChecksLabels,
    ChecksModel,
    ChecksProcesses,
    ChecksTaught,
    Compresses,
    FitsModel,
    Follows,
    KeepsZeros,
    Learns,
    LearnsBlocks,
    Merges,
    NeedsMore,
    PlansShapes,
    ReachesLayers,
    Remarks,
    Shrinks,
    Stage,
    Sweeps,
)
from compresso.stage.flat import Knobs, dumped, group, groups_of, knobs_of
from compresso.stage.knobs import AdamW, Calibrates, Removes, Trains, TunesLora, Watches
from compresso.stage.registry import Card, Effects, card, cards, check_order, refuse_together, stage, zeroing
from compresso.stage.sweep_work import learned_bytes, search_passes, sweep_passes
from compresso.stage.work import Foreign, Learning, Passes

__all__ = [
    "AdamW",
    "Calibrates",
    "Card",
    "ChecksData",
    "ChecksLabels",
    "ChecksModel",
    "ChecksProcesses",
    "ChecksTaught",
    "Compresses",
    "Effects",
    "FitsModel",
    "Follows",
    "Foreign",
    "KeepsZeros",
    "Knobs",
    "Learning",
    "Learns",
    "LearnsBlocks",
    "Merges",
    "NeedsMore",
    "Passes",
    "PlansShapes",
    "ReachesLayers",
    "Remarks",
    "Removes",
    "Shrinks",
    "Stage",
    "Sweeps",
    "Trains",
    "TunesLora",
    "Watches",
    "card",
    "cards",
    "check_order",
    "dumped",
    "group",
    "groups_of",
    "knobs_of",
    "learned_bytes",
    "refuse_together",
    "search_passes",
    "stage",
    "sweep_passes",
    "zeroing",
]
