"""One set of tensor checks for all families: what is missing, left over, coded or an adapter's is refused by name in
each, what published files hold beside weights is not, and tied is what the file says.
"""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    BertForPreTraining,
    BloomConfig,
    Gemma2Config,
    GlmConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedModel,
    Qwen2Config,
    ViTConfig,
    ViTForImageClassification,
)

from compresso.arch.base import arch_for
from compresso.checkpoint.load import load_model, meta_model
from compresso.checkpoint.source import open_source
from compresso.errors import CheckpointError
from compresso.formats.hf import save_checkpoint

SIZES = {
    "vocab_size": 31,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {"num_key_value_heads": 2, "head_dim": 8}


def causal(config: Any) -> PreTrainedModel:
    return AutoModelForCausalLM.from_config(config)


MAKERS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: causal(LlamaConfig(**SIZES)),
    "qwen2": lambda: causal(Qwen2Config(**SIZES, num_key_value_heads=2)),
    "gpt2": lambda: causal(GPT2Config(vocab_size=31, n_embd=16, n_layer=2, n_head=2, n_positions=8)),
    "phi3": lambda: causal(Phi3Config(**SIZES, num_key_value_heads=2)),
    "gemma2": lambda: causal(Gemma2Config(**SIZES, **GROUPED)),
    "glm": lambda: causal(GlmConfig(**SIZES, **GROUPED)),
    "bloom": lambda: causal(BloomConfig(vocab_size=31, hidden_size=16, n_layer=2, n_head=2)),
    "phi": lambda: causal(PhiConfig(**SIZES)),
    "opt": lambda: causal(OPTConfig(**SIZES, ffn_dim=24, word_embed_proj_dim=16)),
    "gpt_neox": lambda: causal(GPTNeoXConfig(**SIZES)),
    "bert": lambda: BertForMaskedLM(BertConfig(**SIZES)),
    "vit": lambda: ViTForImageClassification(
        ViTConfig(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=8,
            patch_size=4,
            num_labels=3,
            architectures=["ViTForImageClassification"],
        )
    ),
}
Tensors = dict[str, torch.Tensor]


@pytest.fixture(params=MAKERS)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    torch.manual_seed(0)
    MAKERS[request.param]().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def edit(folder: Path, change: Callable[[Tensors, str], object]) -> str:
    """Change the stored tensors; returns the name of the matrix that the change was given, as the model calls it."""
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in sorted(tensors) if ".1." in name and tensors[name].dim() == 2)
    change(tensors, name)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return name.replace("vit.encoder.layer", "vit.layers").replace("attention.attention.key", "attention.k_proj")


def refused(folder: Path, *parts: str) -> None:
    with pytest.raises(CheckpointError) as raised:
        open_source(folder)
    said = str(raised.value)
    assert all(part in said for part in parts), said
    assert "\n" not in said and raised.value.exit_code == 2


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
def test_codes_under_a_weight_s_name_are_refused(dtype: torch.dtype, folder: Path) -> None:
    def coded(tensors: Tensors, name: str) -> None:
        tensors[name] = (100 * tensors[name]).to(dtype)

    edit(folder, coded)
    refused(folder, "not plain floats", ".1.", "give the model before quantisation")


@pytest.mark.parametrize("suffix", ["_scale", "_scale_inv", ".absmax"])
def test_scales_are_refused(suffix: str, folder: Path) -> None:
    name = edit(folder, lambda tensors, name: tensors.update({name + suffix: torch.ones(1)}))
    refused(folder, "unexpected", name + suffix, "give the model before quantisation")


def test_adapters_are_refused(folder: Path) -> None:
    def adapted(tensors: Tensors, name: str) -> None:
        tensors[name.removesuffix(".weight") + ".lora_A.weight"] = torch.zeros(2, 16)

    edit(folder, adapted)
    refused(folder, "unexpected", ".lora_A.weight", "Merge the adapter into its base model first")


def test_missing_and_misshaped_tensors_are_refused(folder: Path) -> None:
    name = edit(folder, lambda tensors, name: tensors.update({name: torch.zeros(3, 3)}))
    refused(folder, f"wrong shape: {name} [3, 3] instead of")
    name = edit(folder, lambda tensors, name: tensors.pop(name))
    refused(folder, f"missing: {name}")


