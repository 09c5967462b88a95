"""What `compresso inspect` says about a model nobody described, and about one axis."""

from pathlib import Path

import pytest
from transformers import GPT2Config, LlamaConfig

from compresso.errors import ArchError
from compresso.inspection import inspect, show

GPT2 = GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=16, vocab_size=64, bos_token_id=1, eos_token_id=2)


@pytest.fixture
def gpt2(tmp_path: Path) -> Path:
    GPT2.save_pretrained(tmp_path)
    return tmp_path / "config.json"


def test_an_undescribed_architecture_is_traced(gpt2: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts = inspect(gpt2)
    head, channel = 3 * 8 * 32 + 3 * 8 + 8 * 32, 32 + 1 + 32
    by_kind = {row["kind"]: row for row in facts["axes"]}
    assert by_kind["head"] == {"kind": "head", "count": 2, "size": 4, "parameters_per_unit": head}
    assert by_kind["channel"] == {"kind": "channel", "count": 2, "size": 128, "parameters_per_unit": channel}
    assert by_kind["attention"]["parameters_per_unit"] == 4 * head + 32 + 2 * 32  # the output's bias, and the norm
    layer = by_kind["attention"]["parameters_per_unit"] + by_kind["mlp"]["parameters_per_unit"]
    assert by_kind["layer"]["parameters_per_unit"] == layer
    assert facts["parameters"] == {"total": 2 * layer + (64 + 16) * 32 + 2 * 32}
    assert any("ln_1 (native_layer_norm)" in sentence for sentence in facts["stays"])
    show(facts, as_json=False)
    assert "nobody described this architecture" in capsys.readouterr().out


def test_explain_lists_what_leaves_together(gpt2: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts = inspect(gpt2, "layers.1.heads")
    said = facts["explained"]
    assert {(t["name"].removeprefix("transformer.h.1.attn."), t["dim"], t["entries"]) for t in said["tensors"]} == {
        ("c_attn.weight", 1, 24),
        ("c_attn.bias", 0, 24),
        ("c_proj.weight", 0, 8),
    }
    assert said["masked_at"] == ["input of transformer.h.1.attn.c_proj"]
    assert "read at transformer.h.1.attn.c_proj (addmm)" in {t["why"] for t in said["tensors"]}
    show(facts, as_json=False)
    assert "What leaves with a unit of layers.1.heads" in capsys.readouterr().out


def test_explain_says_why_a_parameter_stays(gpt2: Path) -> None:
    (row, column) = inspect(gpt2, "transformer.wte.weight")["explained"]["stays"]
    assert "looked up by number" in row and "averaged over" in column


def test_a_described_architecture_is_explained_too(tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 64}
    LlamaConfig(**sizes).save_pretrained(tmp_path)
    facts = inspect(tmp_path / "config.json", "hidden")
    assert "blocks" in facts["parameters"] and "stays" not in facts
    assert facts["explained"]["folded_norms"][-1] == "model.norm"
    with pytest.raises(ArchError, match="no axis is called 'hiden'; did you mean 'hidden'"):
        inspect(tmp_path / "config.json", "hiden")
