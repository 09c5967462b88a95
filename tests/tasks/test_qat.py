"""Encoders with rounded weights and activations: what a run of the recipe writes, opens and exports; that training
gives back what rounding took, and that a decoder loses by its activations; that a killed run ends in the same bytes.
"""

import copy
import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conftest import Call, Forked
from tests.tasks.conftest import MakeClassifier, sentences
from tests.tasks.test_runs import outcome
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import compresso
from compresso.checkpoint.source import open_source
from compresso.edit.patches import unpatch_
from compresso.edit.quantise_inputs import behind_activations
from compresso.errors import RecipeError
from compresso.job import Job
from compresso.methods.qat import Qat
from compresso.report.records import RunRecords
from compresso.runner.evaluate_task import task_metric
from compresso.runner.options import with_options
from compresso.runner.run import run
from compresso.tasks import classification
from compresso.training.other_teacher import read_teacher

SETS = (
    *("stages.finetune.steps=60", "stages.finetune.lr=3.0e-3"),
    *("stages.qat.steps=30", "stages.qat.lr=1.0e-3", "stages.qat.warmup=3", "stages.qat.save_every=5"),
)
PACKS = pytest.mark.skipif(
    importlib.util.find_spec("compressed_tensors") is None, reason="compressed-tensors: not installed"
)
RUNS = pytest.mark.skipif(importlib.util.find_spec("onnxruntime") is None, reason="onnxruntime: not installed")


def arguments(recipe: str, bert: Path, moods: Path, output: Path, *more: str) -> list[str]:
    sets = [part for one in SETS for part in ("--set", one)]
    options = ["--model", str(bert), "--task", "classification", "--data", str(moods)]
    return ["run", recipe, *options, "--output", str(output), "--measure", "none", *sets, *more]


