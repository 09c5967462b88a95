"""Knob groups: flat in recipes, composed in Python, and the same stage either way."""

from dataclasses import replace
from typing import Annotated

import pytest
from pydantic import ValidationError

from compresso.core.axis import Kind
from compresso.errors import RecipeError
from compresso.methods.gate_taylor import GateTaylor
from compresso.methods.magnitude_structured import MagnitudeStructured
from compresso.methods.minitron import Minitron
from compresso.runner.recipe import build
from compresso.stage import Calibrates, Knobs, Removes, TunesLora, dumped, groups_of, knobs_of
from compresso.stage.flat import with_flat_knobs


def test_flat_knobs_and_groups_make_the_same_stage() -> None:
    flat = GateTaylor(keep=0.5, batches=8)  # type: ignore[call-arg]
    assert flat == GateTaylor(removes=Removes(0.5), calibrates=Calibrates(8))
    (_, built), *_ = build({"stages": [{"gate_taylor": {"keep": 0.5, "batches": 8}}]}).stages
    assert built == flat
    assert groups_of(flat) == {"removes": Removes(0.5), "calibrates": Calibrates(8)}


def test_a_group_given_in_part_keeps_the_rest_of_the_stage_s_default() -> None:
    assert Minitron().calibrates.batches == 64
    stage = Minitron(micro_batch=2)  # type: ignore[call-arg]
    assert stage.calibrates == Calibrates(batches=64, batch=16, micro_batch=2)
    assert stage.removes.kinds == (Kind.CHANNEL, Kind.HIDDEN)
    assert Minitron(calibrates={"batch": 3}).calibrates == Calibrates(64, 3)  # type: ignore[arg-type]
    assert replace(stage, keep=0.5).calibrates == stage.calibrates  # type: ignore[call-arg]
    assert replace(stage, keep=0.5).removes.keep == 0.5  # type: ignore[call-arg]


def test_a_flat_knob_goes_over_the_group_beside_it() -> None:
    both = GateTaylor(removes=Removes(0.9, kinds=(Kind.HEAD,)), keep=0.4)  # type: ignore[call-arg]
    assert (both.removes.keep, both.removes.kinds) == (0.4, (Kind.HEAD,))


def test_a_knob_that_a_stage_leaves_out_is_unknown_and_stays() -> None:
    with pytest.raises(ValidationError):
        MagnitudeStructured(layout="free")  # type: ignore[call-arg]
    with pytest.raises(RecipeError, match="unknown knob 'layout'"):
        build({"stages": [{"magnitude_structured": {"layout": "free"}}]})
    assert MagnitudeStructured(removes=Removes(0.5)).removes.layout == "uniform"
    assert "layout" not in dumped(MagnitudeStructured())


@pytest.mark.parametrize("name", ["removes", "calibrates"])
def test_recipes_name_no_group(name: str) -> None:
    with pytest.raises(RecipeError, match=f"unknown knob '{name}'"):
        build({"stages": [{"gate_taylor": {name: {}}}]})


@pytest.mark.parametrize(
    ("knobs", "words"),
    [
        ({"keep": 2}, "stage 'gate_taylor': keep=2: wanted at most 1"),
        ({"multiple_of": {"channel": 0}}, "stage 'gate_taylor': multiple_of.channel=0: wanted at least 1"),
        ({"batch": 0}, "stage 'gate_taylor': batch=0: wanted at least 1"),
        ({"kinds": ["vocab"]}, "stage 'gate_taylor': kinds names vocab, which only the stage 'cut_vocab' removes"),
    ],
)
def test_errors_name_the_flat_knob(knobs: dict[str, object], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        build({"stages": [{"gate_taylor": knobs}]})


@pytest.mark.parametrize(
    ("stage", "knobs", "words"),
    [
        ("qat", {"weight_bits": True}, "weight_bits=True: wanted a whole number"),
        ("qat", {"lr": True}, "lr=True: wanted a number"),
        ("qat", {"teacher_layers": [0, True]}, "teacher_layers.1=True: wanted a whole number"),
        ("qat", {"where": {"layers": [False, 4]}}, "where.layers.0=False: wanted a whole number"),
        ("gate_taylor", {"floor": {"head": True}}, "floor.head=True: wanted"),
        ("recover", {"steps": True}, "steps=True: wanted"),
        ("learn_gates", {"lr_at_hidden": True}, "lr_at_hidden=True: wanted"),
    ],
)
def test_truth_is_no_number(stage: str, knobs: dict[str, object], words: str) -> None:
    with pytest.raises(RecipeError, match=f"stage '{stage}': {words}"):
        build({"stages": [{stage: knobs}]})


def test_truth_is_no_number_of_data_either_and_stays_truth_where_that_is_meant() -> None:
    with pytest.raises(RecipeError, match="data: limit=True: wanted a whole number"):
        build({"stages": [{"recover": {}}], "data": {"limit": True}})
    built = build({"stages": [{"qat": {"embeddings": True, "checkpointing": True}}], "data": {"pack": False}})
    assert built.to_dict()["stages"][0]["qat"]["embeddings"] is True and built.data.pack is False


@pytest.mark.parametrize("layers", [[7], [0, 1, 2], [], 3, "all"])
def test_a_range_of_layers_says_how_it_is_written(layers: object) -> None:
    wanted = r"wanted \[first, end\) of the layers, counted from 0, such as \[0, 6\]"
    for stage, knobs in (("wanda", {"where": {"layers": layers}}), ("llm_pruner", {"mlp_layers": layers})):
        with pytest.raises(RecipeError, match=wanted):
            build({"stages": [{stage: knobs}]})
    with pytest.raises(RecipeError, match=r"rates=.*: wanted 2 values"):
        build({"stages": [{"besa": {"rates": [0.1]}}]})


def test_recipes_show_knobs_in_the_order_that_they_always_had() -> None:
    """What and how much first, how in the middle, shapes and mechanics last; written recipes do not change."""
    order = ["keep", "of", "kinds", "batches", "batch", "micro_batch", "layout", "allocation", "multiple_of", "floor"]
    order += ["depth_batches", "depth_weight"]  # what came later stands behind it
    assert list(dumped(GateTaylor())) == [knob.name for knob in knobs_of(GateTaylor)] == order
    assert list(dumped(Minitron()))[:6] == ["keep", "of", "kinds", "multiple_of", "floor", "batches"]


def test_two_knobs_of_one_name_are_refused() -> None:
    class Twice:
        """Both have `alpha`."""

        lora: TunesLora = TunesLora()
        alpha: float = 1.0

    with pytest.raises(ValueError, match="has the knob alpha twice"):
        with_flat_knobs(Twice)


def test_a_group_without_a_default_is_refused() -> None:
    class Bare:
        """No default."""

        lora: Annotated[TunesLora, Knobs(without=("alpha",))]

    with pytest.raises(ValueError, match=r"Bare\.lora is a knob group and needs a default"):
        with_flat_knobs(Bare)
