"""The laws every architecture obeys: gated == shrunk, cost == counted, keep everything == no-op, cache == no cache.

They compare the masked model (hooks on the stock forward) with the physically smaller one (stock forward on sliced
weights); neither shares code with the other beyond the axes. `test_each_correction_matters` shows that the comparison
notices what is easily forgotten.
"""

import re
from collections.abc import Callable

import pytest
import torch
from tests.arch.conftest import (
    ALL_HEADS,
    CLASSES,
    CONFIGS,
    ENCODERS_WITH_HIDDEN,
    GROUPED,
    MIXTURES,
    POST_NORM,
    WITH_HIDDEN,
)
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from compresso.arch.base import Arch, LayerShape, arch_for
from compresso.arch.queries import axes_of
from compresso.core.axis import Axis, Kind
from compresso.core.cost import CostModel
from compresso.core.plan import Plan
from compresso.edit.gate import gated
from compresso.edit.recompute import recompute_
from compresso.edit.shrink import shrink_

NAMES = list(CONFIGS)
GENERATING = [name for name in NAMES if name not in CLASSES]
TOGETHER = "together"
DENSE_TOO = (
    "moe_qwen3_tied",
    "moe_qwen2",
    "moe_deepseek",
    "moe_deepseek_v2",
    "moe_deepseek_v2_greedy",
    "moe_glm4",
)
"""Models of experts some of whose layers have one FFN."""
WITHOUT: dict[str, set[Kind]] = {
    name: ({Kind.HIDDEN} if name not in (*WITH_HIDDEN, *ENCODERS_WITH_HIDDEN, *MIXTURES) else set())
    | ({Kind.VOCAB} if name in CLASSES else set())
    | (set() if name in MIXTURES else {Kind.EXPERT, Kind.EXPERT_CHANNEL})
    | ({Kind.CHANNEL} if name in MIXTURES and name not in DENSE_TOO else set())
    for name in NAMES
}
for name in POST_NORM:
    WITHOUT[name] |= {Kind.LAYER}
for name in ALL_HEADS:
    WITHOUT[name] |= {Kind.HEAD}
for name in NAMES:
    if name not in GROUPED:
        WITHOUT.setdefault(name, set()).add(Kind.QUERY)
    if name not in ENCODERS_WITH_HIDDEN:
        WITHOUT.setdefault(name, set()).add(Kind.HEAD_CHANNEL)
CASES = [
    (name, kind) for name in NAMES for kind in (*(str(k) for k in Kind if k not in WITHOUT.get(name, ())), TOGETHER)
]
Tiny = Callable[[str], PreTrainedModel]

IDS = torch.randint(2, 128, (2, 12), generator=torch.Generator().manual_seed(5))


def described(model: PreTrainedModel) -> tuple[Arch, tuple[Axis, ...]]:
    arch = arch_for(model.config)
    return arch, axes_of(arch, model, tuple(Kind))


