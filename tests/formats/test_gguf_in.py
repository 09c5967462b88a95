"""What is read from GGUF: the inverse of what is written, and of the ways to store numbers that gguf knows.

The oracles are the live models and tokenizers that were written, and gguf's own dequantisers.
"""

import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

import compresso
from compresso.arch.base import LayerShape, arch_for
from compresso.checkpoint.load import load_model
from compresso.checkpoint.source import open_source
from compresso.checkpoint.tokenizer import load_tokenizer
from compresso.commands.export import export
from compresso.errors import CheckpointError
from compresso.formats.gguf import save_gguf
from compresso.formats.gguf_tokenizer import _SPLITS
from tests.formats.nano_variants import TEXTS, nano_tokenizer, pruned_nano
from tests.formats.narrow import SHAPES, narrow_model
from tests.formats.test_gguf import STRANGE, gemma

gguf = pytest.importorskip("gguf", reason="gguf: not installed")

ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 5e5},
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 1e4,
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
}


def written(
    model: PreTrainedModel, path: Path, dtype: str = "f32", tokenizer: PreTrainedTokenizerBase | None = None
) -> Path:
    save_gguf(model, arch_for(model.config).shapes(model), path, tokenizer or nano_tokenizer(), dtype, force=True)
    return path


def wide_llama(hidden: int, heads: int, **more: Any) -> PreTrainedModel:
    """One layer of a Llama, its heads as wide as the hidden size allows."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(nano_tokenizer()),
        hidden_size=hidden,
        intermediate_size=256,
        num_hidden_layers=1,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=16384,
        **more,
    )
    return LlamaForCausalLM(config).eval()


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, model.get_input_embeddings().weight.shape[0], (2, 40), generator=generator)  # pyright: ignore[reportArgumentType, reportOptionalMemberAccess]
    return model(input_ids=ids).logits.float()


def assert_same(path: Path, model: PreTrainedModel, atol: float = 1e-5) -> PreTrainedModel:
    found = load_model(open_source(path))
    torch.testing.assert_close(logits(found), logits(model), atol=atol, rtol=0)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_float32_computes_the_same_to_the_bit_of_rounding(family: str, name: str, tmp_path: Path) -> None:
    if name == "no first attention" and family.startswith("qwen"):
        pytest.skip("cannot be written: query heads share key/value heads in different numbers")
    shapes = SHAPES[name]
    model = narrow_model(family, shapes, vocab_size=len(nano_tokenizer()))
    save_gguf(model, shapes, tmp_path / "m.gguf", nano_tokenizer(), "f32")
    assert_same(tmp_path / "m.gguf", model)


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("tied", [True, False])
def test_rope_and_heads_come_back(rope: str, tied: bool, tmp_path: Path) -> None:
    shapes = (LayerShape(6, 3, 40),) * 2
    rows = len(nano_tokenizer())
    model = narrow_model("llama", shapes, vocab_size=rows, tie_word_embeddings=tied, rope_parameters=ROPES[rope])
    save_gguf(model, shapes, tmp_path / "m.gguf", nano_tokenizer(), "f32")
    config = assert_same(tmp_path / "m.gguf", model).config
    assert config.rope_parameters == ROPES[rope]
    assert config.tie_word_embeddings == tied


@pytest.mark.parametrize(
    "given",
    [
        {"factor": 8.0, "original_max_position_embeddings": 8192},
        {"factor": 32.0, "original_max_position_embeddings": 8192},
        {"factor": 5.0, "low_freq_factor": 1.5, "high_freq_factor": 9.0, "original_max_position_embeddings": 3000},
    ],
)
def test_parameters_behind_factors_are_found_again(given: dict[str, Any], tmp_path: Path) -> None:
    model = wide_llama(128, 1, rope_parameters=ROPES["llama3"] | {"rope_theta": 5e5} | given)
    found = load_model(open_source(written(model, tmp_path / "m.gguf")))
    torch.testing.assert_close(found.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq, rtol=1e-5, atol=0)


@pytest.mark.parametrize("pruned", [False, True])
@pytest.mark.parametrize("family", ["gemma2", "gemma3"])
def test_gemma_gets_its_norms_back(family: str, pruned: bool, tmp_path: Path) -> None:
    model = gemma(family, pruned)
    found = assert_same(written(model, tmp_path / "gemma.gguf"), model, atol=1e-4)
    assert found.model.norm.weight.abs().max() < 1 if not pruned else True
    assert found.config.layer_types == model.config.layer_types or pruned


@pytest.mark.parametrize(("dtype", "kind"), [("f16", torch.float16), ("bf16", torch.bfloat16)])
def test_short_floats_stay_what_they_are(dtype: str, kind: torch.dtype, tmp_path: Path) -> None:
    model = pruned_nano()
    found = load_model(open_source(written(model, tmp_path / "m.gguf", dtype)))
    for name, tensor in model.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor.to(kind)), name


def requantised(path: Path, kind: str, seed: int = 0) -> tuple[Path, dict[str, torch.Tensor]]:
    """A copy of a GGUF file whose matrices hold random codes of another kind, and what gguf makes of them."""
    at = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}.get(kind, ())
    reader, random = gguf.GGUFReader(path), np.random.default_rng(seed)
    target, copy = gguf.GGMLQuantizationType[kind], path.with_name(f"{kind}.gguf")
    writer = gguf.GGUFWriter(copy, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            inner = field.types[1] if len(field.types) > 1 else None
            writer.add_key_value(name, field.contents(), field.types[0], inner)
    floats: dict[str, torch.Tensor] = {}
    for tensor in reader.tensors:
        shape = tuple(int(one) for one in reversed(tensor.shape))
        if len(shape) == 1:
            writer.add_tensor(tensor.name, np.array(tensor.data))
            continue
        if at:
            block, size = gguf.GGML_QUANT_SIZES[target]
            codes = random.integers(0, 256, (shape[0], shape[1] // block, size), dtype=np.uint8)
            for offset in at:
                scales = random.uniform(0.001, 0.01, codes.shape[:2]).astype(np.float16)
                codes[..., offset : offset + 2] = scales[..., None].view(np.uint8)
            codes = codes.reshape(shape[0], -1)
        else:
            codes = gguf.quants.quantize(np.array(tensor.data), target)
        writer.add_tensor(tensor.name, codes, raw_dtype=target)
        floats[tensor.name] = torch.from_numpy(gguf.dequantize(codes, target)).reshape(shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return copy, floats


KINDS = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"]


@pytest.mark.parametrize("kind", KINDS)
def test_codes_become_the_floats_that_gguf_makes_of_them(kind: str, tmp_path: Path) -> None:
    path, floats = requantised(written(wide_llama(256, 4), tmp_path / "m.gguf"), kind)
    found = load_model(open_source(path))
    assert found.dtype == torch.bfloat16
    state, layer = found.state_dict(), "model.layers.0"
    paired = floats["blk.0.attn_q.weight"].reshape(4, 32, 2, 256)
    wanted = {
        "model.embed_tokens.weight": floats["token_embd.weight"],
        f"{layer}.self_attn.v_proj.weight": floats["blk.0.attn_v.weight"],
        f"{layer}.mlp.down_proj.weight": floats["blk.0.ffn_down.weight"],
        f"{layer}.self_attn.q_proj.weight": torch.cat((paired[:, :, 0], paired[:, :, 1]), 1).reshape(256, 256),
    }
    for name, tensor in wanted.items():
        assert torch.equal(state[name], tensor.to(torch.bfloat16)), name


def test_a_kind_that_gguf_does_not_dequantise_is_named(tmp_path: Path) -> None:
    path = written(pruned_nano(), tmp_path / "m.gguf")
    reader = gguf.GGUFReader(path, "r+")
    tensor = next(one for one in reader.tensors if one.name == "blk.0.attn_norm.weight")
    tensor.field.parts[4][0] = int(gguf.GGMLQuantizationType.I32)
    reader.data.flush()
    with pytest.raises(
        CheckpointError, match=r"m\.gguf stores 'blk\.0\.attn_norm\.weight' as I32, which the gguf pack"
    ):
        open_source(path, weights=False)


def byte_level(name: str, begins: bool) -> PreTrainedTokenizerFast:
    """A trained byte-level tokenizer whose texts are split as llama.cpp calls `name`."""
    steps = next(steps for steps, known in _SPLITS.items() if known == name)
    made = {
        "bytes": pre_tokenizers.ByteLevel(add_prefix_space=False),
        "plain bytes": pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        "digit": pre_tokenizers.Digits(individual_digits=True),
    }
    inner = Tokenizer(models.BPE())
    inner.decoder = decoders.ByteLevel()
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [made.get(step) or pre_tokenizers.Split(Regex(step), "isolated") for step in steps]
    )
    special = ["<s>", "</s>", "<|turn|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=special,
        show_progress=False,
    )
    inner.train_from_iterator([*STRANGE, *TEXTS] * 4, trainer)
    if begins:
        inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="</s>")


MIXED = (
    *STRANGE,
    *TEXTS,
    "<s>Hi<|turn|> there</s>",
    "",
    "a",
    "\n\n\n x",
    "e\u0301\u00e9 \u200b\U0001f468\u200d\U0001f469",
)


def assert_same_tokens(found: PreTrainedTokenizerBase, wanted: PreTrainedTokenizerBase) -> None:
    for text in MIXED:
        ids = wanted(text)["input_ids"]
        assert found(text)["input_ids"] == ids, text
        assert found.decode(ids) == wanted.decode(ids)
        assert found.decode(ids, skip_special_tokens=True) == wanted.decode(ids, skip_special_tokens=True)
    assert len(found) == len(wanted)
    assert found.chat_template == wanted.chat_template
    for kind in ("bos", "eos", "unk", "pad"):
        assert getattr(found, f"{kind}_token") == getattr(wanted, f"{kind}_token"), kind


@pytest.mark.parametrize("begins", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("name", ["gpt-2", "smollm", "llama-bpe", "qwen2"])
def test_byte_level_tokens_and_template_come_back(name: str, family: str, begins: bool, tmp_path: Path) -> None:
    tokenizer = byte_level(name, begins)
    tokenizer.chat_template = "{% for one in messages %}<|turn|>{{ one['content'] }} \u00e9\n{% endfor %}"
    if name == "qwen2":
        tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    shapes = (LayerShape(4, 2, 40),)
    model = narrow_model(family, shapes, vocab_size=len(tokenizer) + 5)  # rows that no token has
    save_gguf(model, shapes, tmp_path / "m.gguf", tokenizer, "f32")
    source = open_source(tmp_path / "m.gguf", weights=False)
    assert_same_tokens(load_tokenizer(source), tokenizer)
    assert (source.config.bos_token_id, source.config.eos_token_id) == (0, 1)


@pytest.mark.skipif("COMPRESSO_DATA" not in os.environ, reason="COMPRESSO_DATA: no folder with models")
@pytest.mark.parametrize("name", ["stories260K", "tokenizer-llama2-32k"])
def test_pieces_come_back(name: str, tmp_path: Path) -> None:
    folder = Path(os.environ["COMPRESSO_DATA"], "models", name)
    if not folder.is_dir():
        pytest.skip(f"COMPRESSO_DATA: no models/{name}")
    tokenizer, shapes = AutoTokenizer.from_pretrained(folder), (LayerShape(4, 2, 40),)
    model = narrow_model("llama", shapes, vocab_size=len(tokenizer))
    save_gguf(model, shapes, tmp_path / "m.gguf", tokenizer, "f32")
    assert_same_tokens(load_tokenizer(open_source(tmp_path / "m.gguf", weights=False)), tokenizer)


def test_one_file_in_a_folder_stands_for_itself(tmp_path: Path) -> None:
    path = written(pruned_nano(), tmp_path / "folder-nano.gguf")
    by_folder, by_file = open_source(tmp_path), open_source(path)
    assert by_folder.identity == by_file.identity
    assert (by_folder.kind, by_folder.name, by_folder.file) == ("gguf", "folder-nano", path)
    path.with_name("more.gguf").write_bytes(path.read_bytes())
    with pytest.raises(CheckpointError, match=r"holds 2 GGUF files: folder-nano\.gguf, more\.gguf\. Give one of them"):
        open_source(tmp_path)


def test_a_cache_drops_the_suffix_and_a_link_out_of_a_folder_is_refused(tmp_path: Path) -> None:
    path = written(pruned_nano(), tmp_path / "nano.gguf").rename(tmp_path / "sha256-0123")
    assert open_source(path, weights=False).name == "sha256-0123"
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/m.gguf").symlink_to(path)
    with pytest.raises(CheckpointError, match="leads out of the model folder"):
        open_source(tmp_path / "folder")


@pytest.mark.slow
def test_dequantised_once_said_once_and_gone_at_the_end(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = written(pruned_nano(), tmp_path / "once.gguf", "q4_0")
    with caplog.at_level(logging.WARNING):
        folders = {open_source(path, weights=weights).folder for weights in (False, True, True)}
    assert len(folders) == 1
    said = "once.gguf: GGUF of Q4_0, Q8_0: weights are dequantised to bfloat16; quantising again rounds twice"
    assert caplog.messages.count(said) == 1
    code = f"from compresso.checkpoint.source import open_source; print(open_source({str(path)!r}).folder)"
    environment = {**os.environ, "TMPDIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert Path(done.stdout.strip()).parents[1].parent == tmp_path
    assert not list(tmp_path.glob("compresso-*"))


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    path = written(pruned_nano(), tmp_path / "m.gguf")
    before = open_source(path).identity.fingerprint
    model = pruned_nano()
    model.model.norm.weight.data += 1
    written(model, path)
    assert open_source(path).identity.fingerprint != before


def test_loaded_with_its_tokenizer_and_exported_again(tmp_path: Path) -> None:
    path = written(pruned_nano(), tmp_path / "m.gguf", "q8_0")
    loaded = compresso.load(path)
    assert loaded.tokenizer is not None
    assert loaded.complete("The fox", max_new_tokens=4)
    with pytest.raises(CheckpointError, match="is the input model"):
        export(path, path, format="gguf", overwrite=True)
    export(path, tmp_path / "again.gguf", format="gguf", dtype="bf16")
    first, second = (load_model(open_source(one)).state_dict() for one in (path, tmp_path / "again.gguf"))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.slow
def test_pruned_and_written_as_safetensors(tmp_path: Path) -> None:
    path = written(pruned_nano(), tmp_path / "m.gguf", "q8_0")
    compresso.run("magnitude/50", path, output=tmp_path / "out", measure="none", verify=False)
    dense, found = load_model(open_source(path)), load_model(open_source(tmp_path / "out"))
    for name, tensor in found.state_dict().items():
        kept = tensor != 0
        assert torch.equal(tensor[kept], dense.state_dict()[name][kept]), name
    zeros = (found.model.layers[0].mlp.up_proj.weight == 0).float().mean()
    assert 0.45 < zeros < 0.55
    assert_same_tokens(load_tokenizer(open_source(tmp_path / "out")), nano_tokenizer())
