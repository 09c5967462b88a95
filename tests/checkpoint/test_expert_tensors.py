"""Tensors of experts that no stack can be made of are named, with their shapes; and what a run refuses of weights is
said by commands that count what the config says: surplus layers, missing tensors and other shapes.
"""

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from compresso.checkpoint.source import open_source
from compresso.commands.plan import plan
from compresso.errors import CheckpointError
from compresso.runner.inspection import inspect
from tests.arch.conftest import MIXTURES, build

APART = [name for name in MIXTURES if name != "moe_gpt_oss"]
"""Families whose files hold a tensor an expert; gpt-oss stores stacks."""


@pytest.fixture
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    torch.manual_seed(0)
    build(request.param).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def an_expert(folder: Path) -> str:
    """The first tensor of an expert of the last layer."""
    names = sorted(name for name in load_file(folder / "model.safetensors") if ".experts.1." in name)
    return next(name for name in names if ".layers.3." in name)


def said(folder: Path, words: str, caplog: pytest.LogCaptureFixture) -> None:
    """Refused where weights are wanted, and said where the config is enough."""
    with pytest.raises(CheckpointError) as raised:
        open_source(folder)
    assert words in str(raised.value) and "CONVERSION" not in str(raised.value)
    for counted in (inspect, lambda path: plan("wanda/50", str(path))):
        caplog.clear()
        counted(folder)
        assert [words in message for message in caplog.messages] == [True]
        assert caplog.messages[0].endswith("What is counted here is what the config says.")


@pytest.mark.parametrize("folder", APART, indirect=True)
def test_an_expert_without_a_tensor_or_with_another_shape_is_named(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    name = an_expert(folder)
    weight = load_file(folder / "model.safetensors")[name]
    rows, columns = weight.shape
    with caplog.at_level(logging.WARNING):
        edit(folder, lambda tensors: tensors.update({name: weight[:, :-1].contiguous()}))
        said(folder, f"wrong shape: {name} [{rows}, {columns - 1}] instead of [{rows}, {columns}].", caplog)
        edit(folder, lambda tensors: tensors.__delitem__(name))
        said(folder, f"missing: {name}.", caplog)


@pytest.mark.parametrize("folder", ["moe_mixtral", "llama_gqa"], indirect=True)
def test_layers_that_the_config_does_not_count_are_said(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_hidden_layers": 3, "layer_types": None}))
    with caplog.at_level(logging.WARNING):
        said(folder, "unexpected: model.layers.3.input_layernorm.weight", caplog)