def random_masks(axes: tuple[Axis, ...], kind: str, seed: int = 0, soft: bool = True) -> dict[str, Tensor]:
    """Masks with zeros for the axes of one kind, or of all that have gates; the tokens of IDS stay. Among them, where
    no bias forbids it: layer 0 without heads, another layer without heads or channels, one with a single channel. Key/
    value heads of a layer keep as many query heads, fewer than there are.
    """
    generator, of_queries = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed)
    masks: dict[str, Tensor] = {}
    stay: dict[str, int] = {}
    for axis in axes:
        if kind != axis.kind and (kind != TOGETHER or axis.kind == Kind.VOCAB):
            continue
        if axis.within is not None:
            drawn = 1 + int(torch.randint(axis.size - 1, (), generator=of_queries))
            best = torch.randperm(axis.size, generator=of_queries)[: stay.setdefault(axis.within[0], drawn)]
            values = torch.empty(axis.size).uniform_(0.2 if soft else 1.0, 1.0, generator=of_queries)
            masks[axis.name] = torch.zeros(axis.size).scatter(0, best, values)
            continue
        stays = torch.rand(axis.size, generator=generator) < 0.7
        stays[torch.randint(axis.size, (), generator=generator)] = True
        if axis.kind == Kind.EXPERT:  # as many in each group, and no fewer than the router wants
            scores = torch.rand(axis.groups, axis.size // axis.groups, generator=generator)
            most = -(-axis.min_units // axis.groups)
            best = scores.topk(most + int(most + 1 < scores.shape[1]), dim=1)[1]
            stays = torch.zeros_like(scores, dtype=torch.bool).scatter(1, best, True).flatten()
        elif axis.name == "layers.2.channels":
            stays[:] = False
            stays[min(7, axis.size - 1)] = True
        elif axis.name in ("layers.0.heads", "layers.1.channels") and axis.min_units == 0:
            stays[:] = False
        elif axis.kind in (Kind.LAYER, Kind.ATTENTION, Kind.MLP):
            stays[:] = True
            stays[{Kind.LAYER: 1, Kind.ATTENTION: 2, Kind.MLP: axis.size - 1}[axis.kind]] = False
        elif axis.kind == Kind.VOCAB:
            stays[IDS.flatten()] = True
        halves = soft and axis.kind != Kind.VOCAB
        values = torch.empty(axis.size).uniform_(0.2, 1.0, generator=generator) if halves else torch.ones(axis.size)
        masks[axis.name] = values * stays
    return masks


def shrunk(model: PreTrainedModel, axes: tuple[Axis, ...], masks: dict[str, Tensor]) -> Plan:
    plan = Plan.from_masks(axes, masks)
    shrink_(model, axes, plan, masks)
    return plan


def output(model: PreTrainedModel, ids: Tensor = IDS) -> Tensor:
    """What the model computes from tokens, or from one image a row of tokens; encoders see padding in the middle."""
    if model.main_input_name == "pixel_values":
        seeds = [torch.Generator().manual_seed(int(row.sum())) for row in ids]
        result = model(
            pixel_values=torch.stack([torch.randn(3, 16, 16, generator=seed) for seed in seeds]).to(model.dtype)
        )
    elif model.config.model_type in ("bert", "roberta", "distilbert"):
        result = model(input_ids=ids, attention_mask=(ids % 5 != 0).long())
    else:
        result = model(input_ids=ids)
    if hasattr(result, "start_logits"):
        return torch.stack([result.start_logits, result.end_logits], -1)
    return result.logits if hasattr(result, "logits") else result.last_hidden_state


@torch.no_grad()
def logits(model: PreTrainedModel, ids: Tensor = IDS) -> Tensor:
    return output(model, ids)


def tokens_left(masks: dict[str, Tensor]) -> tuple[Tensor | slice, Tensor]:
    """Where the logits of tokens that stay lie, and IDS in their new numbers."""
    if "vocab" not in masks:
        return slice(None), IDS
    kept = masks["vocab"].nonzero().flatten()
    return kept, torch.searchsorted(kept, IDS)


def states_left(expected: Tensor, smaller: Tensor, masks: dict[str, Tensor]) -> Tensor:
    """Of a model without a head, which shows its hidden states, those that stay."""
    return expected if expected.shape == smaller.shape else expected[..., masks["hidden"] > 0]


@torch.no_grad()
def greedy(
    model: PreTrainedModel, ids: Tensor, *, use_cache: bool = True, attention_mask: Tensor | None = None
) -> list[list[int]]:
    attention_mask = torch.ones_like(ids) if attention_mask is None else attention_mask
    generated = model.generate(
        ids, attention_mask=attention_mask, max_new_tokens=12, do_sample=False, use_cache=use_cache
    )
    return generated[:, ids.shape[1] :].tolist()


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_gated_equals_shrunk(tiny: Tiny, name: str, kind: str) -> None:
    model = tiny(name)
    _, axes = described(model)
    masks = random_masks(axes, kind)
    dense = logits(model)
    with gated(model, axes, masks):
        expected = logits(model)
    kept, ids = tokens_left(masks)
    shrunk(model, axes, masks)
    assert 0.3 < dense.std() < 5, "the model is too small in scale for this test to say anything"
    assert (expected - dense).abs().max() > 0.1 or kind == Kind.VOCAB, (
        "the masks are too close to 1 for this test to say anything"
    )
    smaller = logits(model, ids)
    assert (smaller - states_left(expected[..., kept], smaller, masks)).abs().max() < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("soft", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_gated_equals_shrunk_in_double_precision(tiny: Tiny, double_norms: None, name: str, soft: bool) -> None:
    model = tiny(name).double()
    _, axes = described(model)
    for kind in (TOGETHER, Kind.HIDDEN if name in (*WITH_HIDDEN, *ENCODERS_WITH_HIDDEN) else Kind.HEAD):
        masks = {axis: mask.double() for axis, mask in random_masks(axes, kind, seed=1, soft=soft).items()}
        with gated(model, axes, masks):
            expected = logits(model)
        smaller = tiny(name).double()
        shrunk(smaller, axes, masks)
        found = logits(smaller)
        assert (found - states_left(expected, found, masks)).abs().max() < 1e-10


@pytest.mark.parametrize("name", WITH_HIDDEN)
def test_each_correction_matters(tiny: Tiny, name: str) -> None:
    """Undo one correction at a time: the difference is far above the laws' tolerance."""
    model = tiny(name)
    original = {key: value.clone() for key, value in model.state_dict().items()}
    _, axes = described(model)
    masks = random_masks(axes, TOGETHER)
    shrunk(model, axes, masks)
    right = logits(model)
    norms = [
        module
        for key, module in model.named_modules()
        if key.endswith(("layernorm", "model.norm")) and hasattr(module, "weight")
    ]
    kept = masks["hidden"].nonzero().flatten()
    ratio = 64 / len(kept)
    assert ratio > 1.1

    def difference() -> float:
        return float((logits(model) - right).abs().max())

    with torch.no_grad():
        for norm in norms:
            norm.weight /= ratio**0.5
        assert difference() > 1e-3, "norm weights are not rescaled"
        for norm in norms:
            norm.weight *= ratio**0.5
            norm.variance_epsilon /= ratio
        assert difference() > 1e-3, "eps is not rescaled"
        for norm in norms:
            norm.variance_epsilon *= ratio
        embedding = model.get_input_embeddings().weight
        folded = embedding.clone()
        embedding.copy_(original["model.embed_tokens.weight"][:, kept])
        assert difference() > 1e-3, "the embedding is not masked"
        embedding.copy_(folded)
        if model.config.tie_word_embeddings:
            model.get_submodule("model.norm").weight *= masks["hidden"][kept]
            assert difference() > 1e-3, "the tied head sees the mask twice"
            model.get_submodule("model.norm").weight /= masks["hidden"][kept]
        assert difference() < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_all_ones_equal_the_stock_model(tiny: Tiny, name: str) -> None:
    model = tiny(name)
    _, axes = described(model)
    dense = logits(model)
    with gated(model, axes, {axis.name: torch.ones(axis.size) for axis in axes}):
        assert (logits(model) - dense).abs().max() < 1e-6
    assert torch.equal(logits(model), dense)


@pytest.mark.parametrize("name", NAMES)
def test_keeping_everything_changes_no_bit(tiny: Tiny, name: str) -> None:
    model = tiny(name)
    _, axes = described(model)
    before = {key: (id(p), p.clone()) for key, p in model.named_parameters()}
    config = model.config.to_dict()
    dense = logits(model)
    for plan in (Plan(), Plan({axis.name: tuple(range(axis.size)) for axis in axes})):
        shrink_(model, axes, plan)
    assert all(id(p) == before[key][0] and torch.equal(p, before[key][1]) for key, p in model.named_parameters())
    assert model.config.to_dict() == config
    shrink_(model, axes, Plan(), {axis.name: torch.ones(axis.size) for axis in axes})
    assert torch.equal(logits(model), dense)


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_cost_equals_counted(tiny: Tiny, name: str, kind: str) -> None:
    model = tiny(name)
    arch, axes = described(model)
    weights = arch.weights(model)
    masks = random_masks(axes, kind, soft=False)
    cost = CostModel(axes, weights)
    predicted = cost(masks)
    plan = shrunk(model, axes, masks)
    counted = {"total": 0, "blocks": 0, "embeddings": 0, "norms": 0}
    for key, parameter in model.named_parameters():
        group = (
            "norms"
            if "norm" in key.lower() or ".ln_" in key
            else "blocks"
            if re.search(r"\b(layers?|h)\.\d", key)
            else "embeddings"
        )
        counted[group] += parameter.numel()
        counted["total"] += parameter.numel()
    assert predicted.parameters() == counted == cost.of(plan).parameters()
    assert CostModel(arch.axes(model), arch.weights(model))().parameters() == counted

    if name not in GENERATING:
        assert predicted.cached == 0
        return
    with torch.no_grad():
        cache = model(input_ids=tokens_left(masks)[1][:1], use_cache=True).past_key_values
    entries = sum(
        t.shape[1] * t.shape[3] for layer in cache.layers if layer.is_initialized for t in (layer.keys, layer.values)
    )
    assert predicted.cached == entries


@pytest.mark.parametrize("name", NAMES)
def test_macs_equal_what_torch_counts(tiny: Tiny, name: str) -> None:
    model = tiny(name)
    arch, axes = described(model)
    cost = CostModel(axes, arch.weights(model))
    masks = random_masks(axes, TOGETHER, soft=False)
    smaller = tiny(name)
    shrunk(smaller, axes, masks)
    for counted, predicted in ((model, cost()), (smaller, cost(masks))):
        with FlopCounterMode(display=False) as counter:
            logits(counted, IDS[:1])
        of_module = {
            module: sum(n for op, n in ops.items() if str(op) in ("aten.mm", "aten.addmm"))
            for module, ops in counter.get_flop_counts().items()
        }
        once = sum(n for module, n in of_module.items() if module.endswith((".classifier", ".pooler.dense")))
        tokens = 17 if name.startswith("vit") else IDS.shape[1]
        assert of_module["Global"] - once == 2 * tokens * float(predicted.macs)


@pytest.mark.parametrize("name", NAMES)
def test_shrinking_twice_equals_shrinking_once(tiny: Tiny, name: str) -> None:
    twice, once = tiny(name), tiny(name)
    arch, axes = described(twice)
    first = shrunk_plan(axes, seed=2)
    shrink_(twice, axes, first)
    later_axes = axes_of(arch, twice, tuple(Kind))
    second = shrunk_plan(later_axes, seed=3)
    shrink_(twice, later_axes, second)
    shrink_(once, axes, first.then(second))
    assert arch.shapes(twice) == arch.shapes(once)
    assert (logits(twice) - logits(once)).abs().max() < 1e-5


def shrunk_plan(axes: tuple[Axis, ...], seed: int) -> Plan:
    return Plan.from_masks(axes, random_masks(axes, TOGETHER, seed, soft=False))


@pytest.mark.parametrize("name", GENERATING)
def test_generation(tiny: Tiny, name: str) -> None:
    """Greedy tokens, past the sliding windows and with cache holes: masked == shrunk, cached == not cached, left-padded
    batch == alone.
    """
    model = tiny(name)
    _, axes = described(model)
    masks = random_masks(axes, TOGETHER)
    dense = greedy(model, IDS)
    with gated(model, axes, masks):
        expected = greedy(model, IDS)
        assert greedy(model, IDS, use_cache=False) == expected
    shrunk(model, axes, masks)
    assert greedy(model, IDS) == greedy(model, IDS, use_cache=False) == expected != dense
    short = IDS[:1, 4:]
    padded = torch.cat([IDS[1:], torch.cat([torch.zeros(1, 4, dtype=torch.long), short], dim=1)])
    attention_mask = torch.ones_like(padded)
    attention_mask[1, :4] = 0
    assert greedy(model, padded, attention_mask=attention_mask) == [greedy(model, IDS[1:])[0], greedy(model, short)[0]]


@pytest.mark.parametrize("without", [(0,), (1,), (2,), (0, 1), (0, 2), (2, 3), (0, 1, 3), (0, 2, 3)])
def test_cache_with_mixed_layer_types(tiny: Tiny, without: tuple[int, ...]) -> None:
    """qwen2: layers 0 and 1 see everything, 2 and 3 a window; whatever attentions leave, cached == not cached ==
    masked.
    """
    model = tiny("qwen2")
    _, axes = described(model)
    mask = torch.ones(4)
    mask[list(without)] = 0
    with gated(model, axes, {"attention": mask}):
        expected = logits(model)
    shrunk(model, axes, {"attention": mask})
    with torch.no_grad():
        step = model(input_ids=IDS[:, :7], use_cache=True)
        rows = [step.logits]
        for position in range(7, IDS.shape[1]):
            step = model(
                input_ids=IDS[:, position : position + 1], past_key_values=step.past_key_values, use_cache=True
            )
            rows.append(step.logits)
    assert (logits(model) - expected).abs().max() < 1e-5
    assert (torch.cat(rows, dim=1) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_masks_a_row_an_example(tiny: Tiny, name: str) -> None:
    model = tiny(name)
    _, axes = described(model)
    one, two = random_masks(axes, TOGETHER, seed=4), random_masks(axes, TOGETHER, seed=5)
    with gated(model, axes, {axis: torch.stack([one[axis], two[axis]]) for axis in one}):
        both = logits(model)
    for row, masks in enumerate((one, two)):
        with gated(model, axes, masks):
            assert (logits(model, IDS[row : row + 1]) - both[row]).abs().max() < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_mask_gets_the_same_gradient_with_checkpointing(tiny: Tiny, name: str) -> None:
    model = tiny(name).train()
    _, axes = described(model)
    gradients: list[list[Tensor]] = []
    for checkpointing in (False, True):
        if checkpointing:
            model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        generator = torch.Generator().manual_seed(6)
        masks = {
            axis.name: torch.empty(axis.size).uniform_(0.2, 1, generator=generator).requires_grad_()
            for axis in axes
            if axis.gates
        }
        with gated(model, axes, masks):
            loss = (
                model(input_ids=IDS, labels=IDS, use_cache=False).loss
                if name in GENERATING
                else (output(model) - output(model).mean()).pow(3).sum()
            )
            gradients.append(list(torch.autograd.grad(loss, list(masks.values()))))
    assert all(torch.equal(plain, again) for plain, again in zip(*gradients, strict=True))
    assert all(gradient.abs().sum() > 0 for gradient in gradients[0])


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_mask_gets_the_same_gradient_where_blocks_are_replayed(tiny: Tiny, name: str) -> None:
    """The first pass proves what a block depends on; the second is replayed, where that is known."""
    model = tiny(name).train()
    _, axes = described(model)
    generator = torch.Generator().manual_seed(6)
    masks = {
        axis.name: torch.empty(axis.size).uniform_(0.2, 1, generator=generator).requires_grad_()
        for axis in axes
        if axis.gates
    }
    gradients: list[tuple[Tensor, ...]] = []
    with gated(model, axes, {}) as sites:
        for number in range(3):
            if number == 1:
                recompute_(model, on=True)
            sites.set(masks)
            loss = (
                model(input_ids=IDS, labels=IDS, use_cache=False).loss
                if name in GENERATING
                else (output(model) - 1).pow(3).sum()
            )
            gradients.append(torch.autograd.grad(loss, list(masks.values())))
    for plain, proof, replayed in zip(*gradients, strict=True):
        torch.testing.assert_close(proof, plain, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(replayed, plain, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", WITH_HIDDEN)
def test_config_and_fields_are_true_after_shrinking(tiny: Tiny, name: str) -> None:
    model = tiny(name)
    arch, axes = described(model)
    head_dim = model.model.layers[0].self_attn.head_dim
    group = model.config.num_attention_heads // model.config.num_key_value_heads
    plan = Plan(
        {
            "layers.0.heads": (1,),
            "layers.1.channels": tuple(range(9)),
            "layers.3.channels": (5,),
            "hidden": tuple(range(7, 60)),
            "layers": (0, 1, 3),
        }
    )
    shrink_(model, axes, plan)
    kv = model.config.num_key_value_heads
    assert arch.shapes(model) == [
        LayerShape(group, 1, 176),
        LayerShape(kv * group, kv, 9),
        LayerShape(kv * group, kv, 1),
    ]
    assert (model.config.hidden_size, model.config.num_hidden_layers, model.config.intermediate_size) == (53, 3, 176)
    assert (model.config.num_attention_heads, model.config.head_dim) == (kv * group, head_dim)
    assert model.config.rms_norm_eps == pytest.approx(1e-2 * 64 / 53)
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == [0, 1, 2]
    down = model.model.layers[1].mlp.down_proj
    assert (down.in_features, down.out_features) == (9, 53)
    if not name.startswith(("phi3", "glm")):  # whose FFN has no such fields
        assert (model.model.layers[1].mlp.intermediate_size, model.model.layers[1].mlp.hidden_size) == (9, 53)
    if name == "qwen2":
        assert model.config.layer_types == ["full_attention", "full_attention", "sliding_attention"]
    assert len(arch.blocks(model)) == 3 and arch.linear_groups(arch.blocks(model)[0])[0][-1].endswith("v_proj")
