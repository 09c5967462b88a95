"""What the card advises after a run: each recommendation where it applies, and nowhere else."""

from typing import Any

import pytest

from compresso.metrics.record import Change
from compresso.report.advice import advice
from compresso.report.card import model_card
from tests.report.made import UNITS, checked, dense, pruned, records, report_of

ATTENTION = {f"model.layers.0.self_attn.{one}_proj.weight": "1/8" for one in "qkvo"}
MLP = {"model.layers.0.mlp.up_proj.weight": "1/8"}
MEASURED = (
    Change(name="trust/ethics", dense=0.8, smaller=0.8, difference=0.0, low=-0.1, high=0.1, n=40, verdict="fell"),
)


def told(stages: dict[str, dict[str, Any]], changes: tuple[Change, ...] = (), task: str | None = None) -> list[str]:
    """The advice after a run of these stages."""
    smaller = pruned().model_copy(update={"changes": changes})
    made = records(report_of(dense(), smaller))
    made["stages"] = stages
    if task is not None:
        made["recipe"]["task"] = task
    return advice(checked(made), smaller)


@pytest.mark.parametrize(
    ("facts", "said", "unsaid"),
    [
        ({"bits": 3.25}, "left 3.25 bits a weight", "the trust of 13B kept"),
        ({"bits": 3.99}, "wants several calibration seeds", "the trust of 13B kept"),
        ({"bits": 4.0}, "4 or more", "calibration seeds"),
        ({"bits": 8.0}, "left 8 bits", "calibration seeds"),
        ({"sparsity": 0.5, "zeros": ATTENTION | MLP}, "pruning half of the weights costs trust", "is open"),
        ({"sparsity": 0.4967, "zeros": MLP}, "pruning half of the weights costs trust", "is open"),
        ({"sparsity": 0.2, "zeros": ATTENTION | MLP}, "what that costs in trust is open", "refuse more"),
        ({"sparsity": 0.2, "zeros": ATTENTION}, "refuse more jailbreaks", "turn at 30 %"),
        ({"sparsity": 0.3, "zeros": ATTENTION}, "turn at 30 %", "refuse more"),
        ({"sparsity": 0.25, "zeros": ATTENTION}, "peak near 20 %: prefer 20 %", "turn at 30 %"),
        ({"sparsity": 0.6, "zeros": ATTENTION}, "pruning half of the weights costs trust", "jailbreaks"),
        ({"units_kept": UNITS}, "to remove heads and FFN channels is open", "half of the weights"),
        ({"ranks": {"model.layers.0.mlp.up_proj": 4}}, "a low rank or a narrower stream costs in trust is open", "13B"),
    ],
)
def test_a_recommendation_stands_where_it_applies(facts: dict[str, Any], said: str, unsaid: str) -> None:
    lines = told({"any_stage": facts})
    first = lines[0].replace("\u00a0", " ")
    assert said in first and unsaid not in first
    assert len(lines) == 2, "and one on measuring"


def test_every_published_finding_names_its_paper() -> None:
    lines = told({"gptq": {"bits": 3.2}, "wanda": {"sparsity": 0.5, "zeros": MLP}, "prune": {"units_kept": UNITS}})
    assert len(lines) == 4 and all("arXiv 240" in line for line in lines)


def test_what_was_measured_is_told_apart_from_what_was_not() -> None:
    stages = {"rtn": {"bits": 4.0}}
    assert told(stages)[-1].startswith("Trust was not measured")
    assert told(stages, MEASURED)[-1].startswith("Evaluate every dimension again")


def test_nothing_is_advised_where_nothing_was_compressed_or_no_text_is_written() -> None:
    assert told({"recover": {"seconds": 1.0}}, MEASURED) == []
    assert told({"rtn": {"bits": 3.0}}, task="classification") == []


def test_zeros_that_a_later_stage_filled_are_none() -> None:
    left = {"parameters": 1, "macs_per_token": 1, "held_loss": None, "score": None}
    stages = {
        "magnitude": {"sparsity": 0.5, "zeros": MLP, "left": {**left, "zeros": 0.5}},
        "recover": {"left": {**left, "zeros": 0.0}},
    }
    assert told(stages) == []


def test_the_card_holds_it_under_a_title_of_its_own() -> None:
    made = records(report_of(dense(), pruned()))
    made["stages"] = {"wanda": {"sparsity": 0.5, "zeros": MLP}}
    text = model_card(checked(made))
    assert "## What is advised\n\n- wanda left 50 % of zeros." in text
    made["stages"] = {}
    assert "## What is advised" not in model_card(checked(made))
