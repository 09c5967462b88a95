"""A segmenter under the laws: batches and losses are those of its pixels, distillation is nothing between equals,
masked is smaller; bad maps in one line; and a run from a model without a head to a stock checkpoint with its mIoU.
"""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch
from tests.conftest import Call
from tests.tasks.conftest import untrained
from tests.tasks.scenes import CLASSES, NARROW, SIDE, scene
from torch.nn import functional
from transformers import (
    AutoModelForSemanticSegmentation,
    BertConfig,
    MobileViTConfig,
    MobileViTForSemanticSegmentation,
    MobileViTModel,
    UperNetConfig,
    ViTConfig,
)

from compresso.checkpoint.source import open_source
from compresso.core.axis import Kind
from compresso.core.loss import PIXEL
from compresso.core.losses import IGNORED
from compresso.core.picture import Picture, PixelInput
from compresso.core.row import Row
from compresso.core.segments import at_labels, ohem_loss
from compresso.data.label_maps import MAPPED, encode_mapped
from compresso.data.pictures import png
from compresso.data.registry import load_records
from compresso.data.survival import Reach, check_dropped, told
from compresso.errors import DataError, RecipeError
from compresso.job import Job
from compresso.methods.distill import Distill
from compresso.methods.learn_gates import LearnGates
from compresso.runner.evaluate_task import task_metric
from compresso.runner.run import run
from compresso.tasks import pictures
from compresso.tasks.base import task_named, tasks
from compresso.tasks.segmentation import DRAWN, SEGMENTATION
from compresso.training.distill_objective import DistillObjective
from compresso.training.order import Micro

SIZES: dict[str, Any] = {
    **NARROW,
    "hidden_dropout_prob": 0.0,
    "aspp_dropout_prob": 0.0,
    "classifier_dropout_prob": 0.0,
}
NAMES = tuple(str(i) for i in range(len(CLASSES)))


def rows(n: int) -> list[Row]:
    made = [scene(seed, SIDE) for seed in range(n)]
    inputs = PixelInput(SIDE, SIDE)
    return [Row(input_ids=[], labels=[], picture=Picture(pixels, inputs, classes)) for pixels, classes, _ in made]


@pytest.fixture
def job(tmp_path: Path) -> Job:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = MobileViTForSemanticSegmentation(MobileViTConfig(**SIZES, num_labels=len(CLASSES))).eval()
    return untrained(model, rows(14), SEGMENTATION, tmp_path / "work", NAMES)


def test_a_batch_has_a_label_for_each_pixel_and_none_where_it_is_passed_over() -> None:
    given = rows(3)
    assert given[1]["picture"].classes is not None
    given[1]["picture"].classes[0, :2] = 255
    batch = SEGMENTATION.collate(given, 0)
    assert batch["pixel_values"].shape == (3, 3, SIDE, SIDE) and batch["labels"].shape == (3, SIDE, SIDE)
    assert batch["labels"][1, 0, :2].tolist() == [IGNORED, IGNORED]
    assert torch.equal(batch["labels"][2], scene(2, SIDE)[1].long())


