"""Another model as the teacher: it sees the same picture in its own colours, its logits are compared in full size, and
one with other classes, without weights or of texts is refused before anything is trained.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch
from tests.tasks.conftest import untrained
from tests.tasks.scenes import CLASSES, NARROW, SIDE, scene
from torch import nn
from torch.nn import functional
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MobileViTConfig,
    MobileViTForSemanticSegmentation,
    UperNetConfig,
    UperNetForSemanticSegmentation,
    ViTConfig,
    ViTForImageClassification,
)

from compresso.arch.base import arch_for
from compresso.core.cost import CostModel
from compresso.core.losses import IGNORED
from compresso.core.picture import Picture, PixelInput
from compresso.core.row import Row
from compresso.data.pictures import png
from compresso.errors import RecipeError
from compresso.job import Job
from compresso.methods.distill import Distill
from compresso.runner.plan import plan
from compresso.runner.run import run
from compresso.tasks.segmentation import SEGMENTATION
from compresso.training.distill_objective import DistillObjective
from compresso.training.order import Micro
from compresso.training.other_teacher import Sees, check_classes, recoloured

STUDENT = NARROW
SWIN: dict[str, Any] = {
    "model_type": "swinv2",
    "embed_dim": 12,
    "depths": [1, 1, 1, 1],
    "num_heads": [1, 2, 3, 4],
    "window_size": 4,
    "image_size": SIDE,
    "out_features": ["stage1", "stage2", "stage3", "stage4"],
}
OURS, THEIRS = PixelInput(SIDE, SIDE), PixelInput(SIDE, SIDE, (0.4, 0.5, 0.6), (0.2, 0.25, 0.3), bgr=True)
SO = {"do_normalize": True, "image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.25, 0.3], "do_flip_channel_order": True}


def upernet(classes: int = len(CLASSES), **fields: Any) -> UperNetConfig:
    how: dict[str, Any] = {"hidden_size": 12, "use_auxiliary_head": False, "num_labels": classes}
    return UperNetConfig(backbone_config=SWIN, pool_scales=[1, 2, 4, 6], **how, **fields)


def stored(folder: Path, model: Any) -> str:
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(SO))
    return str(folder)


@pytest.fixture
def teacher(tmp_path: Path) -> str:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        return stored(tmp_path / "swin", UperNetForSemanticSegmentation(upernet()))


def job(tmp_path: Path) -> Job:
    made = [scene(seed, SIDE) for seed in range(10)]
    rows = [Row(input_ids=[], labels=[], picture=Picture(pixels, OURS, classes)) for pixels, classes, _ in made]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = MobileViTForSemanticSegmentation(MobileViTConfig(**STUDENT, num_labels=len(CLASSES))).eval()
    return untrained(model, rows, SEGMENTATION, tmp_path / "work", tuple(map(str, range(len(CLASSES)))))


def test_it_sees_the_same_picture_in_its_own_colours() -> None:
    pixels = torch.stack([scene(seed, SIDE)[0] for seed in range(2)])
    torch.testing.assert_close(recoloured(OURS(pixels), OURS, THEIRS), THEIRS(pixels), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(recoloured(THEIRS(pixels), THEIRS, OURS), OURS(pixels), rtol=1e-5, atol=1e-5)
    wide = recoloured(OURS(pixels), OURS, replace(THEIRS, width=48))
    assert wide.shape == (2, 3, SIDE, 48)


def test_its_logits_are_compared_in_full_size_where_a_pixel_has_a_class(tmp_path: Path) -> None:
    here = job(tmp_path)
    batch = here.collated(here.rows[:2])
    batch["labels"][1, :9] = IGNORED
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        swin = UperNetForSemanticSegmentation(upernet()).eval()
    halves = Sees(SEGMENTATION.halves(swin, ()), OURS, THEIRS)
    how: dict[str, Any] = {"compare": SEGMENTATION.compare, "divergence": "mse"}
    found = DistillObjective(here.model, SEGMENTATION.halves(here.model, ()), halves, **how)(
        batch, Micro(0, 0, range(2))
    )
    pixels = torch.stack([row["picture"].pixels for row in here.rows[:2]])
    with torch.no_grad():
        theirs = swin(pixel_values=THEIRS(pixels)).logits
        ours = here.model(pixel_values=OURS(pixels)).logits
    assert theirs.shape[-2:] == (SIDE, SIDE)
    apart = (functional.interpolate(ours, (SIDE, SIDE), mode="bilinear") - theirs).square().mean(1)
    assert float(found["loss"].detach()) == pytest.approx(float(apart[batch["labels"] != IGNORED].mean()), rel=1e-4)


def test_a_smaller_model_learns_from_it(tmp_path: Path, teacher: str) -> None:
    stage = Distill(train="all", steps=2, batch=4, micro_batch=4, divergence="mse", hard_weight=1.0, teacher=teacher)
    done = stage(job(tmp_path)).records["distill"]
    assert done["updates"] == 2 and done["teacher"]["name"] == "swin"
    (said,) = stage.remarks(job(tmp_path).model, job(tmp_path).arch)
    assert said.startswith("swin teaches in the place of the dense model: ")


def test_a_plan_counts_it_in_the_place_of_the_dense_model(tmp_path: Path, teacher: str) -> None:
    """A forward of it for each example, and its weights in memory."""
    swin = UperNetForSemanticSegmentation(upernet())
    arch = arch_for(swin.config)
    theirs = CostModel(arch.axes(swin), arch.weights(swin))()
    config = str(student(tmp_path / "small"))
    named = {"id2label": dict(enumerate(CLASSES)), "label2id": {one: i for i, one in enumerate(CLASSES)}}
    Path(config).write_text(MobileViTConfig(**STUDENT, **named).to_json_string())
    live, other = (plan(recipe(one), config) for one in ("live", teacher))
    for facts, macs, parameters in (
        (live, live["before"]["macs_per_token"], live["before"]["parameters"]["total"]),
        (other, int(theirs.macs), int(theirs.total)),
    ):
        taught = next(one for one in facts["stages"] if one["stage"] == "distill")
        (row,) = [one for one in taught["passes"] if one["what"] == "teacher"]
        assert row["flops_at_most"] == 2 * macs * 2 * 4
        trained = next(one for one in facts["training"] if one["stage"] == "distill")
        own = facts["after"]["parameters"]["total"]
        assert trained["memory_bytes_estimated"]["weights"] == 4 * (own + parameters)
        assert trained["flops_at_most"] == taught["flops_at_most"]
    assert not any("not in what is counted" in note for note in other["notes"])


def test_other_classes_are_refused(tmp_path: Path) -> None:
    names = {"id2label": {0: "sky", 1: "road"}, "label2id": {"sky": 0, "road": 1}}
    swin = stored(tmp_path / "swin", UperNetForSemanticSegmentation(upernet(2, **names)))
    with pytest.raises(RecipeError, match="teacher=swin decides among 2 classes, this run among 3; train it on the"):
        check_classes(swin, ("sky", "road", "car"))
    with pytest.raises(RecipeError, match="teacher=swin calls class 1 'road', this run 'tree'; train it on the same"):
        check_classes(swin, ("sky", "tree"))
    check_classes(swin, ("sky", "road"))
    check_classes(swin, ("0", "1"))  # numbers name nothing


def parquet(path: Path) -> Path:
    made = [scene(seed, SIDE) for seed in range(48)]
    cells = [{"image": {"bytes": png(p), "path": "a"}, "label": {"bytes": png(c), "path": "b"}} for p, c, _ in made]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(cells), path)
    return path


def recipe(teacher: str, **knobs: Any) -> dict[str, Any]:
    few = {"steps": 2, "batch": 4, "micro_batch": 4}
    taught = {"train": "all", "divergence": "mse", "teacher": teacher, **few, **knobs}
    return {"task": "segmentation", "stages": [{"finetune": few}, {"distill": taught}]}


def student(folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(MobileViTConfig(**STUDENT).to_json_string())
    return folder / "config.json"


def test_a_bad_teacher_is_said_in_a_line_before_anything_is_trained(tmp_path: Path) -> None:
    data, config = parquet(tmp_path / "scenes.parquet"), student(tmp_path / "small")
    LlamaForCausalLM(
        LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=8)
    ).save_pretrained(tmp_path / "llama")
    vit = ViTConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=SIDE)
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone" / "config.json").write_text(upernet().to_json_string())
    swin = stored(tmp_path / "swin", UperNetForSemanticSegmentation(upernet(4)))
    bad = {
        swin: "teacher=swin decides among 4 classes, this run among 5",
        stored(tmp_path / "vit", ViTForImageClassification(vit)): "teacher=vit does another task than the model",
        str(tmp_path / "llama"): "teacher=llama has no head for a task of pictures",
        str(tmp_path / "alone" / "config.json"): "teacher=alone is a config alone, and random numbers teach nothing",
        "livee": "teacher=livee is no folder; give one with a model of pictures, or live or cached",
    }
    for teacher, said in bad.items():
        with pytest.raises(RecipeError, match=said):
            run(recipe(teacher), config, data, output=tmp_path / "out", quiet=True)
        assert not list(tmp_path.glob("*out*"))
    with pytest.raises(RecipeError, match=r"intermediate_weight=1.0 compares the stages of a model with those it came"):
        run(recipe(swin, intermediate_weight=1.0), config, data, output=tmp_path / "out", quiet=True)


def test_it_is_counted_as_hooks_see_it() -> None:
    model = UperNetForSemanticSegmentation(upernet()).eval()
    total = 0

    def see(module: Any, given: Any, output: Any) -> None:
        nonlocal total
        each = module.weight[0].numel() if isinstance(module, nn.Conv2d) else module.in_features
        total += output.numel() * each

    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(see)
    with torch.no_grad():
        model(pixel_values=torch.zeros(1, 3, SIDE, SIDE))
    arch = arch_for(model.config)
    counted = CostModel(arch.axes(model), arch.weights(model))()
    assert int(counted.total) == model.num_parameters() and int(counted.macs) == total > 0


@pytest.mark.slow
def test_a_swin_is_trained_from_its_config_and_teaches(tmp_path: Path) -> None:
    data = parquet(tmp_path / "scenes.parquet")
    (tmp_path / "tiny-swin").mkdir()
    config = tmp_path / "tiny-swin" / "config.json"
    config.write_text(upernet().to_json_string())
    few = {"batch": 4, "micro_batch": 4, "steps": 2}
    raw = {"task": "segmentation", "stages": [{"finetune": few}]}
    how: dict[str, Any] = {"quiet": True, "measure": "none", "allow_collapsed": True}
    run(raw, config, data, output=tmp_path / "taught", **how)
    swin = UperNetForSemanticSegmentation.from_pretrained(tmp_path / "taught")
    assert swin.config.num_labels == len(CLASSES) and swin.config.hidden_size == 12
    done = run(recipe(str(tmp_path / "taught")), student(tmp_path / "small"), data, output=tmp_path / "out", **how)
    assert done.records["stages"]["distill"]["teacher"]["name"] == "taught"
    assert str(tmp_path) not in (tmp_path / "out" / "records.json").read_text()
    assert str(tmp_path) not in (tmp_path / "out" / "recipe.yaml").read_text()
