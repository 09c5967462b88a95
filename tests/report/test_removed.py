"""What is kept in each layer, against the plan."""

import pytest

from compresso.core.axis import Kind
from compresso.core.plan import Plan
from compresso.report.facts import KINDS
from compresso.report.removed import CHANNELS, HEAD_WIDTH, HEADS, HIDDEN, UnitsKept, dense_sizes, units_kept
from compresso.report.stage_facts import StageFacts
from tests.conftest import Ran
from tests.report.made import PLAN, UNITS


def stage(**units: str) -> dict[str, StageFacts]:
    return {"prune": StageFacts(units_kept={name.replace("_", "."): text for name, text in units.items()})}


def test_cells_are_the_units_of_the_plan() -> None:
    cells = units_kept(PLAN, {"learn_gates": StageFacts(units_kept=UNITS)})
    assert cells == [
        UnitsKept(0, CHANNELS, 5, 8),
        UnitsKept(0, HEADS, 3, 4),
        UnitsKept(1, CHANNELS, 2, 8),
        UnitsKept(1, HEADS, 0, 4),
    ]
    assert [cell.share for cell in cells] == [0.625, 0.75, 0.25, 0.0]


def test_hidden_dimensions_are_the_same_in_every_layer() -> None:
    cells = units_kept(Plan({"hidden": (0, 2), "layers.1.heads": (0,)}), stage(hidden="2/3", layers_1_heads="1/2"))
    assert [cell for cell in cells if cell.part == HIDDEN] == [UnitsKept(0, HIDDEN, 2, 3), UnitsKept(1, HIDDEN, 2, 3)]


def test_heads_that_get_narrower_keep_one_width_a_layer() -> None:
    plan = Plan({f"layers.1.heads.{head}.{which}": (0, 2) for head in (0, 1) for which in ("matches", "values")})
    cells = units_kept(plan, {"prune": StageFacts(units_kept=dict.fromkeys(plan.kept, "2/3"))})
    assert cells == [UnitsKept(1, HEAD_WIDTH, 2, 3)]


def test_whole_layers_leave_with_their_parts() -> None:
    cells = units_kept(
        Plan({"layers": (0, 2), "layers.1.heads": (0, 1), "mlp": (1, 2)}),
        stage(layers="2/3", layers_1_heads="2/2", mlp="2/3"),
    )
    removed = {(cell.layer, cell.part) for cell in cells if cell.kept == 0}
    assert removed == {(1, HEADS), (1, CHANNELS), (0, CHANNELS)}
    assert {(cell.layer, cell.part) for cell in cells} == {
        (layer, part) for layer in range(3) for part in (HEADS, CHANNELS)
    }


def test_a_second_stage_refines_and_the_first_knows_the_sizes() -> None:
    stages = {**stage(layers_0_channels="6/8"), "again": StageFacts(units_kept={"layers.0.channels": "3/6"})}
    assert dense_sizes(stages) == {"layers.0.channels": 8}
    assert units_kept(Plan({"layers.0.channels": (0, 1, 2)}), stages) == [UnitsKept(0, CHANNELS, 3, 8)]


def test_axes_renumbered_by_the_removal_of_layers_are_not_guessed() -> None:
    stages = {**stage(layers="1/2"), "again": StageFacts(units_kept={"layers.0.heads": "1/4"})}
    assert dense_sizes(stages) == {"layers": 2}


def test_nothing_removed_gives_no_cells() -> None:
    assert units_kept(Plan(), {}) == []


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["magnitude-structured", "gate-taylor"])
def test_a_real_run_adds_up(ran: Ran, recipe: str) -> None:
    result = ran(recipe)
    stages = {name: StageFacts.model_validate(facts) for name, facts in result.records["stages"].items()}
    cells = units_kept(result.plan, stages)
    assert {(cell.layer, cell.part) for cell in cells} == {
        (layer, part) for layer in range(3) for part in (HEADS, CHANNELS)
    }
    for part, name, of in ((HEADS, "heads", 4), (CHANNELS, "channels", 48)):
        mine = [cell for cell in cells if cell.part == part]
        assert [cell.kept for cell in mine] == [len(result.plan.kept[f"layers.{i}.{name}"]) for i in range(3)]
        assert {cell.of for cell in mine} == {of}


def test_every_kind_of_unit_has_words_in_the_report() -> None:
    assert {str(kind) for kind in Kind} == KINDS.keys()
