"""The DeciLM form: fields as vLLM's class reads them, tensors of the sizes it builds, and the same function in a
per-layer LLaMA.

vLLM itself is not run here.
"""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from compresso.arch.base import LayerShape, arch_for
from compresso.errors import ExportError
from compresso.formats.layout import native_config
from compresso.formats.shrunk import describe
from compresso.formats.vllm_deci import deci_shapes, save_vllm_deci
from tests.formats.nano_variants import nano_tokenizer, pruned_nano
from tests.formats.narrow import narrow_model

READ = """
import sys
from transformers import AutoConfig
config = AutoConfig.from_pretrained(sys.argv[1], trust_remote_code=True)
for block in config.block_configs:
    attention, ffn = block.attention, block.ffn
    kv = 0 if attention.no_op else config.num_attention_heads // attention.n_heads_in_group
    print(kv, 0 if ffn.no_op else ffn.intermediate_size, hasattr(ffn, "ffn_mult"))
config.save_pretrained(sys.argv[2])
"""


def written(folder: Path) -> PreTrainedModel:
    """A model without its first and fourth attention and its third FFN, other widths in every layer."""
    model = pruned_nano(keep=0.7, attention=(0, 3), mlp=(2,))
    save_vllm_deci(model, arch_for(model.config).shapes(model), folder, nano_tokenizer())
    return model


@pytest.mark.slow
def test_the_config_is_read_as_vllm_reads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = written(tmp_path / "deci")
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    done = subprocess.run(
        [sys.executable, "-c", READ, str(tmp_path / "deci"), str(tmp_path / "again")],
        capture_output=True,
        text=True,
        check=True,
    )
    lines = done.stdout.strip().splitlines()[-len(model.model.layers) :]
    heads = max(shape.kv_heads for shape in arch_for(model.config).shapes(model))
    shapes = arch_for(model.config).shapes(model)
    wanted = [f"{heads if shape.kv_heads or i == 0 else 0} {shape.channels} False" for i, shape in enumerate(shapes)]
    assert lines == wanted
    config, again = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("deci", "again"))
    assert config["architectures"] == ["DeciLMForCausalLM"] and again["block_configs"] == config["block_configs"]


def test_the_tensors_compute_what_the_model_does(tmp_path: Path) -> None:
    model = written(tmp_path / "deci")
    described = describe(model, arch_for(model.config).shapes(model))
    tensors = load_file(tmp_path / "deci" / "model.safetensors")
    wide = replace(described, shapes=tuple(deci_shapes(described)))
    reader = AutoModelForCausalLM.from_config(native_config(wide)).eval()
    missing, unexpected = reader.load_state_dict(tensors, strict=False)
    assert not unexpected and missing == ["lm_head.weight"] and described.tied
    reader.tie_weights()
    ids = torch.arange(3, 60).unsqueeze(0)
    with torch.no_grad():
        torch.testing.assert_close(reader(input_ids=ids).logits, model(input_ids=ids).logits, atol=1e-4, rtol=1e-4)


def test_what_it_does_not_hold_is_named(tmp_path: Path) -> None:
    shapes = (LayerShape(4, 2, 40), LayerShape(2, 1, 24))
    with pytest.raises(ExportError, match="vllm-deci is written for llama and mistral, not for model_type 'qwen3'"):
        save_vllm_deci(narrow_model("qwen3", shapes), shapes, tmp_path / "deci")
    with pytest.raises(ExportError, match=r"\.bias is a bias, and none is written to vllm-deci"):
        save_vllm_deci(narrow_model("llama", shapes, attention_bias=True), shapes, tmp_path / "deci")
    with pytest.raises(ExportError, match=r"sliding_window is 16, and DeciLM attends to all"):
        save_vllm_deci(narrow_model("mistral", shapes, sliding_window=16), shapes, tmp_path / "deci")
    empty = (LayerShape(0, 0, 40), LayerShape(0, 0, 24))
    with pytest.raises(ExportError, match="no layer has an attention"):
        save_vllm_deci(narrow_model("llama", empty), empty, tmp_path / "deci")
    assert not list(tmp_path.iterdir())