@pytest.fixture(scope="session")
def made(bert: Path, moods: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Results by recipe."""
    folder, found = tmp_path_factory.mktemp("qat"), dict[str, Path]()
    for recipe in ("qat/w4a4", "qat/w8a8"):
        found[recipe] = folder / recipe.replace("/", "-")
        raw = with_options(recipe, model=str(bert), task="classification", sets=SETS)
        run(raw, bert, moods, output=found[recipe], measure="none", quiet=True)
    return found


@pytest.mark.slow
def test_a_run_ends_with_the_accuracy_of_both_and_says_what_is_simulated(made: dict[str, Path]) -> None:
    folder = made["qat/w4a4"]
    records = RunRecords.checked(json.loads((folder / "records.json").read_text()), "records")
    assert [*records.recipe.knobs()] == ["finetune", "qat"]
    for one in records.report.models:
        assert (one.value("held/acc") or 0) >= 0.9
    facts = records.stages["qat"].model_extra or {}
    assert facts["asymmetric_inputs"] == 2 and facts["activation_bits"] == 4  # those behind GELU
    (patch,) = records.patches
    assert not isinstance(patch, str) and all(name.endswith("output.dense") for name in patch.params["asymmetric"])
    card, page = (folder / "README.md").read_text(), (folder / "report.html").read_text()
    said = "Activations of 4 bits by qat are simulated"
    assert said in card and said in page
    assert "simulated" not in (made["qat/w8a8"] / "README.md").read_text()


@pytest.mark.slow
def test_it_opens_in_transformers_and_with_its_activations_in_compresso(made: dict[str, Path]) -> None:
    folder = made["qat/w4a4"]
    plain, tokens = (one.from_pretrained(folder) for one in (AutoModelForSequenceClassification, AutoTokenizer))
    rows = sentences(40, seed=9)
    texts = tokens([row["sentence"] for row in rows], return_tensors="pt", padding=True)
    ours = compresso.load(folder).model
    for model in (plain, ours):
        with torch.no_grad():
            best = model.eval()(**texts).logits.argmax(-1).tolist()
        assert model.config.id2label is not None
        assert sum(model.config.id2label[i] == row["label"] for i, row in zip(best, rows, strict=True)) >= 36
    for name, module in plain.named_modules():
        if isinstance(module, nn.Linear) and "encoder" in name:
            assert all(len(row.unique()) <= 15 for row in module.weight)
    with torch.no_grad():
        assert not torch.equal(plain(**texts).logits, ours(**texts).logits)
        unpatch_(ours)
        torch.testing.assert_close(plain(**texts).logits, ours(**texts).logits)


@pytest.mark.slow
def test_what_reads_it_computes_with_its_activations_or_says_that_it_does_not(
    made: dict[str, Path], moods: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scored, as a teacher, and by engines, which know nothing of them."""
    folder, read = made["qat/w4a4"], list[nn.Module]()
    scored = classification.label_score
    monkeypatch.setattr(
        classification, "label_score", lambda model, *rest: (read.append(model), scored(model, *rest))[1]
    )
    task_metric(open_source(folder), "classification", moods, torch.device("cpu"), 8)
    read.append(read_teacher(str(folder), torch.float32, torch.device("cpu")))
    ids = torch.arange(5, 25).unsqueeze(0)
    with torch.no_grad():
        rounded, scores, taught = (one(ids).logits for one in (compresso.load(folder).model, *read))
    assert torch.equal(scores, rounded) and torch.equal(taught, rounded)
    found = compresso.verify(folder)
    opened = [one for one in found if one.opens == "yes"]
    assert opened and {one.reason for one in opened} == {
        "by its weights alone: quantise_inputs is what compresso.load adds"
    }


@pytest.mark.slow
def test_a_run_on_a_rounded_model_says_what_it_begins_with(
    made: dict[str, Path], moods: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = made["qat/w4a4"]
    alone = "qat-w4a4: a run starts from its weights alone, without what compresso.load adds: quantise_inputs"
    assert alone in compresso.plan("qat/w4a4", folder, data=moods, task="classification")["notes"]
    raw = with_options("qat/w4a4", model=str(folder), task="classification", sets=["stages.qat.steps=1"])
    records = run(raw, folder, moods, output=tmp_path / "again", measure="none", allow_collapsed=True).records
    assert alone in caplog.messages
    facts = records["stages"]["qat"]
    assert facts["sparsity"] == facts["zero_before"] > 0
    assert f"qat: {100 * facts['zero_before']:.1f} % of the weights that it rounds are 0 already" in caplog.text
    card = (tmp_path / "again" / "README.md").read_text()
    assert f"{100 * facts['zero_before']:.1f} % of the weights that qat worked on were zeros before" in card
    assert "% zeros by qat" not in card and "quantised by qat/w4a4" in card and "pruned and quantised" not in card


@RUNS
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the exporter's own
@pytest.mark.parametrize(("recipe", "dtype"), [("qat/w4a4", "f32"), ("qat/w8a8", "int8")])
def test_it_runs_in_onnx_runtime(recipe: str, dtype: str, made: dict[str, Path], call: Call, tmp_path: Path) -> None:
    words = ("export", made[recipe], "--format", "onnx", "--dtype", dtype, "--output", tmp_path / "onnx", "--json")
    code, out, error = call(*words)
    assert code == 0, error
    told = json.loads(out)
    assert told["checked"] == "opened in ONNX Runtime" and told["difference"] < (1e-4 if dtype == "f32" else 0.5)


@PACKS
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the library's own
@pytest.mark.parametrize(
    ("recipe", "kind", "format"),
    [
        ("qat/w4a4", "4 bits, a scale a row", "pack-quantized"),
        ("qat/w8a8", "8 bits, a scale a row, activations of 8 bits", "int-quantized"),
    ],
)
def test_its_weights_are_packed(
    recipe: str, kind: str, format: str, made: dict[str, Path], call: Call, tmp_path: Path
) -> None:
    packed = tmp_path / "packed"
    code, out, error = call("export", made[recipe], "--format", "compressed-tensors", "--output", packed, "--json")
    assert code == 0, error
    told = json.loads(out)
    assert (told["dtype"], told["checked"]) == (kind, "opened in transformers") and told["difference"] < 0.1
    config = json.loads((packed / "config.json").read_text())["quantization_config"]
    assert config["format"] == format and {"classifier", "bert.pooler.dense"} <= set(config["ignore"])
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (packed, made[recipe])]
    assert sizes[0] < sizes[1]
    card = (packed / "README.md").read_text()
    assert "AutoModelForSequenceClassification.from_pretrained" in card
    assert ("Activations of 4 bits, which it was trained for, are simulated" in card) == (recipe == "qat/w4a4")


@pytest.mark.slow
def test_killed_in_the_middle_a_run_ends_in_the_same_bytes(
    made: dict[str, Path], bert: Path, moods: Path, forked: Forked, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    words = arguments("qat/w4a4", bert, moods, output)
    assert forked(words, event="kill", phase="qat", at=17)[0] == -9
    code, log = forked([*words, "--resume"])
    assert code == 0, log
    assert outcome(output) == outcome(made["qat/w4a4"])


@pytest.mark.slow
def test_a_reduced_student_is_stock_and_was_taught_by_the_layers_it_began_as(
    bert: Path, moods: Path, tmp_path: Path
) -> None:
    raw = with_options("qat/w4a4-reduced", model=str(bert), task="classification", sets=SETS)
    result = run(raw, bert, moods, output=tmp_path / "out", measure="none", allow_collapsed=True, quiet=True)
    assert [*result.records["stages"]] == ["finetune", "keep_layers", "qat"]
    assert (
        result.plan.kept["layers"] == (1,) and result.records["stages"]["keep_layers"]["units_kept"]["layers"] == "1/2"
    )
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert model.config.num_hidden_layers == 1
    curve = result.records["stages"]["qat"]["curve"]
    assert curve["attention"][-1] < curve["attention"][0] and curve["loss"][-1] < curve["loss"][0]


def levels_in(job: Job) -> list[Tensor]:
    seen: list[Tensor] = []
    for name, module in job.model.named_modules():
        if isinstance(module, nn.Linear) and "encoder" in name:
            module.register_forward_hook(lambda _, given, __: seen.append(given[0]))
    with torch.no_grad():
        job.model(**{name: value for name, value in job.collated(job.rows[:4]).items() if name != "labels"})
    return seen


def taught(job: Job) -> Job:
    dense = copy.deepcopy(job.model)
    return replace(job, original=lambda dtype, device: copy.deepcopy(dense).to(device, dtype))


QUICK: dict[str, Any] = {"steps": 3, "batch": 6, "micro_batch": 6, "warmup": 0}


def test_what_is_behind_an_activation_has_a_grid_of_its_own(classifier: MakeClassifier) -> None:
    job = taught(classifier())
    behind = behind_activations(job.arch.axes(job.model))
    assert behind == {f"bert.encoder.layer.{i}.output.dense" for i in range(2)}
    after = Qat(**QUICK)(job)
    assert all(len(token.unique()) <= 16 for one in levels_in(after) for token in one.flatten(0, -2))
    assert all(len(token.unique()) > 20 for token in [after.model.classifier.weight.flatten()])  # type: ignore[union-attr]
    assert {"soft", "attention", "hidden"} <= set(after.records["qat"]["curve"])


def test_a_teacher_of_other_labels_is_refused(classifier: MakeClassifier) -> None:
    job = classifier()
    other = copy.deepcopy(job.model)
    other.classifier = nn.Linear(32, 2)  # type: ignore[assignment]
    other.config.num_labels = 2
    with pytest.raises(RecipeError, match="decides among 3 classes, its teacher among 2"):
        Qat(**QUICK)(replace(job, original=lambda _, __: other))
