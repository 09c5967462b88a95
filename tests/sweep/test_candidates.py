"""Candidates of a search on models: the divergence is that of the smaller model, and borders change no bit of it."""

import copy
import random
from typing import Any

import pytest
import torch
from tests.arch.conftest import CLASSES, CONFIGS, build
from torch import Tensor
from transformers import PreTrainedModel

from compresso.arch.base import arch_for
from compresso.core.axis import Kind
from compresso.edit.shrink import shrink_
from compresso.errors import DataError, NumericError
from compresso.solve.depth import without
from compresso.solve.level_choice import Levels
from compresso.sweep.candidates import MAX_BYTES, CandidateDivergence, candidate_divergence
from compresso.sweep.emptied import EmptiedSubLayers

NAMES = [name for name in CONFIGS if name not in CLASSES]


def made(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    model = build(name).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, 0.3)
    return model


def batches(padded: bool = True) -> list[dict[str, Tensor]]:
    """Three batches, with padding on the right in two of them."""
    found: list[dict[str, Tensor]] = []
    for seed, rows in enumerate((3, 2, 4)):
        ids = torch.randint(2, 50, (rows, 9), generator=torch.Generator().manual_seed(seed))
        mask = torch.ones_like(ids)
        for row in range(rows if padded else 0):
            mask[row, 9 - row * seed :] = 0
        found.append({"input_ids": ids, "attention_mask": mask, "labels": ids})
    return found


def parts(model: PreTrainedModel) -> list[tuple[int, Kind]]:
    n = len(arch_for(model.config).blocks(model))
    return [(block, kind) for block in range(n) for kind in (Kind.ATTENTION, Kind.MLP)]


def fitness_on(
    model: PreTrainedModel, given: list[dict[str, Tensor]], max_bytes: int = MAX_BYTES, stages: tuple[int, ...] = (1, 3)
) -> Any:
    arch, items = arch_for(model.config), parts(model)
    blocks = arch.blocks(model)
    install = EmptiedSubLayers(arch, blocks, [(block, (kind,)) for block, kind in items])
    return candidate_divergence(
        model, blocks, [block for block, _ in items], install, (0,) * len(items), given, stages, max_bytes
    )


def drawn(n: int, seed: int) -> Levels:
    draw = random.Random(seed)
    return tuple(int(draw.random() < 0.3) for _ in range(n))


def expected(model: PreTrainedModel, levels: Levels, given: list[dict[str, Tensor]]) -> float:
    """KL(dense || smaller) over all real tokens, from two whole models."""
    smaller, arch = copy.deepcopy(model), arch_for(model.config)
    axes = [axis for axis in arch.axes(smaller) if axis.kind in (Kind.ATTENTION, Kind.MLP)]
    name = {axis.kind: axis.name for axis in axes}
    gone = [(name[kind], block) for (block, kind), level in zip(parts(model), levels, strict=True) if level]
    shrink_(smaller, arch.axes(smaller), without(axes, gone))
    total, n = 0.0, 0
    for batch in given:
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        with torch.no_grad():
            p, q = (one(**inputs).logits.double().log_softmax(-1) for one in (model, smaller))
        kl = (p.exp() * (p - q)).sum(-1)[batch["attention_mask"].bool()]
        total, n = total + float(kl.sum()), n + len(kl)
    return total / n


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_divergence_is_that_of_the_smaller_model_and_the_model_stays(name: str) -> None:
    model, given = made(name), batches()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    logits = model(**{k: v for k, v in given[0].items() if k != "labels"}).logits
    n = len(parts(model))
    with fitness_on(model, given) as fitness:
        assert fitness((0,) * n, 1) == pytest.approx(0, abs=1e-9)
        for seed in range(3):
            levels = drawn(n, seed)
            fitness.adopt(levels if seed else (0,) * n)
            assert fitness(levels, 1) == pytest.approx(expected_of(model, fitness, levels, given), rel=1e-4, abs=1e-6)
            few = fitness(levels, 0)
            assert few == pytest.approx(expected_of(model, fitness, levels, given[:1]), rel=1e-4, abs=1e-6)
    assert not any("forward" in block.__dict__ for block in model.modules())
    assert {key: value.shape for key, value in model.state_dict().items()} == {k: v.shape for k, v in before.items()}
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(model(**{k: v for k, v in given[0].items() if k != "labels"}).logits, logits)


