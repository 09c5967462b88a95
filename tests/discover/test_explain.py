"""What `compresso inspect` says about a model nobody described, and about one axis."""

from pathlib import Path

import pytest
from transformers import LlamaConfig, Starcoder2Config

from compresso.commands.inspect import show
from compresso.errors import ArchError
from compresso.runner.inspection import inspect

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "vocab_size": 64,
}
STARCODER = Starcoder2Config(**SIZES, num_key_value_heads=4, bos_token_id=1, eos_token_id=2)


@pytest.fixture
def starcoder(tmp_path: Path) -> Path:
    STARCODER.save_pretrained(tmp_path)
    return tmp_path / "config.json"


def test_an_undescribed_architecture_is_traced(starcoder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts = inspect(starcoder)
    head, channel = 3 * 8 * 32 + 3 * 8 + 8 * 32, 32 + 1 + 32
    by_kind = {row["kind"]: row for row in facts["axes"]}
    assert by_kind["head"] == {"kind": "head", "count": 2, "size": 4, "parameters_per_unit": head}
    assert by_kind["channel"] == {"kind": "channel", "count": 2, "size": 128, "parameters_per_unit": channel}
    assert by_kind["attention"]["parameters_per_unit"] == 4 * head + 32 + 2 * 32  # the output's bias, and the norm
    layer = by_kind["attention"]["parameters_per_unit"] + by_kind["mlp"]["parameters_per_unit"]
    assert by_kind["layer"]["parameters_per_unit"] == layer
    assert facts["parameters"] == {"total": 2 * layer + 64 * 32 + 2 * 32}
    assert any("input_layernorm (native_layer_norm)" in sentence for sentence in facts["stays"])
    show(facts, as_json=False)
    assert "nobody described this architecture" in capsys.readouterr().out


def test_explain_lists_what_leaves_together(starcoder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts = inspect(starcoder, "layers.1.heads")
    said = facts["explained"]
    assert {(t["name"].removeprefix("model.layers.1.self_attn."), t["dim"], t["entries"]) for t in said["tensors"]} == {
        *((f"{one}_proj.{tensor}", 0, 8) for one in "qkv" for tensor in ("weight", "bias")),
        ("o_proj.weight", 1, 8),
    }
    assert said["masked_at"] == ["input of model.layers.1.self_attn.o_proj"]
    assert "read at model.layers.1.self_attn.o_proj (addmm)" in {t["why"] for t in said["tensors"]}
    show(facts, as_json=False)
    assert "What leaves with a unit of layers.1.heads" in capsys.readouterr().out


def test_explain_says_why_a_parameter_stays(starcoder: Path) -> None:
    (row, column) = inspect(starcoder, "model.embed_tokens.weight")["explained"]["stays"]
    assert "looked up by number" in row and "averaged over" in column


def test_a_described_architecture_is_explained_too(tmp_path: Path) -> None:
    LlamaConfig(**SIZES).save_pretrained(tmp_path)
    facts = inspect(tmp_path / "config.json", "hidden")
    assert "blocks" in facts["parameters"] and "stays" not in facts
    assert facts["explained"]["folded_norms"][-1] == "model.norm"
    with pytest.raises(ArchError, match="no axis is called 'hiden'; did you mean 'hidden'"):
        inspect(tmp_path / "config.json", "hiden")