def test_the_loss_is_ohem_of_the_models_own_logits(job: Job) -> None:
    batch = job.collated(job.rows[:2])
    with torch.no_grad():
        logits = job.model(pixel_values=batch["pixel_values"]).logits
        assert logits.shape == (2, len(CLASSES), SIDE // 8, SIDE // 8)
        torch.testing.assert_close(PIXEL(job.model, batch), ohem_loss(logits, batch["labels"]))


def test_the_score_is_one_matrix_over_all_pictures(job: Job) -> None:
    score = SEGMENTATION.score(job.model, job.held)
    batch = job.collated(job.held)
    with torch.no_grad():
        logits = job.model(pixel_values=batch["pixel_values"]).logits
    given = functional.interpolate(logits, (SIDE, SIDE), mode="bilinear").argmax(1)
    shares = []
    for k in range(len(CLASSES)):
        own, said = batch["labels"] == k, given == k
        union = int((own | said).sum())
        shares += [int((own & said).sum()) / union] if union else []
    assert score.miou == pytest.approx(sum(shares) / len(shares))
    frequent = max(int((batch["labels"] == k).sum()) for k in range(len(CLASSES)))
    assert score.guess == pytest.approx(frequent / batch["labels"].numel() / len(CLASSES))
    names = {one.name for one in score.measurements(_here(), "scenes")}
    assert {"held/miou", "held/pixel-acc", "held-majority/miou", "held/iou/LABEL_0"} <= names


def _here() -> Any:
    from compresso.metrics.record import Environment

    return Environment.here(torch.device("cpu"), torch.float32)


def test_distillation_is_nothing_between_equals_and_passes_over_what_has_no_class(job: Job) -> None:
    batch = job.collated(job.rows[:2])
    halves = SEGMENTATION.halves(job.model, ())
    objective = DistillObjective(job.model, halves, halves, compare=SEGMENTATION.compare, divergence="mse")
    micro = Micro(0, 0, range(2))
    assert float(objective(batch, micro)["loss"].detach()) == 0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        other = MobileViTForSemanticSegmentation(job.model.config).eval()
    taught = DistillObjective(
        other, SEGMENTATION.halves(other, ()), halves, compare=SEGMENTATION.compare, divergence="mse"
    )
    with torch.no_grad():
        ours, theirs = (
            functional.interpolate(one(pixel_values=batch["pixel_values"]).logits, (SIDE, SIDE), mode="bilinear")
            for one in (other, job.model)
        )
    batch["labels"][0] = IGNORED
    wanted = float((ours[1] - theirs[1]).square().mean())  # over classes, height and width
    assert float(taught(batch, micro)["loss"].detach()) == pytest.approx(wanted, rel=1e-4)


def test_labels_beside_a_teacher_are_learned_by_the_hard_pixels(job: Job) -> None:
    batch = job.collated(job.rows[:2])
    batch["labels"][1, :5] = IGNORED
    classifier = job.model.get_parameter("segmentation_head.classifier.convolution.bias")
    with torch.no_grad():
        classifier.copy_(torch.tensor([4.0, 0.0, 0.0, 0.0, 2.0]))  # some pixels are easy
    halves = SEGMENTATION.halves(job.model, ())
    how: dict[str, Any] = {"compare": SEGMENTATION.compare, "divergence": "mse", "hard_weight": 2.0, "chunk": 100}
    found = DistillObjective(job.model, halves, halves, **how)(batch, Micro(0, 0, range(2)))
    wanted = PIXEL(job.model, batch).detach()
    torch.testing.assert_close(found["hard"], wanted)
    torch.testing.assert_close(found["loss"].detach(), 2 * wanted)
    logits = job.model(pixel_values=batch["pixel_values"]).logits
    plain = functional.cross_entropy(at_labels(logits, batch["labels"]), batch["labels"], ignore_index=IGNORED)
    assert float((plain.detach() - wanted).abs()) > 1e-3


def test_masked_is_smaller_on_examples(job: Job) -> None:
    axes = job.arch.axes(job.model)
    masks = {axis.name: (torch.arange(axis.size) % 3 != 0).float() for axis in axes}
    smaller = job.without(masks, "by hand")
    facts = smaller.records["by hand"]
    assert facts["masked_minus_smaller_max_abs"] < 1e-4
    assert facts["parameters_after"]["total"] == smaller.model.num_parameters()


def test_all_weights_learn_from_the_teacher(job: Job, tmp_path: Path) -> None:
    dense = tmp_path / "dense"
    job.model.save_pretrained(dense)
    kind = type(job.model)
    job = replace(job, original=lambda dtype, device: kind.from_pretrained(dense, dtype=dtype).to(device))
    done = Distill(train="all", steps=2, batch=4, micro_batch=4, divergence="mse", hard_weight=1.0)(job)
    assert done.records["distill"]["updates"] == 2


def test_gates_of_channels_are_learned_by_the_hard_pixels(job: Job) -> None:
    stage = LearnGates(
        keep=0.8,
        kinds=(Kind.CHANNEL,),
        tune=0,
        ramp=0,
        hold=2,
        constraint="projection",
        start="score",
        score_batches=1,
        finish="hard",
        targets=("query", "value"),
        batch=4,
        micro_batch=4,
    )
    facts = stage(job).records["learn_gates"]
    assert 0.78 < facts["kept_share_of_blocks"] <= 0.8 and facts["masked_minus_smaller_max_abs"] < 1e-4


def cells(n: int, side: int = SIDE) -> list[dict[str, Any]]:
    made = [scene(seed, side) for seed in range(n)]
    return [{"image": {"bytes": png(p), "path": "a"}, "label": {"bytes": png(c), "path": "b"}} for p, c, _ in made]


def written(path: Path, given: list[dict[str, Any]]) -> Path:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(given), path)
    return path


