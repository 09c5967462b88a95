"""Numbers of a config that cost memory or minutes are refused by name and value before its class is built."""

import json
import resource
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    CONFIG_MAPPING,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
)

from compresso.checkpoint.bounds import MOST, MOST_BUFFER_BYTES, check_numbers
from compresso.checkpoint.load import meta_model
from compresso.checkpoint.source import open_source
from compresso.commands.plan import plan
from compresso.errors import CheckpointError
from compresso.runner.inspection import inspect

TINY = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
HUGE = 10**12


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**TINY)).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def change(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize("field", ["num_attention_heads", "num_key_value_heads", "hidden_size", "intermediate_size"])
def test_a_number_below_what_it_can_count_is_named(field: str, folder: Path) -> None:
    for value in (-1, 0)[: 2 if field != "intermediate_size" else 1]:
        change(folder, **{field: value})
        with pytest.raises(CheckpointError, match=rf"config\.json: {field} is {value}; wanted at least \d\. Check the"):
            open_source(folder)


@pytest.mark.parametrize(
    "fields",
    [
        {"num_labels": HUGE},
        {"num_labels": float(HUGE)},
        {"num_labels": 10**299},
        {"num_hidden_layers": HUGE},
        {"text_config": {"num_hidden_layers": 4_096}},
        {"parts": [{"n_layer": HUGE}]},
        {"attention_types": [[["global", "local"], HUGE]]},
        {"depths": [2, 2, HUGE]},
        {"num_local_experts": HUGE},
        {"vocab_size": HUGE},
        {"hidden_size": HUGE},
        {"intermediate_size": 10**9},
        {"head_dim": HUGE},
        {"num_attention_heads": HUGE},
        {"max_position_embeddings": HUGE},
        {"n_positions": HUGE},
        {"image_size": HUGE},
    ],
    ids=lambda fields: "-".join(map(str, fields)),
)
def test_a_number_is_refused_before_the_class_is_built(
    fields: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change(folder, **fields)

    def built(*_: object, **__: object) -> None:
        raise AssertionError("a config class was built")

    monkeypatch.setattr(PreTrainedConfig, "__init__", built)
    monkeypatch.setattr(PreTrainedConfig, "from_dict", built)
    for opening in (
        lambda: open_source(folder),
        lambda: inspect(folder),
        lambda: inspect(folder / "config.json"),
        lambda: plan("wanda/50", str(folder)),
    ):
        with pytest.raises(CheckpointError, match=r"(is|are) [\d,.e+]+; at most [\d,]+ .* are built\. Check") as raised:
            opening()
        assert "\n" not in str(raised.value) and len(str(raised.value)) < 500


def test_labels_and_layers_together_with_widths(folder: Path) -> None:
    change(folder, num_hidden_layers=500, intermediate_size=200_000)
    with pytest.raises(CheckpointError, match="intermediate_size is 200,000 in 500 layers; at most 16,777,216 units"):
        open_source(folder)


@pytest.mark.parametrize(("heads", "shared"), [(4, 3), (4, 8), (3, 2)])
def test_heads_that_cannot_share_are_refused_before_anything_is_counted(heads: int, shared: int, folder: Path) -> None:
    change(folder, num_attention_heads=heads, num_key_value_heads=shared)
    wrong = f"num_attention_heads is {heads}, of which num_key_value_heads, {shared}, is no divisor"
    for opening in (lambda: open_source(folder), lambda: inspect(folder), lambda: plan("moe/block-drop", str(folder))):
        with pytest.raises(CheckpointError, match=wrong):
            opening()


def test_layers_are_compared_with_those_that_are_stored(folder: Path, tmp_path: Path) -> None:
    """Also where weights are not asked for; of a class that nobody described, too."""
    wrong = "num_hidden_layers is 500, and the weights beside it are of layers 0 to 1"
    change(folder, num_hidden_layers=500)
    for opening in (lambda: open_source(folder), lambda: inspect(folder), lambda: plan("wanda/50", str(folder))):
        with pytest.raises(CheckpointError, match=wrong):
            opening()
    config = GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=2, n_positions=8)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2", max_shard_size=4_000)
    change(tmp_path / "gpt2", n_layer=500)
    with pytest.raises(CheckpointError, match=wrong):
        inspect(tmp_path / "gpt2")


def test_a_config_alone_counts_beside_weights_that_cannot_be_read(folder: Path) -> None:
    """As a clone without its large files has them."""
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    assert inspect(folder)["architecture"] == "llama"


def test_tables_that_lie_in_no_file(tmp_path: Path) -> None:
    config = GPTNeoConfig(num_layers=2, attention_types=[[["global", "local"], 1]], hidden_size=16, num_heads=2)
    config.max_position_embeddings = 100_000
    config.save_pretrained(tmp_path)
    with pytest.raises(
        CheckpointError, match=rf"tables of 20,000,000,000 bytes.*100000\]; at most {MOST_BUFFER_BYTES:,}"
    ):
        meta_model(open_source(tmp_path / "config.json"))


def test_a_table_computed_in_python(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "distilbert", "dim": 768, "max_position_embeddings": 100000}')
    with pytest.raises(CheckpointError, match="max_position_embeddings is 100,000, each with 768 numbers"):
        open_source(tmp_path / "config.json")


def test_a_number_of_hundreds_of_digits_is_refused_as_it_is_read(folder: Path) -> None:
    change(folder, num_labels=10**400)
    with pytest.raises(CheckpointError, match="has more than 300 digits"):
        open_source(folder)


@pytest.mark.slow
def test_the_most_that_passes_takes_seconds(tmp_path: Path) -> None:
    """At the edge of each bound."""
    edge = {"num_labels": 100_000, "max_position_embeddings": 2**27, "vocab_size": 2**24}
    for fields in ({"num_hidden_layers": 512}, edge, {"intermediate_size": 2**18}):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"} | TINY | fields))
        before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
        inspect(tmp_path / "config.json")
        assert time.process_time() - began < 20
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1_000_000  # KiB


def test_what_is_usual_passes(tmp_path: Path) -> None:
    """With the numbers that a class has by default, of every sixth and of those with large ones; rope's own numbers may
    be any.
    """
    looked_at = 0
    for kind in {*list(CONFIG_MAPPING)[::6], "doge", "qwen4_exp", "llama4", "jamba", "ctrl", "bloom", "distilbert"}:
        try:
            data = json.loads(CONFIG_MAPPING[kind]().to_json_string(use_diff=False))
        except Exception:  # some classes have no default, or want a package
            continue
        check_numbers(tmp_path, data | {"rope_theta": 10**11, "seed": 2**60})
        looked_at += sum(names.search(name) is not None for _, names, _ in MOST for name in data)
    assert looked_at > 500
