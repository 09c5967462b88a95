"""Latency tables: monotone, additive, and of one model and machine."""

from dataclasses import replace

import pytest
import torch
from tests.core.conftest import llama

from compresso.core.axis import Kind
from compresso.core.cost import CostModel
from compresso.core.latency_table import Conditions, LatencyTable
from compresso.core.measures import Measures
from compresso.core.plan import Plan
from compresso.core.score import parameters_per_unit

TINY = {"hidden_size": 16, "queries_per_kv_head": 2, "vocab_size": 10, "layers": 2, "kv_heads": 2, "channels": 24}
HERE = {"hardware": "a processor", "device": "cpu", "threads": 2, "system": "Linux"}
TABLE = LatencyTable(
    model=TINY,
    machine=HERE,
    conditions=Conditions("torch", "decode", 1, 128, "float32"),
    fixed=3.0,
    attention={0: 0.01, 1: 0.5, 2: 0.7},
    ffn={0: 0.02, 8: 0.4, 16: 0.3, 24: 1.1},
)


def measured(layers: int = 2, table: LatencyTable = TABLE) -> CostModel:
    counted = llama(16, layers, 4, 24, 10, kv_heads=2, depth=True)
    return CostModel(counted.axes, counted.weights, measured=Measures(table).of(counted.axes, counted, TINY))


def test_curves_are_made_monotone() -> None:
    assert TABLE.ffn == {0: 0.02, 8: pytest.approx(0.35), 16: pytest.approx(0.35), 24: 1.1}
    assert all(TABLE.of("ffn", n) <= TABLE.of("ffn", n + 1) for n in range(24))
    assert TABLE.of("ffn", 20) == pytest.approx((0.35 + 1.1) / 2)


@pytest.mark.parametrize("layers", [1, 2, 5])
def test_a_model_takes_the_sum_of_its_parts(layers: int) -> None:
    cost = measured(layers)
    whole = TABLE.fixed + layers * (TABLE.attention[2] + TABLE.ffn[24])
    assert float(cost().count("milliseconds")) == pytest.approx(whole)
    assert TABLE.milliseconds([(2, 24)] * layers) == pytest.approx(whole)
    smaller = Plan({"layers.0.heads": (1,), "layers.0.channels": tuple(range(12))})
    expected = whole - TABLE.attention[2] - TABLE.ffn[24] + 0.5 + TABLE.of("ffn", 12)
    assert float(cost.of(smaller).count("milliseconds")) == pytest.approx(expected)
    if layers > 1:
        gone = float(cost.of(Plan({"layers": tuple(range(1, layers))})).count("milliseconds"))
        assert gone == pytest.approx(whole - TABLE.attention[2] - TABLE.ffn[24])


def test_counts_of_shapes_stay_what_they_are() -> None:
    plain, both = llama(16, 2, 4, 24, 10, kv_heads=2, depth=True), measured()
    masks = {axis.name: torch.rand(axis.size) for axis in plain.axes if axis.kind in (Kind.HEAD, Kind.CHANNEL)}
    for of in ("blocks", "total", "macs", "kv"):
        assert float(both(masks).count(of)) == float(plain(masks).count(of))
        assert both.even(of)
    assert not both.even("milliseconds")


def test_units_on_a_level_step_are_not_free() -> None:
    """The last step of a staircase may be level; a unit's price is that of the whole axis, shared out."""
    cost = measured(table=replace(TABLE, attention={0: 0.0, 1: 0.6, 2: 0.6}))
    heads = [axis for axis in cost.axes if axis.kind == Kind.HEAD]
    assert list(parameters_per_unit(heads, cost, "milliseconds").values()) == pytest.approx([0.3, 0.3])


def test_a_written_table_is_read_as_it_was() -> None:
    assert LatencyTable.from_json(TABLE.to_json()) == TABLE


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "cost"},
        {"format": 2},
        {"fixed": -1.0},
        {"fixed": float("inf")},
        {"ffn": {}},
        {"ffn": {"-1": 0.2}},
        {"attention": {"2": "much"}},
        {"conditions": {"engine": "torch"}},
        {"conditions": {**TABLE.to_dict()["conditions"], "batch": 0}},
        {"conditions": {**TABLE.to_dict()["conditions"], "phase": "walk"}},
        {"model": {"layers": [1, 2]}},
        {"more": 1},
    ],
)
def test_what_is_no_table_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"table|measure it again|finite"):
        LatencyTable.from_dict(TABLE.to_dict() | change)
    with pytest.raises(ValueError, match="not a latency table"):
        LatencyTable.from_dict([])


@pytest.mark.parametrize(("name", "there"), [*TINY.items(), *HERE.items()])
def test_another_model_or_machine_is_refused_by_the_field_that_differs(name: str, there: object) -> None:
    what, here = ("model", TINY) if name in TINY else ("machine", HERE)
    TABLE.refuse_other(what, here)
    other = here | {name: f"other {there}"}
    with pytest.raises(ValueError, match=f"another {what}: {name} is {there} in it, other {there} here"):
        TABLE.refuse_other(what, other)
    with pytest.raises(ValueError, match=f"{name} is {there} in it, absent here"):
        TABLE.refuse_other(what, {key: value for key, value in here.items() if key != name})


def test_a_wider_module_than_was_measured_is_refused() -> None:
    counted = llama(16, 2, 4, 24, 10, kv_heads=2)
    with pytest.raises(ValueError, match="measures ffn up to 16"):
        Measures(replace(TABLE, ffn={0: 0.0, 16: 1.0})).of(counted.axes, counted, TINY)


def test_without_a_table_or_a_context_nothing_is_guessed() -> None:
    counted = llama(16, 2, 4, 24, 10, kv_heads=2)
    with pytest.raises(ValueError, match="compresso latency"):
        counted().count("milliseconds")
    with pytest.raises(ValueError, match="--bytes-at-context"):
        counted().count("bytes_at_context")


@pytest.mark.parametrize("context", [1, 4096])
def test_bytes_at_a_context_are_those_counted_by_hand(context: int) -> None:
    """2 layers, hidden 16, 4 query heads of 4 on 2 key/value heads, FFN 24, 10 tokens, by hand."""
    counted = llama(16, 2, 4, 24, 10, kv_heads=2)
    measures = Measures(context=context, weight_bytes=4, cache_bytes=2)
    cost = CostModel(counted.axes, counted.weights, measured=measures.of(counted.axes, counted, TINY))
    total = counted().parameters()["total"]
    dense = 4 * total + context * 2 * (2 * 2 * 2 * 4)  # bytes x layers x keys and values x heads x width
    assert float(cost().count("bytes_at_context")) == dense
    one_head_less = cost.of(Plan({"layers.1.heads": (0,)}))
    lost = 16 * (2 * 4 + 4 + 4) + 2 * 4 * 16  # rows of q, k, v and columns of o
    assert float(one_head_less.count("bytes_at_context")) == dense - 4 * lost - context * 2 * 8
    assert cost.even("bytes_at_context")
