"""Filter pruning keeps the channels with the largest norms, the share it was asked for in every layer, of decoders and
of MobileViT; and what it leaves of MobileViT is written by its own config at every share.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import MobileViTConfig, MobileViTForSemanticSegmentation

from compresso.arch.base import arch_for
from compresso.core.axis import Kind
from compresso.core.cost import CostModel
from compresso.edit.shrink import shrink_
from compresso.formats.plain import plain_obstacle
from compresso.job import Job
from compresso.methods.filter_pruning import FilterPruning


def test_each_layer_keeps_its_largest_channels(make_job: Callable[..., Job]) -> None:
    job = make_job()
    before = {name: value.clone() for name, value in job.model.named_parameters()}
    axis = next(axis for axis in job.arch.axes(job.model) if axis.name == "layers.1.channels")
    norms = torch.zeros(axis.size)
    for piece in axis.slices:
        norms += piece.entries(before[piece.param], axis.size).square().sum(1)
    kept = set(norms.argsort(descending=True)[: axis.size // 2].tolist())
    done = FilterPruning(keep=0.5)(job)
    assert set(done.plan.kept["layers.1.channels"]) == kept
    assert {shape.channels for shape in done.arch.shapes(done.model)} == {axis.size // 2}


@pytest.mark.parametrize("keep", [0.3, 0.5, 0.7, 0.9])
def test_the_published_segmenter_is_held_by_its_config_at_every_share(keep: float) -> None:
    with torch.device("meta"):
        model = MobileViTForSemanticSegmentation(MobileViTConfig(num_labels=11))
    arch = arch_for(model.config)
    axes, cost = arch.axes(model), CostModel(arch.axes(model), arch.weights(model))
    plan = FilterPruning(keep=keep).dry_run_plan(axes, cost)
    for axis in axes:
        if axis.kind == Kind.CHANNEL:
            assert abs(len(plan.kept[axis.name]) / axis.size - keep) <= 5 / axis.size + 1e-9
    shrink_(model, axes, plan)
    assert plain_obstacle(model, arch.shapes(model)) is None


def test_other_kinds_are_refused() -> None:
    with pytest.raises(ValueError, match="kinds names head, which is no channel"):
        FilterPruning(kinds=(Kind.HEAD,))


def test_a_model_without_such_units_is_refused(make_job: Callable[..., Job], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="name nothing that this model has"):
        FilterPruning().dry_run_plan([], CostModel([], []))


def remarked(keep: float, **sizes: object) -> str:
    with torch.device("meta"):
        model = MobileViTForSemanticSegmentation(MobileViTConfig(num_labels=11, **sizes))  # type: ignore[arg-type]
    (said,) = FilterPruning(keep=keep).remarks(model, arch_for(model.config))
    return said


def test_it_says_how_many_channels_stay_and_what_they_are_of_the_parameters() -> None:
    said = remarked(0.5)
    assert said.startswith("2,704 of 5,408 channels stay (50.0%), and with them 85.6% of parameters: feature maps")
    assert "rounded" not in said
    with torch.device("meta"):
        model = MobileViTForSemanticSegmentation(MobileViTConfig(num_labels=11))
    arch = arch_for(model.config)
    before = sum(parameter.numel() for parameter in model.parameters())
    axes, cost = arch.axes(model), CostModel(arch.axes(model), arch.weights(model))
    shrink_(model, axes, FilterPruning(keep=0.5).dry_run_plan(axes, cost))
    assert f"{sum(parameter.numel() for parameter in model.parameters()) / before:.1%}" in said


def test_it_says_where_rounding_leaves_another_share() -> None:
    said = remarked(0.3, neck_hidden_sizes=[4, 4, 6, 8, 10, 12, 20], hidden_sizes=[16, 24, 32])
    assert "rounded to multiples of 8, " in said and "keep a share that is more than 0.1 from 0.3, such as " in said
