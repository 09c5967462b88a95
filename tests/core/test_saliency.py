"""Saliences and their reduction over coupled slices, against sums written out by hand."""

import math

import pytest
import torch
from torch import Tensor

from compresso.core.axis import Axis, Kind, Slice
from compresso.core.saliency import Importance, Reduction, channels_per_unit, kept_units, salience, unit_scores

GENERATOR = torch.Generator().manual_seed(3)
HEADS = Axis(  # 2 key/value heads of 3 channels, each with 2 query heads
    "layers.0.heads",
    Kind.HEAD,
    2,
    (Slice("q.weight", 0, 6), Slice("q.bias", 0, 6), Slice("k.weight", 0, 3), Slice("o.weight", 1, 6)),
    (),
    "attention",
    layer=0,
)
WEIGHTS = {
    name: torch.randn(shape, generator=GENERATOR)
    for name, shape in {"q.weight": (12, 5), "q.bias": (12,), "k.weight": (6, 5), "o.weight": (5, 12)}.items()
}
GRADIENTS = {name: torch.randn(weight.shape, generator=GENERATOR) for name, weight in WEIGHTS.items()}
FISHER = {name: torch.rand(weight.shape, generator=GENERATOR) for name, weight in WEIGHTS.items()}


def by_hand(importance: Importance) -> Tensor:
    """Values of q, k, o for each head and channel [3, 2, 3], entry by entry."""

    def entry(name: str, *at: int) -> float:
        w, g, f = (float(tensors[name][at]) for tensors in (WEIGHTS, GRADIENTS, FISHER))
        signed = {
            "vector": w * g,
            "first": w * g,
            "second": w * f * w,
            "mixed": w * g - 0.5 * w * f * w,
            "l1": w,
            "l2": w * w,
        }[importance]
        return signed if importance == "vector" else abs(signed)

    result = torch.zeros(3, 2, 3, dtype=torch.float64)
    for head in range(2):
        for channel in range(3):
            for query in range(2):
                row = head * 6 + query * 3 + channel
                result[0, head, channel] += abs(sum(entry("q.weight", row, c) for c in range(5)) + entry("q.bias", row))
                result[2, head, channel] += abs(sum(entry("o.weight", c, row) for c in range(5)))
            result[1, head, channel] = abs(sum(entry("k.weight", head * 3 + channel, c) for c in range(5)))
    return result


@pytest.mark.parametrize("reduction", ["sum", "mean", "max", "prod", "last"])
def test_parts_of_a_fused_projection_are_coupled_slices(reduction: Reduction) -> None:
    """q, k and v behind one another in one weight and bias, as GPT-2 and Phi-3 have them,
    score as three linears would.
    """
    fused = [
        Slice(f"qkv.{tensor}", 0, width, start=start)
        for width, start in ((6, 0), (3, 12), (3, 18))
        for tensor in ("weight", "bias")
    ]
    apart = [
        Slice(f"{name}.{tensor}", 0, width)
        for name, width in (("q", 6), ("k", 3), ("v", 3))
        for tensor in ("weight", "bias")
    ]
    parameters = {
        "qkv.weight": torch.randn(24, 5, generator=GENERATOR),
        "qkv.bias": torch.randn(24, generator=GENERATOR),
    }
    for tensor in ("weight", "bias"):
        parts = parameters[f"qkv.{tensor}"].split([12, 6, 6])
        parameters |= {f"{name}.{tensor}": part for name, part in zip("qkv", parts, strict=True)}
    one, three = (
        Axis("layers.0.heads", Kind.HEAD, 2, tuple(pieces), (), "attention", layer=0) for pieces in (fused, apart)
    )
    for importance in ("l1", "l2"):
        scores = unit_scores(one, importance, parameters, reduction=reduction)
        assert torch.equal(scores, unit_scores(three, importance, parameters, reduction=reduction))


