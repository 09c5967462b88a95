"""A text classifier as the scorer of toxicity: which label it is, how far it goes, and that a batch changes nothing."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, BertModel

from compresso.data import nano
from compresso.errors import DataError
from compresso.metrics.trust.scorer import MULTI, ClassifierScorer, toxic_label
from compresso.metrics.trust.suite import Extent, trust_of
from tests.conftest import Call
from tests.metrics.trust.made_up import data
from tests.metrics.trust.scripted import Scripted
from tests.tasks.conftest import SIZES, tokenizer

TEXTS = ["w1 good", "bad", "", "w2 w3 w4 awful poor w5 w6"]


def classifier(*labels: str, bias: tuple[float, ...] | None = None, **more: Any) -> BertForSequenceClassification:
    """A tiny BERT with these labels; with a bias it gives that whatever it reads."""
    torch.manual_seed(0)
    config = BertConfig(**SIZES, id2label=dict(enumerate(labels)), **more)
    model = BertForSequenceClassification(config).eval()
    with torch.no_grad():
        if bias is None:
            model.classifier.weight.normal_()
        else:
            model.classifier.weight.zero_()
            model.classifier.bias.copy_(torch.tensor(bias))
    return model


def test_shares_of_two_labels_and_of_labels_by_themselves() -> None:
    model = classifier("fine", "toxic", bias=(0.0, math.log(3)))
    scorer = ClassifierScorer(model, tokenizer(), "small", toxic_label(model.config, "small"))
    assert scorer.toxicity(TEXTS) == pytest.approx([0.75] * 4) and scorer.name == "small, label toxic"
    several = classifier("toxic", "insult", bias=(-math.log(3), 5.0), problem_type=MULTI)
    assert ClassifierScorer(several, tokenizer(), "several", 0).toxicity(["bad"]) == pytest.approx([0.25])


def test_texts_side_by_side_score_as_alone() -> None:
    model = classifier("fine", "toxic")
    alone, together = (ClassifierScorer(model, tokenizer(), "small", 1, batch) for batch in (1, 4))
    scores = together.toxicity(TEXTS)
    assert scores == pytest.approx(alone.toxicity(TEXTS), abs=1e-6) and max(scores) - min(scores) > 1e-4


def test_what_is_beyond_its_context_is_cut_and_said(caplog: pytest.LogCaptureFixture) -> None:
    model = classifier("fine", "toxic")
    scorer = ClassifierScorer(model, tokenizer(), "small", 1)
    long = "bad " * 40
    assert scorer.toxicity([long, "bad"])[0] == pytest.approx(scorer.toxicity(["bad " * 30])[0], abs=1e-5)
    assert "reads 32 tokens: it read the beginning of 1 text" in caplog.text


@pytest.mark.parametrize(
    ("labels", "wanted", "said"),
    [
        (
            ("LABEL_0", "LABEL_1"),
            None,
            "no one label called toxic: it has LABEL_0, LABEL_1; name one by --scorer-label",
        ),
        (("toxic", "toxicity"), None, "no one label called toxic"),
        (("fine", "hateful"), "hatefull", "did you mean 'hateful'"),
        (("toxic",), None, "1 label: a classifier needs two"),
    ],
)
def test_a_label_that_is_not_there_is_one_line(labels: tuple[str, ...], wanted: str | None, said: str) -> None:
    with pytest.raises(DataError) as error:
        toxic_label(BertConfig(id2label=dict(enumerate(labels))), "small", wanted)
    assert said in str(error.value)
    assert toxic_label(BertConfig(id2label={0: "Toxic", 1: "fine"}), "small") == 0
    assert toxic_label(BertConfig(id2label={0: "fine", 1: "hateful"}), "small", "hateful") == 1


def test_the_suite_takes_its_scores(tmp_path: Path) -> None:
    model = classifier("fine", "toxic", bias=(0.0, math.log(3)))
    scorer = ClassifierScorer(model, tokenizer(), "small", 1)
    (one, *_) = trust_of(Scripted(lambda _: "bad"), data(tmp_path), Extent("sampled", draws=2), scorer)
    assert one.score()[0] == pytest.approx(0.25) and one.remark == "scored by small, label toxic"


@pytest.fixture
def bad(call: Call) -> Callable[..., str]:
    """bad(*options): the one line on stderr of a command that does nothing."""

    def _bad(*options: object) -> str:
        code, out, error = call("evaluate", nano.path(), "--suite", "trust", *options)
        assert (code, out, len(error.splitlines())) == (2, "", 1), error
        return error

    return _bad


def test_bad_words_are_one_line(bad: Callable[..., str], call: Call, tmp_path: Path) -> None:
    sampled = ("--scoring", "sampled", "--scorer")
    assert "--scoring likelihood writes none to read" in bad("--scorer", "somewhere")
    assert "--scorer-label is a label of --scorer" in bad("--scorer-label", "toxic")
    assert "--scorer: " in bad(*sampled, tmp_path / "absent")
    assert "is no text classifier" in bad(*sampled, nano.path())
    BertModel(BertConfig(**SIZES)).save_pretrained(tmp_path / "base")
    assert "is no text classifier" in bad(*sampled, tmp_path / "base")
    classifier("a", "b").save_pretrained(tmp_path / "bare")
    assert "name one by --scorer-label" in bad(*sampled, tmp_path / "bare")
    assert "has no tokenizer" in bad(*sampled, tmp_path / "bare", "--scorer-label", "a")
    code, _, error = call("evaluate", nano.path(), "--suite", "world", "--scorer", "x")
    assert code == 2 and "--scorer belongs to --suite trust" in error
