"""Laws of plans: they survive JSON, compose like removal does, and refuse what a model cannot do."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compresso.core.axis import Axis, Kind
from compresso.core.plan import Plan

SIZES = {"layers.0.heads": 4, "layers.1.heads": 4, "layers.2.heads": 4, "hidden": 7, "attention": 3, "layers": 3}
KINDS = {"hidden": Kind.HIDDEN, "attention": Kind.ATTENTION, "layers": Kind.LAYER}
AXES = tuple(Axis(name, KINDS.get(name, Kind.HEAD), size, (), (), "") for name, size in SIZES.items())


def subsets(size: int, least: int = 0) -> st.SearchStrategy[tuple[int, ...]]:
    return (
        st.sets(st.integers(0, size - 1), min_size=least).map(lambda units: tuple(sorted(units)))
        if size
        else st.just(())
    )


@st.composite
def plans(draw: st.DrawFn, sizes: dict[str, int] = SIZES) -> Plan:
    names = draw(st.sets(st.sampled_from(sorted(sizes))))
    return Plan(
        {name: draw(subsets(sizes[name], least=1 if name in ("hidden", "layers") else 0)) for name in sorted(names)}
    )


def after(plan: Plan) -> tuple[dict[str, int], dict[str, tuple[str, list[int]]]]:
    """The axes of the smaller model: their sizes, and for each the original axis and the original index of every unit.

    The attention axis keeps one place for every layer that is left, also where its attention is gone.
    """
    left = {name: list(plan.kept.get(name, range(size))) for name, size in SIZES.items()}
    left["attention"] = left["layers"]
    origin = {name: (name, left[name]) for name in ("hidden", "attention", "layers")}
    for new, old in enumerate(left["layers"]):
        origin[f"layers.{new}.heads"] = (f"layers.{old}.heads", left[f"layers.{old}.heads"])
    return {name: len(units) for name, (_, units) in origin.items()}, origin


@settings(deadline=None)
@given(st.data())
def test_then_equals_removing_twice(data: st.DataObject) -> None:
    first = data.draw(plans())
    sizes, origin = after(first)
    second = data.draw(plans(sizes))
    both = first.then(second)
    both.check(AXES)
    for name, kept in second.kept.items():
        original, units = origin[name]
        there = first.kept.get("attention", range(3)) if name == "attention" else units
        assert list(both.kept[original]) == [units[i] for i in kept if units[i] in there]
    for name in set(first.kept) - {origin[name][0] for name in second.kept}:
        assert both.kept[name] == first.kept[name]


def test_axes_with_one_unit_a_layer_are_renumbered_with_the_layers() -> None:
    first = Plan({"attention": (0, 1, 2), "layers": (1, 2)})
    assert first.then(Plan({"attention": (0,)})).kept == {"attention": (1,), "layers": (1, 2)}
    assert Plan({"attention": (0, 2)}).then(Plan({"attention": (1, 2)})).kept["attention"] == (2,)
    assert Plan({"layers": (0, 2)}).then(Plan({"attention": (1,)})).kept["attention"] == (2,)


@settings(deadline=None)
@given(plans())
def test_json_and_masks_and_the_empty_plan_change_nothing(plan: Plan) -> None:
    assert Plan.from_json(plan.to_json()) == plan
    assert Plan.from_masks(AXES, plan.masks(AXES)) == Plan(
        {axis.name: plan.kept[axis.name] for axis in AXES if axis.name in plan.kept}
    )
    assert plan.then(Plan()) == Plan().then(plan) == plan
    plan.check(AXES)
    assert plan.is_noop(AXES) == all(bool(mask.all()) for mask in plan.masks(AXES).values())


def test_a_soft_mask_keeps_what_is_above_zero() -> None:
    assert Plan.from_masks(AXES, {"layers.1.heads": torch.tensor([0.0, 0.2, 0.0, 1.0])}).kept == {
        "layers.1.heads": (1, 3)
    }


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        ({"layers.3.heads": (0,)}, "'layers.3.heads', which the model does not have"),
        ({"layers.0.heads": (0, 4)}, r"in \[0, 4\)"),
        ({"layers.0.heads": (-1, 0)}, r"in \[0, 4\)"),
        ({"layers.0.heads": (1, 0)}, "ascending"),
        ({"layers.0.heads": (1, 1)}, "ascending"),
        ({"hidden": ()}, "0 of 7 units; at least 1 must be kept"),
        ({"layers": ()}, "0 of 3 units; at least 1 must be kept"),
    ],
)
def test_impossible_plans_are_refused(kept: dict[str, tuple[int, ...]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Plan(kept).check(AXES)


def test_fewest_units_are_respected() -> None:
    axis = Axis("layers.0.heads", Kind.HEAD, 4, (), (), "", min_units=2)
    Plan({"layers.0.heads": (0, 3)}).check([axis])
    with pytest.raises(ValueError, match="1 of 4 units; at least 2"):
        Plan({"layers.0.heads": (0,)}).check([axis])
    assert [Axis("x", kind, 4, (), (), "").fewest for kind in (Kind.HEAD, Kind.HIDDEN, Kind.LAYER, Kind.MLP)] == [
        0,
        1,
        1,
        0,
    ]


@pytest.mark.parametrize("text", ["[]", '{"format": 2, "kept": {}}', '{"format": 1, "kept": []}', "{"])
def test_foreign_json_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        Plan.from_json(text)


QUERIES = {f"layers.{i}.heads": 3 for i in range(2)} | {
    f"layers.{i}.heads.{g}.queries": 4 for i in range(2) for g in range(3)
}
WITH_QUERIES = tuple(
    Axis(
        name,
        Kind.QUERY if name.endswith("queries") else Kind.HEAD,
        size,
        (),
        (),
        "",
        within=(name[: len("layers.0.heads")], int(name[len("layers.0.heads.")])) if name.endswith("queries") else None,
    )
    for name, size in QUERIES.items()
)


@st.composite
def plans_of_queries(draw: st.DrawFn, groups: dict[int, int], slots: dict[int, int]) -> Plan:
    """A plan of two layers' key/value heads and, at equal counts, of their query heads; either may be left out."""
    kept: dict[str, tuple[int, ...]] = {}
    for i in range(2):
        if draw(st.booleans()):
            kept[f"layers.{i}.heads"] = draw(subsets(groups[i]))
        if draw(st.booleans()) and slots[i]:
            n = draw(st.integers(1, slots[i]))
            for g in kept.get(f"layers.{i}.heads", range(groups[i])):
                some = draw(st.permutations(range(slots[i])))[:n]
                kept[f"layers.{i}.heads.{g}.queries"] = tuple(sorted(some))
    return Plan(kept)


