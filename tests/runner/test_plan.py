"""What `compresso plan` says of each shipped recipe: a cost for every stage, readable on a narrow screen."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import OF_OTHER_MODELS, ONE_SHOT
from transformers import BertConfig, MixtralConfig, MobileViTConfig

from compresso.commands.plan_table import show
from compresso.data import nano
from compresso.edit import merge_experts
from compresso.edit.merge_experts import Merging
from compresso.errors import BudgetError, RecipeError
from compresso.runner import plan as planning
from compresso.runner.plan import plan
from compresso.runner.recipe import names, override, read, with_knob
from compresso.tasks.base import DEFAULT

FITTED = {  # published configurations of 32 layers, on six
    "attention_layers": [1, 4],
    "mlp_layers": [1, 4],
}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rate that is not measured."""
    monkeypatch.setattr(planning, "matmul_rate", lambda device: 1e9)


def planned(name: str, model: Path | None = None, **knobs: Any) -> dict[str, Any]:
    raw = with_knob(read(name), "group", 64, required=False)  # published groups of 128 do not divide 192
    for knob, value in FITTED.items():
        if any(knob in (own or {}) for entry in raw["stages"] for own in entry.values()):
            raw = with_knob(raw, knob, value)
    for knob, value in knobs.items():
        raw = with_knob(raw, knob, value)
    return plan(raw, str(model or nano.path()))


def nano_tokens() -> int:
    """Of the embedded model's vocabulary."""
    return int(json.loads((nano.path() / "config.json").read_text())["vocab_size"])


