"""The report a run ends with is true, and a collapsed model is not written unless somebody insists."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conftest import Ran

import compresso
from compresso.data import nano
from compresso.errors import CollapseError
from compresso.metrics.guard import Guard
from compresso.metrics.prompts import OPENINGS, REQUESTS
from compresso.metrics.record import ModelResults, Report
from compresso.runner import final_evaluation
from compresso.runner.evaluation_settings import evaluation_settings
from compresso.runner.run import run
from compresso.tasks.causal_lm import CausalLM

RUINED: dict[str, Any] = {
    "name": "ruined",
    "data": {"source": "world", "limit": 60, "held": 12, "max_length": 96, "prompt": False, "pack": False},
    "stages": [
        {"magnitude_structured": {"keep": 0.4}},
        {"recover": {"steps": 1, "lr": 1e-9, "batch": 4, "micro_batch": 4, "rank": 1}},
    ],
}


def models(records: Any) -> tuple[ModelResults, ModelResults]:
    dense, pruned = Report.model_validate(records["report"]).models
    return dense, pruned


@pytest.mark.slow
def test_both_models_answer_the_same_questions(ran: Ran) -> None:
    result = ran("gate-taylor/nano")
    dense, pruned = models(result.records)
    assert (dense.name, pruned.name, pruned.model) == ("dense", "pruned", result.folder.name)
    assert dense.fingerprint == result.records["model"]["fingerprint"] != pruned.fingerprint
    here = {one.name: one for one in dense.measurements}
    there = {one.name: one for one in pruned.measurements}
    for name in ("held/perplexity", "repetition", "degenerate", "decode/batch1", "prefill/batch1"):
        assert here[name].same_protocol(there[name]), name
    assert {"kl", "top1_agreement", "decode_speedup/batch1", "decode_bound/batch1"} <= there.keys() - here.keys()
    for side in (here, there):
        timed = side["decode/batch1"].protocol
        wanted = (final_evaluation.SPEED_PROMPT, final_evaluation.SPEED_NEW, final_evaluation.SPEED_ROUNDS)
        assert tuple(timed[key] for key in ("prompt_tokens", "new_tokens", "rounds")) == wanted
    assert there["kl"].value > 0
    for records, side in ((result.records["before"], here), (result.records["after"], there)):
        assert {part: side[f"parameters/{part}"].value for part in records["parameters"]} == records["parameters"]
        assert side["held/perplexity"].value == pytest.approx(torch.tensor(records["held_loss"]).exp().item(), rel=1e-5)
    assert there["bytes/disk"].value == result.records["bytes"]
    assert [one.prompt for one in dense.samples] == [one.prompt for one in pruned.samples]
    assert dense.not_measured == pruned.not_measured == {}


@pytest.mark.usefixtures("quick_reopening")
def test_a_model_that_keeps_all_has_lost_nothing(tiny_folder: Path, instructions: Path, tmp_path: Path) -> None:
    whole = {
        "name": "whole",
        "data": {"source": str(instructions), "prompt": False, "held": 4},
        "stages": [
            {"magnitude_structured": {"keep": 1.0}},
            {"recover": {"steps": 1, "lr": 1e-12, "batch": 4, "micro_batch": 4, "rank": 1}},
        ],
    }
    result = run(whole, tiny_folder, output=tmp_path / "out", quiet=True)
    dense, pruned = models(result.records)
    assert pruned.value("kl") == pytest.approx(0, abs=1e-9)
    assert pruned.value("top1_agreement") == 1
    assert [one.text for one in dense.samples] == [one.text for one in pruned.samples]
    assert dense.value("held/perplexity") == pytest.approx(pruned.value("held/perplexity"))


@pytest.mark.usefixtures("quick_reopening")
def test_without_data_or_tokenizer_the_account_says_what_it_lacks(tiny_folder: Path, tmp_path: Path) -> None:
    model = compresso.load(tiny_folder).model
    result = run(
        {"name": "prune", "stages": [{"magnitude_structured": {"keep": 0.6}}]},
        model,
        output=tmp_path / "out",
        quiet=True,
    )
    dense, pruned = models(result.records)
    for one in (dense, pruned):
        assert one.not_measured == {"held/perplexity": "the run had no data", "texts": "the model has no tokenizer"}
    assert result.records["guard"]["verdict"] == "unchecked"
    assert "not known" in Guard.model_validate(result.records["guard"]).message()


@pytest.mark.usefixtures("quick_reopening")
def test_data_of_which_nothing_is_held_out_is_said_to_be_that(
    tiny_folder: Path, instructions: Path, tmp_path: Path
) -> None:
    raw = {"stages": [{"recover": {"steps": 1}}], "data": {"held": 0, "limit": 20}}
    result = run(raw, tiny_folder, instructions, output=tmp_path / "out", measure="none", quiet=True)
    for one in models(result.records):
        assert one.not_measured["held/perplexity"] == "no examples were held out"


@pytest.mark.usefixtures("quick_reopening")
def test_where_the_dense_model_does_not_fit_the_account_says_so(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compresso.runner.final_evaluation._lacking", lambda *_: "no room")
    result = run(
        {"name": "prune", "stages": [{"magnitude_structured": {"keep": 0.6}}]},
        tiny_folder,
        output=tmp_path / "out",
        quiet=True,
    )
    dense, pruned = models(result.records)
    assert dense.not_measured["speed"] == pruned.not_measured["speed"] == pruned.not_measured["kl"] == "no room"
    assert pruned.value("decode/batch1") is None
    assert dense.value("parameters/total")


@pytest.mark.slow
@pytest.mark.usefixtures("quick_reopening")
def test_a_collapsed_model_is_refused_and_its_stages_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "out"
    with pytest.raises(
        CollapseError,
        match=r"collapsed: perplexity on held text is .* times the dense one .*resume=True allow_collapsed=True",
    ) as refused:
        run(RUINED, nano.path(), output=output, quiet=True)
    assert refused.value.exit_code == 4
    assert not output.exists()
    assert (tmp_path / "out.partial" / "stages" / "02-recover").is_dir()
    monkeypatch.setattr("compresso.stage.tuning.fit", pytest.fail)
    result = run(RUINED, nano.path(), output=output, quiet=True, resume=True, allow_collapsed=True)
    assert result.records["guard"]["verdict"] == "refuse"
    assert (output / "report.html").is_file()
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.usefixtures("quick_reopening")
def test_a_quick_look_measures_less_and_says_so(tiny_folder: Path, instructions: Path, tmp_path: Path) -> None:
    recipe = {
        "name": "some",
        "data": {"source": str(instructions), "prompt": False, "held": 4},
        "stages": [
            {"magnitude_structured": {"keep": 0.9}},
            {"recover": {"steps": 1, "lr": 1e-9, "batch": 4, "micro_batch": 4, "rank": 1}},
        ],
    }
    for extent in ("quick", "none"):
        result = run(recipe, tiny_folder, output=tmp_path / extent, quiet=True, measure=extent, allow_collapsed=True)
        dense, pruned = models(result.records)
        for one in (dense, pruned):
            assert one.value("held/perplexity") and one.value("decode/batch1") is None
            assert one.not_measured["speed"] == "the run was asked not to measure it"
            assert len(one.samples) == (24 if extent == "quick" else 0)
            assert all(sample.tokens <= 24 for sample in one.samples)
        assert "kl" in pruned.not_measured
        assert result.records["guard"]["checks"][0]["value"] is not None


@pytest.mark.usefixtures("quick_reopening")
@pytest.mark.parametrize("n_stages", [1, 2])
def test_each_model_is_scored_once(
    tiny_folder: Path, instructions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n_stages: int
) -> None:
    """The dense one, and what each stage left."""
    scored: list[int] = []
    score = CausalLM.score
    monkeypatch.setattr(CausalLM, "score", lambda *given: (scored.append(1), score(*given))[1])
    recipe = {
        "name": "some",
        "data": {"source": str(instructions), "prompt": False, "held": 4},
        "stages": [
            {"magnitude_structured": {"keep": 0.9}},
            {"recover": {"steps": 1, "lr": 1e-9, "batch": 4, "micro_batch": 4, "rank": 1}},
        ][-n_stages:],
    }
    run(recipe, tiny_folder, output=tmp_path / "out", quiet=True, measure="none", allow_collapsed=True)
    assert len(scored) == 1 + n_stages


def test_a_model_with_a_chat_template_is_asked_through_it(tiny_folder: Path) -> None:
    opened = compresso.load(tiny_folder)
    tokenizer = opened.tokenizer
    assert tokenizer is not None
    ask = {"corpus": "texts", "instructions": False, "prompt_on": False}
    assert evaluation_settings(opened.model, [tokenizer], **ask).prompts == OPENINGS
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<answer>"
    settings = evaluation_settings(opened.model, [tokenizer], **ask)
    assert settings.prompts == REQUESTS and settings.prompt_format == "by the chat template"
    assert settings.encode is not None
    text = tokenizer.decode(settings.encode(tokenizer, "Hello"))
    assert text.replace(" ", "").endswith("<user>Hello<answer>")
