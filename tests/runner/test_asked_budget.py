"""Budgets out of reach are refused in the option that asked for them, with a value that every check takes."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import Call
from transformers import BertConfig

import compresso
from compresso.arch.base import arch_for
from compresso.arch.costs import shape_facts
from compresso.checkpoint.load import meta_model
from compresso.checkpoint.source import open_source
from compresso.core.budget import InfeasibleBudget, Shortfall
from compresso.core.latency_table import Conditions, LatencyTable
from compresso.errors import BudgetError
from compresso.runner.asked_budget import Asked, asked_for, count, said_as_asked
from compresso.runner.measured_budget import machine_here

OTHERS = ("compresso", "ristretto", "shortgpt", "magnitude-structured", "llm-pruner", "lorashear")
BEYOND = {"parameters": "1K", "macs": 1e4, "speedup": "1e4x"}
"""What no recipe reaches."""


@pytest.fixture(scope="module")
def table(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the tiny model, by hand: 1 + 3 x (4 + 6) = 31 ms."""
    model = meta_model(open_source(tiny_folder))
    facts, conditions = shape_facts(arch_for(model.config), model), Conditions("torch", "decode", 1, 24, "float32")
    curves = {0: 0.0, 1: 1.5, 2: 2.0, 4: 4.0}, {0: 0.0, 12: 2.5, 24: 3.0, 48: 6.0}
    path = tmp_path_factory.mktemp("tables") / "latency.json"
    path.write_text(LatencyTable(facts, machine_here(), conditions, 1.0, *curves).to_json())
    return path


def options_of(name: str, value: object, table: Path) -> dict[str, Any]:
    return {name: value} | ({"latency_table": table} if name == "speedup" else {})


@pytest.mark.parametrize(
    ("recipe", "name"),
    [
        ("gate-taylor", "parameters"),
        *(pytest.param("gate-taylor", name, marks=pytest.mark.slow) for name in ("macs", "speedup")),
        pytest.param("magnitude-structured", "speedup", marks=pytest.mark.slow),
        *(pytest.param(recipe, name, marks=pytest.mark.slow) for recipe in OTHERS for name in ("parameters", "macs")),
    ],
)
def test_the_value_that_is_proposed_is_taken_and_little_less_is_not(
    recipe: str, name: str, tiny_folder: Path, table: Path
) -> None:
    """However many things hold the budget up, one after the other; and nothing is said of a share nobody gave."""
    with pytest.raises(BudgetError) as caught:
        compresso.plan(recipe, tiny_folder, **options_of(name, BEYOND[name], table))
    said = str(caught.value)
    found = re.search(rf"; give {name}='?([^ ']+)'? or (more|less)$", said)
    assert found is not None and not re.search(r"\bkeep\b|--", said) and "\n" not in said
    assert said.startswith(f"{name}=") and (found[2] == "more") == (name == "parameters")
    value = Asked(name, found[1])
    compresso.plan(recipe, tiny_folder, **options_of(name, value.argument, table))
    with pytest.raises(BudgetError):
        compresso.plan(recipe, tiny_folder, **options_of(name, value.of_share(0.97).argument, table))


def test_a_run_and_the_command_line_say_the_same(tiny_folder: Path, tmp_path: Path, call: Call) -> None:
    data = tmp_path / "rows.txt"
    data.write_text("never read\n")
    code, out, error = call("plan", "gate-taylor", "--model", tiny_folder, "--macs", 1e4)
    assert (code, out, len(error.splitlines())) == (2, "", 1)
    assert re.match(r"BudgetError: --macs 10000 is above the most of [\d.]+ \(.+\); give --macs [\d.]+ or less", error)
    with pytest.raises(BudgetError, match=r"^macs=10000 is above the most of [\d.]+ \(.+\); give macs=[\d.]+ or less$"):
        compresso.run("gate-taylor", tiny_folder, data, output=tmp_path / "out", macs=1e4, quiet=True)
    assert not (tmp_path / "out").exists()