@pytest.mark.slow
@pytest.mark.parametrize("name", names())
def test_every_stage_of_every_recipe_has_a_cost(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: Any, tmp_path: Path
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    config = None  # the embedded model's
    if name.startswith("moe/"):
        config = MixtralConfig(architectures=["MixtralForCausalLM"])
    elif (task := read(name).get("task", DEFAULT)) == "segmentation":
        config = MobileViTConfig(architectures=["MobileViTForSemanticSegmentation"])
    elif task != DEFAULT:
        config = BertConfig(architectures=["BertForMaskedLM"])
    if config is not None:
        config.save_pretrained(tmp_path)
    counted = {"of": "blocks"} if name == "ristretto/latency" else {}  # tables belong to a machine
    facts = planned(name, tmp_path if config is not None else None, **counted)
    stages = [one["stage"] for one in facts["stages"]]
    wanted: list[str] = []
    turns = 1
    for stage, knobs in (item for entry in read(name)["stages"] for item in entry.items()):
        turns = max(turns, len((knobs or {}).get("family", [])), (knobs or {}).get("rounds", 1))
        wanted += [stage, "repair"] if (knobs or {}).get("repair", "none") != "none" else [stage]
    if turns > 1:  # no recipe has a stage outside of its rounds
        wanted = [f"{stage} {turn}/{turns}" for turn in range(1, turns + 1) for stage in wanted]
    assert stages == wanted
    for one in facts["stages"]:
        known = [row["tokens_at_most"] for row in one["passes"]]
        if None not in known:
            forward = sum(round(row["tokens_at_most"] * row["forwards"]) for row in one["passes"])
            assert one["forward_tokens_at_most"] == forward
            assert bool(one["flops_at_most"]) == bool(known) == bool(one["seconds_estimated"])
    show(facts, as_json=False)
    lines = capsys.readouterr().out.splitlines()
    begun = next(i for i, line in enumerate(lines) if "What the stages take" in line)
    first = [re.match(r"  (\S+(?: \d+/\d+)?)", line) for line in lines[begun:]]
    rows = [found[1] for found in first if found is not None]
    assert [word for word in rows if word in stages] == stages
    assert "…" not in "".join(lines[begun:])


def test_a_training_pass_costs_three_forwards_with_weights_and_two_with_adapters() -> None:
    """In multiply-accumulates: 2 FLOPs forward, 2 for activations' gradients, 2 for weights'."""
    facts = planned("gate-taylor/nano", steps=10, batch=4, micro_batch=4)
    macs = facts["after"]["macs_per_token"]
    recover = next(one for one in facts["stages"] if one["stage"] == "recover")
    tokens = 10 * 4 * 256
    assert recover["forward_tokens_at_most"] == recover["backward_tokens_at_most"] == tokens
    assert recover["flops_at_most"] == 4 * macs * tokens == facts["training"][0]["flops_at_most"]
    whole = planned("gate-taylor/distill", train="all", steps=10)
    distill = next(one for one in whole["stages"] if one["stage"] == "distill")
    student, teacher = (row["flops_at_most"] / row["tokens_at_most"] for row in distill["passes"])
    assert student == pytest.approx(6 * whole["after"]["macs_per_token"])
    assert teacher == pytest.approx(2 * whole["before"]["macs_per_token"])


def test_searches_and_sweeps_count_every_pass() -> None:
    """Six layers, two of which leave: 6 + 5 passes of a search that scores again after each removal."""
    searched = planned("shortgpt/perplexity")["stages"][0]
    assert [row["what"] for row in searched["passes"]] == ["search"]
    assert searched["passes"][0]["forwards"] == 11
    once = planned("shortgpt/perplexity", iterative=False)["stages"][0]
    assert once["passes"][0]["forwards"] == 6
    swept = planned("wanda/50")["stages"][0]["passes"][0]["forwards"]
    assert swept == pytest.approx((6 + 5) / 6)  # the last block is not run again
    looked = planned("owl/70")["stages"][0]["passes"][0]["forwards"]
    assert looked == pytest.approx(swept + 1)


def test_the_dense_model_beside_a_stage_that_does_not_train_is_counted() -> None:
    for judged, beside in (("found", {"repair"}), ("repaired", {"ristretto", "repair"})):
        facts = planned("ristretto", judged=judged)
        dense = facts["before"]["parameters"]["total"] * 4
        rows = {one["stage"]: one["memory_bytes_estimated"] for one in facts["stages"]}
        assert {stage for stage, bytes_ in rows.items() if bytes_ is not None} == beside
        assert all(dense < rows[stage] <= 2 * dense for stage in beside)


def test_a_cached_teacher_is_not_in_memory_with_its_student_and_takes_the_disk(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """8 bytes of each of 64 outcomes and 4 of the rest, for each token that may be seen."""
    live, cached, narrow = (
        planned("gate-taylor/distill", steps=10, batch=4, micro_batch=4, **more)
        for more in ({}, {"teacher": "cached"}, {"teacher": "cached", "teacher_top": 1})
    )
    (beside,), (alone,), (least,) = (facts["training"] for facts in (live, cached, narrow))
    dense, left = (live[when]["parameters"]["total"] for when in ("before", "after"))
    assert beside["memory_bytes_estimated"]["weights"] == 4 * (dense + left)
    assert alone["memory_bytes_estimated"]["weights"] == 4 * dense
    assert alone["flops_at_most"] == beside["flops_at_most"]
    assert beside["disk_bytes_at_most"] is None
    tokens = beside["tokens_at_most"]
    assert alone["disk_bytes_at_most"] - least["disk_bytes_at_most"] == tokens * 8 * 63
    assert least["disk_bytes_at_most"] == tokens * 12 + 128 * 8 * nano_tokens() + 4 * left
    assert "distill: the dense model is asked before, and not in memory with the smaller one; at most" in said(
        cached, capsys
    )


def test_epochs_of_unknown_data_are_null() -> None:
    stage = planned("compresso/paper")["stages"][0]
    assert stage["forward_tokens_at_most"] is None and stage["seconds_estimated"] is None
    assert planned("compresso/paper", max_steps=5)["stages"][0]["forward_tokens_at_most"] > 0


def said(facts: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> str:
    """What the terminal shows of a plan."""
    show(facts, as_json=False)
    return capsys.readouterr().out


def test_the_terminal_says_what_depends_on_the_length_of_the_data(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    shown = said(planned("sparse-finetune/50"), capsys)
    assert "sparse_finetune: 2 epochs; the number of updates depends on --data; about" in shown
    assert "epochs updates" not in shown and "?: the length of the data decides; give --data." in shown
    row = next(line for line in shown.splitlines() if line.startswith("  sparse_finetune"))
    assert row.split() == ["sparse_finetune", "training", *"????"], "no cell of what is not known is empty"
    assert "sparse_finetune: 2 epochs, at most 5 updates; about" in said(
        planned("sparse-finetune/50", max_steps=5), capsys
    )
    shown = said(planned("shortgpt", max_steps=5), capsys)
    assert re.search(r"recover: 5 updates, by max_steps, of [\d,]+; about", shown) and "?:" not in shown


@pytest.mark.parametrize(
    ("name", "equal"), [("sparse-finetune/50", False), ("shortgpt", False), ("ristretto", False), ("gate-taylor", True)]
)
def test_only_what_makes_layers_narrower_is_counted_with_equal_widths(
    name: str, equal: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    assert ("after (equal widths)" in said(planned(name), capsys)) == equal


def test_both_halves_of_lorashear_s_recovery_are_planned() -> None:
    facts = planned("lorashear")
    assert [one["stage"] for one in facts["training"]] == ["lorashear", "recover_knowledge"]
    assert facts["training"][0]["updates"] == 500 and facts["training"][1]["updates"] == 1600


@pytest.mark.parametrize("name", ONE_SHOT)
def test_one_shot_recipes_train_nothing(name: str, tmp_path: Path) -> None:
    folder = None
    if name in OF_OTHER_MODELS:  # it is for experts alone
        folder = tmp_path
        MixtralConfig(architectures=["MixtralForCausalLM"]).save_pretrained(folder)
    assert planned(name, folder)["training"] == []


def test_a_plan_needs_no_weights(tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text((nano.path() / "config.json").read_text("utf-8"))
    assert plan(read("lorashear"), str(config))["stages"] == planned("lorashear")["stages"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["magnitude-structured/nano", "gate-taylor", "compresso"])
def test_a_budget_that_leaves_a_later_stage_nothing_names_the_smallest_that_leaves_some(name: str) -> None:
    """Not the linear that is missed, as if the model had never had it."""
    with pytest.raises(
        BudgetError, match=r"keep=0\.05 .*raise keep to [\d.]+|keep=0\.05 .*Raise keep to [\d.]+"
    ) as error:
        planned(name, keep=0.05)
    said = re.search(r"aise keep to ([\d.]+\d)", str(error.value))
    assert said is not None and "q_proj" not in str(error.value)
    planned(name, keep=float(said[1]))
    with pytest.raises(BudgetError):
        planned(name, keep=float(said[1]) - 0.01)


def test_what_a_model_never_had_is_no_fault_of_the_budget() -> None:
    raw = override(read("magnitude-structured"), "stages.recover.targets", ["q_porj"])
    with pytest.raises(RecipeError, match="did you mean 'q_proj'"):
        plan(with_knob(raw, "keep", 0.05), str(nano.path()))


def test_merging_experts_is_counted_in_products_assignments_and_memory(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By arithmetic on Mixtral-8x7B: two of 8 experts in each of 32 layers are aligned, 14,336 channels of 3 x 4,096
    numbers with as many; all experts run once more on every token.
    """
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(Merging, "seconds_of_assignments", lambda self: 7200.0)
    MixtralConfig(architectures=["MixtralForCausalLM"]).save_pretrained(tmp_path)
    facts, whole = planned("moe/merge-25", tmp_path), planned("moe/expert-drop", tmp_path)
    (one,), (plain,) = facts["stages"], whole["stages"]
    merging = one["merging"]
    assert (merging["experts"], merging["width"]) == (64, 14336) and plain["merging"] is None
    assert merging["flops"] == 64 * 2 * 14336 * 14336 * 3 * 4096
    assert merging["bytes_beside"] == 16 * 14336 * 3 * 4096 + 20 * 14336**2
    assert one["memory_bytes_estimated"] == 4 * 46_702_792_704 + merging["bytes_beside"]
    (there,) = plan(read("moe/merge-25"), str(tmp_path), device="h100")["stages"]
    assert there["merging"]["bytes_beside"] == 16 * 14336 * 3 * 4096 + 4 * 14336**2, "assigned on the host"
    assert there["merging"]["bytes_of_host"] == merging["bytes_of_host"] == 16 * 14336**2
    tokens = 128 * 2048
    again = one["passes"][0]["flops_at_most"] - plain["passes"][0]["flops_at_most"]
    assert again == pytest.approx(2 * tokens * 32 * 8 * 3 * 4096 * 14336, rel=1e-6)
    assert one["flops_at_most"] == one["passes"][0]["flops_at_most"] + merging["flops"]
    assert merging["seconds_estimated"] == pytest.approx(7200 + merging["flops"] / 1e9, abs=0.1)
    assert one["seconds_estimated"] == pytest.approx(one["flops_at_most"] / 1e9 + 7200, rel=1e-6)
    show(facts, as_json=False)
    told = capsys.readouterr().out
    assert "64 experts of 14,336 channels merged" in told and "6.93 GB beside the weights" in told
    reap = planned("moe/reap-25", tmp_path)["stages"][0]["passes"][0]
    assert reap["forwards"] == pytest.approx(1 + 2 * 32 * 3 * 4096 * 14336 / facts["before"]["macs_per_token"])
    assert planned("moe/merge-25", tmp_path, keep=1.0)["stages"][0]["merging"] is None


def test_assignments_are_counted_by_the_cube_of_the_width(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock that says one second an assignment: 3 experts of twice the widest one that is tried take 3 x 8."""
    ticks = iter(range(4))
    monkeypatch.setattr(merge_experts, "_MEASURED", 16)
    monkeypatch.setattr(merge_experts.time, "process_time", lambda: float(next(ticks)))
    assert Merging(3, 32, 48).seconds_of_assignments() == 24.0
    assert Merging(3, 8, 48).seconds_of_assignments() == 3.0


def test_examples_are_counted_no_longer_than_the_model_reads() -> None:
    """As a run cuts them, whatever was typed."""
    context = int(json.loads((nano.path() / "config.json").read_text())["max_position_embeddings"])
    typed, cut = (
        plan(override(read("compresso/nano"), "data.max_length", length), str(nano.path()))
        for length in (100 * context, context)
    )
    assert typed["training"] == cut["training"] and typed["stages"] == cut["stages"]
