"""Gates on a context. The law: the masked forward is token-by-token decoding through a cache that really frees, also in
a batch with padding on either side, in every family. Oracles: the dense model where nothing is dropped, and each sample
alone.
"""

import copy
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    StaticCache,
)

from compresso.edit.context_attention import NAME, keepers_of
from compresso.edit.context_cache import BLOCK, LIVE, ContextCache
from compresso.edit.context_gates import ContextGates, live_fraction, rank_for
from compresso.edit.context_layer_gates import LayerGates
from compresso.edit.patches import patch_, read_patches, save_tensors, unpatch_, written
from compresso.edit.recompute import recompute_
from compresso.errors import ArchError

TOKENS = {"vocab_size": 64, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
SIZES = {**TOKENS, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 256}
ROTARY = {**SIZES, "num_key_value_heads": 2, "intermediate_size": 48}
FAMILIES: dict[str, Callable[[], object]] = {
    "llama": lambda: LlamaConfig(**ROTARY, head_dim=8),
    "mistral": lambda: MistralConfig(**ROTARY, head_dim=8),
    "qwen2": lambda: Qwen2Config(**ROTARY),
    "qwen3": lambda: Qwen3Config(**ROTARY, head_dim=8),
    "gpt2": lambda: GPT2Config(**TOKENS, n_embd=32, n_layer=3, n_head=4, n_positions=256, n_inner=48),
    "gpt_neox": lambda: GPTNeoXConfig(**SIZES, intermediate_size=48),
}
N = 24
LENGTHS = (24, 17, 9)


@cache
def dense(name: str) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_config(FAMILIES[name]()).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, 0.2, generator=generator)
    return model


