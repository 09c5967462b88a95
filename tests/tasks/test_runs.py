"""`compresso run ... --task classification`: a head is trained, the model pruned and recovered, and what was measured
is told; a killed run ends in the same bytes; what cannot work is refused in a line before weights are read.
"""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conftest import Call, Forked, work_of
from tests.tasks.conftest import exported, sentences
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import compresso
from compresso.engines.encoder import encoder_parity, encoder_reference
from compresso.engines.onnx_runtime import ONNX
from compresso.errors import DataError, RecipeError
from compresso.report.records import RunRecords
from compresso.runner import examples
from compresso.runner.execution import Execution
from compresso.runner.options import with_options
from compresso.runner.recipe import build
from compresso.runner.run import run
from compresso.stage import cards
from compresso.tasks.base import task_named, tasks

SETS = (
    *("stages.finetune.steps=60", "stages.finetune.lr=3.0e-3", "stages.finetune.save_every=20"),
    *("stages.gate_taylor.batches=2", "stages.recover.rank=4", "stages.recover.save_every=5"),
    *("stages.recover.steps=20", "stages.recover.lr=1.0e-3", "stages.recover.lr_at_hidden=null"),
)
PIPELINE = (
    *(*SETS[:4], "stages.distill.steps=20", "stages.distill.save_every=5", "stages.distill.lr=1.0e-3"),
    *("stages.qat.steps=20", "stages.qat.save_every=5", "stages.qat.lr=1.0e-3"),
)
Command = Callable[..., list[str]]


@pytest.fixture(scope="session")
def arguments(bert: Path, moods: Path) -> Command:
    """arguments(output, *more, recipe, sets): of a run that takes seconds."""

    def _arguments(output: Path, *more: str, recipe: str = "gate-taylor", sets: Sequence[str] = SETS) -> list[str]:
        given = [part for one in sets for part in ("--set", one)]
        options = ["--model", str(bert), "--task", "classification", "--data", str(moods), "--keep", "0.7"]
        return ["run", recipe, *options, "--output", str(output), *given, *more]

    return _arguments


