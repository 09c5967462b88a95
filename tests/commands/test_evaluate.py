"""`compresso evaluate`: what it measures by default, what it writes, and one line for everything that can be wrong
before.
"""

import json
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from tests.conftest import Call

import compresso
from compresso.checkpoint.source import open_source
from compresso.commands import evaluate as evaluation
from compresso.commands.evaluate import evaluate, prompts
from compresso.commands.evaluate_table import show
from compresso.data import nano
from compresso.data.prompt import collaborative_prompt
from compresso.errors import DataError
from compresso.loading import Loaded
from compresso.metrics.record import Environment, Measurement, ModelResults, Report

QUICK = ("--tasks", "world_fact,world_date", "--limit", "3")


@pytest.fixture(autouse=True)
def no_local_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COMPRESSO_DATA", raising=False)
    monkeypatch.setattr("compresso.metrics.tasks.ready.why_silent", lambda _: "HF_HUB_OFFLINE is set")


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is wrong must be found before weights are read."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(sys.modules["compresso.loading"], "load_model", refuse)


@pytest.fixture
def bad_call(call: Call, tmp_path: Path, no_weights: None) -> Callable[..., str]:
    """bad_call(model, *options): the one line on stderr; exit code 2, nothing printed, nothing written."""

    def _bad(model: object, *options: object) -> str:
        there = sorted(tmp_path.rglob("*"))
        code, out, error = call("evaluate", model, *options)
        assert (code, out) == (2, "")
        assert len(error.splitlines()) == 1, error
        assert sorted(tmp_path.rglob("*")) == there
        return error

    return _bad


@dataclass(frozen=True)
class Language:
    """Stands in for a perplexity: what was asked, as a measurement."""

    asked: dict[str, Any]

    def measurements(self, environment: Environment, remark: str | None) -> tuple[Measurement, ...]:
        one = Measurement(
            name="wikitext2/perplexity",
            value=7.5,
            unit="1",
            how="measured",
            protocol=self.asked,
            environment=environment,
            remark=remark,
        )
        return (one,)


@pytest.fixture
def language(monkeypatch: pytest.MonkeyPatch) -> None:
    """Perplexities are not computed, but say what would have been."""

    class Texts:
        texts = ("one",)
        remark = "Texts: one."

    def found(source: Any, corpus: str, protocol: str | None, data_root: object) -> tuple[type[Texts], dict[str, Any]]:
        return Texts, {"corpus": corpus, "asked": protocol}

    def perplexity(
        model: Any, tokenizer: Any, texts: Any, protocol: dict[str, Any], *, batch_size: int, progress: object
    ) -> Language:
        return Language({**protocol, "batch_size": batch_size, "texts": len(texts)})

    monkeypatch.setattr(evaluation, "_language", found)
    monkeypatch.setattr("compresso.metrics.perplexity.perplexity", perplexity)


def test_scores_are_printed_and_written(call: Call, tmp_path: Path) -> None:
    output = tmp_path / "report.json"
    code, out, said = call("evaluate", nano.path(), *QUICK, "--output", output, "--batch", "4", "--device", "cpu")
    assert code == 0
    assert said == "", "what is quick needs no sign of life, and the harness' bars are no lines of a log"
    assert re.search(r"\bprompt\b", out) and re.search(r"world_fact/acc .*\boff\b", out)
    assert "world_fact/acc" in out
    assert "Only the first 3 items of each task" in out
    assert "Not measured: perplexity (--corpus)." in out
    report = Report.model_validate_json(output.read_text())
    (results,) = report.models
    assert results.fingerprint == open_source(nano.path()).identity.fingerprint
    assert (results.name, results.model) == ("nano", "nano")
    assert [one.name for one in results.measurements] == [
        f"world_{t}/{m}" for t in ("fact", "date") for m in ("acc", "acc_norm")
    ]
    assert {one.protocol["prompt"] for one in results.measurements} == {None}
    assert call("evaluate", nano.path(), *QUICK, "--output", output, "--json")[0] == 0  # a report may be replaced


def test_json_is_the_account(call: Call) -> None:
    _, out, _ = call("evaluate", nano.path(), *QUICK, "--json", "--prompt", "both")
    (results,) = Report.model_validate(json.loads(out)).models
    version = str(collaborative_prompt(with_input=False).version)
    assert [bool(one.protocol["prompt"]) for one in results.measurements] == [False] * 4 + [True] * 4
    assert all(version in str(one.protocol["prompt"]) for one in results.measurements[4:])


def test_without_a_wish_it_is_the_perplexity_on_wikitext2(call: Call, language: None) -> None:
    code, out, _ = call("evaluate", nano.path())
    assert code == 0
    assert "wikitext2/perplexity" in out
    assert not re.search(r"\b(prompt|shots|stderr)\b", out.partition("Not measured")[0]), "of which there is nothing"
    assert "Not measured: tasks (--suite or --tasks)." in out
    report = evaluate(nano.path(), batch_size=2)
    assert report.models[0].measurements[0].protocol == {
        "corpus": "wikitext2",
        "asked": None,
        "batch_size": 2,
        "texts": 1,
    }
    both = evaluate(nano.path(), tasks=["world_fact"], corpus="c4", protocol="sparsegpt", limit=1)
    assert [one.name for one in both.models[0].measurements] == [
        "wikitext2/perplexity",
        "world_fact/acc",
        "world_fact/acc_norm",
    ]
    assert both.models[0].measurements[0].protocol["corpus"] == "c4"


