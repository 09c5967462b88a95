"""What is written as GGUF: opened by llama.cpp it computes what transformers computes, and its fields and tensors say
so without an engine.

The oracles are transformers (greedy tokens, probabilities, tokenizers, scaled rotary frequencies), llama.cpp itself,
and gguf's own reader.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    Gemma3TextConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from compresso.arch.base import LayerShape, arch_for
from compresso.core.plan import Plan
from compresso.edit.shrink import shrink_
from compresso.engines.llama_cpp import continue_texts, missing
from compresso.errors import CheckpointError, ExportError, NumericError
from compresso.formats.gguf import _widest, save_gguf
from compresso.formats.gguf_tokenizer import _SPLITS
from tests.formats.nano_variants import TEXTS, greedy, nano_tokenizer, pruned_nano
from tests.formats.narrow import narrow_model

gguf = pytest.importorskip("gguf", reason="gguf: not installed")


def engine(test: Callable[..., None]) -> Callable[..., None]:
    """A test that opens what it wrote in llama.cpp."""
    return pytest.mark.slow(pytest.mark.skipif(missing() is not None, reason=f"llama.cpp: {missing()}")(test))


STRANGE = (
    "Once upon a time, there was",
    'Zoë said:  "Hi 42!"\nTom\'s x=1234567; 日本語 😀 \n\t\nend',
    "def f(a):\n    return a**2",
    " leading and  two spaces",
)
VARIANTS: dict[str, tuple[dict[str, Any], str]] = {
    "dense": ({}, "llama"),
    "30 % gone, an FFN, an attention": ({"keep": 0.7, "attention": (3,), "mlp": (2,)}, "deci"),
    "50 % gone, first attention, last FFN, a whole layer": ({"keep": 0.5, "attention": (0, 4), "mlp": (4, 5)}, "deci"),
}


def write(model: PreTrainedModel, path: Path, dtype: str = "f32", **more: Any) -> str:
    return save_gguf(
        model, arch_for(model.config).shapes(model), path, more.pop("tokenizer", nano_tokenizer()), dtype, **more
    )


def read(path: Path) -> Any:
    return gguf.GGUFReader(path)


def assert_same(
    path: Path, model: PreTrainedModel, atol: float, texts: tuple[str, ...] = TEXTS, tokenizer: Any = None
) -> None:
    for text, found in zip(texts, continue_texts(path, texts), strict=True):
        ids = (tokenizer or nano_tokenizer())(text)["input_ids"]
        assert found.tokens == ids
        tokens, probabilities = greedy(model, ids, 8)
        assert found.greedy == tokens
        torch.testing.assert_close(torch.tensor(found.probabilities), probabilities, atol=atol, rtol=0)


@engine
@pytest.mark.parametrize("name", VARIANTS)
def test_llama_cpp_computes_what_transformers_computes(name: str, tmp_path: Path) -> None:
    knobs, arch = VARIANTS[name]
    model = pruned_nano(**knobs)
    assert write(model, tmp_path / "m.gguf") == arch
    assert_same(tmp_path / "m.gguf", model, 1e-4)


@engine
@pytest.mark.parametrize(("dtype", "atol"), [("f16", 0.02), ("bf16", 0.05), ("q8_0", 0.15), ("q4_0", 0.6)])
def test_every_dtype_opens_also_with_odd_widths(dtype: str, atol: float, tmp_path: Path) -> None:
    model = pruned_nano(**VARIANTS["30 % gone, an FFN, an attention"][0])
    assert any(shape.channels % 32 for shape in arch_for(model.config).shapes(model))
    write(model, tmp_path / "m.gguf", dtype)
    found = continue_texts(tmp_path / "m.gguf", TEXTS[:1], new_tokens=1)[0]
    _, probabilities = greedy(model, nano_tokenizer()(TEXTS[0])["input_ids"], 1)
    torch.testing.assert_close(torch.tensor(found.probabilities), probabilities, atol=atol, rtol=0)


@engine
@pytest.mark.parametrize("rope", ["llama3", "linear"])
def test_scaled_rope_and_an_untied_head(rope: str, tmp_path: Path) -> None:
    model = pruned_nano(keep=0.7)
    given = {"rope_theta": 10000.0, "rope_type": rope, "factor": 4.0}
    if rope == "llama3":
        given |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
    plain = greedy(model, nano_tokenizer()(TEXTS[1])["input_ids"], 1)[1]
    model.config.rope_parameters = given
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    assert (greedy(model, nano_tokenizer()(TEXTS[1])["input_ids"], 1)[1] - plain).abs().max() > 0.02
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().roll(1, 0))
    model.config.tie_word_embeddings = False
    write(model, tmp_path / "m.gguf")
    assert_same(tmp_path / "m.gguf", model, 1e-4)


@engine
def test_equal_widths_whose_heads_do_not_divide_the_hidden_size(tmp_path: Path) -> None:
    model = pruned_nano()
    kept = {"hidden": tuple(range(160))} | {f"layers.{i}.heads": (0, 2, 3) if i else (0, 1, 2) for i in range(6)}
    shrink_(model, arch_for(model.config).axes(model), Plan(kept))
    assert write(model, tmp_path / "m.gguf") == "llama"
    assert_same(tmp_path / "m.gguf", model, 1e-4)


@engine
@pytest.mark.parametrize("name", ["gpt-2", "smollm", "llama-bpe", "qwen2"])
def test_byte_level_tokens_of_every_known_split(name: str, tmp_path: Path) -> None:
    steps = next(steps for steps, known in _SPLITS.items() if known == name)
    made = {
        "bytes": pre_tokenizers.ByteLevel(add_prefix_space=False),
        "plain bytes": pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        "digit": pre_tokenizers.Digits(individual_digits=True),
    }
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [made.get(step) or pre_tokenizers.Split(Regex(step), "isolated") for step in steps]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=420, initial_alphabet=alphabet, special_tokens=["<s>", "</s>"], show_progress=False
    )
    inner.train_from_iterator([*STRANGE, *TEXTS] * 4, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")
    shapes = (LayerShape(4, 2, 40),) * 2
    save_gguf(narrow_model("llama", shapes, vocab_size=len(tokenizer)), shapes, tmp_path / "m.gguf", tokenizer, "f32")
    for text, found in zip(STRANGE, continue_texts(tmp_path / "m.gguf", STRANGE, new_tokens=0), strict=True):
        assert found.tokens == tokenizer(text)["input_ids"]


@engine
@pytest.mark.skipif("COMPRESSO_DATA" not in os.environ, reason="COMPRESSO_DATA: no folder with models")
@pytest.mark.parametrize("name", ["stories260K", "tokenizer-llama2-32k"])
def test_tokens_converted_from_sentencepiece(name: str, tmp_path: Path) -> None:
    folder = Path(os.environ["COMPRESSO_DATA"], "models", name)
    if not folder.is_dir():
        pytest.skip(f"COMPRESSO_DATA: no models/{name}")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    shapes = (LayerShape(4, 2, 40),) * 2
    if (folder / "config.json").is_file():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    else:
        model = narrow_model("mistral", shapes, vocab_size=len(tokenizer), sliding_window=None)
    assert write(model, tmp_path / "m.gguf", tokenizer=tokenizer) == "llama"
    assert_same(tmp_path / "m.gguf", model, 1e-4, STRANGE, tokenizer)


def test_fields_tell_widths_special_tokens_and_template(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(nano_tokenizer().name_or_path)
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    model = pruned_nano(keep=0.5, attention=(0, 4), mlp=(4, 5))
    shapes = arch_for(model.config).shapes(model)
    write(model, tmp_path / "m.gguf", "q8_0", tokenizer=tokenizer)
    fields = {name: field.contents() for name, field in read(tmp_path / "m.gguf").fields.items()}
    kept = [shape for shape in shapes if shape.query_heads or shape.channels]
    assert len(kept) == 5
    assert fields["deci.block_count"] == 5
    assert fields["deci.attention.head_count"] == [1] + [shape.query_heads for shape in kept[1:]]
    assert fields["deci.attention.head_count_kv"] == [1] + [shape.kv_heads for shape in kept[1:]]
    assert fields["deci.feed_forward_length"] == [max(-(-shape.channels // 32), 1) * 32 for shape in kept]
    assert {
        fields[f"deci.{name}"] for name in ("attention.key_length", "attention.value_length", "rope.dimension_count")
    } == {32}
    assert [fields[f"tokenizer.ggml.{kind}_token_id"] for kind in ("bos", "eos")] == [0, 1]
    assert fields["tokenizer.ggml.padding_token_id"] == 2
    assert fields["tokenizer.ggml.add_bos_token"] is True
    assert fields["tokenizer.ggml.add_eos_token"] is False
    assert fields["tokenizer.chat_template"] == tokenizer.chat_template
    assert fields["tokenizer.ggml.tokens"] == tokenizer.convert_ids_to_tokens(range(1024))


def test_quantized_tensors_are_gguf_s_own_and_norms_stay_float(tmp_path: Path) -> None:
    model = pruned_nano()
    write(model, tmp_path / "m.gguf", "q4_0")
    tensors = {tensor.name: tensor for tensor in read(tmp_path / "m.gguf").tensors}
    assert "output.weight" not in tensors
    assert tensors["token_embd.weight"].tensor_type.name == "Q8_0"
    assert tensors["blk.0.attn_norm.weight"].tensor_type.name == "F32"
    down = model.model.layers[1].mlp.down_proj.weight.detach().numpy()
    found = tensors["blk.1.ffn_down.weight"]
    assert found.tensor_type.name == "Q4_0"
    assert (found.data == gguf.quants.quantize(down, found.tensor_type)).all()


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_text("old")
    model = pruned_nano()
    with pytest.raises(CheckpointError, match="exists"):
        write(model, path)
    model.model.layers[3].mlp.up_proj.weight.data[0, 0] = 1e6
    with pytest.raises(NumericError, match=r"blk\.3\.ffn_up\.weight.*f16"):
        write(model, path, "f16", force=True)
    assert [(one.name, one.read_text()) for one in tmp_path.iterdir()] == [("m.gguf", "old")]


def test_what_llama_cpp_cannot_hold_is_named_with_what_would_do(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "m.gguf"
    narrow = narrow_model("llama", shapes := (LayerShape(4, 2, 40), LayerShape(2, 1, 24)))
    with pytest.raises(ExportError, match=r"hidden_size 48.*multiple of 32.*f16"):
        save_gguf(narrow, shapes, path, tokenizer, "q8_0")
    wide = narrow_model("llama", shapes, hidden_size=96)
    with pytest.raises(ExportError, match=r"layers\.1: query heads x head_dim is 16.*f16"):
        save_gguf(wide, shapes, path, tokenizer, "q8_0")
    with pytest.raises(ExportError, match="WordLevel"):
        save_gguf(narrow, shapes, path, tokenizer, "f32")
    with pytest.raises(ExportError, match=r"\.bias is a bias, and none is written to gguf\..*--format onnx"):
        save_gguf(narrow_model("llama", shapes, attention_bias=True), shapes, path, tokenizer, "f32")
    with pytest.raises(ExportError, match=r"sliding_window is 16.*null"):
        save_gguf(narrow_model("mistral", shapes, sliding_window=16), shapes, path, tokenizer, "f32")
    with pytest.raises(ExportError, match=r"every layer is empty"):
        save_gguf(narrow_model("llama", empty := (LayerShape(0, 0, 0),)), empty, path, tokenizer, "f32")
    with pytest.raises(ExportError, match=r"yarn.*llama3"):
        rope = {"rope_type": "yarn", "factor": 2.0, "rope_theta": 10000.0, "original_max_position_embeddings": 64}
        save_gguf(narrow_model("llama", shapes, rope_parameters=rope), shapes, path, tokenizer, "f32")
    with pytest.raises(ExportError, match="unknown dtype 'q4_k_m'"):
        save_gguf(narrow, shapes, path, tokenizer, "q4_k_m")
    small = narrow_model("llama", shapes, vocab_size=80)
    with pytest.raises(ExportError, match="no row in the embedding of 80"):
        save_gguf(small, shapes, path, nano_tokenizer(), "f32")
    assert not list(tmp_path.iterdir())


def qwen(family: str, pruned: bool) -> PreTrainedModel:
    """A tiny Qwen with the embedded model's tokens; pruned: other widths in two layers, no attention in one, no FFN in
    another.
    """
    config = (Qwen2Config if family == "qwen2" else Qwen3Config)(
        vocab_size=1024,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=family == "qwen3",
        rms_norm_eps=1e-3,
        **({"head_dim": 16} if family == "qwen3" else {}),
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.15 + (parameter.dim() == 1) * 0.5)
    if pruned:
        hidden = {"hidden": tuple(range(32)) + tuple(range(32, 64, 2))} if family == "qwen3" else {}
        kept = {
            "layers.0.heads": (1, 3),
            "layers.3.channels": tuple(range(0, 90, 2)),
            "attention": (0, 2, 3),
            "mlp": (1, 2, 3),
            **hidden,
        }
        shrink_(model, arch_for(config).axes(model), Plan(kept))
    return model


@engine
@pytest.mark.parametrize("pruned", [False, True])
@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_qwen_is_filled_up_to_one_width_and_computes_the_same(family: str, pruned: bool, tmp_path: Path) -> None:
    model = qwen(family, pruned)
    assert write(model, tmp_path / "qwen.gguf") == family
    assert_same(tmp_path / "qwen.gguf", model, atol=1e-4)


def test_qwen_says_what_it_cannot_hold(tmp_path: Path) -> None:
    model = qwen("qwen2", pruned=False)
    mixed = [LayerShape(8, 4, 96), LayerShape(8, 8, 96)]
    with pytest.raises(ExportError, match="layers have 1 and 2 query heads a key/value head, and one number is held"):
        _widest(mixed)
    model.config.layer_types = ["sliding_attention"] * 4
    with pytest.raises(ExportError, match=r"layers attend to a sliding window, and llama\.cpp's qwen2 attends to all"):
        write(model, tmp_path / "qwen.gguf")
    assert not list(tmp_path.iterdir())


def gemma(family: str, pruned: bool, **config: Any) -> PreTrainedModel:
    """A tiny Gemma with the embedded model's tokens; pruned: other widths in two layers, no attention in one, no FFN in
    another.
    """
    kind, n_layers = (Gemma2Config, 4) if family == "gemma2" else (Gemma3TextConfig, 7)
    settings = {
        "vocab_size": 1024,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": n_layers,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "sliding_window": 8,  # shorter than the texts
        "query_pre_attn_scalar": 16,
        "attn_implementation": "eager",  # the only one that caps scores
    }
    model = AutoModelForCausalLM.from_config(kind(**settings | config)).eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.15 + (parameter.dim() == 1) * 0.2)
    if pruned:
        layers = tuple(range(n_layers))
        kept = {
            "layers.0.heads": (1, 3),
            "layers.3.channels": tuple(range(0, 90, 2)),
            "attention": (0, *layers[2:]),
            "mlp": layers[1:],
        }
        shrink_(model, arch_for(model.config).axes(model), Plan(kept))
    return model


@engine
@pytest.mark.parametrize("pruned", [False, True])
@pytest.mark.parametrize("family", ["gemma2", "gemma3"])
def test_gemma_is_filled_up_to_one_width_and_computes_the_same(family: str, pruned: bool, tmp_path: Path) -> None:
    model = gemma(family, pruned)
    assert write(model, tmp_path / "gemma.gguf") == family
    assert_same(tmp_path / "gemma.gguf", model, atol=1e-3)  # its GELU is a table in half precision


@engine
@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("gemma2", {"query_pre_attn_scalar": 5, "attn_logit_softcapping": 0.7, "final_logit_softcapping": 2.0}),
        ("gemma2", {"attn_logit_softcapping": None, "final_logit_softcapping": None}),
        ("gemma2", {"num_hidden_layers": 46}),
        ("gemma3", {"query_pre_attn_scalar": 50}),
        (
            "gemma3",
            {
                "rope_parameters": {
                    "sliding_attention": {"rope_type": "default", "rope_theta": 700.0},
                    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 30000.0},
                }
            },
        ),
    ],
    ids=["caps", "no caps", "46 layers", "scale", "rope"],
)
def test_numbers_of_a_gemma_that_llama_cpp_knows_otherwise(family: str, config: dict[str, Any], tmp_path: Path) -> None:
    model = gemma(family, pruned=False, **config)
    assert write(model, tmp_path / "gemma.gguf") == family
    assert_same(tmp_path / "gemma.gguf", model, atol=1e-3)  # its GELU is a table in half precision


@pytest.mark.parametrize(
    ("family", "config", "message"),
    [
        (
            "gemma2",
            {"layer_types": ["full_attention"] * 4},
            r"layers\.0 has full_attention, and llama\.cpp's gemma2 computes sliding",
        ),
        (
            "gemma3",
            {"final_logit_softcapping": 30.0},
            r"final_logit_softcapping is 30\.0, and llama\.cpp's gemma3 caps none",
        ),
        (
            "gemma2",
            {"tie_word_embeddings": False},
            r"the head is not tied to the embedding, and llama\.cpp's gemma2 ties them",
        ),
        (
            "gemma2",
            {"hidden_activation": "silu"},
            r"hidden_activation is 'silu', llama\.cpp computes gelu_pytorch_tanh",
        ),
        ("gemma3", {"use_bidirectional_attention": True}, r"use_bidirectional_attention is set"),
    ],
)
def test_gemma_says_what_it_cannot_hold(family: str, config: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=message):
        write(gemma(family, pruned=False, **config), tmp_path / "gemma.gguf")
    assert not list(tmp_path.iterdir())