@settings(deadline=None)
@given(st.data())
def test_query_heads_follow_their_key_value_heads_that_move_up(data: st.DataObject) -> None:
    first = data.draw(plans_of_queries({0: 3, 1: 3}, {0: 4, 1: 4}))
    left = {
        i: {
            g: list(first.kept.get(f"layers.{i}.heads.{g}.queries", range(4)))
            for g in first.kept.get(f"layers.{i}.heads", range(3))
        }
        for i in range(2)
    }
    slots = {i: len(next(iter(units.values()), [])) for i, units in left.items()}
    second = data.draw(plans_of_queries({i: len(units) for i, units in left.items()}, slots))
    both = first.then(second)
    both.check(WITH_QUERIES)
    assert Plan.from_json(both.to_json()) == both
    for i in range(2):
        originals = list(left[i])
        stay = [originals[g] for g in second.kept.get(f"layers.{i}.heads", range(len(originals)))]
        assert stay == list(both.kept.get(f"layers.{i}.heads", range(3)))
        for g, original in enumerate(originals):
            name = f"layers.{i}.heads.{original}.queries"
            assert original in stay or name not in both.kept
            if original in stay:
                kept = second.kept.get(f"layers.{i}.heads.{g}.queries", range(slots[i]))
                assert list(both.kept.get(name, range(4))) == [left[i][original][r] for r in kept]


def test_key_value_heads_that_stay_keep_as_many_query_heads() -> None:
    uneven = {"layers.1.heads.0.queries": (1, 2), "layers.1.heads.2.queries": (0, 3)}
    with pytest.raises(
        ValueError, match=r"unequal numbers within the units of layers\.1\.heads \(2 in .*, 4 in .*\.1\."
    ):
        Plan(uneven).check(WITH_QUERIES)
    Plan({**uneven, "layers.1.heads": (0, 2)}).check(WITH_QUERIES)
    masks = {"layers.1.heads": torch.tensor([1.0, 0.0, 1.0]), "layers.1.heads.1.queries": torch.tensor([1.0, 0, 0, 0])}
    assert Plan.from_masks(WITH_QUERIES, masks).kept == {"layers.1.heads": (0, 2)}
