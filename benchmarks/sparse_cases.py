"""The models of the comparison of losses at 70 % zeros, what they are calibrated and trained on, and for how long."""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compresso.runner.recipe import build, read

RECIPE = "sparse-finetune/70"
LOSSES: dict[str, dict[str, float]] = {
    "CE": {"hard_weight": 1.0, "kl_weight": 0.0, "feature_weight": 0.0},
    "CE + KL": {"hard_weight": 1.0, "kl_weight": 1.0, "feature_weight": 0.0},
    "CE + SquareHead": {"hard_weight": 1.0, "kl_weight": 0.0, "feature_weight": 1.0},
    "CE + KL + SquareHead": {"hard_weight": 1.0, "kl_weight": 1.0, "feature_weight": 1.0},
}
GRID_SEED = 100
"""Of the cells that rates are taken from; none of the scored ones."""
SCORED_STORIES = 100


@dataclass(frozen=True, eq=False)
class Case:
    """A model and how long it is trained.

    Args:
        name, model: of the model.
        data: knobs of the recipe's data; calibration: of SparseGPT; training: of `sparse_finetune`.
        losses, rates, seeds: what is compared, from which rates, how often.
        windows: of each scored text; None for all.
    """

    name: str
    model: Path
    data: dict[str, Any]
    calibration: dict[str, Any]
    training: dict[str, Any]
    losses: tuple[str, ...]
    rates: tuple[float, ...]
    seeds: tuple[int, ...]
    windows: int | None = None

    @property
    def raw(self) -> dict[str, Any]:
        """The shipped recipe with this case's sizes."""
        raw = copy.deepcopy(read(RECIPE))
        raw["data"] |= self.data
        raw["stages"][0]["sparsegpt"]["calibration"] = self.calibration
        raw["stages"][1]["sparse_finetune"] |= self.training
        return raw

    def stage(self, name: str, **knobs: Any) -> Any:
        """A stage of it with more knobs."""
        raw = self.raw
        place = next(one for one in raw["stages"] if name in one)
        place[name] |= knobs
        return dict(build(raw, RECIPE).stages)[name]


def babyllama(root: Path) -> Case:
    """The small model, of which all of it is cheap."""
    return Case(
        "babyllama-tok361",
        root / "models/babyllama-tok361",
        {"max_length": 256, "held": 128},
        {"examples": 128, "batch": 16},
        {"steps": 100, "batch": 8, "micro_batch": 8, "warmup": 10, "precision": "no"},
        tuple(LOSSES),
        (3e-4, 1e-3, 3e-3),
        (0, 1, 2, 3, 4),
    )


def larger(folder: Path) -> Case:
    """A real model, shortened: 512 tokens an update."""
    return Case(
        folder.name,
        folder,
        {"max_length": 512, "held": 8, "limit": 300},
        {"examples": 24, "batch": 1},
        {"steps": 30, "batch": 1, "micro_batch": 1, "warmup": 5, "precision": "bf16"},
        tuple(LOSSES)[:3],
        (3e-5, 1e-4, 3e-4),
        (0, 1, 2),
        12,
    )