REDUCED = PixelInput(SIDE, SIDE, reduced=True)


def encoded(path: Path, names: tuple[str, ...] | None = None, passed_over: int = 255) -> Any:
    return encode_mapped(load_records(path, form=MAPPED), PixelInput(SIDE, SIDE), passed_over, names)


def test_rows_of_a_table_and_of_a_folder_are_the_same(tmp_path: Path) -> None:
    table = encoded(written(tmp_path / "train.parquet", cells(4)))
    for name in ("images", "labels"):
        (tmp_path / "set" / name).mkdir(parents=True)
    for i, cell in enumerate(cells(4)):
        (tmp_path / "set" / "images" / f"{i}.png").write_bytes(cell["image"]["bytes"])
        (tmp_path / "set" / "labels" / f"{i}.png").write_bytes(cell["label"]["bytes"])
    folder = encoded(tmp_path / "set")
    assert table.labels == folder.labels == NAMES
    for one, other in zip(table.rows, folder.rows, strict=True):
        assert torch.equal(one["picture"].pixels, other["picture"].pixels)
        assert torch.equal(one["picture"].classes, other["picture"].classes)
    (tmp_path / "set" / "labels" / "2.png").unlink()
    with pytest.raises(DataError, match=r"2.png: no label map of this name lies in"):
        load_records(tmp_path / "set", form=MAPPED)
    (tmp_path / "set" / "images" / "2.png").unlink()
    (tmp_path / "set" / "images" / "3.png").unlink()
    with pytest.raises(DataError, match=r"3.png: no picture of this name lies in .*images; add it, or take the label"):
        load_records(tmp_path / "set", form=MAPPED)
    (tmp_path / "set" / "images" / "1.jpg").write_bytes(b"another")
    with pytest.raises(DataError, match=r"1.png: 1.jpg has the same name without its suffix; take one away"):
        load_records(tmp_path / "set", form=MAPPED)


def test_a_folder_without_pictures_and_maps_is_told_what_was_wanted(tmp_path: Path) -> None:
    (tmp_path / "set" / "images").mkdir(parents=True)
    (tmp_path / "set" / "masks").mkdir()
    said = r"set: wanted image \(or img\) and label .*, or a folder with images/ and labels/.*holds images/, masks/$"
    with pytest.raises(DataError, match=said):
        load_records(tmp_path / "set", form=MAPPED)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"a folder with images/ and labels/.*the folder holds nothing$"):
        load_records(tmp_path / "empty", form=MAPPED)


def test_a_number_that_is_passed_over_is_no_class(tmp_path: Path) -> None:
    found = encoded(written(tmp_path / "train.parquet", cells(6)), passed_over=4)
    assert found.labels == NAMES[:4]
    assert 255 in found.rows[2]["picture"].classes.unique().tolist()


def test_maps_that_begin_at_one_are_those_that_begin_at_zero(tmp_path: Path) -> None:
    """Where preprocessor_config.json says so (do_reduce_labels): 0 is passed over, as 255 is."""
    made = [scene(seed, SIDE) for seed in range(4)]
    maps = [torch.where(c == 4, torch.tensor(255, dtype=torch.uint8), c) for _, c, _ in made]
    lifted = [torch.where(c == 255, torch.tensor(0, dtype=torch.uint8), c + 1) for c in maps]
    lifted[1][:2] = 255
    maps[1][:2] = 255
    rows = [
        [{"image": {"bytes": png(p)}, "label": {"bytes": png(c)}} for (p, *_), c in zip(made, some, strict=True)]
        for some in (maps, lifted)
    ]
    plain, reduced = (
        encode_mapped(load_records(written(tmp_path / f"{i}.parquet", one), form=MAPPED), inputs, 255, NAMES[:4])
        for i, (one, inputs) in enumerate(zip(rows, (PixelInput(SIDE, SIDE), REDUCED), strict=True))
    )
    for one, other in zip(plain.rows, reduced.rows, strict=True):
        assert torch.equal(one["picture"].classes, other["picture"].classes)
    said = r"the label map has the class 4; the model has 3 \(1 to 3\), and 0 and 255 are passed over"
    with pytest.raises(DataError, match=said):
        encode_mapped(load_records(tmp_path / "1.parquet", form=MAPPED), REDUCED, 255, NAMES[:3])


