"""A classifier of pictures under the laws: masked is smaller, scores are slopes of its own loss; and a run from a model
without a head to a stock checkpoint that engines open, with its accuracy in the report.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch
from tests.conftest import Call
from tests.tasks.conftest import untrained
from tests.tasks.scenes import THINGS, scene
from transformers import (
    AutoModelForImageClassification,
    BertConfig,
    DeiTConfig,
    DeiTForImageClassification,
    DeiTModel,
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

from compresso.checkpoint.source import open_source
from compresso.commands.inspect import show as show_facts
from compresso.commands.plan_table import show as show_plan
from compresso.core.axis import Kind
from compresso.core.loss import LABEL
from compresso.core.picture import Picture, PixelInput
from compresso.core.plan import Plan
from compresso.core.row import Row
from compresso.data.labelled_pictures import PICTURED
from compresso.data.pictures import png
from compresso.data.records import Pictured
from compresso.data.registry import load_records
from compresso.edit.gate import gated
from compresso.errors import ArchError, CheckpointError, DataError
from compresso.job import Job
from compresso.methods.distill import Distill
from compresso.methods.gate_taylor import GateTaylor
from compresso.metrics.labels import label_score
from compresso.observe.gate_taylor import gate_taylor
from compresso.observe.losses import losses_under
from compresso.runner.evaluate_task import task_metric
from compresso.runner.inspection import inspect
from compresso.runner.options import with_options
from compresso.runner.plan import plan
from compresso.runner.run import run
from compresso.tasks.image_classification import IMAGE_CLASSIFICATION

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
SEEN = {"image_size": 16, "patch_size": 4}
INPUTS = PixelInput(16, 16)
MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "vit": lambda: ViTForImageClassification(ViTConfig(**SIZES, **SEEN, num_labels=3)),
    "deit": lambda: DeiTForImageClassification(DeiTConfig(**SIZES, **SEEN, num_labels=3)),
}


def rows(n: int) -> list[Row]:
    made = [scene(seed) for seed in range(n)]
    return [Row(input_ids=[], labels=[kind], picture=Picture(pixels, INPUTS)) for pixels, _, kind in made]


@pytest.fixture(params=sorted(MODELS))
def job(request: pytest.FixtureRequest, tmp_path: Path) -> Job:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = MODELS[request.param]().eval()
    return untrained(model, rows(18), IMAGE_CLASSIFICATION, tmp_path / "work", THINGS)


def test_a_batch_is_what_the_model_sees() -> None:
    batch = IMAGE_CLASSIFICATION.collate(rows(5), 0)
    assert batch["pixel_values"].shape == (5, 3, 16, 16) and batch["labels"].tolist() == [0, 1, 2, 0, 1]
    wanted = scene(3)[0].float() / 127.5 - 1
    torch.testing.assert_close(batch["pixel_values"][3], wanted)
    with pytest.raises(DataError, match="a batch of 0 pictures"):
        IMAGE_CLASSIFICATION.collate([], 0)


def test_the_loss_is_the_models_own(job: Job) -> None:
    batch = job.collated(job.rows[:6])
    with torch.no_grad():
        torch.testing.assert_close(LABEL(job.model, batch), job.model(**batch).loss)


@pytest.mark.parametrize("kinds", [(Kind.HEAD,), (Kind.CHANNEL,), (Kind.HEAD, Kind.CHANNEL)])
def test_masked_is_smaller(kinds: tuple[Kind, ...], job: Job) -> None:
    axes = [axis for axis in job.arch.axes(job.model) if axis.kind in kinds]
    plan = Plan({axis.name: tuple(range(1, axis.size)) for axis in axes})
    given = IMAGE_CLASSIFICATION.probe(job.rows, 0)
    with torch.no_grad():
        whole = job.model(**given).logits
        with gated(job.model, axes, plan.masks(axes)):
            masked = job.model(**given).logits
        smaller = job.without(plan.masks(axes), "by hand")
        left = smaller.model(**given).logits
    torch.testing.assert_close(left, masked, rtol=0, atol=1e-5)
    assert float((whole - left).abs().max()) > 1e-3
    assert smaller.records["by hand"]["masked_minus_smaller_max_abs"] < 1e-5


def test_a_score_predicts_what_dimming_the_gate_does_to_the_loss(job: Job) -> None:
    model = job.model.double()
    axes = [axis for axis in job.arch.axes(model) if axis.kind == Kind.CHANNEL]
    one = {k: v.double() if v.is_floating_point() else v for k, v in job.collated(job.rows[:1]).items()}
    scores = gate_taylor(model, axes, [one], loss=LABEL)
    for axis in axes:
        unit, losses = int(scores[axis.name].argmax()), []
        for value in (0.99, 1.01):
            mask = torch.ones(axis.size, dtype=torch.float64)
            mask[unit] = value
            with torch.no_grad(), gated(model, axes, {axis.name: mask}):
                losses.append(float(LABEL(model, one)))
        assert float(scores[axis.name][unit]) == pytest.approx(((losses[1] - losses[0]) / 0.02) ** 2, rel=5e-2)


def test_layers_leave_by_the_loss_without_them(job: Job) -> None:
    """Pictures have no attention mask that would say what counts."""
    axes = [axis for axis in job.arch.axes(job.model) if axis.kind == Kind.LAYER]
    batch = job.collated(job.rows[:6])
    (axis,) = axes
    without = {axis.name: torch.tensor([1.0, 0.0])}
    with torch.no_grad():
        whole = float(LABEL(job.model, batch))
        with gated(job.model, axes, without):
            cut = float(LABEL(job.model, batch))
    found = losses_under(job.model, axes, [{}, without], [batch], loss=LABEL)
    assert found.tolist() == pytest.approx([whole, cut], rel=1e-6) and whole != cut
    pruned = GateTaylor(keep=0.5, kinds=(Kind.LAYER, Kind.CHANNEL), batches=1, batch=6, micro_batch=6)(job)
    assert pruned.model.config.num_hidden_layers == 1


def test_pruned_and_distilled_it_counts_what_it_has(job: Job, tmp_path: Path) -> None:
    """With hidden states compared, too: pictures have no padding that a mask could name."""
    dense = tmp_path / "dense"
    job.model.save_pretrained(dense)
    job = replace(job, original=lambda dtype, device: type(job.model).from_pretrained(dense, dtype=dtype).to(device))
    pruned = GateTaylor(keep=0.7, kinds=(Kind.CHANNEL,), batches=1, batch=6, micro_batch=6)(job)
    taught = Distill(steps=3, batch=6, micro_batch=6, intermediate_weight=1.0)(pruned)
    shapes = taught.arch.shapes(taught.model)
    assert shapes[0].channels < 48 and taught.records["distill"]["updates"] == 3
    assert taught.records["gate_taylor"]["parameters_after"]["total"] == taught.model.num_parameters()


def test_accuracy_is_counted_over_examples(job: Job) -> None:
    score = IMAGE_CLASSIFICATION.score(job.model, job.held)
    with torch.no_grad():
        logits = job.model(pixel_values=job.collated(job.held)["pixel_values"]).logits
    right = (logits.argmax(-1) == torch.tensor([row["labels"][0] for row in job.held])).float().mean()
    assert score.accuracy == pytest.approx(float(right)) and score.guess == pytest.approx(1 / 3)
    other = [*job.held[:-1], {**job.held[-1], "picture": job.held[0]["picture"]}]
    assert label_score(job.model, other, lambda some: job.collated(list(some))).examples_sha256 != score.examples_sha256


def test_each_pass_sees_a_picture_anew_and_the_held_out_ones_as_they_are(job: Job) -> None:
    batches = job.batches(12, "seen")
    first, second = (batches.at(update, range(12))["pixel_values"] for update in (0, 1))
    assert {tuple(one.flatten().tolist()) for one in first} != {tuple(one.flatten().tolist()) for one in second}
    assert torch.equal(job.batches(12, "seen").at(1, range(12))["pixel_values"], second)


def test_models_of_texts_are_refused() -> None:
    said = IMAGE_CLASSIFICATION.obstacle(BertConfig())
    assert said == "(bert) sees no pictures; --task image-classification takes a model of pictures, such as ViT"


def test_a_deit_without_a_head_is_given_one() -> None:
    """transformers has two classifiers of DeiT; the one without a teacher's token is made."""
    base = DeiTModel(DeiTConfig(**SIZES, **SEEN, architectures=["DeiTModel"])).eval()
    assert IMAGE_CLASSIFICATION.lacks_head(base.config)
    headed = IMAGE_CLASSIFICATION.with_head(base, THINGS, 0)
    assert type(headed) is DeiTForImageClassification and headed.config.num_labels == 3
    assert not IMAGE_CLASSIFICATION.lacks_head(headed.config)
    assert headed(**IMAGE_CLASSIFICATION.probe(rows(2), 0)).logits.shape == (2, 3)


