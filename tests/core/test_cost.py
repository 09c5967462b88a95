"""The counter against published parameter counts, hand-made formulas, and sums over single entries."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from compresso.core.axis import Axis, Kind, Slice
from compresso.core.cost import CostModel, Group, Weight
from compresso.core.hard_concrete import LOG_ALPHA_HIGH, keep_probability
from compresso.core.plan import Plan

Describe = Callable[..., CostModel]


def uniform_plan(cost: CostModel, layers: range, **kept: int) -> Plan:
    """Keeps the first units: `heads` and `channels` in the given layers, `hidden` everywhere."""
    plan = {f"layers.{i}.{name}": tuple(range(n)) for i in layers for name, n in kept.items() if name != "hidden"}
    if "hidden" in kept:
        plan["hidden"] = tuple(range(kept["hidden"]))
    result = Plan(plan)
    result.check(cost.axes)
    return result


def test_llama_7b(llama_7b: CostModel) -> None:
    assert llama_7b().parameters() == {
        "total": 6_738_415_616,
        "blocks": 6_476_005_376,
        "embeddings": 262_144_000,
        "norms": 266_240,
    }
    assert llama_7b().macs == 6_476_005_376 + 32000 * 4096
    assert llama_7b().cached == 32 * 2 * 4096
    gates = {
        kind: sum(axis.size for axis in llama_7b.axes if axis.kind == kind)
        for kind in (Kind.HEAD, Kind.CHANNEL, Kind.HIDDEN)
    }
    assert gates == {Kind.HEAD: 1_024, Kind.CHANNEL: 352_256, Kind.HIDDEN: 4_096}


@pytest.mark.parametrize(
    ("axis", "size", "blocks", "total"),
    [
        ("layers.7.heads", 32, 2_097_152, 2_097_152),
        ("layers.7.channels", 11008, 12_288, 12_288),
        ("hidden", 4096, 1_581_056, 1_645_121),
    ],
)
def test_one_unit_less_in_llama_7b(llama_7b: CostModel, axis: str, size: int, blocks: int, total: int) -> None:
    dense, smaller = llama_7b(), llama_7b.of(Plan({axis: tuple(range(1, size))}))
    assert dense.blocks - smaller.blocks == blocks
    assert dense.total - smaller.total == total


def test_slices_of_one_axis_tile_a_fused_projection_together() -> None:
    """q, k and v in one weight [3 * 2 * 4, 5]: counts, cache and units as if they were three."""
    fused = tuple(Slice("qkv", 0, width, start=start) for width, start in ((8, 0), (4, 16), (4, 24)))
    apart = tuple(Slice(name, 0, width) for name, width in (("q", 8), ("k", 4), ("v", 4)))
    one = CostModel(
        (Axis("heads", Kind.HEAD, 2, fused, (), ""),), (Weight("qkv", (32, 5), Group.BLOCKS, macs=1, cached=16),)
    )
    of_three = [
        Weight(name, (size, 5), Group.BLOCKS, macs=1, cached=cached)
        for name, size, cached in (("q", 16, 0), ("k", 8, 8), ("v", 8, 8))
    ]
    three = CostModel((Axis("heads", Kind.HEAD, 2, apart, (), ""),), of_three)
    for masks in (None, {"heads": torch.tensor([1.0, 0.0])}, {"heads": torch.tensor([0.3, 0.5])}):
        assert (one(masks).blocks, one(masks).cached, one(masks).macs) == (
            three(masks).blocks,
            three(masks).cached,
            three(masks).macs,
        )
    weight = torch.arange(160.0).reshape(32, 5)
    parts = dict(zip("qkv", weight.split([16, 8, 8]), strict=True))
    of_units = [piece.entries(weight, 2) for piece in fused]
    assert all(
        torch.equal(mine, piece.entries(parts[piece.param], 2)) for mine, piece in zip(of_units, apart, strict=True)
    )
    with pytest.raises(ValueError, match=r"2 units of 16 cannot tile dim 0 \(32\)"):
        overlapping = (*fused[:2], Slice("qkv", 0, 4, start=20))
        CostModel((Axis("heads", Kind.HEAD, 2, overlapping, (), ""),), one.weights)


def test_llm_pruners_printed_counts(llama_7b: CostModel, describe: Describe) -> None:
    assert llama_7b.of(uniform_plan(llama_7b, range(4, 30), heads=24, channels=8256)).total == 5_422_977_024
    llama_3_8b = describe(4096, 32, 32, 14336, 128256, kv_heads=8)
    assert llama_3_8b.of(uniform_plan(llama_3_8b, range(26), heads=6, channels=14336 - 3584)).total == 6_612_586_496
    tiny_llama = describe(2048, 22, 32, 5632, 32000, kv_heads=4)
    assert tiny_llama.of(uniform_plan(tiny_llama, range(14), heads=3, channels=5632 - 1408)).total == 945_907_712


def test_llama_7b_cut_to_uniform_widths(llama_7b: CostModel) -> None:
    cost = llama_7b.of(uniform_plan(llama_7b, range(32), heads=28, channels=9632, hidden=3584))
    assert cost.parameters() == {
        "blocks": 4_958_191_616,
        "embeddings": 2 * 32000 * 3584,
        "norms": 65 * 3584,
        "total": 5_187_800_576,
    }


@pytest.mark.parametrize(
    ("layers", "hidden", "heads", "ffn", "total"),
    [(24, 2048, 16, 5504, 1_345_423_360), (32, 2560, 20, 6912, 2_701_560_320), (24, 1024, 8, 2816, 373_867_520)],
)
def test_sheared_llama_shapes(describe: Describe, layers: int, hidden: int, heads: int, ffn: int, total: int) -> None:
    """LLM-Shearing's target shapes, cut from LLaMA-2-7B by layers, hidden dimensions, heads and channels at once."""
    cost = describe(4096, 32, 32, 11008, 32000, depth=True)
    plan = uniform_plan(cost, range(layers), heads=heads, channels=ffn, hidden=hidden)
    assert cost.of(Plan({**plan.kept, "layers": tuple(range(layers))})).total == total