def blank(cell: dict[str, Any]) -> dict[str, Any]:
    """The same picture with a map of which no pixel has a class."""
    return {**cell, "label": {"bytes": png(torch.full((SIDE, SIDE), 255, dtype=torch.uint8)), "path": "b.png"}}


def test_maps_without_a_class_are_left_out_and_counted(tmp_path: Path) -> None:
    path = written(tmp_path / "train.parquet", [blank(one) if i == 3 else one for i, one in enumerate(cells(6))])
    found = encoded(path)
    assert len(found.rows) == 5 and (found.stats.n, found.stats.empty, found.stats.rows) == (6, 1, 5)
    records = load_records(path, form=MAPPED)
    assert "1 of 6 examples is dropped: 1 whose label map has no pixel with a class" in told(records, found, 0)[0]
    check_dropped(records, found, Reach(0), allowed=False)
    half = written(tmp_path / "half.parquet", [blank(one) if i % 2 else one for i, one in enumerate(cells(6))])
    records = load_records(half, form=MAPPED)
    with pytest.raises(DataError, match=r"3 of 6 examples would be dropped, .*3 whose label map has no pixel with a"):
        check_dropped(records, encoded(half), Reach(0), allowed=False)
    with pytest.raises(DataError, match=r"no pixel of 3 label maps has a class, all are 255, which is passed over; re"):
        encoded(written(tmp_path / "all.parquet", [blank(one) for one in cells(3)]))


def of_one(cell: dict[str, Any], number: int) -> dict[str, Any]:
    """The same picture with a map of one class, and an edge that is passed over."""
    classes = torch.full((SIDE, SIDE), number, dtype=torch.uint8)
    classes[0] = 255
    return {**cell, "label": {"bytes": png(classes), "path": "b.png"}}


def test_maps_of_one_class_alone_are_said_by_its_name(tmp_path: Path) -> None:
    """Whichever of the classes it is; of two, and of pixels of one more, nothing is said."""
    path = written(tmp_path / "train.parquet", [of_one(one, 2) for one in cells(4)])
    records = load_records(path, form=MAPPED)
    said = "train.parquet: only class 'square' occurs of 5 classes: their labels teach nothing, and a score"
    assert said in told(records, encoded(path, CLASSES), 0)[-1]
    assert "only class '2' occurs of 3 classes" in told(records, encoded(path), 0)[-1]
    for others in ([of_one(one, 3) for one in cells(1)], cells(1)):
        path = written(tmp_path / "more.parquet", [*(of_one(one, 2) for one in cells(4)), *others])
        assert encoded(path, CLASSES).notes == ()


@pytest.mark.parametrize("what", ["plan", pytest.param("run", marks=pytest.mark.slow)])
def test_a_plan_and_a_run_say_that_one_class_alone_occurs(
    what: str, tmp_path: Path, call: Call, caplog: pytest.LogCaptureFixture
) -> None:
    model = MobileViTForSemanticSegmentation(MobileViTConfig(**SIZES, id2label=dict(enumerate(CLASSES))))
    model.save_pretrained(tmp_path / "start")
    (tmp_path / "start" / "preprocessor_config.json").write_text(json.dumps({"do_normalize": False}))
    data = written(tmp_path / "scenes.parquet", [of_one(one, 2) for one in cells(12)])
    train = {"steps": 1, "batch": 4, "micro_batch": 4}
    raw = {"task": "segmentation", "data": {"held": 4}, "stages": [{"finetune": train}]}
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps(raw))
    said = "only class 'square' occurs of 5 classes"
    if what == "plan":
        code, out, error = call("plan", recipe, "--model", tmp_path / "start", "--data", data)
        assert code == 0 and (out + error).count(said) == 1, error
        return
    run(raw, tmp_path / "start", data, output=tmp_path / "out", allow_collapsed=True)
    assert sum(said in record.getMessage() for record in caplog.records) == 1
    assert said in (tmp_path / "out" / "README.md").read_text()


