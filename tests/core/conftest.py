"""Llama-like models as descriptions only: axes and weights written out by hand, without a framework, at any size in no
memory.
"""

from collections.abc import Callable

import pytest

from compresso.core.axis import Axis, Kind, Slice
from compresso.core.cost import CostModel, Group, Weight

Describe = Callable[..., CostModel]


def llama(
    hidden: int,
    layers: int,
    heads: int,
    ffn: int,
    vocab: int,
    *,
    kv_heads: int | None = None,
    head_dim: int | None = None,
    depth: bool = False,
) -> CostModel:
    """Head, channel and hidden axes of an untied Llama, and with `depth` also its layer, attention and mlp axes."""
    kv_heads = kv_heads or heads
    head_dim = head_dim or hidden // heads
    group = heads // kv_heads
    weights = [
        Weight("model.embed_tokens.weight", (vocab, hidden), Group.EMBEDDINGS),
        Weight("lm_head.weight", (vocab, hidden), Group.EMBEDDINGS, macs=1),
        Weight("model.norm.weight", (hidden,), Group.NORMS),
    ]
    stream = [Slice("model.embed_tokens.weight", 1), Slice("lm_head.weight", 1), Slice("model.norm.weight", 0)]
    axes: list[Axis] = []
    whole: dict[str, list[Slice]] = {"layers": [], "attention": [], "mlp": []}
    for i in range(layers):
        at = f"model.layers.{i}."
        q, k, v, o = (f"{at}self_attn.{name}_proj.weight" for name in "qkvo")
        gate, up, down = (f"{at}mlp.{name}_proj.weight" for name in ("gate", "up", "down"))
        before, after = f"{at}input_layernorm.weight", f"{at}post_attention_layernorm.weight"
        weights += [
            Weight(q, (heads * head_dim, hidden), Group.BLOCKS, macs=1),
            Weight(k, (kv_heads * head_dim, hidden), Group.BLOCKS, macs=1, cached=kv_heads * head_dim),
            Weight(v, (kv_heads * head_dim, hidden), Group.BLOCKS, macs=1, cached=kv_heads * head_dim),
            Weight(o, (hidden, heads * head_dim), Group.BLOCKS, macs=1),
            Weight(gate, (ffn, hidden), Group.BLOCKS, macs=1),
            Weight(up, (ffn, hidden), Group.BLOCKS, macs=1),
            Weight(down, (hidden, ffn), Group.BLOCKS, macs=1),
            Weight(before, (hidden,), Group.NORMS),
            Weight(after, (hidden,), Group.NORMS),
        ]
        wide, narrow = group * head_dim, head_dim
        head_slices = (Slice(q, 0, wide), Slice(k, 0, narrow), Slice(v, 0, narrow), Slice(o, 1, wide))
        channel_slices = (Slice(gate, 0), Slice(up, 0), Slice(down, 1))
        axes.append(Axis(f"layers.{i}.heads", Kind.HEAD, kv_heads, head_slices, (), f"{at}self_attn", i, (before,)))
        axes.append(Axis(f"layers.{i}.channels", Kind.CHANNEL, ffn, channel_slices, (), f"{at}mlp", i, (after,)))
        stream += [Slice(name, 1) for name in (q, k, v, gate, up)] + [
            Slice(name, 0) for name in (o, down, before, after)
        ]
        attention = [Slice(name, 0, unit=i) for name in (q, k, v, o, before)]
        mlp = [Slice(name, 0, unit=i) for name in (gate, up, down, after)]
        whole["attention"] += attention
        whole["mlp"] += mlp
        whole["layers"] += attention + mlp
    axes.append(Axis("hidden", Kind.HIDDEN, hidden, tuple(stream), (), "model"))
    if depth:
        for kind, slices in zip((Kind.LAYER, Kind.ATTENTION, Kind.MLP), whole.items(), strict=True):
            axes.append(Axis(slices[0], kind, layers, tuple(slices[1]), (), "model.layers"))
    return CostModel(axes, weights)


@pytest.fixture(scope="session")
def describe() -> Describe:
    """Builds a CostModel; its axes are `.axes`."""
    return llama


@pytest.fixture(scope="session")
def llama_7b() -> CostModel:
    return llama(4096, 32, 32, 11008, 32000)


@pytest.fixture(scope="session")
def tiny() -> CostModel:
    """Two layers, 4 heads on 2 key/value heads, hidden 16, FFN 24."""
    return llama(16, 2, 4, 24, 10, kv_heads=2)