def test_the_prompt_is_on_for_what_was_pruned_with_it() -> None:
    loaded = compresso.load(nano.path())
    on = collaborative_prompt(with_input=False)
    pruned = Loaded(loaded.model, loaded.tokenizer, on)
    assert [prompts(pruned, how) for how in ("auto", "on", "off", "both")] == [(on,), (on,), (None,), (on, None)]
    assert [prompts(loaded, how) for how in ("auto", "on", "off", "both")] == [(None,), (on,), (None,), (None, on)]
    with pytest.raises(DataError, match="did you mean 'both'"):
        prompts(loaded, "bot")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--suite", "comonsense"), "DataError: --suite 'comonsense' is unknown; did you mean 'commonsense'?"),
        (
            ("--suite", "foo"),
            "DataError: --suite 'foo' is unknown; known: bbh, commonsense, mmlu, reading, refusal, trust, world",
        ),
        (("--tasks", "world_fact,pica"), "no task or suite 'pica'; did you mean 'piqa'?"),
        (("--tasks", ","), "--tasks names nothing"),
        (("--tasks", "piqa", "--data", "rows.jsonl"), ". --tasks 'piqa' is something else: benchmarks, which bring"),
        (("--suite", "world", "--tasks", "piqa"), "--suite and --tasks are both given"),
        (("--suite", "world", "--prompt", "onn"), "prompt 'onn' is unknown; did you mean 'on'?"),
        (("--suite", "world", "--limit", "0"), "usage: Invalid value for '--limit'"),
        (("--suite", "world", "--batch", "0"), "usage: Invalid value for '--batch'"),
        (("--suite", "world", "--protocol", "sparsegpt"), "protocol 'sparsegpt' belongs to a corpus"),
        (("--limit", "3"), "--prompt and --limit belong to tasks"),
        (
            ("--suite", "reading"),
            "data set aps/super_glue is not in the local cache, and HF_HUB_OFFLINE is set. Give --data-root",
        ),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    options: tuple[str, ...], message: str, bad_call: Callable[..., str]
) -> None:
    assert message in bad_call(nano.path(), *options)


def test_a_device_that_is_not_there_is_no_bad_input(call: Call) -> None:
    code, _, error = call("evaluate", nano.path(), *QUICK, "--device", "tpu")
    assert (code, len(error.splitlines())) == (3, 1)


def test_models_that_cannot_be_evaluated_are_refused(
    bad_call: Callable[..., str], tiny_folder: Path, tmp_path: Path
) -> None:
    bare, other = tmp_path / "bare", tmp_path / "other"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(tiny_folder / name, bare)
    shutil.copytree(tiny_folder, other)
    tensors = load_file(other / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    save_file({**tensors, name: tensors[name][:-1].clone()}, other / "model.safetensors", metadata={"format": "pt"})
    assert "model bare has no tokenizer. Copy tokenizer.json" in bad_call(bare, *QUICK)
    assert f"does not fit its config.json: wrong shape: {name} [47, 32] instead of [48, 32]" in bad_call(other, *QUICK)
    assert "has no weights to evaluate" in bad_call(tiny_folder / "config.json", *QUICK)
    assert "does not exist" in bad_call(tmp_path / "none", *QUICK)


def test_outputs_that_cannot_be_written_are_refused_before(bad_call: Callable[..., str], tmp_path: Path) -> None:
    precious = tmp_path / "config.json"
    precious.write_text('{"model_type": "llama"}')
    assert "is a folder; a file is wanted" in bad_call(nano.path(), *QUICK, "--output", tmp_path)
    assert "is no folder that can be written to" in bad_call(
        nano.path(), *QUICK, "--output", tmp_path / "no" / "report.json"
    )
    assert "exists and is no report of measurements" in bad_call(nano.path(), *QUICK, "--output", precious)


def test_an_empty_or_short_corpus_is_refused(call: Call, tmp_path: Path) -> None:
    for text in ("", "One."):
        corpus = tmp_path / "notes.txt"
        corpus.write_text(text)
        code, out, error = call("evaluate", nano.path(), "--corpus", corpus, "--output", tmp_path / "report.json")
        assert (code, out) == (2, "")
        assert "notes" in error.splitlines()[-1]
    assert not (tmp_path / "report.json").exists()


def test_remarks_and_the_origin_of_rows_are_printed_once(capsys: pytest.CaptureFixture[str]) -> None:
    environment = Environment.here()
    measured = [
        Measurement(
            name=f"boolq/{metric}",
            value=0.5,
            unit="share",
            how="measured",
            n=4,
            protocol={"data": "local rows.jsonl.gz 0123", "data_remark": "a part", "prompt": None},
            environment=environment,
            remark="2 items lost tokens",
        )
        for metric in ("acc", "acc_norm")
    ]
    results = ModelResults(name="m", model="m", fingerprint="sha256:0", measurements=tuple(measured))
    show(Report(created="2026-01-01", models=(results,)))
    out = capsys.readouterr().out
    assert out.count("local rows.jsonl.gz 0123: a part") == 1
    assert "boolq/acc: 2 items lost tokens" in out
    assert "comparable" not in out
