"""A count of 0 in a config, and numbers of experts that do not fit each other, are refused by name, value and what is
wanted before anything is built of them: by every command, for every family, under the names that it has.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedConfig, SegformerConfig

from compresso.arch.moe_config import COUNTS
from compresso.checkpoint.source import open_source
from compresso.commands.plan import plan
from compresso.errors import CheckpointError, CompressoError
from compresso.runner.inspection import inspect
from tests.arch.conftest import CONFIGS, MIXTURES

COMMANDS: tuple[Callable[[Path], object], ...] = (
    open_source,
    inspect,
    lambda path: plan("moe/expert-drop", str(path)),
)


def written(config: PreTrainedConfig, folder: Path, **fields: Any) -> Path:
    """A config.json with other numbers than its class would take."""
    config.save_pretrained(folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return path


def refused(path: Path, words: str) -> None:
    for command in COMMANDS:
        with pytest.raises(CheckpointError) as raised:
            command(path)
        assert words in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize("name", MIXTURES)
def test_experts_and_how_many_a_token_takes_fit_each_other(name: str, tmp_path: Path) -> None:
    config = CONFIGS[name]()
    data = json.loads(config.to_json_string(use_diff=False))
    count = next(one for one in COUNTS if one in data)
    for value in (0, -1, data[count] + 1):
        words = f"num_experts_per_tok is {value}; wanted 1 to {data[count]}, its {count}. Check the config."
        refused(written(config, tmp_path, num_experts_per_tok=value), words)
    for value in (0, -8):
        refused(
            written(config, tmp_path, **{count: value}), f"{count} is {value}; wanted at least 1. Check the config."
        )
    refused(written(config, tmp_path, **{count: 0, "num_experts_per_tok": 0}), f"{count} is 0; wanted at least 1")
    assert inspect(written(config, tmp_path))["experts"]["per_token"] == 2


def test_a_field_is_called_as_the_file_calls_it(tmp_path: Path) -> None:
    """Mixtral's class takes num_experts for num_local_experts."""
    path = written(CONFIGS["moe_mixtral"](), tmp_path)
    data = json.loads(path.read_text())
    data["num_experts"] = 0 * data.pop("num_local_experts")
    path.write_text(json.dumps(data))
    refused(path, "num_experts is 0; wanted at least 1")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"n_group": 0}, "n_group is 0; wanted at least 1, and a divisor of its 12 experts"),
        ({"n_group": 5}, "n_group is 5; wanted at least 1, and a divisor of its 12 experts"),
        ({"topk_group": 0}, "topk_group is 0; wanted 1 to 3, its n_group"),
        ({"topk_group": 4}, "topk_group is 4; wanted 1 to 3, its n_group"),
        ({"num_experts_per_tok": 9}, "room for 9 experts a token in groups of 4"),
        ({"n_shared_experts": 0}, "n_shared_experts is 0; wanted at least 1"),
        ({"moe_intermediate_size": 0}, "moe_intermediate_size is 0; wanted at least 1"),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["moe_deepseek", "moe_deepseek_v2"])
def test_groups_of_experts(name: str, fields: dict[str, int], words: str, tmp_path: Path) -> None:
    refused(written(CONFIGS[name](), tmp_path, **fields), words)


def test_groups_that_do_not_limit_may_be_any(tmp_path: Path) -> None:
    assert open_source(written(CONFIGS["moe_deepseek_v2_greedy"](), tmp_path, topk_group=0)).config.topk_group == 0


def test_a_family_that_may_have_no_experts_says_so_with_0(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"model_type": "granitemoehybrid", "num_local_experts": 0, "num_experts_per_tok": 0}')
    assert open_source(path).config.num_local_experts == 0
    path.write_text('{"model_type": "granitemoehybrid", "num_local_experts": 2, "num_experts_per_tok": 3}')
    with pytest.raises(CheckpointError, match="num_experts_per_tok is 3; wanted 1 to 2, its num_local_experts"):
        open_source(path)


@pytest.mark.parametrize(
    ("name", "field"),
    [
        *((name, field) for name in ("llama_gqa", "moe_mixtral") for field in ("num_hidden_layers", "vocab_size")),
        *(("llama_gqa", field) for field in ("hidden_size", "intermediate_size", "num_attention_heads", "head_dim")),
        *(("gpt2", field) for field in ("n_embd", "n_layer", "n_head", "n_inner", "n_positions")),
        *(("distilbert", field) for field in ("dim", "hidden_dim", "n_heads", "n_layers")),
        *(("vit", field) for field in ("num_hidden_layers", "intermediate_size", "patch_size", "image_size")),
        ("opt", "ffn_dim"),
        ("moe_olmoe", "intermediate_size"),
        ("moe_qwen3_tied", "moe_intermediate_size"),
    ],
)
def test_a_count_of_0_is_named(name: str, field: str, tmp_path: Path) -> None:
    config = next(make() for one, make in CONFIGS.items() if one.startswith(name))
    refused(written(config, tmp_path, **{field: 0}), f"{field} is 0; wanted at least 1. Check the config.")


def test_a_count_of_0_in_one_of_several_stages_is_named(tmp_path: Path) -> None:
    path = written(SegformerConfig(), tmp_path, hidden_sizes=[8, 0, 8, 8])
    refused(path, "hidden_sizes is [8, 0, 8, 8]; wanted at least 1. Check the config.")


def test_a_mixture_without_dense_layers_may_give_them_no_width(tmp_path: Path) -> None:
    """And is refused in words where it has some."""
    config = CONFIGS["moe_qwen3_tied"]()
    assert inspect(written(config, tmp_path, intermediate_size=0, mlp_only_layers=[]))["experts"]["layers"] == 4
    with pytest.raises(CompressoError, match=r"zero-element|FFN of 0 channels"):
        inspect(written(config, tmp_path, intermediate_size=0))
