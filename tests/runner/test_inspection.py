"""Mixtures of experts are counted from their shapes, without a trace; the oracle is arithmetic on their configs, and
what was published of Mixtral 8x7B.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import Call
from transformers import CONFIG_MAPPING

from compresso.runner import inspection
from compresso.runner.inspection import inspect

SIZES = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FINE = {"moe_intermediate_size": 32, "num_experts": 4}
LATENT = {
    "moe_intermediate_size": 32,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_group": 1,
    "topk_group": 1,
}
MIXTURES: dict[str, tuple[dict[str, Any], int, int]] = {
    "mixtral": ({"num_local_experts": 4}, 96, 3),
    "qwen2_moe": (FINE | {"shared_expert_intermediate_size": 48}, 32, 3),
    "qwen3_moe": (FINE, 32, 3),
    "olmoe": ({"num_experts": 4}, 96, 3),
    "granitemoe": ({"num_local_experts": 4}, 96, 3),
    "phimoe": ({"num_local_experts": 4}, 96, 3),
    "deepseek_v2": (LATENT, 32, 2),
    "deepseek_v3": (LATENT, 32, 2),
}
"""Fields, the width of an expert, and the layers that have experts."""
UNDESCRIBED = ("granitemoe", "phimoe")


@pytest.fixture(autouse=True)
def no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspection, "discover", lambda model: pytest.fail("a mixture of experts was traced"))


@pytest.mark.parametrize("verb", ["inspect", "plan"])
def test_weights_that_a_run_refuses_are_said_where_they_are_not_read(
    verb: str, call: Call, tiny_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "cut"
    shutil.copytree(tiny_folder, folder)
    planned = ("magnitude-structured", "--model", folder, "--parameters", "50K", "--device", "h100")
    given = (verb, *((folder,) if verb == "inspect" else planned))
    code, whole, _ = call(*given)
    assert code == 0 and not caplog.messages
    os.truncate(folder / "model.safetensors", 9000)
    code, out, _ = call(*given)
    assert code == 0 and out == whole and len(caplog.messages) == 1
    assert "model.safetensors cannot be read: " in caplog.text and "it is truncated" in caplog.text
    assert "What is counted here is what the config says." in caplog.text
    caplog.clear()
    assert call("inspect", folder / "config.json")[0] == 0
    (folder / "model.safetensors").unlink()
    assert call(*given)[:2] == (0, whole) and not caplog.messages


def written(family: str, folder: Path, **fields: Any) -> Path:
    path = folder / "config.json"
    path.write_text(CONFIG_MAPPING[family](**(SIZES | fields)).to_json_string())
    return path


@pytest.mark.parametrize("family", MIXTURES)
def test_experts_and_what_a_token_meets_are_counted(family: str, tmp_path: Path) -> None:
    fields, width, layers = MIXTURES[family]
    facts = inspect(written(family, tmp_path, **fields))
    one = 3 * 64 * width  # gate, up and down
    parameters = facts["parameters"]
    assert parameters["experts"] == layers * 4 * one
    assert parameters["total"] - parameters["active"] == layers * 2 * one
    config = json.loads((tmp_path / "config.json").read_text())
    assert parameters["embeddings"] == (1 if config["tie_word_embeddings"] else 2) * 128 * 64
    assert facts["experts"] == {"layers": layers, "each": 4, "per_token": 2}
    assert facts["architecture"] == family
    rows = {row["kind"]: row for row in facts["axes"]}
    if family in UNDESCRIBED:
        assert not rows and facts["stays"]
    else:
        assert (rows["expert"]["count"], rows["expert"]["size"]) == (layers, 4)
        assert rows["expert"]["parameters_per_unit"] == one + 64 and "stays" not in facts


def test_mixtral_8x7b_has_the_published_size(tmp_path: Path, call: Call) -> None:
    """46.7e9 parameters, of which a token meets 12.9e9 (arXiv 2401.04088)."""
    path = written(
        "mixtral",
        tmp_path,
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
    )
    code, out, _ = call("inspect", path)
    assert code == 0 and "46,702,792,704 parameters" in out and "12,879,925,248 active" in " ".join(out.split())
    assert "8 experts in each of 32 layers, 2 chosen a token" in out
