"""Layers that are named stay with their weights, also in an encoder whose norms lie behind the sums."""

import copy
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification, PreTrainedModel

from compresso.arch.base import arch_for
from compresso.arch.whole_layers import with_layers
from compresso.core.plan import Plan
from compresso.edit.gate import gated
from compresso.edit.shrink import shrink_
from compresso.errors import ArchError, RecipeError
from compresso.job import Job
from compresso.methods.keep_layers import KeepLayers
from tests.methods.conftest import MakeJob

CONTRACT = {"layers": [0, 1]}
"""The contract compares tensors by name, and layers behind a gap get other names."""
IDS = torch.arange(1, 9).unsqueeze(0)


def kept(job: Job, **knobs: Any) -> Job:
    return KeepLayers(**knobs)(job)


def encoder(layers: int = 6) -> PreTrainedModel:
    config = BertConfig(
        vocab_size=32,
        hidden_size=16,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=16,
        id2label={0: "a", 1: "b", 2: "c"},
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = BertForSequenceClassification(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape) * 0.2)
    return model


def weights(model: PreTrainedModel, layer: int) -> dict[str, Tensor]:
    return dict(arch_for(model.config).blocks(model)[layer].named_parameters())


@pytest.mark.parametrize(
    ("knobs", "wanted"), [({}, (1,)), ({"layers": (0, 2)}, (0, 2)), ({"every": 3}, (2,)), ({"layers": (1,)}, (1,))]
)
def test_named_layers_stay_as_they_were(make_job: MakeJob, knobs: dict[str, Any], wanted: tuple[int, ...]) -> None:
    job = make_job()
    before = copy.deepcopy(job.model)
    after = kept(job, **knobs)
    assert after.plan.kept["layers"] == wanted and after.model.config.num_hidden_layers == len(wanted)
    for new, old in enumerate(wanted):
        assert all(torch.equal(one, weights(before, old)[name]) for name, one in weights(after.model, new).items())
    assert after.records["keep_layers"]["units_kept"] == {"layers": f"{len(wanted)}/3"}


@torch.no_grad()
def test_a_skipped_layer_of_an_encoder_is_a_removed_one(make_job: MakeJob) -> None:
    """Every second of six, and the published list of five of twelve."""
    for n, knobs, wanted in ((6, {}, (1, 3, 5)), (12, {"layers": (2, 4, 6, 8, 10)}, (2, 4, 6, 8, 10))):
        model = encoder(n)
        arch = arch_for(model.config)
        axes = with_layers(arch.axes(model), arch, model)
        mask = torch.tensor([float(i in wanted) for i in range(n)])
        with gated(model, axes, {"layers": mask}):
            masked = model(IDS).logits
        seen = model(IDS).logits
        plan = KeepLayers(**knobs).dry_run_plan(axes, None)  # type: ignore[arg-type]  # no cost is asked
        assert plan.kept == {"layers": wanted}
        shrink_(model, axes, plan)
        torch.testing.assert_close(model(IDS).logits, masked, rtol=0, atol=0)
        assert not torch.allclose(masked, seen, atol=1e-4)
        assert model.config.num_hidden_layers == len(wanted) == len(arch.blocks(model))


def test_axes_of_an_encoder_name_no_layers_and_no_mask_keeps_one_by_half() -> None:
    model = encoder()
    arch = arch_for(model.config)
    assert "layers" not in {axis.name for axis in arch.axes(model)}
    axes = with_layers(arch.axes(model), arch, model)
    assert with_layers(axes, arch, model) == axes
    with pytest.raises(ArchError, match="soft mask 'layers' keeps layers by halves"):
        shrink_(model, axes, Plan(), {"layers": torch.full((6,), 0.5)})


def test_layers_that_are_not_there_are_refused(make_job: MakeJob) -> None:
    job = make_job()
    for knobs, said in (
        ({"layers": (1, 3)}, r"keep_layers: layers=\[1, 3\], and the model has the layers 0 to 2"),
        ({"every": 4}, "every=4 keeps none of the model's 3 layers; give 2 to 3"),
    ):
        with pytest.raises(RecipeError, match=said):
            KeepLayers(**knobs).check(job.model, job.arch)
        with pytest.raises(RecipeError, match=said):
            kept(job, **knobs)
    for layers in ((), (2, 1), (1, 1)):
        with pytest.raises(ValidationError, match="each once, from the first to the last"):
            kept(make_job(), layers=layers)
