"""Plans for devices that are not here, and budgets that an engine's shapes do not reach."""

import re
from pathlib import Path

import pytest
from transformers import LlamaConfig

import compresso
from compresso.errors import BudgetError, ResourceError
from compresso.runner.acted import Acted
from compresso.runner.devices import DEVICES, planned
from compresso.runner.plan_devices import flops_of_each
from compresso.stage import Passes


def test_a_device_that_is_not_here_has_its_data_sheet() -> None:
    found = planned("H100")
    assert found.here is None and found.known == DEVICES["h100"]
    with pytest.raises(ResourceError, match=r"--device h10 is unknown; did you mean 'h100'"):
        planned("h10")
    with pytest.raises(ResourceError, match=r"--device '' is unknown"):
        planned("")
    assert planned("cpu").here is not None and planned("CPU").here is not None


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


def test_several_devices_are_counted() -> None:
    found = planned("8xH100")
    assert (found.name, found.known, found.count) == ("8xh100", DEVICES["h100"], 8)
    for name, said in (("8xh10", "'h10' has no data sheet here; did you mean 'h100'"), ("0xh100", "is unknown")):
        with pytest.raises(ResourceError, match=said):
            planned(name)


def test_calibration_and_training_are_shared_out_and_searches_are_not(tiny_folder: Path) -> None:
    looks = {"batches": 2, "batch": 8, "micro_batch": 4}
    recipe = {
        "name": "some",
        "stages": [
            {"gate_taylor": {"keep": 0.9, **looks}},
            {"drop_layers": {"drop": 1, "kinds": ["layer"], "score": "perplexity", **looks}},
            {"distill": {"steps": 8, "batch": 8, "micro_batch": 8, "rank": 2, "alpha": 4}},
        ],
    }
    one, four = (compresso.plan(recipe, tiny_folder, device=f"{n}xh100") for n in (1, 4))
    assert [row["flops_at_most"] for row in one["stages"]] == [row["flops_at_most"] for row in four["stages"]]
    big = {**recipe, "stages": [*recipe["stages"][:2], {"distill": {**recipe["stages"][2]["distill"], "steps": 10**9}}]}
    one, four = (compresso.plan(big, tiny_folder, device=f"{n}xh100")["training"][0] for n in (1, 4))
    assert one["seconds_estimated"] == pytest.approx(4 * four["seconds_estimated"], rel=1e-3)
    memory, of_one = four["memory_bytes_estimated"], one["memory_bytes_estimated"]
    assert memory["weights"] == of_one["weights"], "each holds the whole model"
    assert memory["activations"] < of_one["activations"], "an update's examples are shared out"
    assert memory["exchanged"] == 4 * sum(four["trainable"].values()) and "exchanged" not in of_one
    assert memory["total"] == sum(value for name, value in memory.items() if name != "total")


def test_weights_that_are_spread_are_counted_a_device(tiny_folder: Path) -> None:
    """By hand, of a tied model of three blocks: shares of all, two blocks and what is outside of blocks whole."""
    stages = [{"distill": {"steps": 8, "batch": 8, "micro_batch": 1, "train": "all"}}]
    found = compresso.plan({"name": "some", "stages": stages}, tiny_folder, device="8xh100")
    (row,) = found["training"]
    counts = found["before"]["parameters"]
    total, blocks = counts["total"], counts["blocks"]
    at_once = total - blocks + 2 * blocks // 3
    wanted = (
        -(-(16 * total + 4 * blocks) // 8) + at_once * 8 + at_once * 4 + row["memory_bytes_estimated"]["activations"]
    )
    around = 8 * total + -(-(4 * total + 4 * blocks) // 8)
    assert row["memory_bytes_spread"] == {"training": wanted, "around": around, "total": max(wanted, around)}
    (alone,) = compresso.plan({"name": "some", "stages": stages}, tiny_folder, device="h100")["training"]
    assert "memory_bytes_spread" not in alone
    lora = {"recover": {"steps": 8, "batch": 8, "micro_batch": 1, "rank": 2, "alpha": 4}}
    (row,) = compresso.plan({"name": "some", "stages": [lora]}, tiny_folder, device="8xh100")["training"]
    learned = sum(row["trainable"].values())
    wanted = -(-(4 * total + 16 * learned) // 8) + at_once * 4 + row["memory_bytes_estimated"]["activations"]
    assert row["memory_bytes_spread"]["training"] == wanted
    assert row["memory_bytes_spread"]["around"] == 4 * total + -(-4 * total // 8)


def test_what_each_of_several_devices_computes() -> None:
    passes = [
        Passes("calibration", 8),
        Passes("search", 8),
        Passes("training", 8, 1, 1),
        Passes("calibration", 8, 1, 1),
    ]
    acted = Acted("some", LlamaConfig(), 1, 1, passes)
    rows = [{"flops_at_most": 8.0}, {"flops_at_most": 80.0}, {"flops_at_most": 800.0}, {"flops_at_most": 8000.0}]
    assert flops_of_each(acted, rows, 1) == 8888
    weights = passes[3].weights
    assert flops_of_each(acted, rows, 8) == 1 + 80 + 100 + (8000 if weights else 1000)
    assert flops_of_each(acted, [*rows[:3], {"flops_at_most": None}], 8) is None


def test_a_plan_for_70b_says_what_does_not_fit_and_what_would(tmp_path: Path) -> None:
    config = LlamaConfig(
        hidden_size=8192,
        intermediate_size=28672,
        num_attention_heads=64,
        num_key_value_heads=8,
        num_hidden_layers=80,
        vocab_size=128256,
        max_position_embeddings=8192,
        dtype="bfloat16",
    )
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path)
    notes = " ".join(compresso.plan("wanda/50", tmp_path / "config.json", device="8xh100")["notes"])
    assert "8 processes, a device each: every one holds the whole model" in notes
    assert re.search(r"wanda: about 148\.\d GB each of 8 DOES NOT FIT 80 GB", notes)
    assert re.search(r"wanda: with --offload about \d\.\d GB, which fits", notes)
    facts = compresso.plan("compresso", tmp_path / "config.json", device="8xh100")
    assert all(row["seconds_estimated"] > 0 for row in facts["stages"])
    said = re.search(
        r"learn_gates: launched with FSDP 2 \(accelerate launch --use_fsdp --fsdp_version 2\) about (\d+\.\d) GB each"
        r" while it trains, and (\d+\.\d) GB before and after, .* DOES NOT FIT either",
        " ".join(facts["notes"]),
    )
    assert said is not None and float(said[1]) < 80 and float(said[2]) == pytest.approx(141.1 * 9 / 8, abs=0.1)
    with pytest.raises(ResourceError, match=r"'besa' runs in one process, since it learns block by block .*8 were"):
        compresso.plan("besa/50", tmp_path / "config.json", device="8xh100")


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
