"""OPT, BERT, ViT, Gemma, GLM, BLOOM and Phi: what their own config holds is written and reopened; what it does not hold
is refused with what would do.
"""

from pathlib import Path

import pytest
import torch
from transformers import Phi3Config, Phi3ForCausalLM

from compresso.arch.base import arch_for
from compresso.core.plan import Plan
from compresso.edit.shrink import shrink_
from compresso.errors import ExportError
from compresso.formats.hf import reopen_and_compare, save_checkpoint
from compresso.loading import load
from compresso.runner.inspection import inspect
from tests.arch.conftest import CLASSES, POST_NORM, build

INPUTS = torch.arange(2, 26).reshape(2, 12)
PIXELS = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def channels(keep: int, layers: range = range(4)) -> dict[str, tuple[int, ...]]:
    return {f"layers.{i}.channels": tuple(range(keep)) for i in layers}


def test_heads_that_a_config_refuses_are_refused_in_words(tmp_path: Path) -> None:
    model = build("gemma2")
    model.config.num_attention_heads = 7
    with pytest.raises(
        ExportError, match=r"cannot hold this gemma2: .*not a multiple of the number of attention heads \(7\)"
    ):
        save_checkpoint(model, arch_for(model.config).shapes(model), tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        *("opt", "bert", "bert_classifier", "bert_bare", "vit", "vit_bare", "gemma2", "gemma3"),
        *("roberta", "roberta_classifier", "distilbert", "distilbert_finder"),
        *("glm", "glm4_tied", "bloom", "phi", "phi_gqa_normed"),
    ],
)
def test_uniform_widths_are_written_and_reopened(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = build(name).eval()
    arch = arch_for(model.config)
    kept: dict[str, tuple[int, ...]] = {} if name == "bloom" else channels(50)
    kept |= {f"layers.{i}.heads": (1,) for i in range(4)} if name.startswith(("gemma", "glm")) or name == "phi" else {}
    kept |= {"hidden": tuple(range(60))} if name.startswith("glm") else {}
    kept |= {} if name in POST_NORM else {"layers": (0, 2, 3)}
    shrink_(model, arch.axes(model), Plan(kept))
    assert save_checkpoint(model, arch.shapes(model), tmp_path / "out") == "uniform"
    given = PIXELS if name.startswith("vit") else INPUTS
    if name in ("bert", "distilbert", "roberta_classifier", "vit_bare", "gemma3", "glm4_tied", "bloom", "phi"):
        reopen_and_compare(tmp_path / "out", model, given, atol=1e-5)
    for path in (tmp_path / "out", tmp_path / "out" / "config.json"):
        assert inspect(path)["parameters"]["total"] == model.num_parameters()
    loaded = load(tmp_path / "out").model
    assert type(loaded) is CLASSES.get(name, type(model)) and arch.shapes(loaded) == arch.shapes(model)
    with torch.no_grad():
        assert (loaded(given)[0] - model(given)[0]).abs().max() < 1e-5


@pytest.mark.parametrize("name", ["opt", "bert", "roberta", "distilbert", "vit", "phi_gqa_normed"])
def test_head_counts_that_a_config_without_head_dim_cannot_hold(name: str, tmp_path: Path) -> None:
    model = build(name)
    arch = arch_for(model.config)
    shrink_(model, arch.axes(model), Plan({f"layers.{i}.heads": (0, 1) for i in range(4)}))
    with pytest.raises(ExportError, match="no head_dim, so keep all heads and prune FFN channels"):
        save_checkpoint(model, arch.shapes(model), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("removed", [channels(50), {"attention": (0, 1, 3)}], ids=["channels", "attention"])
def test_a_config_without_a_field_for_the_ffn_s_width(removed: dict[str, tuple[int, ...]], tmp_path: Path) -> None:
    model = build("bloom")
    arch = arch_for(model.config)
    shrink_(model, arch.axes(model), Plan(removed))
    with pytest.raises(ExportError, match=r"cannot hold this bloom: .*drop whole layers"):
        save_checkpoint(model, arch.shapes(model), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("removed", ["heads", "hidden"])
def test_a_longrope_phi_3_says_what_to_keep_in_words_of_ours(removed: str, tmp_path: Path) -> None:
    """Its config holds one factor for every second entry of a head, whose size it takes from hidden size and heads."""
    model = longrope_phi_3()
    arch = arch_for(model.config)
    kept = {f"layers.{i}.heads": (0,) for i in range(4)} if removed == "heads" else {"hidden": tuple(range(48))}
    shrink_(model, arch.axes(model), Plan(kept))
    with pytest.raises(ExportError) as raised:
        save_checkpoint(model, arch.shapes(model), tmp_path / "out")
    said = str(raised.value)
    assert "short_factor field must have length" in said and "validat" not in said
    assert "keep all heads and hidden dimensions and prune FFN channels, such as by kinds: [channel]" in said
    model = longrope_phi_3()
    shrink_(model, arch.axes(model), Plan(channels(50)))
    assert save_checkpoint(model, arch.shapes(model), tmp_path / "out") == "uniform"


def longrope_phi_3() -> Phi3ForCausalLM:
    return Phi3ForCausalLM(
        Phi3Config(
            vocab_size=64,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            original_max_position_embeddings=64,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            rope_parameters={
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "short_factor": [1.0] * 8,
                "long_factor": [2.0] * 8,
            },
        )
    ).eval()


def test_what_else_is_refused(tmp_path: Path) -> None:
    model = build("bert")
    arch = arch_for(model.config)
    for layout in ("native", "padded"):
        with pytest.raises(ExportError, match=f"{layout} is not written for model_type 'bert'. Use uniform"):
            save_checkpoint(model, arch.shapes(model), tmp_path / "out", layout)  # type: ignore[arg-type]
    shrink_(model, arch.axes(model), Plan(channels(9, range(1, 2))))
    with pytest.raises(ExportError, match=r"layers\.1 has 9 channels, layers\.0 has 176; keep as many"):
        save_checkpoint(model, arch.shapes(model), tmp_path / "out")
    shrink_(model, arch.axes(model), Plan({"mlp": (0, 1, 3)}))
    with pytest.raises(ExportError, match=r"keep as many in every layer|no channels"):
        save_checkpoint(model, arch.shapes(model), tmp_path / "out")