def test_layers_beyond_the_config_s_are_refused(folder: Path) -> None:
    def deeper(tensors: Tensors, name: str) -> None:
        tensors[name.replace(".1.", ".2.", 1)] = tensors[name].clone()

    edit(folder, deeper)
    refused(folder, "unexpected", ".2.")


def test_what_published_files_hold_beside_weights_passes(tmp_path: Path) -> None:
    """Masks and positions as older versions stored them, and names without the base model's prefix."""
    MAKERS["gpt2"]().save_pretrained(tmp_path / "gpt2")
    tensors = load_file(tmp_path / "gpt2" / "model.safetensors")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    bare["h.0.attn.bias"] = torch.ones(1, 1, 8, 8, dtype=torch.uint8)
    save_file(bare, tmp_path / "gpt2" / "model.safetensors", {"format": "pt"})
    model = load_model(open_source(tmp_path / "gpt2"))
    assert torch.equal(model.state_dict()["transformer.wte.weight"], tensors["transformer.wte.weight"])
    bare["h.1.mlp.c_fc.weight"] = bare["h.1.mlp.c_fc.weight"].to(torch.int8)  # found without its prefix, too
    save_file(bare, tmp_path / "gpt2" / "model.safetensors", {"format": "pt"})
    refused(tmp_path / "gpt2", "not plain floats: h.1.mlp.c_fc.weight I8")
    MAKERS["bert"]().save_pretrained(tmp_path / "bert")
    tensors = load_file(tmp_path / "bert" / "model.safetensors")
    tensors["bert.embeddings.position_ids"] = torch.arange(512).unsqueeze(0)
    save_file(tensors, tmp_path / "bert" / "model.safetensors", {"format": "pt"})
    load_model(open_source(tmp_path / "bert"))


def test_the_other_heads_of_an_encoder_are_left_out_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    BertForPreTraining(BertConfig(**SIZES, architectures=["BertForMaskedLM"])).save_pretrained(tmp_path)
    text = (tmp_path / "config.json").read_text().replace("BertForPreTraining", "BertForMaskedLM")
    (tmp_path / "config.json").write_text(text)
    with caplog.at_level(logging.WARNING):
        load_model(open_source(tmp_path))
    assert "left out, as a BertForMaskedLM has no such part: bert.pooler.dense.bias" in caplog.text
    assert "cls.seq_relationship.weight" in caplog.text


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("head", ["absent", "equal", "differs"])
def test_tied_is_what_the_file_says(family: str, head: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    tied: PreTrainedModel = (
        LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True)) if family == "llama" else MAKERS["gpt2"]()
    )
    tied.save_pretrained(tmp_path / "model")
    embedding = next(name for name, one in tied.named_parameters() if one is tied.get_input_embeddings().weight)
    if head != "absent":
        weight = tied.get_input_embeddings().weight.detach().clone() + (head == "differs")
        edit(tmp_path / "model", lambda tensors, name: tensors.update({"lm_head.weight": weight}))
    source = open_source(tmp_path / "model")
    for one in (source, open_source(tmp_path / "model", weights=False)):
        assert one.config.tie_word_embeddings is (head != "differs")
    model, shapes = load_model(source), meta_model(source)
    for one in (model, shapes):
        assert (one.get_output_embeddings().weight is one.get_input_embeddings().weight) is (head != "differs")
    save_checkpoint(model, arch_for(model.config).shapes(model), tmp_path / "out")
    again = open_source(tmp_path / "out")
    assert again.config.tie_word_embeddings is (head != "differs")
    assert ("lm_head.weight" in again.tensors) is (head == "differs") and embedding in again.tensors
    ids = torch.arange(6).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(load_model(again)(ids).logits, model(ids).logits)


def test_an_absent_head_that_the_config_does_not_tie_is_missing_with_its_cure(tmp_path: Path) -> None:
    GPT2LMHeadModel(
        GPT2Config(vocab_size=31, n_embd=16, n_layer=2, n_head=2, n_positions=8, tie_word_embeddings=False)
    ).save_pretrained(tmp_path)
    edit(tmp_path, lambda tensors, name: tensors.pop("lm_head.weight"))
    refused(tmp_path, "missing: lm_head.weight", "write tie_word_embeddings: true in its config")
