"""SegFormer as a segmenter: logits at a quarter of the picture are stretched to its labels; L2, gate-Taylor and
Compresso's gates each leave a smaller model that is the masked one; a run ends in a folder of its layout; what numbers
layers of one list, or has no form, is refused in a line.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.arch.test_segformer import made
from tests.conftest import Call
from tests.native.test_segformer import narrow
from tests.tasks.conftest import untrained
from tests.tasks.scenes import CLASSES, SIDE, scene
from tests.tasks.test_segmentation import NAMES, cells, rows, written
from transformers import SegformerConfig, SegformerForSemanticSegmentation, SegformerModel

from compresso.arch.base import arch_for
from compresso.checkpoint.load import load_model
from compresso.checkpoint.source import open_source
from compresso.core.axis import Kind
from compresso.core.loss import PIXEL
from compresso.core.segments import ohem_loss
from compresso.errors import ArchError, BudgetError, CompressoError, RecipeError
from compresso.formats.hf import save_checkpoint
from compresso.job import Job
from compresso.methods.filter_pruning import FilterPruning
from compresso.methods.gate_taylor import GateTaylor
from compresso.methods.keep_layers import KeepLayers
from compresso.methods.learn_gates import LearnGates
from compresso.methods.ziplm import ZipLM
from compresso.native import SEGFORMER_CLASSES
from compresso.runner.activations import activation_bytes
from compresso.runner.plan import plan
from compresso.runner.recipe import read
from compresso.runner.run import run
from compresso.tasks.segmentation import SEGMENTATION

SMALL: dict[str, Any] = {
    "image_size": SIDE,
    "hidden_sizes": [8, 16, 24, 32],
    "num_attention_heads": [1, 2, 3, 4],
    "decoder_hidden_size": 32,
    "drop_path_rate": 0.0,
    "classifier_dropout_prob": 0.0,
}
CUT: dict[str, Any] = {"keep": 0.6, "kinds": (Kind.HEAD, Kind.CHANNEL, Kind.HIDDEN)}


@pytest.fixture
def job(tmp_path: Path) -> Job:
    model = made("segmenter", num_labels=len(CLASSES), depths=[2, 2, 2, 2], mlp_ratios=[4, 4, 4, 4], **SMALL)
    return untrained(model, rows(14), SEGMENTATION, tmp_path / "work", NAMES)


def test_logits_of_a_quarter_are_stretched_to_the_labels(job: Job) -> None:
    batch = job.collated(job.rows[:2])
    with torch.no_grad():
        logits = job.model(pixel_values=batch["pixel_values"]).logits
        assert logits.shape == (2, len(CLASSES), SIDE // 4, SIDE // 4)
        torch.testing.assert_close(PIXEL(job.model, batch), ohem_loss(logits, batch["labels"]))
    assert SEGMENTATION.halves(job.model, ()).read(batch)[0].shape == (2, SIDE, SIDE, len(CLASSES))
    assert SEGMENTATION.score(job.model, job.held).pictures == len(job.held)


def test_units_of_the_smallest_norms_leave_a_stock_model(job: Job, tmp_path: Path) -> None:
    done = FilterPruning(keep=0.5)(job)
    assert done.records["filter_pruning"]["masked_minus_smaller_max_abs"] < 1e-4
    assert save_checkpoint(done.model, (), tmp_path / "half") == "uniform"
    config = SegformerForSemanticSegmentation.from_pretrained(tmp_path / "half").config
    assert (config.decoder_hidden_size, config.num_attention_heads) == (16, [1, 2, 3, 4])
    assert config.mlp_ratios == [2, 2, 2, 2]


@pytest.mark.parametrize("depth", [(), (Kind.LAYER,), (Kind.ATTENTION, Kind.MLP)])
def test_units_whose_gates_the_loss_minds_least_leave_a_model_of_ours(
    depth: tuple[Kind, ...], job: Job, tmp_path: Path
) -> None:
    stage = GateTaylor(**{**CUT, "kinds": (*CUT["kinds"], *depth)}, batches=2, batch=4, micro_batch=4)
    done = stage(job)
    assert done.records["gate_taylor"]["masked_minus_smaller_max_abs"] < 1e-4
    assert 0.58 < done.records["gate_taylor"]["kept_share_of_blocks"] <= 0.6
    assert save_checkpoint(done.model, (), tmp_path / "small") == "native"
    assert type(load_model(open_source(tmp_path / "small"))) is SEGFORMER_CLASSES["segformer"][2]


def test_gates_are_learned_by_the_hard_pixels(job: Job, tmp_path: Path) -> None:
    stage = LearnGates(
        **CUT,
        tune=0,
        ramp=0,
        hold=2,
        constraint="projection",
        start="score",
        score_batches=1,
        finish="hard",
        targets=("q_proj", "v_proj"),
        batch=4,
        micro_batch=4,
    )
    done = stage(job)
    facts = done.records["learn_gates"]
    assert 0.58 < facts["kept_share_of_blocks"] <= 0.6 and facts["masked_minus_smaller_max_abs"] < 1e-4
    assert save_checkpoint(done.model, (), tmp_path / "small") == "native"


def test_what_follows_one_list_of_layers_is_refused(job: Job) -> None:
    with pytest.raises(RecipeError, match="keep_layers: a segformer has stages, which all stay"):
        KeepLayers().check(job.model, job.arch)
    with pytest.raises(BudgetError, match="ziplm: a segformer has stages, and the bank is of one list of layers"):
        ZipLM().check(job.model, job.arch)
    depth: dict[str, Any] = {"constraint": "projection", "start": "score", "depth_order": "influence"}
    stage = LearnGates(keep=0.8, kinds=(Kind.CHANNEL, Kind.ATTENTION), batch=4, micro_batch=4, score_batches=1, **depth)
    with pytest.raises(ArchError, match="a list of attention units in each of its stages; score them by the loss"):
        stage(job)


def test_a_plan_counts_pictures_of_a_config_alone(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(SegformerConfig(**SMALL).to_json_string())
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"size": {"height": 36, "width": 40}}))
    facts = plan({**read("gate-taylor"), "task": "segmentation"}, str(tmp_path / "config.json"))
    assert facts["layouts"]["native"] is None and "class wants" in facts["layouts"]["uniform"]
    assert not any("all heads stay" in note for note in facts["notes"])
    before, after = facts["before"]["parameters"]["blocks"], facts["after"]["parameters"]["blocks"]
    assert 0.69 < after / before <= 0.7
    shares = {name: kept / size for name, (kept, size) in facts["shapes"].items() if name.endswith("channels")}
    assert max(shares.values()) - min(shares.values()) < 0.06  # each stage gives the same share
    config = open_source(tmp_path / "config.json").config
    assert config.image_size == [36, 40] and activation_bytes(config, 2, 4, False) > 2 * 3 * 36 * 40 * 4


def test_what_cannot_hold_it_is_refused_before_weights_are_read(tmp_path: Path) -> None:
    SegformerForSemanticSegmentation(SegformerConfig(**SMALL)).save_pretrained(tmp_path / "model")
    how: dict[str, Any] = {"quiet": True, "output": tmp_path / "out"}
    one, none = {"keep": 0.5, "kinds": ["channel"]}, tmp_path / "none.parquet"
    few = r"stages have 32 to 128 channel units a layer, and no one count fits all; take the stage filter_pruning"
    for stage, layout, said in (
        (
            "gate_taylor",
            "padded",
            r"layout padded is not written for model_type 'segformer'\. Use uniform.*, or native",
        ),
        ("gate_taylor", "uniform", few),
        ("magnitude_structured", "auto", few),
    ):
        raw = {"task": "segmentation", "stages": [{stage: one}]}
        with pytest.raises(CompressoError, match=said):
            run(raw, tmp_path / "model", none, layout=layout, **how)
    raw = {"task": "segmentation", "stages": [{"filter_pruning": {"keep": 0.3}}]}
    with pytest.raises(
        CompressoError, match=r"layout uniform cannot hold what this recipe leaves of a segformer: .*native"
    ):
        run(raw, tmp_path / "model", none, layout="uniform", **how)


def test_unequal_layers_are_refused_as_equal_before_weights_are_read(tmp_path: Path) -> None:
    narrow("segmenter", tmp_path / "small")
    raw = {"task": "segmentation", "stages": [{"filter_pruning": {"keep": 0.5}}]}
    assert plan(raw, str(tmp_path / "small"))["layouts"] == {"uniform": "its layers differ already", "native": None}
    said = "layout uniform cannot hold what this recipe leaves of a compresso_segformer: its layers differ already"
    with pytest.raises(CompressoError, match=said):
        run(raw, tmp_path / "small", None, layout="uniform", output=tmp_path / "out", quiet=True)


@pytest.mark.slow
def test_a_run_of_a_backbone_ends_in_a_segmenter_of_ours(tmp_path: Path, call: Call) -> None:
    start = tmp_path / "start"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        SegformerModel(SegformerConfig(**SMALL)).save_pretrained(start)
    (start / "preprocessor_config.json").write_text(json.dumps({"do_normalize": False, "size": SIDE}))
    data = written(tmp_path / "scenes.parquet", cells(48))
    train = {"batch": 8, "micro_batch": 8, "lr": 3.0e-3, "warmup": 5}
    cut = {"keep": 0.7, "kinds": ["head", "channel", "hidden"], "batches": 2, "batch": 8, "micro_batch": 8}
    raw = {"task": "segmentation", "stages": [{"finetune": {"steps": 20, **train}}, {"gate_taylor": cut}]}
    output = tmp_path / "out"
    result = run(raw, start, data, output=output, quiet=True)
    assert result.records["layout"] == "native" and result.records["reopened_max_abs_difference"] < 1e-4
    assert result.records["modeling"] == "modeling_compresso_segformer.py"
    assert (output / "modeling_compresso_segformer.py").is_file()
    model = load_model(open_source(output))
    assert type(model) is SEGFORMER_CLASSES["segformer"][2] and model.config.num_labels == len(CLASSES)
    arch = arch_for(model.config)
    assert {a.size for a in arch.axes(model) if a.name.endswith(".channels")} - {32, 64, 96, 128}
    code, out, error = call("export", output, "--format", "onnx", "--output", tmp_path / "graph", "--json")
    assert code == 0, error
    assert json.loads(out)["checked"] == "opened in ONNX Runtime and OpenVINO" and json.loads(out)["difference"] < 1e-3
    shown = torch.stack([scene(seed, SIDE)[0] for seed in range(2)]).float() / 255
    assert model(pixel_values=shown).logits.shape == (2, len(CLASSES), SIDE // 4, SIDE // 4)