def test_a_map_whose_classes_are_lost_in_the_models_size_is_left_out(tmp_path: Path) -> None:
    lonely = torch.full((64, 64), 255, dtype=torch.uint8)
    lonely[0, 0] = 1  # of each two pixels the second is seen
    one = {"image": {"bytes": png(scene(0, 64)[0])}, "label": {"bytes": png(lonely)}}
    assert len(encoded(written(tmp_path / "train.parquet", [*cells(5), one])).rows) == 5


def test_what_a_pass_sees_has_a_pixel_with_a_class() -> None:
    """Of a map with one such pixel, which most cuts do not show; a draw that shows it is as it was."""
    (row,) = rows(1)
    picture = row["picture"]
    classes = torch.full_like(picture.classes, 255)
    classes[-1, -1] = 3
    lonely = Row(**{**row, "picture": replace(picture, classes=classes)})
    first = [pictures.drawn_anew(lonely, DRAWN, seed)["picture"].classes for seed in range(40)]
    shown = [bool((one != 255).any()) for one in first]
    assert 0 < sum(shown) < 40
    for seed, one in enumerate(first):
        batch = SEGMENTATION.collate([SEGMENTATION.again(lonely, seed)], 0)
        assert bool((batch["labels"] != IGNORED).any())
        if shown[seed]:
            assert torch.equal(SEGMENTATION.again(lonely, seed)["picture"].classes, one)


def test_bad_maps_are_said_in_a_line_with_their_place(tmp_path: Path) -> None:
    path = written(tmp_path / "train.parquet", cells(6))
    with pytest.raises(DataError, match=r"row 2: the label map has the class 3; the model has 3 \(0 to 2\), and 255"):
        encoded(path, NAMES[:3])
    given = cells(3)
    given[1]["label"] = cells(2, 16)[1]["label"]
    with pytest.raises(DataError, match=r"row 2: the picture has 32 x 32 pixels, its label map 16 x 16"):
        encoded(written(tmp_path / "odd.parquet", given))
    given[1]["label"] = given[1]["image"]
    with pytest.raises(DataError, match=r"row 2: the label map is a PNG with colours"):
        encoded(written(tmp_path / "colours.parquet", given))


def test_what_cannot_be_read_is_left_out_on_request_and_counted(tmp_path: Path) -> None:
    """A picture cut short, a map of another size and one with colours, of five."""
    given = cells(5)
    given[0]["image"]["bytes"] = given[0]["image"]["bytes"][:60]
    given[2]["label"] = cells(3, 16)[2]["label"]
    given[3]["label"] = given[3]["image"]
    records = load_records(written(tmp_path / "train.parquet", given), form=MAPPED, skip_bad=True)
    sees = PixelInput(SIDE, SIDE)
    with pytest.raises(DataError, match=r"row 1: the picture is a damaged PNG.*or add --skip-bad to skip and count"):
        encode_mapped(records, sees, 255, None)
    with pytest.raises(DataError, match=r"row 1: the picture is a damaged PNG: it ends early\. Repair it\.$"):
        encode_mapped(records, sees, 255, None, skip_bad=None)
    left = encode_mapped(records, sees, 255, None, skip_bad=True)
    assert len(left.rows) == 2 and left.stats.refused == 3 and [one.unreadable for one in left.lost] == [3]
    assert [place.partition(": the")[0] for place in left.bad] == [f"train.parquet: row {i}" for i in (1, 3, 4)]
    said = "3 of 5 examples are dropped: 3 whose picture or label map cannot be read"
    assert any(said in line for line in told(records, left, 0))
    with pytest.raises(DataError, match=r"3 whose picture or label map cannot be read.*--allow-dropped"):
        check_dropped(records, left, Reach(0), allowed=False)
    one = replace(records, rows=[records.rows[0]])
    with pytest.raises(DataError, match=r"no picture can be read, of 1; the first: train.parquet: row 1"):
        encode_mapped(one, sees, 255, None, skip_bad=True)