def test_expected_sparsity_of_fresh_gates(llama_7b: CostModel) -> None:
    means = {Kind.HEAD: 10.0, Kind.HIDDEN: 10.0, Kind.CHANNEL: 4.59512}

    def sparsity(highest: float) -> float:
        gates = {axis.name: torch.full((axis.size,), min(means[axis.kind], highest)) for axis in llama_7b.axes}
        return (
            1 - float(llama_7b({name: keep_probability(gate) for name, gate in gates.items()}).blocks) / 6_476_005_376
        )

    assert sparsity(20) == pytest.approx(0.0013744, abs=5e-8)
    assert sparsity(LOG_ALPHA_HIGH) == pytest.approx(0.0040449, abs=5e-8)


@pytest.mark.parametrize(
    ("sparsity", "blocks", "total"), [(0.2, 5.181e9, 5.443e9), (0.3, 4.533e9, 4.796e9), (0.35, 4.209e9, 4.472e9)]
)
def test_sparsity_of_blocks_in_parameters(llama_7b: CostModel, sparsity: float, blocks: float, total: float) -> None:
    dense = llama_7b()
    left = (1 - sparsity) * float(dense.blocks)
    assert left == pytest.approx(blocks, abs=6e5)
    assert left + float(dense.embeddings + dense.norms) == pytest.approx(total, abs=6e5)