def expected_of(
    model: PreTrainedModel, fitness: CandidateDivergence, levels: Levels, given: list[dict[str, Tensor]]
) -> float:
    fitness.set((0,) * len(levels))
    return expected(model, levels, given)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_borders_change_no_bit(name: str) -> None:
    model, given = made(name), batches()
    n = len(parts(model))
    parents = [drawn(n, 100 + seed) for seed in range(4)]
    with fitness_on(model, given) as cached:
        assert cached.borders == tuple(range(1, n // 2))
        found: list[float] = []
        for seed, parent in enumerate(parents):
            cached.adopt(parent)
            children = [(*parent[:place], 1 - parent[place], *parent[place + 1 :]) for place in range(n)]
            found += [cached(levels, seed % 2) for levels in (parent, *children, drawn(n, seed))]
    with fitness_on(model, given) as plain:
        plain.borders = ()
        again: list[float] = []
        for seed, parent in enumerate(parents):
            children = [(*parent[:place], 1 - parent[place], *parent[place + 1 :]) for place in range(n)]
            again += [plain(levels, seed % 2) for levels in (parent, *children, drawn(n, seed))]
    assert found == again and len(set(found)) > n


def test_blocks_before_the_first_change_are_not_run() -> None:
    model, given = made("llama_mha"), batches()
    blocks = arch_for(model.config).blocks(model)
    n, runs = 2 * len(blocks), [0] * len(blocks)
    for layer, block in enumerate(blocks):
        norm = block.get_submodule("input_layernorm")
        norm.register_forward_hook(lambda *_, layer=layer: runs.__setitem__(layer, runs[layer] + 1))
    with fitness_on(model, given) as fitness:
        runs[:] = [0] * len(blocks)
        fitness((*(0,) * (n - 1), 1), 1)
        assert runs == [0] * (len(blocks) - 1) + [3]
        fitness((0, 1, *(0,) * (n - 2)), 0)
        assert runs == [1] * (len(blocks) - 1) + [4]


def test_padding_changes_nothing() -> None:
    """What stands at padded places is neither looked at nor compared."""
    model, given = made("llama_mha"), batches()
    other = [{**batch, "input_ids": batch["input_ids"].where(batch["attention_mask"] == 1, 7)} for batch in given]
    assert any(not torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(given, other, strict=True))
    levels = drawn(len(parts(model)), 1)
    with fitness_on(model, given) as one:
        first = one(levels, 1)
        assert one.facts["tokens"] == one.facts["compared"] == sum(int(b["attention_mask"].sum()) for b in given)
    with fitness_on(model, other) as two:
        assert two(levels, 1) == pytest.approx(first, rel=1e-5)


@pytest.mark.parametrize("max_bytes", [6_000, 20_000, 60_000, MAX_BYTES])
def test_memory_is_bounded_and_what_is_left_out_is_said(max_bytes: int) -> None:
    model, given = made("llama_mha"), batches()
    n = len(parts(model))
    with fitness_on(model, given, max_bytes) as fitness:
        fitness.adopt(drawn(n, 3))
        value = fitness(drawn(n, 4), 1)
        assert fitness.facts["bytes"] <= max_bytes and fitness.facts["borders"] == len(fitness.borders)
        assert value > 0 and (fitness.facts["compared"] < fitness.facts["tokens"]) == (max_bytes < MAX_BYTES)
    with fitness_on(model, given, MAX_BYTES) as roomy, pytest.raises(DataError, match="max_bytes=64 holds no token"):
        assert value == pytest.approx(roomy(drawn(n, 4), 1), rel=0.9)
        fitness_on(made("llama_mha"), given, 64).__enter__()


def test_bad_input_is_named() -> None:
    model = made("llama_mha")
    with pytest.raises(DataError, match=r"stages of \[1, 4\] batches, and there are 3"):
        fitness_on(model, batches(), stages=(1, 4)).__enter__()
    with torch.no_grad():
        model.get_parameter("model.norm.weight")[0] = float("nan")
    with pytest.raises(NumericError, match="predictions are NaN on the calibration data"):
        fitness_on(model, batches()).__enter__()


def test_a_candidate_without_numbers_is_nan_and_harms_no_other() -> None:
    model, given = made("llama_mha"), batches()
    n = len(parts(model))
    blocks = arch_for(model.config).blocks(model)
    own = EmptiedSubLayers(arch_for(model.config), blocks, [(block, (kind,)) for block, kind in parts(model)])
    kept = model.get_parameter("model.layers.0.mlp.down_proj.weight")
    saved = kept.detach().clone()

    def install(block: int, levels: Levels) -> None:
        own(block, levels)
        if block == 0:
            with torch.no_grad():
                kept.copy_(torch.full_like(saved, float("inf")) if levels[0] else saved)

    at = [block for block, _ in parts(model)]
    with candidate_divergence(model, blocks, at, install, (0,) * n, given, (1, 3)) as fitness:
        assert str(fitness((1, *(0,) * (n - 1)), 1)) == "nan"
        assert fitness((0,) * n, 1) == pytest.approx(0, abs=1e-9)
