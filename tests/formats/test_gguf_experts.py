"""Mixtures of experts as GGUF: opened by llama.cpp they compute what transformers computes, whole and without some of
their experts; what its archs would compute otherwise is refused.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, MixtralConfig, OlmoeConfig, PreTrainedModel, Qwen3MoeConfig

from compresso.arch.base import LayerShape, arch_for
from compresso.core.plan import Plan
from compresso.edit.shrink import shrink_
from compresso.errors import ExportError
from compresso.formats.gguf import save_gguf
from tests.formats.nano_variants import nano_tokenizer
from tests.formats.test_gguf import assert_same, engine, read, write

pytest.importorskip("gguf", reason="gguf: not installed")
TOKENS = {"vocab_size": 1024, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "max_position_embeddings": 256}
SIZES = {**TOKENS, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_experts_per_tok": 2}
FAMILIES: dict[str, Any] = {
    "llama": lambda **more: MixtralConfig(
        **{**SIZES, "num_key_value_heads": 2, "intermediate_size": 48, "num_local_experts": 6, **more}
    ),
    "qwen3moe": lambda **more: Qwen3MoeConfig(
        **{
            **SIZES,
            "num_key_value_heads": 2,
            "intermediate_size": 96,
            "moe_intermediate_size": 48,
            "num_experts": 6,
            "head_dim": 24,
            "norm_topk_prob": True,
            **more,
        }
    ),
    "olmoe": lambda **more: OlmoeConfig(
        **{**SIZES, "num_key_value_heads": 4, "intermediate_size": 48, "num_experts": 6, **more}
    ),
}


def mixture(arch: str, **more: Any) -> PreTrainedModel:
    """A random mixture whose routers, norms and head say something."""
    model = AutoModelForCausalLM.from_config(FAMILIES[arch](**more)).eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5, generator=generator)
            else:
                parameter.normal_(0, 1.5 * parameter.shape[-1] ** -0.5, generator=generator)
    return model


def without(model: PreTrainedModel, **kept: tuple[int, ...]) -> PreTrainedModel:
    """The model with these experts of each layer, and these units of the stream."""
    axes = arch_for(model.config).axes(model)
    units = {a.name: kept[a.kind] for a in axes if a.kind in kept}
    shrink_(model, axes, Plan(units))
    return model


@engine
@pytest.mark.parametrize("arch", FAMILIES)
def test_a_dropped_mixture_continues_in_llama_cpp_as_in_transformers(tmp_path: Path, arch: str) -> None:
    model = without(mixture(arch), expert=(0, 2, 3, 5))
    assert write(model, tmp_path / "m.gguf") == arch
    assert_same(tmp_path / "m.gguf", model, 1e-3)


@engine
@pytest.mark.parametrize(("arch", "more"), [("llama", {"tie_word_embeddings": True}), ("qwen3moe", {})])
def test_a_narrower_stream_and_tied_heads_continue_alike(tmp_path: Path, arch: str, more: dict[str, Any]) -> None:
    model = without(mixture(arch, **more), hidden=tuple(i for i in range(64) if i % 4))
    write(model, tmp_path / "m.gguf")
    assert_same(tmp_path / "m.gguf", model, 1e-3)


@engine
def test_an_olmoe_gets_a_head_of_its_own(tmp_path: Path) -> None:
    """Where it is tied to the embedding: that arch wants both."""
    model = mixture("olmoe", tie_word_embeddings=True)
    write(model, tmp_path / "m.gguf")
    assert_same(tmp_path / "m.gguf", model, 1e-3)


@pytest.mark.parametrize("arch", FAMILIES)
def test_fields_and_tensors_say_what_is_there(tmp_path: Path, arch: str) -> None:
    model = without(mixture(arch), expert=(0, 2, 3, 5))
    write(model, tmp_path / "m.gguf", "q8_0")
    reader = read(tmp_path / "m.gguf")
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert (fields[f"{arch}.expert_count"], fields[f"{arch}.expert_used_count"]) == (4, 2)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    router = tensors["blk.1.ffn_gate_inp.weight"]
    assert router.tensor_type.name == "F32" and router.data.shape == (4, 64)
    torch.testing.assert_close(torch.tensor(router.data), model.model.layers[1].mlp.gate.weight)
    assert list(tensors["blk.0.ffn_down_exps.weight"].shape) == [64, 64, 4]  # a width of 48 in blocks of 32
    assert list(tensors["blk.0.ffn_up_exps.weight"].shape) == [64, 64, 4]


def test_what_an_arch_would_compute_otherwise_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    model = mixture("llama")
    shapes = arch_for(model.config).shapes(model)
    uneven = [shapes[0], LayerShape(4, 2, 48, 5)]
    with pytest.raises(ExportError, match=r"layers.1 has 5 experts, layers.0 has 6, .* reads one .* pool: layer"):
        save_gguf(model, uneven, path, nano_tokenizer(), "f32")
    with pytest.raises(ExportError, match=r"layers.1 has no experts, and llama.cpp's llama wants them in all"):
        save_gguf(model, [shapes[0], LayerShape(4, 2, 48)], path, nano_tokenizer(), "f32")
    with pytest.raises(ExportError, match=r"norm_topk_prob is False, and llama.cpp's qwen3moe divides the weights"):
        write(mixture("qwen3moe", norm_topk_prob=False), path)
    with pytest.raises(ExportError, match=r"norm_topk_prob is True, and llama.cpp's olmoe does not divide"):
        write(mixture("olmoe", norm_topk_prob=True), path)
    with pytest.raises(ExportError, match=r"clip_qkv is 8.0, and none is written"):
        write(mixture("olmoe", clip_qkv=8.0), path)
    with pytest.raises(ExportError, match=r"sliding_window is 16, and llama.cpp's llama attends to all"):
        write(mixture("llama", sliding_window=16), path)
    with pytest.raises(ExportError, match=r"4 query heads share 2 key/value heads, and llama.cpp's olmoe"):
        write(mixture("olmoe", num_key_value_heads=2), path)
    with pytest.raises(ExportError, match=r"hidden_size is 48, heads have 64 dimensions, and llama.cpp's olmoe"):
        write(without(mixture("olmoe"), hidden=tuple(i for i in range(64) if i % 4)), path)
    assert not path.exists()