@pytest.mark.parametrize("importance", ["vector", "first", "second", "mixed", "l1", "l2"])
def test_a_head_is_scored_with_its_own_query_heads(importance: Importance) -> None:
    values = by_hand(importance)
    reduced = {
        "sum": values.sum(dim=0),
        "mean": values.mean(dim=0),
        "max": values.amax(dim=0),
        "prod": values.prod(dim=0),
        "last": values[2],
    }
    for reduction, wanted in reduced.items():
        got = unit_scores(HEADS, importance, WEIGHTS, GRADIENTS, FISHER, reduction)  # type: ignore[arg-type]
        expected = wanted.sum(dim=-1)
        torch.testing.assert_close(got, expected.log() if reduction == "prod" else expected, rtol=1e-5, atol=1e-6)


def test_signs_cancel_in_the_vector_only() -> None:
    axis = Axis("layers.0.channels", Kind.CHANNEL, 1, (Slice("up.weight", 0),), (), "mlp", layer=0)
    weights, gradients = {"up.weight": torch.tensor([[1.0, 1.0]])}, {"up.weight": torch.tensor([[3.0, -2.0]])}
    assert unit_scores(axis, "vector", weights, gradients).item() == 1
    assert unit_scores(axis, "first", weights, gradients).item() == 5


def test_products_do_not_underflow() -> None:
    """290 slices of 1e-9 each: their product has 2610 zeros behind the point."""
    axis = Axis("hidden", Kind.HIDDEN, 2, tuple(Slice(f"{i}.weight", 1) for i in range(290)), (), "model")
    weights = {f"{i}.weight": torch.tensor([[1e-9, 2e-9]]) for i in range(290)}
    scores = unit_scores(axis, "l1", weights, reduction="prod")
    assert (scores[1] - scores[0]).item() == pytest.approx(290 * math.log(2), rel=1e-5)
    dead = unit_scores(axis, "l1", {**weights, "7.weight": torch.tensor([[0.0, 0.0]])}, reduction="prod")
    assert dead.isfinite().all()
    assert (dead < scores).all()


def test_layers_add_up_all_that_they_own() -> None:
    pieces = tuple(Slice(f"{layer}.{module}.weight", 0, unit=layer) for layer in range(2) for module in ("q", "up"))
    axis = Axis("layers", Kind.LAYER, 3, pieces, (), "model.layers")  # the third has lost both sub-layers
    weights = {piece.param: torch.full((2, 2), float(i + 1)) for i, piece in enumerate(pieces)}
    assert unit_scores(axis, "l1", weights).tolist() == [4 + 8, 12 + 16, 0]
    assert unit_scores(axis, "l1", weights, reduction="mean").tolist() == [6, 14, 0]
    assert unit_scores(axis, "l1", weights, reduction="max").tolist() == [8, 16, 0]


def test_what_is_missing_or_means_nothing_is_refused() -> None:
    weight = torch.ones(2)
    with pytest.raises(ValueError, match="'first' needs the gradient"):
        salience("first", weight)
    with pytest.raises(ValueError, match="'mixed' needs squared gradients"):
        salience("mixed", weight, gradient=weight)
    with pytest.raises(ValueError, match="axis hidden has no slice that computes last"):
        unit_scores(
            Axis("hidden", Kind.HIDDEN, 2, (Slice("a.weight", 0),), (), "model"),
            "l1",
            {"a.weight": weight},
            reduction="last",
        )


def test_half_precision_is_widened_first() -> None:
    tiny = torch.tensor([1e-3], dtype=torch.bfloat16)
    assert salience("second", tiny, fisher=torch.tensor([1e-8])).item() == pytest.approx(1e-14, rel=0.02)


def test_ratios_truncate_in_channels_and_remove_whole_units() -> None:
    """The widths behind the published sizes."""
    assert [kept_units(32, 128, 0.25), kept_units(11008, 1, 0.25)] == [24, 8256]
    assert [kept_units(32, 128, 0.6), kept_units(11008, 1, 0.6)] == [13, 4403]
    assert [kept_units(8, 128, 0.25), kept_units(4, 64, 0.25), kept_units(4096, 1, 0.2)] == [6, 3, 3276]
    assert channels_per_unit(HEADS) == 3