def test_what_programs_leave_behind_is_no_class_and_what_gives_no_row_is_named(tmp_path: Path) -> None:
    """A class is a folder with pictures; a hidden one is no class, an empty one and a stray file are named."""
    for name, n in (("cat", 3), ("dog", 2), (".ipynb_checkpoints", 1), ("zebra", 0)):
        (tmp_path / "set" / name).mkdir(parents=True)
        for i in range(n):
            (tmp_path / "set" / name / f"{i}.png").write_bytes(png(scene(i)[0]))
    (tmp_path / "set" / "dog" / "._0.png").write_bytes(b"of a desktop")
    (tmp_path / "set" / "stray.png").write_bytes(png(scene(0)[0]))
    records = load_records(tmp_path / "set", form=PICTURED)
    assert sorted(row.label for row in records.rows if isinstance(row, Pictured)) == ["cat"] * 3 + ["dog"] * 2
    assert records.notes == ("set: 1 folder is empty: zebra", "set: 1 file is not read: stray.png")


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a model without a head."""
    folder = tmp_path_factory.mktemp("models") / "vit"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        ViTModel(ViTConfig(**SIZES, **SEEN, hidden_dropout_prob=0.0)).save_pretrained(folder)
    fields = {"do_normalize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(fields))
    return folder


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "scenes.parquet"
    made = [scene(seed) for seed in range(240)]
    cells = [{"image": {"bytes": png(pixels), "path": "a.png"}, "label": THINGS[kind]} for pixels, _, kind in made]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(cells), path)
    return path


def test_what_is_counted_is_called_a_patch(vit: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """17 of them a picture: 4 x 4, and the class token."""
    facts = inspect(vit)
    show_facts(facts, False)
    assert f"{facts['macs_per_token']:,} multiply-accumulates a patch" in (said := capsys.readouterr().out)
    raw = with_options("gate-taylor", model=str(vit), task="image-classification", keep=0.7, sets=SETS)
    planned = plan(raw, str(vit))
    show_plan(planned, False)
    table = capsys.readouterr().out
    assert (
        "macs per patch" in table
        and "Patches are at most these" in table
        and "What the stages take, in patches" in table
    )
    assert "token" not in said and "token" not in table.replace("max_length", "")
    assert planned["stages"][1]["passes"][0]["tokens_at_most"] == 2 * 16 * 17


SETS = (
    *("stages.finetune.steps=80", "stages.finetune.lr=3.0e-3", "stages.gate_taylor.batches=2"),
    *("stages.recover.steps=10", "stages.recover.rank=4", "stages.recover.lr_at_hidden=null"),
)


def test_a_model_that_does_not_say_how_it_sees_is_refused_before_weights(
    vit: Path, scenes: Path, tmp_path: Path
) -> None:
    blind = tmp_path / "blind"
    ViTModel.from_pretrained(vit).save_pretrained(blind)
    raw = with_options("gate-taylor", model=str(blind), task="image-classification", sets=SETS)
    with pytest.raises(CheckpointError, match=r"blind has no preprocessor_config\.json"):
        run(raw, blind, scenes, output=tmp_path / "out", quiet=True)
    with pytest.raises(ArchError, match="vit has no head for image-classification"):
        task_metric(open_source(vit), "image-classification", scenes, torch.device("cpu"))


@pytest.mark.slow
def test_a_run_ends_in_a_stock_checkpoint_that_engines_open(
    vit: Path, scenes: Path, tmp_path: Path, call: Call
) -> None:
    output = tmp_path / "small"
    raw = with_options("gate-taylor", model=str(vit), task="image-classification", keep=0.7, sets=SETS)
    run(raw, vit, scenes, output=output, quiet=True)
    model = AutoModelForImageClassification.from_pretrained(output)
    assert type(model) is ViTForImageClassification and model.config.intermediate_size < 48
    assert model.config.id2label == {0: "cross", 1: "disc", 2: "square"}
    records = json.loads((output / "records.json").read_text())
    assert [*records["stages"]] == ["finetune", "gate_taylor", "recover"]
    assert records["before"]["parameters"]["total"] > records["after"]["parameters"]["total"] == model.num_parameters()
    assert "accuracy" in (output / "README.md").read_text().lower()
    assert (output / "preprocessor_config.json").is_file()
    (found, *_) = task_metric(open_source(output), "image-classification", scenes, torch.device("cpu"))
    assert found.value > 0.5
    code, out, error = call("export", output, "--format", "onnx", "--output", tmp_path / "graph", "--json")
    assert code == 0, error
    assert json.loads(out)["checked"] == "opened in ONNX Runtime and OpenVINO" and json.loads(out)["difference"] < 1e-4