def test_parameters_are_those_with_the_head_that_the_task_gives(tmp_path: Path) -> None:
    """A base model's own count is smaller: a share of it would be more parameters of the model that is shrunk."""
    config = BertConfig(vocab_size=90, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
    (tmp_path / "base").mkdir()
    config.save_pretrained(tmp_path / "base")
    for task in ("masked-lm", "classification"):
        with pytest.raises(BudgetError, match="below the floor") as caught:
            compresso.plan("homodistil", tmp_path / "base", task=task, parameters="1")
        found = re.search(r"give parameters='?([^ ']+)'? or more$", str(caught.value))
        assert found is not None
        shown = compresso.plan("homodistil", tmp_path / "base", task=task, parameters=found[1])
        assert shown["after"]["parameters"]["total"] <= count(found[1])


@pytest.mark.parametrize(
    ("recipe", "share"),
    [
        ("homodistil", "all parameters"),
        ("slicegpt/20", "the stream's dimensions"),
        ("gate-taylor", "block parameters"),
        ("magnitude/50", "block parameters"),
    ],
)
def test_a_share_out_of_range_says_what_it_is_of(recipe: str, share: str, tiny_folder: Path) -> None:
    with pytest.raises(BudgetError, match=rf"^keep=1.5: the kept share of {share} lies in \(0, 1\]"):
        compresso.plan(recipe, tiny_folder, keep=1.5)


def test_a_share_that_was_given_is_spoken_of_as_before(tiny_folder: Path) -> None:
    with pytest.raises(BudgetError, match=r"keep=0\.001 .*aise keep to [\d.]+"):
        compresso.plan("gate-taylor", tiny_folder, keep=0.001)


def test_an_engine_whose_shapes_miss_it_names_the_nearest_in_the_same_unit(tiny_folder: Path) -> None:
    """Multiples of 256 leave none of 48 channels or all; the value that is proposed is taken."""
    recipe = {"name": "some", "stages": [{"magnitude_structured": {"keep": 0.7, "kinds": ["channel"]}}]}
    with pytest.raises(BudgetError, match=r"at the nearest; give macs=[\d.]+, or leave the target out") as caught:
        compresso.plan(recipe, tiny_folder, macs=1.2, target="llama.cpp:q4_k")
    assert "keep=" not in str(caught.value)
    found = re.search(r"give macs=([\d.]+)", str(caught.value))
    assert found is not None
    compresso.plan(recipe, tiny_folder, macs=float(found[1]), target="llama.cpp:q4_k")


def _refused(_: Mapping[str, Any]) -> None:
    raise BudgetError("more than there is")


def test_where_nothing_is_known_to_do_the_option_is_named_all_the_same() -> None:
    with (
        pytest.raises(
            BudgetError, match=r"more than 4; raise keep \(keep is the share that --macs 9 comes to: give less"
        ),
        said_as_asked({"macs": 9.0}, _refused),
    ):
        raise BudgetError("stage 'a': the cheapest levels cost 4.5, more than 4; raise keep")
    with (
        pytest.raises(BudgetError, match=r"^--parameters 5M is out of reach: heads stay$"),
        said_as_asked({"parameters": "5M"}, _refused),
    ):
        raise BudgetError("stage 'a'") from InfeasibleBudget("keep=0.1", Shortfall(0.1, 0.2, "heads stay"))
    with pytest.raises(BudgetError, match=r"^of something else$"), said_as_asked({"parameters": "5M"}, _refused):
        raise BudgetError("of something else")


def test_a_share_or_two_budgets_are_nobodys_to_reword() -> None:
    assert asked_for({"keep": 0.5}) is None and asked_for({"macs": 2.0, "speedup": "2x"}) is None
    assert asked_for({}) is None and str(asked_for({"parameters": 20_000_000})) == "--parameters 20000000"