@pytest.fixture(scope="session")
def pruned(bert: Path, moods: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A result."""
    output = tmp_path_factory.mktemp("runs") / "moods"
    raw = with_options("gate-taylor", model=str(bert), task="classification", keep=0.7, sets=SETS)
    run(raw, bert, moods, output=output, quiet=True)
    return output


def outcome(output: Path) -> tuple[str, dict[str, Any]]:
    stages = json.loads((output / "records.json").read_text())["stages"]
    facts = {name: {key: value for key, value in stage.items() if key != "seconds"} for name, stage in stages.items()}
    return hashlib.sha256((output / "model.safetensors").read_bytes()).hexdigest(), facts


@pytest.mark.slow
def test_the_result_is_a_stock_classifier_that_still_knows_the_labels(pruned: Path) -> None:
    model, tokens = (one.from_pretrained(pruned) for one in (AutoModelForSequenceClassification, AutoTokenizer))
    assert type(model).__name__ == "BertForSequenceClassification"
    assert model.config.id2label == {0: "neg", 1: "pos"} and model.config.intermediate_size < 48
    rows = sentences(40, seed=9)
    with torch.no_grad():
        logits = [model(**tokens(row["sentence"], return_tensors="pt")).logits[0] for row in rows]
    right = [model.config.id2label[int(one.argmax())] == row["label"] for one, row in zip(logits, rows, strict=True)]
    assert sum(right) >= 38
    loaded = compresso.load(pruned)
    assert type(loaded.model) is type(model) and loaded.model.num_parameters() == model.num_parameters()
    with pytest.raises(DataError, match="a BertForSequenceClassification writes no text"):
        loaded.complete("w1")


@pytest.mark.slow
def test_records_card_and_report_tell_the_accuracy_of_both(pruned: Path) -> None:
    records = RunRecords.checked(json.loads((pruned / "records.json").read_text()), "records")
    assert records.recipe.task == "classification"
    assert [*records.recipe.knobs()] == ["finetune", "gate_taylor", "recover"]
    assert records.dense is not None and records.dense.name == "bert, fine-tuned"
    dense, smaller = records.report.models
    assert (dense.name, dense.fingerprint) == ("dense", records.dense.fingerprint) != records.model.fingerprint
    for one in (dense, smaller):
        (accuracy,) = [number for number in one.measurements if number.name == "held/acc"]
        assert accuracy.value >= 0.9 and accuracy.n == 48 and accuracy.stderr is not None
        assert one.value("held-majority/acc") == 0.5 and one.value("held/f1") >= 0.9
    assert records.guard.verdict == "ok" and records.before.held_loss is not None
    assert records.after.parameters["blocks"] <= 0.705 * records.before.parameters["blocks"]  # widths are equal
    assert records.stages["gate_taylor"].units_kept["layers.0.heads"] == "4/4"  # its config could not say fewer
    card = (pruned / "README.md").read_text()
    assert "pipeline_tag: text-classification" in card and "| Tasks: accuracy: held |" in card
    assert "AutoModelForSequenceClassification.from_pretrained" in card and "bert, fine-tuned" in card
    page = (pruned / "report.html").read_text()
    assert "Tasks: accuracy" in page and "bert, fine-tuned" in page and "text-classification" in page
    again = build(compresso.runner.recipe.read(pruned / "recipe.yaml"))  # type: ignore[attr-defined]
    assert again.task.name == "classification" and len(again.stages) == 3


@pytest.mark.slow
def test_the_terminal_tells_the_accuracy_and_a_run_again_has_the_same_bytes(
    arguments: Command, call: Call, pruned: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    code, out, _ = call(*arguments(tmp_path / "out"))
    assert code == 0 and "bert has no head for classification: finetune makes a new one" in caplog.messages
    (line,) = [line for line in out.splitlines() if line.startswith("held acc")]
    assert "100.0 % -> 100.0 %, on 48 held-out examples; guard: ok" in line
    assert outcome(tmp_path / "out") == outcome(pruned)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "sets", "kills"),
    [
        ("gate-taylor", SETS, (("recover", 12),)),
        ("pipelines/encoder", PIPELINE, (("scores", 2), ("distill", 12), ("saved", 3), ("qat", 12), ("saved", 4))),
    ],
)
def test_killed_in_every_stage_a_run_ends_in_the_same_bytes(
    recipe: str,
    sets: Sequence[str],
    kills: Sequence[tuple[str, int]],
    arguments: Command,
    forked: Forked,
    pruned: Path,
    tmp_path: Path,
) -> None:
    output, whole = tmp_path / "out", pruned if recipe == "gate-taylor" else tmp_path / "whole"
    words = arguments(output, recipe=recipe, sets=sets)
    if not whole.exists():
        code, log = forked(arguments(whole, recipe=recipe, sets=sets))
        assert code == 0, log
    assert forked(words, event="kill", phase="finetune", at=45)[0] == -9
    assert (work_of(output) / "training" / "finetune" / "step-000040").is_dir()
    assert forked([*words, "--resume"], event="kill", phase="saved", at=1)[0] == -9
    dense = work_of(output) / "stages" / "01-finetune"
    written = (dense / "model.safetensors").stat().st_mtime_ns
    model = AutoModelForSequenceClassification.from_pretrained(dense)  # can be used by itself
    assert model.config.id2label == {0: "neg", 1: "pos"} and model.config.intermediate_size == 48
    for phase, at in kills:
        code, log = forked([*words, "--resume"], event="kill", phase=phase, at=at)
        assert code == -9 and "finetune" not in log, log
        assert (dense / "model.safetensors").stat().st_mtime_ns == written  # it is not done again
    code, log = forked([*words, "--resume"])
    assert code == 0 and "finetune  1/" not in log, log
    assert outcome(output) == outcome(whole)


@pytest.mark.slow
def test_distillation_learns_from_the_fine_tuned_model(bert: Path, moods: Path, tmp_path: Path) -> None:
    sets = [one for one in SETS if "recover" not in one] + ["stages.distill.steps=4", "stages.distill.rank=2"]
    raw = with_options("gate-taylor/distill", model=str(bert), task="classification", keep=0.9, sets=sets)
    result = run(raw, bert, moods, output=tmp_path / "out", quiet=True)
    divergences = result.records["stages"]["distill"]["curve"]["divergence"]
    assert max(divergences) < 0.1  # a teacher without a trained head would be far away


@pytest.mark.slow
def test_a_model_with_a_head_keeps_it(pruned: Path, moods: Path, tmp_path: Path) -> None:
    raw = with_options(
        "gate-taylor",
        model=str(pruned),
        task="classification",
        keep=0.9,
        sets=[one for one in SETS if "finetune" not in one],
    )
    result = run(raw, pruned, moods, output=tmp_path / "out", quiet=True)
    assert [*result.records["stages"]] == ["gate_taylor", "recover"] and result.records["dense"] is None
    assert result.model.config.id2label == {0: "neg", 1: "pos"}
    other = tmp_path / "other.jsonl"
    other.write_text('{"text": "w1", "label": "joy"}\n{"text": "w2", "label": "pos"}\n' * 30)
    with pytest.raises(DataError, match=r"label 'joy' is none of the model's 2: 0 \(neg\), 1 \(pos\)"):
        run(raw, pruned, other, output=tmp_path / "out2", quiet=True)


@pytest.mark.parametrize(
    ("recipe", "more", "said"),
    [
        ("wanda/50", (), "stage 'wanda' works on next tokens, and task classification has none; under it run"),
        ("contextual/vocab", (), "works on next tokens"),
        ("gate-taylor", ("--task", "clasification"), "task 'clasification' is unknown; did you mean 'classification'?"),
        ("gate-taylor", ("--model", "LLAMA"), "is a causal language model; --task classification takes an encoder"),
        (
            "gate-taylor",
            ("--task", "causal-lm"),
            "no causal language model; give a task that it can do: --task classification",
        ),
        (
            "gate-taylor",
            ("--data", "TEXT"),
            "fields are: text; wanted text, sentence, or sentence1 + sentence2, and label",
        ),
        ("gate-taylor", ("--layout", "native"), "layout native is not written for model_type 'bert'"),
        ("gate-taylor", ("--keep", "0.2"), "at least"),
    ],
)
def test_what_cannot_work_is_refused_before_weights_are_read(
    recipe: str,
    more: tuple[str, ...],
    said: str,
    bert: Path,
    moods: Path,
    tiny_folder: Path,
    call: Call,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        sys.modules["compresso.runner.first_job"], "load_model", lambda *_, **__: pytest.fail("weights were read")
    )
    text = tmp_path / "text.jsonl"
    text.write_text('{"text": "w1"}\n' * 40)
    given = {"--model": str(bert), "--task": "classification", "--data": str(moods), "--output": str(tmp_path / "out")}
    words = [{"LLAMA": str(tiny_folder), "TEXT": str(text)}.get(one, one) for one in more]
    given |= dict(zip(words[::2], words[1::2], strict=True))
    code, out, error = call("run", recipe, *(part for pair in given.items() for part in pair))
    assert (code, out) == (2, "") and len(error.splitlines()) == 1
    assert said in error
    assert not (tmp_path / "out").exists() and not work_of(tmp_path / "out").exists()


def test_a_task_without_data_asks_for_some(bert: Path, call: Call, tmp_path: Path) -> None:
    """The recipe's own data is for another task."""
    code, _, error = call("run", "gate-taylor", "--model", bert, "--task", "classification", "--output", tmp_path / "o")
    assert code == 2 and "recipe gate-taylor needs data; give --data" in error
    assert "for --task classification: text, sentence, or sentence1 + sentence2, and label" in error
    assert "alpaca" not in error


@pytest.mark.parametrize("name", sorted(tasks()))
def test_a_recipe_without_data_names_what_its_task_reads(name: str) -> None:
    said = examples._such_data(task_named(name))  # pyright: ignore[reportPrivateUsage]
    assert said.startswith("give --data ") and ("alpaca" in said) == (name == "causal-lm")
    assert name == "causal-lm" or task_named(name).form.wanted in said


def test_a_plan_counts_the_head_and_shows_the_stage(bert: Path, call: Call) -> None:
    code, out, _ = call("plan", "gate-taylor", "--model", bert, "--task", "classification", "--json")
    shown = json.loads(out)
    assert code == 0 and shown["after"]["parameters"]["blocks"] < shown["before"]["parameters"]["blocks"]
    assert any("counted with a head for 2 labels" in note for note in shown["notes"])
    assert any("all heads stay" in note for note in shown["notes"])
    total = shown["before"]["parameters"]["total"]
    assert total == compresso.inspect(bert)["parameters"]["total"] + 2 * 32 + 2


def test_a_plan_says_that_heads_stay_only_where_they_do(bert: Path, call: Call) -> None:
    """HomoDistil's whole heads leave with the hidden dimensions, in the same ratio."""
    for kinds, stay in (("[head_channel,channel,hidden]", True), ("[head,channel,hidden]", False)):
        given = ("--set", f"stages.homodistil.kinds={kinds}")
        code, out, _ = call("plan", "homodistil", "--model", bert, "--keep", "0.6", *given, "--json")
        shown = json.loads(out)
        kept, size = shown["shapes"].get("layers.0.heads", (4, 4))
        assert code == 0 and any("all heads stay" in note for note in shown["notes"]) == stay == (kept == size)


def test_fine_tuning_stands_first() -> None:
    with pytest.raises(compresso.errors.RecipeError, match=r"stage 'finetune' makes the dense model .* put it first"):
        build({"task": "classification", "stages": ["gate_taylor", "finetune"]})


@pytest.mark.slow
def test_transformers_alone_opens_the_result(pruned: Path) -> None:
    """In a process that knows nothing of compresso."""
    code = (
        "import sys; from transformers import pipeline;"
        "found = pipeline('text-classification', sys.argv[1])('w1 good w2');"
        "assert 'compresso' not in sys.modules; print(found[0]['label'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(pruned)], env={**os.environ, "PYTHONPATH": ""}, capture_output=True, text=True
    )
    assert done.stdout.strip() == "pos", done.stderr[-500:]


@pytest.mark.slow
@pytest.mark.engines
def test_onnx_computes_the_same_in_the_engines(pruned: Path, call: Call, tmp_path: Path) -> None:
    """Texts of different lengths side by side, so padding must not count."""
    pytest.importorskip("onnxruntime")
    live = exported(call, pruned, tmp_path / "onnx")
    assert json.loads((tmp_path / "onnx" / "config.json").read_text())["id2label"] == {"0": "neg", "1": "pos"}
    with torch.no_grad():
        live.get_parameter("classifier.bias").add_(1)
    assert encoder_parity(ONNX, tmp_path / "onnx", encoder_reference(live, None)).opens == "no"
    code, _, error = call("export", pruned, "--format", "gguf", "--output", tmp_path / "x.gguf")
    assert code == 2 and len(error.splitlines()) == 1


@pytest.mark.slow
def test_evaluate_scores_a_file_of_labelled_texts(
    pruned: Path, bert: Path, call: Call, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = tmp_path / "fresh.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in sentences(60, seed=5)))
    given = ("--task", "classification", "--data", rows)
    code, out, _ = call("evaluate", pruned, *given, "--json")
    accuracy, guess, f1 = json.loads(out)["models"][0]["measurements"]
    assert code == 0 and accuracy["name"] == "fresh/acc" and accuracy["n"] == 60 and accuracy["value"] >= 0.95
    assert guess["value"] == 0.5
    assert f1["name"] == "fresh/f1" and f1["value"] >= 0.95 and f1["stderr"] is not None
    code, out, _ = call("evaluate", pruned, *given, "--limit", 10)
    assert code == 0 and "fresh/acc" in out and "Not measured" not in out
    rows.write_text(rows.read_text() + json.dumps({"text": "the cat is good", "label": -1}) + "\n")
    code, _, error = call("evaluate", pruned, *given)
    assert code == 2 and "fresh.jsonl:61: field 'label' is -1" in error and "or add --skip-bad to skip" in error
    code, out, _ = call("evaluate", pruned, *given, "--skip-bad", "--json")
    skipped = json.loads(out)["models"][0]["measurements"][0]
    assert code == 0 and skipped["value"] == accuracy["value"] and skipped["n"] == 60
    assert skipped["protocol"] == accuracy["protocol"] | {"bad_lines_skipped": 1}
    assert caplog.messages[-1] == "fresh.jsonl: 1 bad line is skipped"
    for more, said in (
        ((pruned, "--skip-bad"), "--skip-bad is for the rows of --data"),
        ((bert, *given), "has no head for classification"),
        ((pruned, "--task", "classification"), "--task and --data belong together"),
        ((pruned, *given, "--suite", "world"), "leave them out with a task"),
    ):
        code, _, error = call("evaluate", *more)
        assert code == 2 and said in error and len(error.splitlines()) == 1


def test_a_plan_names_the_classes_with_their_rows(bert: Path, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{"text": "the cat is good", "label": 7 if n % 3 else 0} for n in range(90)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = compresso.plan("gate-taylor", bert, task="classification", data=path)["data"]
    assert found["notes"][0] == "2 classes: 0 (30), 7 (60)"


def test_weights_without_zeros_are_refused_before_anything_is_trained(
    bert: Path, moods: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fine-tuning takes hours, and the file told before; what is named as a cure runs under the task and cures it."""
    last = {"sparse_finetune": {"steps": 2, "batch": 4, "micro_batch": 4}}
    raw = with_options({"name": "r", "stages": [last]}, model=str(bert), task="classification")
    with monkeypatch.context() as patched:
        patched.setattr(Execution, "_run_stage", lambda *_: pytest.fail("a stage ran"))
        with pytest.raises(RecipeError, match="no linear of the blocks has a weight that is 0") as caught:
            run(raw, bert, moods, output=tmp_path / "no", quiet=True, measure="none")
    able = {name: one for name, one in cards().items() if one.zeroes is not None and one.any_task}
    assert able and "sparsegpt" not in str(caught.value) and not (tmp_path / "no").exists()
    for name, one in able.items():
        assert f"{name} ({', '.join(f'{knob}: {value}' for knob, value in (one.zeroes or {}).items())})" in str(
            caught.value
        )
        first = {name: {**(one.zeroes or {}), **last["sparse_finetune"]}}
        raw = with_options({"name": "r", "stages": [first, last]}, model=str(bert), task="classification", max_steps=2)
        result = run(raw, bert, moods, output=tmp_path / name, quiet=True, measure="none", allow_collapsed=True)
        assert result.records["stages"]["sparse_finetune"]["zeros"] > 0
