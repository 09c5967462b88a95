"""Rounding without data: what the stage `qat` does without training, on models that no recipe runs on. A ViT that has
learned to tell patterns keeps that at 8 bits, and loses more with each bit less.
"""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.arch.conftest import build
from torch import Tensor
from transformers import PreTrainedModel, ViTConfig, ViTForImageClassification

import compresso
from compresso.arch.base import arch_for
from compresso.core.plan import Plan
from compresso.core.quantisers import Style
from compresso.edit.patches import unpatch_
from compresso.errors import RecipeError
from compresso.formats.hf import save_checkpoint
from compresso.job import Job
from compresso.methods.qat import Qat
from compresso.sweep.post_training import quantise_
from compresso.sweep.targets import Where

CLASSES = 8
BITS = (8, 6, 4)


def images(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """One of eight faint patterns in noise, and which [n, 1, 16, 16], [n]."""
    patterns = torch.randn(CLASSES, 1, 16, 16, generator=torch.Generator().manual_seed(99))
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (n,), generator=draw)
    return torch.randn(n, 1, 16, 16, generator=draw) + 0.4 * patterns[labels], labels


@torch.no_grad()
def logits(model: PreTrainedModel, pixels: Tensor) -> Tensor:
    return model.eval()(pixel_values=pixels).logits


@pytest.fixture(scope="module")
def trained() -> PreTrainedModel:
    """A ViT of two layers that has seen 12,800 such images."""
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
    }
    shown: dict[str, Any] = {"image_size": 16, "patch_size": 4, "num_channels": 1, "num_labels": CLASSES}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = ViTForImageClassification(ViTConfig(**sizes, **shown, initializer_range=0.1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for update in range(200):
        pixels, labels = images(64, seed=update)
        loss = torch.nn.functional.cross_entropy(model(pixel_values=pixels).logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


@pytest.mark.slow
def test_a_vit_keeps_its_accuracy_at_8_bits_and_loses_more_with_each_bit_less(trained: PreTrainedModel) -> None:
    pixels, labels = images(500, seed=10_000)
    whole = logits(trained, pixels)
    right = float((whole.argmax(-1) == labels).float().mean())
    assert right > 0.8
    errors, others = dict[int, float](), dict[int, int]()
    for bits in BITS:
        model = copy.deepcopy(trained)
        quantise_(model, bits, bits)
        rounded = logits(model, pixels)
        errors[bits] = float((rounded - whole).norm() / whole.norm())
        others[bits] = int((rounded.argmax(-1) != whole.argmax(-1)).sum())
        if bits == 8:
            assert float((rounded.argmax(-1) == labels).float().mean()) >= right - 0.01
    assert errors[8] < 0.02
    assert 3 * errors[8] < errors[6] and 3 * errors[6] < errors[4]  # a step is four times as wide
    assert others[8] < others[6] < others[4]


@pytest.mark.slow
@pytest.mark.parametrize("bits", [8, 6])
def test_a_rounded_vit_is_written_and_opened_again(trained: PreTrainedModel, bits: int, tmp_path: Path) -> None:
    model, (pixels, _) = copy.deepcopy(trained), images(8, seed=3)
    patches = quantise_(model, bits, bits)
    save_checkpoint(model, arch_for(model.config).shapes(model), tmp_path / "out", patches=patches)
    live = logits(model, pixels)
    opened = compresso.load(tmp_path / "out").model
    assert isinstance(opened, ViTForImageClassification)
    torch.testing.assert_close(logits(opened, pixels), live)
    unpatch_(opened)  # what transformers alone computes: rounded weights, activations as they are
    alone = ViTForImageClassification.from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(logits(opened, pixels), logits(alone, pixels))
    assert not torch.equal(logits(alone, pixels), live)
    query = alone.get_parameter("vit.layers.0.attention.q_proj.weight")
    assert all(len(set(row.tolist())) <= 2**bits - 1 for row in query)
    assert torch.equal(
        alone.get_parameter("classifier.weight"), trained.get_parameter("classifier.weight")
    )  # the head keeps its numbers


@pytest.mark.parametrize("name", ["bert_classifier", "vit", "llama_gqa", "gpt2"])
def test_it_is_what_the_stage_does_without_training(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = build(name).eval()
    other = copy.deepcopy(model)
    patches = quantise_(model, 6, 5, style=Style.DEEPSPEED)
    job = Job(
        model=other,
        arch=arch_for(other.config),
        tokenizer=None,
        rows=[],
        held=[],
        plan=Plan(),
        records={},
        identity={},
        seed=0,
        out=tmp_path / "work",
        quiet=True,
    )
    done = Qat(steps=0, weight_bits=6, input_bits=5, quantisers=Style.DEEPSPEED)(job)  # type: ignore[call-arg]
    assert done.patches == patches
    draw = torch.Generator().manual_seed(1)
    given = {"input_ids": torch.randint(3, 40, (2, 12), generator=draw)}
    if name == "vit":
        given = {"pixel_values": torch.randn(2, 3, 16, 16, generator=draw)}
    with torch.no_grad():
        assert torch.equal(done.model(**given).logits, model(**given).logits)


def test_16_bits_change_nothing_and_what_has_no_grid_is_refused() -> None:
    model = build("vit").eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert quantise_(model, 16, 16) == ()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for bits in ((9, 8), (8, 2)):
        with pytest.raises(ValueError, match="wanted"):
            quantise_(model, *bits)
    with pytest.raises(RecipeError, match=r"'\*\.fc9' matches no linear"):
        quantise_(model, where=Where(ignore=("*.fc9",)))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_half_precision_stays_and_some_linears_may_be_spared() -> None:
    model = build("vit").eval().bfloat16()
    before = model.get_parameter("vit.layers.0.mlp.fc1.weight").clone()
    (patch,) = quantise_(model, where=Where(ignore=("*.fc1",)))
    assert model.dtype == torch.bfloat16
    assert torch.equal(model.get_parameter("vit.layers.0.mlp.fc1.weight"), before)
    assert not [name for name in (*patch.params["symmetric"], *patch.params["asymmetric"]) if "fc1" in name]
    assert [name.rpartition(".")[2] for name in patch.params["asymmetric"]] == ["fc2"] * model.config.num_hidden_layers