def gated(name: str = "llama", offset: float = 0.9, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A model with random gates, that drop some of the tokens a query sees."""
    model = AutoModelForCausalLM.from_config(copy.deepcopy(dense(name).config)).eval()
    model.load_state_dict(dense(name).state_dict())
    patch_(model.to(dtype), [ContextGates(model, 8, offset, seed=1).patch()])
    return model


def ids(batch: int = 3, n: int = N) -> Tensor:
    return torch.randint(3, 64, (batch, n), generator=torch.Generator().manual_seed(5))


def padding(side: str) -> Tensor:
    mask = torch.ones(3, N, dtype=torch.int64)
    for row, length in enumerate(LENGTHS):
        if side == "left":
            mask[row, : N - length] = 0
        else:
            mask[row, length:] = 0
    return mask


def places(mask: Tensor) -> Tensor:
    return (mask.cumsum(-1) - 1).clamp(min=0)


@torch.no_grad()
def masked(model: PreTrainedModel, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
    mask = torch.ones_like(tokens) if mask is None else mask
    return model(tokens, attention_mask=mask, position_ids=places(mask), use_cache=False).logits


@torch.no_grad()
def decoded(
    model: PreTrainedModel, tokens: Tensor, mask: Tensor | None = None, chunks: tuple[int, ...] = ()
) -> tuple[Tensor, ContextCache]:
    """Logits through the cache, in chunks and then token by token."""
    mask = torch.ones_like(tokens) if mask is None else mask
    held, logits, start = ContextCache(len(keepers_of(model))), [], 0
    n = tokens.shape[1]
    for size in (*chunks, *[1] * (n - sum(chunks))):
        end = start + size
        out = model(
            tokens[:, start:end],
            attention_mask=mask[:, :end],
            position_ids=places(mask)[:, start:end],
            past_key_values=held,
        )
        assert out.past_key_values is held
        logits.append(out.logits)
        start = end
    return torch.cat(logits, dim=1), held


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_masked_is_decoded_token_by_token(name: str, side: str) -> None:
    model, mask = gated(name), padding(side)
    table = masked(model, ids(), mask)
    logits, held = decoded(model, ids(), mask)
    real = mask.bool()
    torch.testing.assert_close(logits[real], table[real], rtol=0, atol=1e-5)
    assert 0.1 < held.live_fraction() < 0.9
    plain = dense(name)(ids(), attention_mask=mask, position_ids=places(mask)).logits
    assert not torch.allclose(plain[real], table[real], atol=1e-2)


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_dropped_and_padding_leave_no_trace(name: str) -> None:
    model = gated(name)
    for side in ("left", "right"):
        mask = padding(side)
        table = masked(model, ids(), mask)
        for row in range(3):
            alone = masked(model, ids()[row : row + 1][:, mask[row].bool()])
            torch.testing.assert_close(table[row, mask[row].bool()], alone[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("chunks", [(24,), (5, 7), (1, 9), (3, 1, 20)])
def test_chunked_prefill_and_padding_in_the_middle(chunks: tuple[int, ...]) -> None:
    model, mask = gated(), padding("left")
    mask[0, 10:13] = 0  # as a shorter prompt of a batch has it, once decoding goes on
    table = masked(model, ids(), mask)
    alone = masked(model, ids()[:1][:, mask[0].bool()])
    torch.testing.assert_close(table[0, mask[0].bool()], alone[0], rtol=0, atol=1e-5)
    logits, held = decoded(model, ids(), mask, chunks)
    torch.testing.assert_close(logits[mask.bool()], table[mask.bool()], rtol=0, atol=1e-5)
    _, single = decoded(model, ids(), mask)
    for one, other in zip(held.layers, single.layers, strict=True):
        assert torch.equal(one.live_tokens(), other.live_tokens())


def test_an_offset_that_keeps_all_is_the_dense_model() -> None:
    model = gated(offset=20)
    torch.testing.assert_close(masked(model, ids()), dense("llama")(ids()).logits, rtol=0, atol=1e-5)
    logits, held = decoded(model, ids())
    torch.testing.assert_close(logits, dense("llama")(ids()).logits, rtol=0, atol=1e-5)
    assert held.live_fraction() == 1 and live_fraction(model) == 1


def test_an_offset_that_keeps_nothing_attends_to_itself_alone() -> None:
    model = gated(offset=-20)
    _, held = decoded(model, ids())
    assert all((layer.live_tokens() == 1).all() for layer in held.layers)
    first = masked(model, ids()[:, :1])
    torch.testing.assert_close(masked(model, ids())[:, :1], first, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_slots_are_used_again_and_memory_is_given_back() -> None:
    model = gated(offset=-20)
    _, held = decoded(model, ids(n=200))
    assert all(layer.capacity == BLOCK for layer in held.layers)
    full = gated(offset=20)
    with torch.no_grad():
        full(ids(n=200), past_key_values=(held := ContextCache(3)))
        assert all(layer.capacity == 256 for layer in held.layers)
        for gates in keepers_of(full):
            assert isinstance(gates, LayerGates)
            gates.offset.fill_(-20)
        full(ids(n=1), past_key_values=held)
    assert all(layer.capacity == BLOCK for layer in held.layers)
    for layer in held.layers:
        assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in layer.slots.values())


def test_reported_bytes_are_the_live_entries_and_what_is_allocated() -> None:
    model = gated()
    _, held = decoded(model, ids(), chunks=(12,))
    entries = sum(int(layer.slots[LIVE].sum()) for layer in held.layers)
    assert held.live_bytes() == entries * (2 * 2 * 8 + 8) * 4
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for s in held.layers for t in s.slots.values()
    }
    assert held.allocated_bytes() == sum(storages.values()) > held.live_bytes()


def test_generate_goes_on_as_the_masked_forward_says() -> None:
    model = gated()
    prompt, mask = ids(n=10), padding("left")[:, -10:]
    out = model.generate(
        prompt, attention_mask=mask, max_new_tokens=12, do_sample=False, eos_token_id=None, return_dict_in_generate=True
    )
    assert isinstance(out.past_key_values, ContextCache) and out.past_key_values.live_fraction() < 0.9
    whole = torch.cat([mask, torch.ones(3, 12, dtype=torch.int64)], dim=1)
    said = masked(model, out.sequences, whole)[:, 9:-1].argmax(-1)
    assert torch.equal(said, out.sequences[:, 10:])


@pytest.mark.parametrize("how", [{"num_beams": 3}, {"do_sample": True}, {"prefill_chunk_size": 4}])
def test_every_way_of_generating_gives_tokens_of_the_masked_forward(how: dict[str, object]) -> None:
    model = gated()
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, **how}
    torch.manual_seed(4)
    with_cache = model.generate(ids(n=10), attention_mask=torch.ones(3, 10, dtype=torch.int64), **options)
    torch.manual_seed(4)
    options = {name: value for name, value in options.items() if name != "prefill_chunk_size"}
    without = model.generate(ids(n=10), attention_mask=torch.ones(3, 10, dtype=torch.int64), use_cache=False, **options)
    assert torch.equal(with_cache, without)


@pytest.mark.slow
def test_a_chat_of_twenty_turns_keeps_its_cache_small_and_its_answers() -> None:
    model, held = gated(), ContextCache(3)
    said = ids(batch=1, n=6)
    for turn in range(20):
        out = model.generate(
            said,
            attention_mask=torch.ones_like(said),
            past_key_values=held,
            max_new_tokens=4,
            do_sample=False,
            eos_token_id=None,
        )
        start = said.shape[1]
        assert torch.equal(masked(model, out)[:, start - 1 : -1].argmax(-1), out[:, start:])
        for layer in held.layers:
            assert layer.capacity - int(layer.live_tokens().max()) < 2 * BLOCK
        said = torch.cat([out, ids(batch=1, n=20 + turn)[:, -5:]], dim=1)
    assert held.get_seq_length() == said.shape[1] - 6 == 180
    assert all(layer.capacity < 180 for layer in held.layers)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_finite_and_drops_the_same(dtype: torch.dtype) -> None:
    model = gated(dtype=dtype)
    table = masked(model, ids(), padding("left"))
    logits, held = decoded(model, ids(), padding("left"), chunks=(6,))
    real = padding("left").bool()
    assert table.isfinite().all() and held.layers[0].slots["keys"].dtype == dtype
    assert (logits[real] - table[real]).abs().mean() < 0.02 * table[real].abs().mean() + 0.02


def test_a_patch_comes_back_from_files_and_goes_off_without_a_trace(tmp_path: Path) -> None:
    patch = ContextGates(dense("gpt2"), 8, 0.9, seed=1).patch()
    save_tensors([patch], tmp_path)
    model = gated("gpt2")
    before = masked(model, ids())
    unpatch_(model)
    assert model.config._attn_implementation != NAME and not keepers_of(model)
    torch.testing.assert_close(masked(model, ids()), dense("gpt2")(ids()).logits, rtol=0, atol=1e-6)
    patch_(model, read_patches(written([patch]), tmp_path))
    assert torch.equal(masked(model, ids()), before)


def test_soft_gates_have_gradients_for_projections_and_offsets_under_a_frozen_body() -> None:
    model = gated("gpt2")
    unpatch_(model)
    model.requires_grad_(False)
    gates = ContextGates(model, 8, 0.9, seed=1)
    gates.hold_(model)
    gates.at(2.0)
    out = model(ids(), labels=ids(), use_cache=False)
    (out.loss + gates.live()).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in gates.parameters())
    assert 0 < gates.live().item() < 1
    unpatch_(model)


def test_recomputed_layers_give_the_same_gradients() -> None:
    found = []
    for recompute in (False, True):
        model = gated()
        unpatch_(model)
        model.requires_grad_(False).train()
        gates = ContextGates(model, 8, 0.9, seed=1)
        gates.hold_(model)
        gates.at(2.0)
        if recompute:
            recompute_(model, on=True)
        (model(ids(), labels=ids(), use_cache=False).loss + gates.live()).backward()
        found.append([p.grad for p in gates.parameters()])
    torch.testing.assert_close(found[0], found[1])


def test_ranks() -> None:
    assert rank_for(dense("llama")) == 32
    wide = AutoModelForCausalLM.from_config(
        LlamaConfig(**{**ROTARY, "num_attention_heads": 8, "num_key_value_heads": 8})
    )
    assert rank_for(wide) == 64


def test_what_cannot_hold_a_pruned_context_is_refused_in_one_line() -> None:
    model = gated()
    with pytest.raises(ArchError, match="StaticCache that cannot hold a pruned context"):
        model(ids(), past_key_values=StaticCache(config=model.config, max_cache_len=40))
    filled = dense("llama")(ids(), past_key_values=DynamicCache(config=model.config)).past_key_values
    with pytest.raises(ArchError, match="DynamicCache that cannot hold"):
        model(ids(), past_key_values=filled)
    with pytest.raises(ArchError, match="given to a model whose context is not pruned"):
        dense("llama")(ids(), past_key_values=ContextCache(3))
    with pytest.raises(ArchError, match="sliding window"):
        ContextGates(AutoModelForCausalLM.from_config(MistralConfig(**ROTARY, head_dim=8, sliding_window=8)), 8, 1, 0)
    with pytest.raises(ArchError, match="context of a gemma2 cannot be pruned; wanted one of llama"):
        ContextGates(AutoModelForCausalLM.from_config(Gemma2Config(**ROTARY, head_dim=8)), 8, 1, 0)
    with pytest.raises(ArchError, match=r"wanted \[3, 32, 8\]"):
        patch = ContextGates(model, 8, 0.9, seed=1).patch()
        patch.tensors["queries"].resize_(2, 32, 8)
        patch_(model, [patch])
    with pytest.raises(ArchError, match="assisted decoding"):
        ContextCache(1).crop(-1)
    model.config._attn_implementation = "eager"
    with pytest.raises(ArchError, match="attention was switched to eager"):
        model(ids())