def random_probabilities(cost: CostModel, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {axis.name: torch.rand(axis.size, generator=generator, dtype=torch.float64) for axis in cost.axes}


def test_expected_count_equals_the_sum_over_single_entries(tiny: CostModel) -> None:
    """Every entry of every matrix stays with the product of its row's and its column's probability."""
    p = random_probabilities(tiny)
    hidden, blocks, embeddings, norms = p["hidden"], 0.0, 0.0, 0.0
    for i in range(2):
        kv = p[f"layers.{i}.heads"].repeat_interleave(4)  # head_dim 4, two query heads a group
        queries = p[f"layers.{i}.heads"].repeat_interleave(8)
        channels = p[f"layers.{i}.channels"]
        for rows in (queries, kv, kv, queries, channels, channels, channels):
            blocks += sum(float(row) * float(column) for row in rows for column in hidden)
        norms += 2 * float(hidden.sum())
    embeddings += 2 * 10 * float(hidden.sum())
    norms += float(hidden.sum())
    cost = tiny(p)
    assert float(cost.blocks) == pytest.approx(blocks, rel=1e-12)
    assert float(cost.embeddings) == pytest.approx(embeddings, rel=1e-12)
    assert float(cost.norms) == pytest.approx(norms, rel=1e-12)
    assert float(cost.total) == pytest.approx(blocks + embeddings + norms, rel=1e-12)
    assert float(cost.macs) == pytest.approx(blocks + embeddings / 2, rel=1e-12)


def test_expected_size_equals_compressos_factorised_formula(llama_7b: CostModel) -> None:
    p = random_probabilities(llama_7b)
    heads = sum(float(p[f"layers.{i}.heads"].sum()) for i in range(32))
    channels = sum(float(p[f"layers.{i}.channels"].sum()) for i in range(32))
    assert float(llama_7b(p).blocks) == pytest.approx(
        float(p["hidden"].sum()) * (4 * 128 * heads + 3 * channels), rel=1e-12
    )


def test_float32_probabilities_are_summed_exactly(llama_7b: CostModel) -> None:
    p = {name: value.float() for name, value in random_probabilities(llama_7b).items()}
    wide = {name: value.double() for name, value in p.items()}
    assert float(llama_7b(p).blocks) == pytest.approx(float(llama_7b(wide).blocks), rel=1e-14)


def test_the_gradient_of_the_expected_size_matches_finite_differences(describe: Describe) -> None:
    cost = describe(4, 2, 2, 3, 5, depth=True)
    sizes = [axis.size for axis in cost.axes]
    log_alpha = torch.randn(
        sum(sizes), generator=torch.Generator().manual_seed(0), dtype=torch.float64
    ).requires_grad_()

    def share(flat: Tensor) -> Tensor:
        parts = dict(zip([axis.name for axis in cost.axes], keep_probability(flat).split(sizes), strict=True))
        return torch.stack(
            [cost(parts).blocks / cost().blocks, cost(parts).total / cost().total, cost(parts).macs / cost().macs]
        )

    torch.autograd.gradcheck(share, log_alpha)


def test_a_layer_is_its_attention_and_its_mlp(describe: Describe) -> None:
    cost = describe(16, 3, 4, 24, 10, depth=True)
    for of in ("blocks", "total", "macs"):
        by_layer = cost.of(Plan({"layers": (0, 2)})).count(of)
        by_parts = cost.of(Plan({"attention": (0, 2), "mlp": (0, 2)})).count(of)
        assert by_layer == by_parts < cost().count(of)
    assert cost.of(Plan({"layers": (0, 2)})).cached == 2 * 2 * 16


def test_a_norm_leaves_with_the_last_unit(tiny: CostModel) -> None:
    one_head = tiny.of(Plan({"layers.0.heads": (1,)}))
    no_head = tiny.of(Plan({"layers.0.heads": ()}))
    assert one_head.norms == tiny().norms
    assert no_head.norms == tiny().norms - 16


def test_parameters_of_masks_with_gradients_are_plain_numbers(tiny: CostModel) -> None:
    p = {"hidden": torch.ones(16, requires_grad=True)}
    assert tiny(p).parameters() == tiny().parameters()


@pytest.mark.parametrize(
    ("axis", "message"),
    [
        (Axis("a", Kind.HEAD, 2, (Slice("v", 0),), (), ""), "slices 'v'"),
        (Axis("a", Kind.HEAD, 3, (Slice("w", 0),), (), ""), r"3 units of 1 cannot tile dim 0 \(4\)"),
        (Axis("a", Kind.HEAD, 4, (Slice("w", 2),), (), ""), "along dim 2 of w"),
        (Axis("a", Kind.LAYER, 4, (Slice("w", 0, unit=4),), (), ""), "cannot belong to unit 4"),
        (Axis("a", Kind.HEAD, 4, (Slice("w", 0),), (), "", with_last_unit=("n",)), "takes 'n' with its last unit"),
        (Axis("a", Kind.HEAD, 4, (Slice("w", 0), Slice("w", 0)), (), ""), "cannot tile dim 0"),
    ],
)
def test_ill_formed_axes_are_refused(axis: Axis, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CostModel([axis], [Weight("w", (4, 6), Group.BLOCKS)])


def test_masks_of_unknown_axes_are_refused(tiny: CostModel) -> None:
    with pytest.raises(ValueError, match="unknown axes"):
        tiny({"hiden": torch.ones(16)})
