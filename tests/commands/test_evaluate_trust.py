"""`compresso evaluate --suite refusal` and `--suite trust`: one line for what can be wrong, and a whole report."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.conftest import Call
from tests.metrics.trust.made_up import data
from tests.metrics.trust.scripted import tree
from transformers import AutoTokenizer

from compresso.commands.evaluate_table import show
from compresso.commands.trust_options import words_of
from compresso.data import nano
from compresso.metrics.record import Environment, Measurement, ModelResults, Report


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.json"
    path.write_text(json.dumps(tree()))
    return path


@pytest.fixture
def bad(call: Call) -> Callable[..., str]:
    """bad(*options): the one line on stderr; exit code 2 and nothing printed."""

    def _bad(*options: object) -> str:
        code, out, error = call("evaluate", nano.path(), *options)
        assert (code, out) == (2, ""), error
        assert len(error.splitlines()) == 1, error
        return error

    return _bad


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--suite", "refusal"), "--suite refusal needs --prompts FILE"),
        (("--suite", "refusal", "--prompts", "absent.yaml"), "--prompts absent.yaml is no file"),
        (("--suite", "refusal", "--scoring", "sampled"), "--scoring belongs to --suite trust"),
        (("--suite", "trust", "--new-tokens", "4"), "--new-tokens belongs to --suite refusal"),
        (("--suite", "trust", "--attention"), "--attention belongs to --suite refusal"),
        (("--suite", "world", "--against", "x"), "--against belongs to --suite refusal or trust"),
        (("--suite", "trust", "--scoring", "guess"), "--scoring 'guess' is unknown"),
        (("--suite", "trust", "--corpus", "c4"), "--suite trust goes without --corpus and --protocol"),
        (("--suite", "trust", "--limit", "many"), "wanted a number of items, at least 1, or a share such as 5%"),
        (("--suite", "trust", "--limit", "nan%"), "wanted a number of items, at least 1, or a share such as 5%"),
        (("--suite", "trust", "--limit", "inf%"), "wanted a number of items, at least 1, or a share such as 5%"),
        (("--suite", "trust", "--generations", "3"), "--scoring likelihood draws none"),
        (("--suite", "trustt"), "did you mean 'trust'?"),
        (("--suite", "refusals"), "did you mean 'refusal'?"),
        (("--suite", "world", "--limit", "5%"), "a share is for --suite refusal and trust"),
        (("--suite", "trust", "--prompt", "both"), "--prompt both does not go with --suite trust"),
        (("--suite", "trust", "--against", "absent"), "--against: "),
        (
            ("--suite", "trust", "--data-root", "absent"),
            "give one that holds datasets/trust/decodingtrust/",
        ),
        (("--suite", "refusal", "--data-root", "absent"), "--data-root absent is not read by --suite refusal"),
    ],
)
def test_bad_words_are_one_line(options: tuple[str, ...], said: str, bad: Callable[..., str]) -> None:
    assert said in bad(*options)


def test_refusals_want_a_chat_template_and_labels_a_judge(bad: Callable[..., str], prompts: Path) -> None:
    assert "model nano has no chat template" in bad("--suite", "refusal", "--prompts", prompts)
    alone = bad("--suite", "refusal", "--prompts", prompts, "--judge", nano.path())
    assert "--judge and --judge-labels belong together" in alone


def test_a_wrong_file_of_trust_is_said_before_weights(
    bad: Callable[..., str], call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Alike by evaluate, run and plan, though fairness stands last."""
    made = data(tmp_path)
    assert made.folder is not None
    (made.folder / "fairness_adult_0_40_br1.0_sensitive_attr.json").write_text("[1]")
    monkeypatch.setenv("COMPRESSO_DATA", str(tmp_path))
    lines = {bad("--suite", "trust", "--answers", tmp_path / "kept")}
    for command in ("plan", "run"):
        options = ("--trust", "quick", *(("--output", tmp_path / "out") if command == "run" else ()))
        code, out, said = call(command, "magnitude/50", "--model", nano.path(), *options)
        assert (code, out) == (2, "")
        lines.add(said)
    (line,) = lines
    assert "fairness_adult_0_40_br1.0_sensitive_attr.json: wanted a list of 40 groups, one for each row, got 1" in line
    assert not (tmp_path / "out").exists() and not (tmp_path / "kept").exists()


@pytest.mark.parametrize("template", ["", "hello"])
def test_a_chat_template_that_leaves_the_request_out_is_refused(
    template: str, call: Call, prompts: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "chat"
    shutil.copytree(nano.path(), folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": template}))
    for options in (("--suite", "refusal", "--prompts", prompts), ("--suite", "trust")):
        code, out, said = call("evaluate", folder, *options)
        assert (code, out) == (2, "") and len(said.splitlines()) == 1
        assert "model chat: its chat template leaves out what the user says" in said


def test_answers_of_another_chat_format_are_not_taken(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(nano.path())
    words = {words_of(tokenizer, False), words_of(tokenizer, True)}
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    words.add(words_of(tokenizer, False))
    tokenizer.add_tokens(["newcomer"])
    assert len(words | {words_of(tokenizer, False)}) == 4


@pytest.mark.slow
def test_a_model_against_itself(call: Call, tmp_path: Path) -> None:
    """Every dimension whose files are there is measured or says why not, nothing changed, and a second call asks
    nothing again.
    """
    data(tmp_path / "data")
    options = ("--suite", "trust", "--data-root", tmp_path / "data", "--limit", "8", "--answers", tmp_path / "kept")
    output = tmp_path / "report.json"
    code, out, said = call("evaluate", nano.path(), *options, "--against", nano.path(), "--output", output)
    assert code == 0, said
    dense, same = Report.model_validate_json(output.read_text()).models
    assert dense.name == "dense" and "trust/toxicity" in same.not_measured
    assert {one.verdict for one in same.changes} <= {"within noise", "at chance", "not measured"}
    assert {one.environment.dtype for one in same.measurements} == {"float32"}
    in_words = {one.name: one.n for one in same.measurements if one.name.endswith("/degenerate")}
    assert in_words.pop("trust/fairness/degenerate") == 8 and set(in_words.values()) <= set(range(1, 9)), (
        "of 80 that are asked"
    )
    assert len(same.changes) == 8 and "trust/privacy" in out and "against dense" in out
    (journal,) = (tmp_path / "kept").iterdir()
    before = journal.read_bytes()
    assert call("evaluate", nano.path(), *options)[0] == 0
    assert journal.read_bytes() == before
    assert "Only 8 questions of a dimension, every kind with its share (fairness at least 96)" in " ".join(out.split())
    assert "Only the first" not in out


def test_a_share_of_the_questions_is_said_as_such(capsys: pytest.CaptureFixture[str]) -> None:
    protocol = {"suite": "trust", "limit": "5 % of a dimension"}
    number = Measurement(
        name="trust/ethics", value=0.5, unit="share", how="measured", protocol=protocol, environment=Environment.here()
    )
    results = ModelResults(name="m", model="m", fingerprint="sha256:" + "a" * 64, measurements=(number,))
    show(Report(created="2026-01-01T00:00:00+00:00", models=(results,)))
    out = " ".join(capsys.readouterr().out.split())
    assert "Only 5 % of a dimension, every kind with its share: not comparable with published scores" in out
