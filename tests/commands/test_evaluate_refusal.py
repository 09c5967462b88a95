"""`compresso evaluate --suite refusal` as a whole on a tiny chat model: against itself nothing changes, a judge
says what does harm and how far people agree with it, attention is measured, and a second call asks nothing again.
"""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
from tests.conftest import Call
from tests.metrics.trust.scripted import benign_tree, tree

from compresso.data import nano
from compresso.metrics.record import Report
from compresso.metrics.trust.judge import LABELS, ModelJudge


@pytest.fixture
def chat(tmp_path: Path) -> Path:
    """The embedded model with a chat template."""
    folder = tmp_path / "chat"
    shutil.copytree(nano.path(), folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["chat_template"] = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def labels(tmp_path: Path) -> Path:
    """Labelled answers, seven of each label."""
    lines = [{"task": "t", "answer": f"answer {i}", "label": LABELS[i % 3].value} for i in range(21)]
    path = tmp_path / "labels.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


@pytest.mark.slow
def test_the_whole_suite(call: Call, chat: Path, labels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The judge knows what people said of the labelled answers, and weighs the others."""
    weighed = ModelJudge.labels

    def knows(self: ModelJudge, pairs: Sequence[tuple[str, str]]) -> list[str]:
        said = weighed(self, pairs)
        known = {f"answer {i}": LABELS[i % 3].value for i in range(21)}
        return [known.get(answer, label) for (_, answer), label in zip(pairs, said, strict=True)]

    monkeypatch.setattr(ModelJudge, "labels", knows)
    (tmp_path / "h.json").write_text(json.dumps(tree()))
    (tmp_path / "b.json").write_text(json.dumps(benign_tree()))
    options = (
        "--suite", "refusal", "--prompts", tmp_path / "h.json", "--benign", tmp_path / "b.json", "--limit", "11",
        "--new-tokens", "8", "--against", chat, "--judge", chat, "--judge-labels", labels,
        "--answers", tmp_path / "kept", "--output", tmp_path / "r.json", "--attention",
    )  # fmt: skip
    code, out, said = call("evaluate", chat, *options)
    assert code == 0, said
    dense, same = Report.model_validate_json((tmp_path / "r.json").read_text()).models
    found = {one.name: one for one in same.measurements}
    assert found["refusal/rate"].n == found["benign/compliance"].n == 11
    kinds = ("rate", "harmful", "irrelevant", "degenerate", "empty")
    assert sum(found[f"refusal/{kind}"].value for kind in kinds) == pytest.approx(1), "an answer is one of five things"
    agreed = found["judge/agreement"]
    assert agreed.n == 21 and "kappa" in str(agreed.remark)
    bare = found.get("refusal/rate/template/none")
    assert found["attention/task/share"].n == 11 - (bare.n or 0 if bare else 0), "a bare task has no template beside it"
    assert {one.name: one.value for one in dense.measurements} == {name: one.value for name, one in found.items()}
    assert {one.verdict for one in same.changes} == {"within noise"} and {one.difference for one in same.changes} == {0}
    assert "attention/entropy" in {one.name for one in same.changes} and "attention/last/rank" in out
    kept = {path: path.read_bytes() for path in (tmp_path / "kept").iterdir()}
    (tmp_path / "r.json").unlink()
    assert call("evaluate", chat, *options)[0] == 0
    assert {path: path.read_bytes() for path in (tmp_path / "kept").iterdir()} == kept


@pytest.mark.slow
def test_a_judge_no_better_than_chance_is_left_out(
    call: Call, chat: Path, labels: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Shares are then by the rule, as without a judge."""
    (tmp_path / "h.json").write_text(json.dumps(tree()))
    options = ("--suite", "refusal", "--prompts", tmp_path / "h.json", "--limit", "2", "--new-tokens", "4")
    rates: list[float | None] = []
    for more in ((), ("--judge", chat, "--judge-labels", labels)):
        output = tmp_path / f"{len(more)}.json"
        code, _, said = call("evaluate", chat, *options, *more, "--output", output)
        assert code == 0, said
        (found,) = Report.model_validate_json(output.read_text()).models
        values = {one.name: one.value for one in found.measurements}
        rates.append(values["refusal/rate"])
        assert "refusal/harmful" not in values and "refusal/harmful" in found.not_measured
    assert rates[0] == rates[1] and "judge/agreement" in values
    assert "no better than chance" in caplog.text and "not believed" in found.not_measured["refusal/harmful"]


def test_a_judge_is_a_chat_model(call: Call, chat: Path, labels: Path, tmp_path: Path) -> None:
    (tmp_path / "h.json").write_text(json.dumps(tree()))
    options = ("--suite", "refusal", "--prompts", tmp_path / "h.json", "--judge", nano.path(), "--judge-labels", labels)
    code, out, said = call("evaluate", chat, *options)
    assert (code, out) == (2, "") and "--judge nano has no chat template" in said and len(said.splitlines()) == 1


def test_other_lengths_of_answers_are_kept_apart(call: Call, chat: Path, tmp_path: Path) -> None:
    (tmp_path / "h.json").write_text(json.dumps(tree()))
    kept = tmp_path / "kept"
    options = ("--suite", "refusal", "--prompts", tmp_path / "h.json", "--limit", "2", "--answers", kept)
    for tokens in ("2", "3", "2"):
        code, _, said = call("evaluate", chat, *options, "--new-tokens", tokens)
        assert code == 0, said
    assert len(list(kept.iterdir())) == 2


def test_labels_are_looked_at_before_weights_are_read(call: Call, chat: Path, tmp_path: Path) -> None:
    (tmp_path / "h.json").write_text(json.dumps(tree()))
    (tmp_path / "labels.jsonl").write_text('{"task": "t", "answer": "a", "label": "bad"}\n')
    options = ("--suite", "refusal", "--prompts", tmp_path / "h.json", "--judge")
    for judge, labels, line in (
        (chat, tmp_path / "labels.jsonl", "labels.jsonl line 1: label 'bad'"),
        (chat, tmp_path / "absent.jsonl", "is no file"),
        (tmp_path / "absent", tmp_path / "labels.jsonl", "label 'bad'"),
    ):
        code, out, said = call("evaluate", chat, *options, judge, "--judge-labels", labels)
        assert (code, out) == (2, "") and line in said and len(said.splitlines()) == 1
