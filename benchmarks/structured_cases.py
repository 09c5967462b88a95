"""The fair comparison's models and methods: who is compared, with which knobs, and for how many updates.

Every method is its shipped recipe's first stage; everything after it is the same for all: LoRA on all linears at one
rank and schedule, on the same data, with the updates that are left after the method has spent its own. "KD" stands for
distillation in the place of labels.
"""

import copy
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compresso.data import nano
from compresso.runner.recipe import read

STORIES = "datasets/text/tinystories_sample.jsonl.gz"
UNSEEN = "datasets/text/tinystories_v2_valid_5.jsonl.gz"
KEEPS = (0.8, 0.7, 0.5)


@dataclass(frozen=True)
class Case:
    """A model, its data, and the training that all methods share.

    Args:
        name, model, data: of the model; data as `compresso run` takes it.
        configuration: which of each method's recipes is for a model of this kind.
        knobs: the recipe's `data`.
        batch: examples an update, for every stage.
        training: knobs of recovery.
    """

    name: str
    model: Path
    data: str
    configuration: str
    knobs: dict[str, Any]
    batch: int
    training: dict[str, Any]


def cases(root: str | None = None) -> dict[str, Case]:
    """Models that are here, by name; `root` is the folder that COMPRESSO_DATA names."""
    root = root or os.environ.get("COMPRESSO_DATA", "")
    found = {
        "nano": Case(
            "nano",
            nano.path(),
            "world",
            "/nano",
            {"source": "world", "max_length": 256, "prompt": False, "pack": False, "held": 64},
            32,
            {"rank": 8, "alpha": 16, "lr": 5e-3, "lr_schedule": "cosine"},
        )
    }
    folder = Path(root, "models/babyllama-tok361")
    if root and folder.is_dir():
        found["babyllama-tok361"] = Case(
            "babyllama-tok361",
            folder,
            str(Path(root, STORIES)),
            "",
            {"source": "stories", "max_length": 256, "prompt": True, "pack": True},
            16,
            {"rank": 32, "alpha": 32, "lr": 2e-4, "lr_at_hidden": 4096, "lr_schedule": "cosine"},
        )
    return found


@dataclass(frozen=True)
class Method:
    """A method as it is compared.

    Args:
        recipe: whose first stage with a budget it is.
        knobs: what is changed in that stage.
        learning: how the updates of its learning phases are called, and their shares of all updates.
        distilled: whether the dense model teaches afterwards.
    """

    recipe: str
    knobs: dict[str, Any]
    learning: dict[str, float]
    distilled: bool = False


METHODS = {
    "random": Method("llm-pruner", {"importance": "random"}, {}),
    "magnitude": Method("magnitude-structured", {}, {}),
    "gate-Taylor": Method("gate-taylor", {}, {}),
    "gate-Taylor, KD": Method("gate-taylor", {}, {}, distilled=True),
    "LLM-Pruner vector": Method("llm-pruner", {"importance": "vector"}, {}),
    "LLM-Pruner element^1": Method("llm-pruner", {"importance": "first"}, {}),
    "LLM-Pruner element^2": Method("llm-pruner", {"importance": "second"}, {}),
    "LLM-Pruner mixed": Method("llm-pruner", {"importance": "mixed"}, {}),
    "LoRAPrune": Method("loraprune", {}, {"steps": 0.5}),
    "LoRAShear": Method("lorashear", {}, {"tune": 0.1, "shrink": 0.4}),
    "ShortGPT": Method("shortgpt", {}, {}),
    "Minitron width": Method("minitron", {}, {}),
    "Minitron width, KD": Method("minitron", {}, {}, distilled=True),
    "Minitron depth": Method("minitron", {"kinds": ["layer", "channel"], "multiple_of": None}, {}),
    "contextual": Method("contextual", {}, {}),
    "Compresso": Method("compresso", {}, {"hold": 0.2}),
    "Compresso, KD": Method("compresso", {}, {"hold": 0.2}, distilled=True),
}
DENSE = "dense"


def recipe_of(case: Case, method: Method, keep: float, updates: int) -> dict[str, Any]:
    """The raw recipe of one job: the method's stage, then recovery or distillation for the updates that are left.

    Raises:
        RecipeError: there is no such recipe.
    """
    raw = copy.deepcopy(read(method.recipe + case.configuration))
    name, knobs = next((name, knobs) for stage in raw["stages"] for name, knobs in stage.items() if "keep" in knobs)
    learning = {phase: max(1, round(share * updates)) for phase, share in method.learning.items()}
    knobs |= {"keep": keep, **method.knobs, **learning}
    for knob in ("batch", "micro_batch"):
        if knob in knobs:
            knobs[knob] = max(case.batch, int(knobs[knob])) if knob == "batch" and not learning else case.batch
    left = updates - sum(learning.values())
    after = {"steps": left, "batch": case.batch, "micro_batch": case.batch, "precision": "no", **case.training}
    if learning:
        knobs["precision"] = "no"
    stages = [{name: knobs}, {"distill" if method.distilled else "recover": after}]
    return {"name": raw["name"], "paper": raw.get("paper", ""), "data": case.knobs, "stages": stages}