def test_files_of_a_folder_that_no_row_is_made_of_are_named(tmp_path: Path) -> None:
    for name in ("images", "labels"):
        (tmp_path / "set" / name / "inner").mkdir(parents=True)
        for i, cell in enumerate(cells(3)):
            (tmp_path / "set" / name / f"{i}.png").write_bytes(cell[name[:5]]["bytes"])
    assert not load_records(tmp_path / "set", form=MAPPED).notes
    (tmp_path / "set" / ".DS_Store").write_bytes(b"")
    (tmp_path / "set" / "images" / "inner" / "3.png").write_bytes(b"")
    (tmp_path / "set" / "images" / "4.tga").write_bytes(b"")
    records = load_records(tmp_path / "set", form=MAPPED)
    assert records.notes == ("set: 2 files are not read: images/4.tga, images/inner/3.png",)
    assert records.notes[0] in told(records, encode_mapped(records, PixelInput(SIDE, SIDE), 255, None), 0)


def test_a_model_without_such_a_head_class_is_refused() -> None:
    said = SEGMENTATION.obstacle(ViTConfig())
    assert said == (
        "(vit) sees pictures, but has no class for --task segmentation; give --task image-classification, or another"
        " model, such as MobileViT"
    )
    assert SEGMENTATION.obstacle(BertConfig()).startswith("(bert) sees no pictures; --task segmentation takes a model")
    assert (
        task_named("image-classification")
        .obstacle(UperNetConfig())
        .startswith(
            "(upernet) sees pictures, but has no class for --task image-classification; give --task segmentation, or"
        )
    )
    for name in ("classification", "masked-lm", "question-answering", "causal-lm"):
        assert "give --task image-classification" in task_named(name).obstacle(ViTConfig())
    assert set(pictures.seen_by(MobileViTConfig())) == {name for name, one in tasks().items() if not one.reads_text}


def test_one_picture_at_a_time_is_refused_before_weights_are_read(tmp_path: Path) -> None:
    MobileViTModel(MobileViTConfig(**SIZES)).save_pretrained(tmp_path / "start")
    raw = {"task": "segmentation", "stages": [{"finetune": {"steps": 4, "batch": 4, "micro_batch": 1}}]}
    with pytest.raises(RecipeError, match="stage 'finetune': micro_batch=1 shows batch norms one example at a time"):
        run(raw, tmp_path / "start", tmp_path / "none.parquet", output=tmp_path / "out", quiet=True)


@pytest.mark.slow
def test_a_run_ends_in_a_stock_segmenter(tmp_path: Path, call: Call) -> None:
    start = tmp_path / "start"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        MobileViTModel(MobileViTConfig(**SIZES)).save_pretrained(start)
    (start / "preprocessor_config.json").write_text(json.dumps({"do_normalize": False, "do_flip_channel_order": True}))
    data = written(tmp_path / "scenes.parquet", cells(96))
    train = {"batch": 8, "micro_batch": 8, "lr": 3.0e-3, "warmup": 5}
    raw = {"task": "segmentation", "stages": [{"finetune": {"steps": 100, **train}}]}
    output = tmp_path / "out"
    result = run(raw, start, data, output=output, quiet=True)
    model = AutoModelForSemanticSegmentation.from_pretrained(output)
    assert type(model) is MobileViTForSemanticSegmentation and model.config.num_labels == len(CLASSES)
    (dense, *_) = [one for one in result.records["report"]["models"][1]["measurements"] if one["name"] == "held/miou"]
    assert dense["value"] > 0.25 and not math.isnan(dense["value"])
    (found, *_) = task_metric(open_source(output), "segmentation", data, torch.device("cpu"))
    assert found.value > 0.25  # the most frequent class alone gives .12
    of_dense, of_smaller = (one["segmented"] for one in result.records["report"]["models"])
    assert [one["number"] for one in of_dense] == [one["number"] for one in of_smaller] and len(of_dense) == 3
    assert all(
        a["picture"] == b["picture"] and a["labels"] == b["labels"] for a, b in zip(of_dense, of_smaller, strict=True)
    )
    assert {"macs/picture"} == {
        n["name"] for n in result.records["report"]["models"][1]["measurements"] if "macs" in n["name"]
    }
    page = (output / "report.html").read_text()
    assert "What they see" in page and "What they write" not in page
    assert all(one["given"] in page for one in (*of_dense, *of_smaller))
    code, out, error = call("export", output, "--format", "onnx", "--output", tmp_path / "graph", "--json")
    assert code == 0, error
    assert json.loads(out)["checked"] == "opened in ONNX Runtime and OpenVINO" and json.loads(out)["difference"] < 1e-3
