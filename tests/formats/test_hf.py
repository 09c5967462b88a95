"""What is written computes what the live model computes, for every family, layout and kind of missing sub-layer;
oracle: narrow.py.
"""

import copy
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

import compresso  # noqa: F401  # registers the native classes
from compresso.arch.base import LayerShape
from compresso.checkpoint.load import load_model
from compresso.checkpoint.source import open_source
from compresso.errors import CheckpointError, ExportError, NumericError, ResourceError
from compresso.formats import reopen
from compresso.formats.hf import reopen_and_compare, save_checkpoint

from .narrow import EVEN, FAMILIES, NO_FIRST_ATTENTION, SHAPES, UNEVEN, n_parameters, narrow_model, some_ids


def reopened(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def stored(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a mapping
    return tensors


@torch.no_grad()
def difference(one: PreTrainedModel, other: PreTrainedModel, **inputs: Any) -> float:
    inputs = inputs or {"input_ids": some_ids()}
    return float((one(**inputs).logits - other(**inputs).logits).abs().max())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", SHAPES)
def test_native_is_the_live_model(family: str, name: str, tmp_path: Path) -> None:
    live = narrow_model(family, SHAPES[name])
    assert save_checkpoint(live, SHAPES[name], tmp_path / "out", "native") == "native"
    again = reopened(tmp_path / "out")
    assert again.config.model_type == f"compresso_{family}"
    assert difference(live, again) <= 1e-6
    assert (
        sum(tensor.numel() for tensor in stored(tmp_path / "out").values()) == n_parameters(live) == n_parameters(again)
    )
    assert set(stored(tmp_path / "out")) == set(live.state_dict())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", SHAPES)
def test_padded_is_plain_and_equal(family: str, name: str, tmp_path: Path) -> None:
    live = narrow_model(family, SHAPES[name])
    assert save_checkpoint(live, SHAPES[name], tmp_path / "out", "padded") == "padded"
    again = reopened(tmp_path / "out")
    assert again.config.model_type in (family, "mistral")
    assert "auto_map" not in json.loads((tmp_path / "out/config.json").read_text())
    assert difference(live, again) <= 1e-5
    generated = again.generate(some_ids(), max_new_tokens=4, do_sample=False)
    assert torch.equal(generated, again.generate(some_ids(), max_new_tokens=4, do_sample=False, use_cache=False))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("heads", [4, 5])
def test_uniform_is_plain(family: str, heads: int, tmp_path: Path) -> None:
    shapes = (
        LayerShape(heads, 1, 40),
    ) * 2  # 5 heads do not divide the hidden size of 48, which Llama's own config refuses
    live = narrow_model(family, shapes)
    assert save_checkpoint(live, shapes, tmp_path / "out") == "uniform"
    again = reopened(tmp_path / "out")
    assert again.config.model_type == ("mistral" if (family, heads) == ("llama", 5) else family)
    assert getattr(again.config, "sliding_window", None) is None or family == "mistral"
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert (config["head_dim"], config["num_attention_heads"], config["intermediate_size"], config["dtype"]) == (
        8,
        heads,
        40,
        "float32",
    )
    assert difference(live, again) <= 1e-6
    assert n_parameters(live) == n_parameters(again)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("layout", ["uniform", "padded", "native"])
def test_head_is_written_once_if_tied(layout: Any, tied: bool, tmp_path: Path) -> None:
    live = narrow_model("llama", EVEN, tie_word_embeddings=tied)
    save_checkpoint(live, EVEN, tmp_path / "out", layout)
    again = reopened(tmp_path / "out")
    assert ("lm_head.weight" in stored(tmp_path / "out")) != tied
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == tied
    assert difference(live, again) <= 1e-5


def test_head_untied_after_the_config_said_tied(tmp_path: Path) -> None:
    live = narrow_model("llama", EVEN, tie_word_embeddings=True)
    live.lm_head.weight = torch.nn.Parameter(torch.randn_like(live.lm_head.weight))
    save_checkpoint(live, EVEN, tmp_path / "out")
    assert difference(live, reopened(tmp_path / "out")) <= 1e-6


@pytest.mark.parametrize("layout", ["padded", "native"])
def test_biases(layout: Any, tmp_path: Path) -> None:
    live = narrow_model("llama", SHAPES["no FFN"], attention_bias=True, mlp_bias=True)
    save_checkpoint(live, SHAPES["no FFN"], tmp_path / "out", layout)
    assert difference(live, reopened(tmp_path / "out")) <= 1e-5
    live = narrow_model("qwen3", UNEVEN, attention_bias=True)
    save_checkpoint(live, UNEVEN, tmp_path / "qwen3", layout)
    assert difference(live, reopened(tmp_path / "qwen3")) <= 1e-5


def test_rope_scaling_and_activation_are_kept(tmp_path: Path) -> None:
    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    live = narrow_model(
        "llama", UNEVEN, rope_parameters=rope | {"original_max_position_embeddings": 32}, hidden_act="gelu"
    )
    for layout in ("padded", "native"):
        save_checkpoint(live, UNEVEN, tmp_path / layout, layout)
        assert difference(live, reopened(tmp_path / layout)) <= 1e-5


def scale_hidden_epsilon(model: PreTrainedModel, factor: float) -> None:
    """What pruning the hidden size does to the norms that run over it."""
    for name, module in model.named_modules():
        if name.endswith(("layernorm", "model.norm")) and hasattr(module, "variance_epsilon"):
            module.variance_epsilon *= factor


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("layout", ["padded", "native"])
def test_epsilon_is_that_of_the_live_norms(family: str, tied: bool, layout: Any, tmp_path: Path) -> None:
    live = narrow_model(family, UNEVEN, rms_norm_eps=0.05, tie_word_embeddings=tied)
    before = copy.deepcopy(live)
    scale_hidden_epsilon(live, 2.5)
    assert difference(live, before) > 1e-3  # large enough to be seen if it were lost
    save_checkpoint(live, UNEVEN, tmp_path / "out", layout)
    assert difference(live, reopened(tmp_path / "out")) <= 2e-5


def in_bfloat16(model: PreTrainedModel) -> PreTrainedModel:
    """Parameters only: `model.bfloat16()` would round the rotary frequencies too, which no loader does."""
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    return model


def test_two_epsilons_are_refused(tmp_path: Path) -> None:
    live = narrow_model("llama", EVEN)
    live.model.norm.variance_epsilon = 1e-3
    with pytest.raises(ExportError, match=r"different epsilons .*model\.norm 0\.001"):
        save_checkpoint(live, EVEN, tmp_path / "out")


def test_qwen3_16_bit_with_two_epsilons_goes_native(tmp_path: Path) -> None:
    live = in_bfloat16(narrow_model("qwen3", EVEN))
    scale_hidden_epsilon(live, 2.0)
    with pytest.raises(ExportError, match="16-bit weights cannot absorb"):
        save_checkpoint(live, EVEN, tmp_path / "out", "padded")
    assert save_checkpoint(live, EVEN, tmp_path / "out") == "native"
    assert difference(live, reopened(tmp_path / "out")) == 0


def test_sliding_windows(tmp_path: Path) -> None:
    ids = {"input_ids": some_ids(2, 24)}
    all_sliding = {"sliding_window": 5}
    mixed = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}  # layer 0 full, the rest sliding
    for name, config in (("mistral", all_sliding), ("qwen2", mixed)):
        live = narrow_model(name, NO_FIRST_ATTENTION, **config)
        save_checkpoint(live, NO_FIRST_ATTENTION, tmp_path / name, "native")
        again = reopened(tmp_path / name)
        assert difference(live, again, **ids) <= 1e-6
        cached = again.generate(**ids, max_new_tokens=6, do_sample=False)
        assert torch.equal(cached, again.generate(**ids, max_new_tokens=6, do_sample=False, use_cache=False))


def test_uniform_refusal_names_the_layer_and_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(
        ExportError, match=r"layers\.1 has 6 query heads, layers\.0 has 4\. Use layout native .* or padded"
    ):
        save_checkpoint(narrow_model("llama", UNEVEN), UNEVEN, tmp_path / "out", "uniform")
    with pytest.raises(ExportError, match=r"layers\.1 has no query heads"):
        save_checkpoint(
            narrow_model("llama", SHAPES["no middle attention"]),
            SHAPES["no middle attention"],
            tmp_path / "out",
            "uniform",
        )
    shapes = (LayerShape(5, 1, 40),) * 2
    live = narrow_model("llama", shapes, attention_bias=True)
    with pytest.raises(ExportError, match=r"5 query heads do not divide the hidden size 48.*Use layout native\."):
        save_checkpoint(live, shapes, tmp_path / "out", "uniform")
    assert save_checkpoint(live, shapes, tmp_path / "out") == "native"
    with pytest.raises(ExportError, match="unknown layout 'flat'"):
        save_checkpoint(live, shapes, tmp_path / "other", "flat")  # type: ignore[arg-type]


def test_shapes_must_be_those_of_the_model(tmp_path: Path) -> None:
    live = narrow_model("llama", EVEN)
    with pytest.raises(ExportError, match=r"layers\.0\.self_attn\.q_proj has 32 rows, its shape says 48"):
        save_checkpoint(live, (LayerShape(6, 2, 40),) * 4, tmp_path / "out")
    with pytest.raises(ExportError, match="3 layer shapes were given for a model of 4 layers"):
        save_checkpoint(live, EVEN[:3], tmp_path / "out")
    live.model.layers[0].mlp.extra = torch.nn.Linear(2, 2)
    with pytest.raises(ExportError, match=r"mlp\.extra\.bias is \(2,\), wanted none"):
        save_checkpoint(live, EVEN, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_nan_never_reaches_disk(tmp_path: Path) -> None:
    live = narrow_model("llama", EVEN)
    live.model.layers[1].mlp.up_proj.weight.data[0, 0] = 1e6
    with pytest.raises(NumericError, match=r"layers\.1\.mlp\.up_proj\.weight' holds NaN or Inf in float16"):
        save_checkpoint(live, EVEN, tmp_path / "out", dtype=torch.float16)
    live.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(NumericError):
        save_checkpoint(live, EVEN, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_bfloat16_and_shards(tmp_path: Path) -> None:
    live = narrow_model("qwen2", UNEVEN)
    save_checkpoint(live, UNEVEN, tmp_path / "out", dtype=torch.bfloat16, max_shard_size=20_000)
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 2
    assert live.dtype == torch.float32
    again = reopened(tmp_path / "out")
    assert again.dtype == torch.bfloat16 == AutoConfig.from_pretrained(tmp_path / "out").dtype
    assert difference(in_bfloat16(live), again) == 0


def test_bytes_on_disk(tmp_path: Path) -> None:
    live = narrow_model("llama", UNEVEN, hidden_size=512, num_attention_heads=8, num_key_value_heads=4, vocab_size=2000)
    save_checkpoint(live, UNEVEN, tmp_path / "out", dtype=torch.bfloat16)
    size = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    assert n_parameters(live) > 2_000_000
    assert size <= 1.02 * 2 * n_parameters(live)


def test_weights_that_are_views_of_one_tensor(tmp_path: Path) -> None:
    live = narrow_model("llama", EVEN)
    attention = live.model.layers[1].self_attn
    fused = torch.cat([attention.k_proj.weight.data, attention.v_proj.weight.data])
    attention.k_proj.weight.data, attention.v_proj.weight.data = fused.chunk(2)
    live.model.layers[0].mlp.up_proj.weight.data = live.model.layers[0].mlp.up_proj.weight.data.t().contiguous().t()
    save_checkpoint(live, EVEN, tmp_path / "out")
    assert difference(live, reopened(tmp_path / "out")) <= 1e-6
    modes = {path.stat().st_mode for path in (tmp_path / "out").iterdir()}
    assert len(modes) == 1  # weights as readable as the rest


def test_native_can_be_written_again(tmp_path: Path) -> None:
    live = narrow_model("qwen3", UNEVEN)
    save_checkpoint(live, UNEVEN, tmp_path / "once", "native")
    again = reopened(tmp_path / "once")
    for layout in ("native", "padded"):
        save_checkpoint(again, UNEVEN, tmp_path / layout, layout)
        assert difference(live, reopened(tmp_path / layout)) <= 1e-5


def test_everything_else_is_saved(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    live = narrow_model("llama", UNEVEN)
    live.generation_config.temperature = 0.5
    save_checkpoint(live, UNEVEN, tmp_path / "out", tokenizer=tokenizer, files={"plan.json": "{}", "README.md": "# x"})
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {
        "plan.json",
        "README.md",
        "modeling_compresso.py",
        "generation_config.json",
        "tokenizer.json",
        "chat_template.jinja",
    } <= names
    source = open_source(tmp_path / "out")
    assert load_model(source).generation_config.temperature == 0.5
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert list(config["auto_map"]) == ["AutoConfig", "AutoModel", "AutoModelForCausalLM"]
    assert config["per_layer_config"] == {
        "0": {"intermediate_size": 40, "num_attention_heads": 4, "num_key_value_heads": 2},
        "1": {"intermediate_size": 24},
        "2": {"num_attention_heads": 2, "num_key_value_heads": 1},
        "3": {"intermediate_size": 8, "num_attention_heads": 4, "num_key_value_heads": 2},
    }
    with pytest.raises(CheckpointError, match="not empty"):
        save_checkpoint(live, UNEVEN, tmp_path / "out")
    with pytest.raises(ExportError, match="further file"):
        save_checkpoint(live, UNEVEN, tmp_path / "out", files={"config.json": "{}"}, force=True)
    assert {path.name for path in (tmp_path / "out").iterdir()} == names


@pytest.mark.slow
@pytest.mark.usefixtures("real_processes")
def test_reopen_in_a_fresh_process(tmp_path: Path) -> None:
    live = narrow_model("qwen2", NO_FIRST_ATTENTION)
    save_checkpoint(live, NO_FIRST_ATTENTION, tmp_path / "out", dtype=torch.bfloat16)
    weight = live.model.layers[1].mlp.up_proj.weight
    before = weight.data.clone()
    assert reopen_and_compare(tmp_path / "out", live, some_ids(), 1e-5) <= 1e-5
    assert torch.equal(weight.data, before)


def test_reopening_sees_a_difference_and_a_broken_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    live = narrow_model("llama", EVEN)
    save_checkpoint(live, EVEN, tmp_path / "out")

    def in_this_process(command: list[Any], **_: Any) -> subprocess.CompletedProcess[str]:
        reopen._main(*(str(part) for part in command[4:]))
        return subprocess.CompletedProcess(command, 0, "", "")

    def killed(command: list[Any], **_: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, -9, "", "")

    def failed(command: list[Any], **_: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, "", "Traceback\nOSError: no file")

    monkeypatch.setattr(subprocess, "run", in_this_process)
    assert reopen_and_compare(tmp_path / "out", live, some_ids(), 1e-6) <= 1e-6
    live.model.layers[1].mlp.up_proj.weight.data[0] += 0.5
    with pytest.raises(ExportError, match="logits differ by up to"):
        reopen_and_compare(tmp_path / "out", live, some_ids(), 1e-5)
    live.model.layers[1].mlp.up_proj.weight.data[0] = float("nan")
    with pytest.raises(ExportError, match="differ by up to nan"):
        reopen_and_compare(tmp_path / "out", live, some_ids(), 1e-5)
    monkeypatch.setattr(subprocess, "run", killed)
    with pytest.raises(ResourceError):
        reopen_and_compare(tmp_path / "out", live, some_ids(), 1e-5)
    monkeypatch.setattr(subprocess, "run", failed)
    with pytest.raises(ExportError, match="does not open in a fresh process: OSError: no file"):
        reopen_and_compare(tmp_path / "out", live, some_ids(), 1e-5)
