"""Plans for devices that are not here, and budgets that an engine's shapes do not reach."""

import re
from pathlib import Path

import pytest

import compresso
from compresso.errors import BudgetError, ResourceError
from compresso.runner.devices import DEVICES, planned


def test_a_device_that_is_not_here_has_its_data_sheet() -> None:
    found = planned("H100")
    assert found.here is None and found.known == DEVICES["h100"]
    with pytest.raises(ResourceError, match=r"--device h10 is unknown; did you mean 'h100'"):
        planned("h10")
    assert planned("cpu").here is not None


def test_a_plan_for_another_device_says_what_it_assumes(tiny_folder: Path) -> None:
    facts = compresso.plan("wanda/50", tiny_folder, device="h100")
    assert facts["device"] == "h100"
    notes = " ".join(facts["notes"])
    assert "time on h100: 40% of 989 dense 16-bit TFLOP/s, by its data sheet" in notes
    assert "wanda: about" in notes and "GB fits 80 GB" in notes
    (one,) = facts["compressed"]
    assert one["stage"] == "wanda" and one["sparsity"] == 0.5 and one["bits"] is None
    assert one["memory_bytes_estimated"] > 0 and facts["stages"][0]["seconds_estimated"] >= 0
    assert "packed" not in facts["weight_bytes"]


def test_a_plan_of_rounding_has_the_packed_bytes(tiny_folder: Path) -> None:
    facts = compresso.plan("rtn/4-bit", tiny_folder)
    (one,) = facts["compressed"]
    total, width = facts["before"]["parameters"]["total"], facts["weight_bytes"]["before"]
    per_number = width / total
    wanted = (total - one["weights"]) * per_number + one["weights"] * one["bits"] / 8
    assert facts["weight_bytes"]["packed"] == round(wanted)


def test_an_engine_whose_shapes_miss_the_budget_is_refused_with_what_they_reach(tiny_folder: Path) -> None:
    recipe = {"name": "some", "stages": [{"magnitude_structured": {"keep": 0.7, "kinds": ["channel"]}}]}
    with pytest.raises(
        BudgetError, match=r"target='llama.cpp:q4_k': .* is to keep 0.7 of blocks, and its multiples leave 0.5714"
    ):
        compresso.plan(recipe, tiny_folder, target="llama.cpp:q4_k")
    recipe = {"name": "some", "stages": [{"magnitude_structured": {"keep": 0.6}}]}
    with pytest.raises(BudgetError, match=r"is to keep 0.6 of blocks, and its multiples leave (0\.\d+) at") as missed:
        compresso.plan(recipe, tiny_folder, target="awq:g16")
    nearest = re.search(r"leave (0\.\d+) at", str(missed.value))
    assert nearest is not None
    facts = compresso.plan(recipe, tiny_folder, keep=float(nearest[1]), target="awq:g16")
    assert facts["after"]["parameters"]["total"] < facts["before"]["parameters"]["total"]
