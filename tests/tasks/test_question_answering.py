"""Extractive question answering: rows become windows that know where the answer lies, no title is on both sides of the
split, scores are SQuAD's, a base model gets a head, and stages train and prune it under its own loss.
"""

import copy
import gzip
import json
import random
from array import array
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conftest import Call
from tests.tasks.conftest import MOODS, NEUTRAL, SIZES, exported, tokenizer, untrained
from transformers import AutoModelForQuestionAnswering, BertConfig, BertForQuestionAnswering, BertModel, GPT2Config
from transformers.modeling_outputs import QuestionAnsweringModelOutput

from compresso.core.answer_window import LONGEST, AnswerWindow
from compresso.core.loss import SPAN
from compresso.data.answer_groups import by_group
from compresso.data.answers import ANSWERED, encode_answered, parse_answered
from compresso.data.record_forms import BadRecord, records_from
from compresso.data.records import Answered, Records
from compresso.data.registry import load_records
from compresso.engines.encoder import encoder_parity, encoder_reference
from compresso.engines.onnx_runtime import ONNX
from compresso.errors import DataError
from compresso.job import Job
from compresso.methods.distill import Distill
from compresso.methods.gate_taylor import GateTaylor
from compresso.methods.recover import Recover
from compresso.metrics.answers import EXACT, F1, NEVER, WHOLE
from compresso.metrics.record import Environment
from compresso.report.records import RunRecords
from compresso.runner.options import with_options
from compresso.runner.run import run
from compresso.tasks.question_answering import QUESTION_ANSWERING
from compresso.training.distill_objective import DistillObjective
from compresso.training.order import Micro

Make = Callable[..., Job]


def questions(n: int, seed: int = 0, words: tuple[int, int] = (4, 12)) -> list[dict[str, Any]]:
    """Which word of a text has a mood: one answer a question."""
    draw = random.Random(seed)
    rows: list[dict[str, Any]] = []
    for i in range(n):
        context = [draw.choice(NEUTRAL) for _ in range(draw.randint(*words))]
        answer = draw.choice((*MOODS["pos"], *MOODS["neg"]))
        context.insert(draw.randint(0, len(context)), answer)
        text = " ".join(context)
        answers = {"text": [answer], "answer_start": [f" {text} ".index(f" {answer} ")]}
        rows.append({"question": "w1 w2", "context": text, "answers": answers, "title": f"t{i % 7}", "id": str(i)})
    return rows


def records(rows: list[dict[str, Any]]) -> Records:
    return records_from(rows, "here", ANSWERED)


def encoded(rows: list[dict[str, Any]], max_length: int = 32, **how: Any) -> Any:
    return encode_answered(records(rows), tokenizer(), max_length, **how)


@pytest.fixture(scope="session")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of questions."""
    path = tmp_path_factory.mktemp("data") / "asked.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in questions(280)))
    return path


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """make(): a job of a model with random weights large enough to tell units apart."""

    def _make() -> Job:
        return untrained(
            BertForQuestionAnswering(BertConfig(**SIZES)).eval(),
            encoded(questions(24), segments=True).rows,
            QUESTION_ANSWERING,
            tmp_path / "work",
        )

    return _make


SQUAD = {"question": "who", "context": "a b c", "answers": {"text": ["b", "b"], "answer_start": [2, 2]}, "title": "T"}


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({}, Answered("who", "a b c", (("b", 2),), "T")),
        ({"answers": [{"text": "c", "answer_start": 4}], "id": 3}, Answered("who", "a b c", (("c", 4),), "T")),
        ({"title": None}, Answered("who", "a b c", (("b", 2),), "")),
        ({"answers": {"text": [], "answer_start": []}}, Answered("who", "a b c", (), "T")),
        ({"answers": [], "is_impossible": True, "plausible_answers": [{}]}, Answered("who", "a b c", (), "T")),
        ({"is_impossible": False}, Answered("who", "a b c", (("b", 2),), "T")),
        # as pandas writes a column that had gaps
        ({"answers": {"text": ["b"], "answer_start": [2.0]}}, Answered("who", "a b c", (("b", 2),), "T")),
        ({"answers": [{"text": "c", "answer_start": 4.0}]}, Answered("who", "a b c", (("c", 4),), "T")),
    ],
)
def test_the_columns_that_are_read(change: dict[str, Any], wanted: Answered) -> None:
    assert parse_answered(SQUAD | change) == wanted


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"question": " "}, "field 'question' is empty"),
        ({"context": 5}, "field 'context' is a number; wanted a string"),
        (
            {"is_impossible": True},
            "field 'is_impossible' is true, and field 'answers' holds 1; wanted true beside none",
        ),
        ({"answers": [], "is_impossible": False}, "field 'is_impossible' is false, and field 'answers' holds 0"),
        ({"is_impossible": "False"}, "field 'is_impossible' is 'False'; wanted true or false"),
        ({"is_impossible": 0}, "field 'is_impossible' is 0; wanted true or false"),
        ({"answers": {"text": ["b"], "answer_start": [3]}}, "answer 'b' does not stand at character 3 of the context"),
        ({"answers": {"text": ["b"], "answer_start": [-3]}}, "does not stand at character -3"),
        ({"answers": {"text": ["b"]}}, "has no lists text and answer_start of one length"),
        ({"answers": "b"}, "field 'answers' is a string; wanted"),
        ({"answers": {"text": ["b"], "answer_start": [True]}}, "answer_start of 'b' is true; wanted a whole number"),
        ({"answers": {"text": ["b"], "answer_start": [2.5]}}, "answer_start of 'b' is 2.5; wanted a whole number"),
        ({"answers": [{"text": "b", "answer_start": "2"}]}, "answer_start of 'b' is '2'; wanted a whole number"),
        ({"answers": [{"text": 2, "answer_start": 2}]}, "the text of an answer is 2; wanted a string"),
        ({"answers": [{"text": "b"}]}, "answer_start of 'b' is null; wanted"),
    ],
)
def test_what_is_no_question_says_why(change: dict[str, Any], said: str) -> None:
    with pytest.raises(BadRecord, match=said):
        parse_answered(SQUAD | change)
    with pytest.raises(BadRecord, match="fields are: question, text; wanted question, context and answers"):
        parse_answered({"question": "a", "text": "b"})


def test_windows_cover_the_text_and_know_where_the_answer_lies() -> None:
    rows = questions(20, words=(60, 90))
    made = encoded(rows, segments=True)
    assert len(made.rows) > 3 * len(rows) and "20 questions give" in made.notes[0]
    told: dict[int, list[Any]] = {}
    for row in made.rows:
        told.setdefault(row["window"].question, []).append(row)
        assert len(row["input_ids"]) <= 32 and len(row["window"].begins) == len(row["input_ids"])
        assert set(row["token_type_ids"]) == {0, 1}
    for number, windows in told.items():
        given = rows[number]
        answer = given["answers"]["text"][0]
        reached = {
            i
            for row in windows
            for a, b in zip(row["window"].begins, row["window"].ends, strict=True)
            if a >= 0
            for i in range(a, b)
        }
        assert reached == {i for i, letter in enumerate(given["context"]) if letter != " "}
        overlap = sum(sum(one >= 0 for one in row["window"].begins) for row in windows) - len(given["context"].split())
        assert overlap >= 10 * (len(windows) - 1)  # a third of a window
        found = [row for row in windows if row["labels"] != [0, 0]]
        assert found
        for row in windows:
            first, last = row["labels"]
            text = given["context"][row["window"].begins[first] : row["window"].ends[last]]
            seen = given["answers"]["answer_start"][0] in row["window"].begins
            assert (text == answer) == seen and (first > 0) == seen


def test_long_questions_are_cut_and_short_rows_refused() -> None:
    row = {**SQUAD, "question": " ".join(["w1"] * 50)}
    (made,) = encoded([row]).rows
    assert made["input_ids"].count(made["input_ids"][1]) == 10 and len(made["input_ids"]) <= 32
    with pytest.raises(DataError, match="max_length=31: wanted at least 32"):
        encoded([row], max_length=31)
    with pytest.raises(DataError, match="the vocabulary has 4"):
        encoded([row], vocab_size=4)


def test_no_title_lies_on_both_sides_and_asking_again_gives_the_same() -> None:
    rows = encoded(questions(70)).rows
    held = by_group(rows, 15)
    groups = [{rows[i]["window"].group for i in range(70) if (i in held) == inside} for inside in (True, False)]
    assert not groups[0] & groups[1] and len(groups[0]) == 2 and len(held) == 20
    assert by_group(rows, len(held)) == held and by_group(rows, 0) == set()
    turned = rows[::-1]
    assert {turned[i]["window"].group for i in by_group(turned, 15)} == groups[0]
    bare = encoded([{**one, "title": ""} for one in questions(3)])
    assert [row["window"].group for row in bare.rows] == [one["context"] for one in questions(3)]
    assert "split by their context" in bare.notes[-1]


def test_the_best_answer_is_that_of_trying_all() -> None:
    draw = torch.Generator().manual_seed(0)
    n = 60
    begins = array("i", [-1] * 5 + [3 * i for i in range(n - 6)] + [-1])
    ends = array("i", [-1] * 5 + [3 * i + 2 for i in range(n - 6)] + [-1])
    window = AnswerWindow(0, "", "".join(chr(97 + i % 26) for i in range(3 * n)), (), begins, ends)
    for _ in range(20):
        starts, stops = torch.randn(2, n, generator=draw).unbind(0)
        tried = [
            (float(starts[i] + stops[j]), i, j) for i in range(5, n - 1) for j in range(i, min(i + LONGEST, n - 1))
        ]
        top, i, j = max(tried)
        found, text = window.best(starts, stops)
        assert found == pytest.approx(top) and text == window.context[begins[i] : ends[j]]
    for apart, length in ((LONGEST - 1, LONGEST), (LONGEST, 1)):  # the longest that counts, and one more
        starts, stops = torch.zeros(2, n).unbind(0)
        starts[10], stops[10 + apart] = 5.0, 5.0
        _, text = window.best(starts, stops)
        assert (text == window.context[begins[10] : ends[10 + apart]]) == (length == LONGEST)
    nothing = AnswerWindow(0, "", "a", (), array("i", [-1]), array("i", [-1]))
    assert nothing.best(torch.zeros(1), torch.zeros(1)) == (-torch.inf, "")


def with_some_unanswerable(n: int, seed: int = 0, **how: Any) -> list[dict[str, Any]]:
    """As `questions`; every third text has no mood in it, so that there is no answer."""
    rows = questions(n, seed, **how)
    for row in rows[::3]:
        (answer,) = row["answers"]["text"]
        row["context"] = " ".join("w3" if word == answer else word for word in row["context"].split())
        row["answers"] = {"text": [], "answer_start": []}
    return rows


def test_questions_without_an_answer_point_at_the_first_token_of_all_windows() -> None:
    rows = with_some_unanswerable(12, words=(60, 90))
    made = encoded(rows)
    assert "4 of 12 questions have no answer: the first token stands for none" in made.notes
    assert not any("lie whole in no window" in note for note in made.notes)
    for row in made.rows:
        window = row["window"]
        assert window.open and (window.answers == ()) == (window.question % 3 == 0)
        if not window.answers:
            assert row["labels"] == [0, 0]
    assert not any(row["window"].open for row in encoded(questions(3)).rows)
    with pytest.raises(DataError, match="no question has an answer, so there is nothing to learn"):
        encoded(rows[::3])


class Says(torch.nn.Module):
    """A model whose two logits of a token are its id's, so that a test decides what it answers; `sure` is added to
    those of the first token where no mood is in sight.
    """

    def __init__(self, logits: torch.Tensor, sure: float = 0.0) -> None:
        super().__init__()
        self.logits, self.sure = torch.nn.Parameter(logits), sure
        self.config = BertConfig(**SIZES)
        self.device = torch.device("cpu")

    def get_input_embeddings(self) -> torch.nn.Embedding:
        return torch.nn.Embedding(self.config.vocab_size, 2)

    def forward(self, input_ids: torch.Tensor, **_: Any) -> Any:
        logits = self.logits[input_ids].clone()
        logits[:, 0] += self.sure * ~((input_ids >= 4) & (input_ids < 10)).any(dim=1)
        return QuestionAnsweringModelOutput(start_logits=logits, end_logits=logits)


@pytest.mark.parametrize(("none", "exact", "answered"), [(-1.0, 8, True), (0.5, 12, True), (9.0, 4, False)])
def test_nothing_is_an_answer_where_its_two_logits_are_above_those_of_all_words(
    none: float, exact: int, answered: bool
) -> None:
    """Moods have logits 1 and neutral words 0; `none` is that of [CLS], in the window where it is least."""
    rows = encoded(with_some_unanswerable(12)).rows
    logit = torch.tensor([0.0, 0.0, none, 0.0] + [1.0] * 6 + [0.0] * (SIZES["vocab_size"] - 10))
    found = QUESTION_ANSWERING.score(Says(logit), rows)  # type: ignore[arg-type]
    assert len(found.f1) == 12 and sum(found.exact) == exact
    assert found.f1 == tuple(map(float, found.exact))  # words of one token
    numbers = {one.name: one for one in found.measurements(Environment.here(), "t")}
    assert numbers[NEVER].value == pytest.approx(4 / 12) and numbers[NEVER].how == "counted"
    assert sum(found.whole) < 8 and found.whole[0] == 0.0  # of a question without an answer no word is right
    says = {F1: numbers[F1].value, WHOLE: numbers[WHOLE].value, NEVER: numbers[NEVER].value}
    guard = QUESTION_ANSWERING.judge(BertConfig(), {**says, "examples": 12}, {**says, "examples": 12})
    assert "no answer" in guard.message() or "whole text" in guard.message()
    assert (numbers[EXACT].value > numbers[NEVER].value) == answered


def test_of_windows_without_the_answer_the_least_says_none() -> None:
    """One window in which there is an answer is enough, however sure the others are that there is none."""
    rows = encoded(with_some_unanswerable(12, words=(60, 90))).rows
    assert len(rows) > 24
    logit = torch.tensor([0.0, 0.0, -0.5, 0.0] + [1.0] * 6 + [0.0] * (SIZES["vocab_size"] - 10))
    found = QUESTION_ANSWERING.score(Says(logit, sure=5.0), rows)  # type: ignore[arg-type]
    assert len(found.exact) == 12 and all(found.exact)


def test_where_every_question_has_an_answer_nothing_is_none() -> None:
    rows = encoded(questions(6)).rows
    logit = torch.zeros(SIZES["vocab_size"])
    logit[2], logit[4:10] = 9.0, 1.0
    found = QUESTION_ANSWERING.score(Says(logit), rows)  # type: ignore[arg-type]
    assert found.never == () and [one.name for one in found.measurements(Environment.here(), "t")] == [F1, EXACT, WHOLE]
    assert all(found.exact)  # however sure the first token is


def published(rows: list[dict[str, Any]], **article: Any) -> dict[str, Any]:
    """The same rows as SQuAD's authors publish them."""
    asked = [
        {
            "question": row["question"],
            "id": row["id"],
            "is_impossible": not row["answers"]["text"],
            "answers": [
                {"text": text, "answer_start": begin}
                for text, begin in zip(row["answers"]["text"], row["answers"]["answer_start"], strict=True)
            ],
        }
        for row in rows
    ]
    paragraphs = [{"context": row["context"], "qas": [one]} for row, one in zip(rows, asked, strict=True)]
    return {"version": "v2.0", "data": [{"title": rows[0]["title"], "paragraphs": paragraphs, **article}]}


@pytest.mark.parametrize("how", ["one line", "many lines", "packed"])
def test_a_file_as_it_is_published_holds_the_same_questions(how: str, tmp_path: Path) -> None:
    rows = [{**row, "title": "t"} for row in with_some_unanswerable(9)]
    text = json.dumps(published(rows), indent=None if how == "one line" else 1)
    path = tmp_path / ("dev.json.gz" if how == "packed" else "dev.json")
    path.write_bytes(gzip.compress(text.encode()) if how == "packed" else text.encode())
    found = load_records(path, form=ANSWERED)
    assert found.rows == records(rows).rows and found.kind == "answered"
    assert found.sha256 == records(rows).sha256
    assert found.passed_over == {"id": 9} and found.columns["is_impossible"] == 9
    assert found.places[1] == f"{path.name}: article 1, paragraph 2, question 1"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            '{"data": [{"title": "t"}]}',
            "dev.json: article 1, paragraph 1, question 1: fields are: title, context; want",
        ),
        ('{"data": [5]}', "article 1, paragraph 1, question 1: holds a number; wanted an object with question"),
        ('{"data": [{"title": "t", "paragraphs": []}]}', "the file holds no record"),
        ('{"data": [{"paragraphs": [{"context": "a"', "dev.json:1: bad JSON at character 42"),
        ('{\n"data": [\n}', "dev.json:3: bad JSON at character 1"),
        ('{"data": 5}', "dev.json: field 'data' is a number; wanted a list"),
        ('{"data": "nope"}', "dev.json: field 'data' is a string; wanted a list"),
        ('{"data": "nope", "question": "a"}', "dev.json:1: fields are: data, question; wanted question"),
        (
            '{"data": [{"paragraphs": {"context": "a", "qas": []}}]}',
            "dev.json: article 1: field 'paragraphs' is an object; wanted a list",
        ),
        (
            '{"data": [{"paragraphs": [{"qas": "a"}]}]}',
            "article 1, paragraph 1: field 'qas' is a string; wanted a list",
        ),
        ("{" * 20 + "\n" + "{", "bad JSON"),
    ],
)
def test_what_is_no_such_file_is_refused_at_its_place(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "dev.json"
    path.write_text(text.replace("\\n", "\n"))
    with pytest.raises(DataError) as error:
        load_records(path, form=ANSWERED)
    assert said in str(error.value) and len(str(error.value).splitlines()) == 1


def test_an_object_a_line_is_still_one_row_a_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text("".join(json.dumps(row) + "\n" for row in questions(4)))
    assert load_records(path, form=ANSWERED).rows == records(questions(4)).rows
    path.write_text("{broken\n" + path.read_text())
    assert load_records(path, form=ANSWERED, skip_bad=True).n_bad == 1


def test_a_whole_file_has_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "dev.json"
    path.write_text(json.dumps(published([{**row, "title": "t"} for row in questions(9)])))
    monkeypatch.setattr("compresso.data.lines.MAX_WHOLE_BYTES", 100)
    with pytest.raises(DataError, match=r"one JSON object of more than 100 bytes; write its rows as .jsonl"):
        load_records(path, form=ANSWERED)


def test_the_loss_is_the_models_own_and_padding_does_not_count(make: Make) -> None:
    job = make()
    one = job.collated(job.rows[:1])
    with torch.no_grad():
        wanted = job.model(
            **{key: value for key, value in one.items() if key != "labels"},
            start_positions=one["labels"][:, 0],
            end_positions=one["labels"][:, 1],
        ).loss
        torch.testing.assert_close(SPAN(job.model, one), wanted)
        each = [float(SPAN(job.model, job.collated([row]))) for row in job.rows[:5]]
        assert float(SPAN(job.model, job.collated(job.rows[:5]))) == pytest.approx(sum(each) / 5, rel=1e-5)
    assert SPAN.terms(one["labels"]) == 2


def test_a_score_is_that_of_answers_read_off_the_logits(make: Make) -> None:
    job = make()
    found = QUESTION_ANSWERING.score(job.model, job.rows)
    with torch.no_grad():
        for row, exact in zip(job.rows, found.exact, strict=True):
            given = {key: value for key, value in job.collated([row]).items() if key != "labels"}
            said = job.model(**given)
            _, text = row["window"].best(said.start_logits[0], said.end_logits[0])
            assert exact == (text == row["window"].answers[0])
    f1, match, whole = found.measurements(Environment.here(), "t")
    assert (f1.name, match.name, whole.name, whole.how) == (F1, EXACT, WHOLE, "counted")
    assert f1.value >= match.value and f1.stderr is not None and f1.n == len(job.rows)


def test_of_windows_of_one_question_the_surest_counts(make: Make) -> None:
    job = make()
    rows = encoded(questions(6, words=(60, 90)), segments=True).rows
    found = QUESTION_ANSWERING.score(job.model, rows)
    assert len(found.f1) == 6 < len(found.nats) == len(rows)
    by_question: dict[int, list[tuple[float, str]]] = {}
    with torch.no_grad():
        for row in rows:
            given = {key: value for key, value in job.collated([row]).items() if key != "labels"}
            said = job.model(**given)
            by_question.setdefault(row["window"].question, []).append(
                row["window"].best(said.start_logits[0], said.end_logits[0])
            )
    best = [max(several)[1] for several in by_question.values()]
    assert [
        text == row["answers"]["text"][0] for text, row in zip(best, questions(6, words=(60, 90)), strict=True)
    ] == [*found.exact]


def test_a_student_is_taught_where_answers_lie(make: Make) -> None:
    job = make()
    given = job.collated(job.rows[:4])
    teacher = copy.deepcopy(job.model)
    with torch.no_grad():
        teacher.get_parameter("qa_outputs.weight").mul_(-1)
        inputs = {key: value for key, value in given.items() if key != "labels"}
        real = given["attention_mask"] == 1
        wanted = 0.0
        for row in range(4):
            for end in ("start_logits", "end_logits"):
                p, q = (getattr(m(**inputs), end)[row][real[row]].log_softmax(-1) for m in (teacher, job.model))
                wanted += float((p.exp() * (p - q)).sum()) / 8
    made = DistillObjective(
        job.model,
        QUESTION_ANSWERING.halves(job.model, []),
        QUESTION_ANSWERING.halves(teacher, []),
        compare=QUESTION_ANSWERING.compare,
    )
    assert made(given, Micro(0, 0, range(4)))["loss"].item() == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize(
    "stage",
    [
        GateTaylor(keep=0.7, batches=1, batch=4, kinds=("head", "channel")),
        Recover(steps=2, batch=4, micro_batch=2, rank=2),
        Distill(steps=2, batch=4, micro_batch=2, train="all", intermediate_weight=1.0, hard_weight=0.5),
    ],
    ids=lambda stage: type(stage).__name__,
)
def test_stages_for_any_task_train_and_prune_it(stage: Any, make: Make) -> None:
    job = make()
    dense = copy.deepcopy(job.model)
    before = {name: value.clone() for name, value in job.model.state_dict().items()}
    job = replace(job, original=lambda dtype, device: copy.deepcopy(dense).to(device, dtype))
    state = stage(job).model.state_dict()
    assert any(
        state[name].shape != value.shape or not torch.equal(state[name], value) for name, value in before.items()
    )
    assert all(bool(value.isfinite().all()) for value in state.values())


def test_a_new_head_has_two_outputs_and_the_encoder_stays() -> None:
    torch.manual_seed(0)
    model = BertModel(BertConfig(**SIZES, num_labels=5)).eval()
    encoder = {name: value.clone() for name, value in model.state_dict().items() if "pooler" not in name}
    made = QUESTION_ANSWERING.with_head(model, (), 0)
    assert isinstance(made, BertForQuestionAnswering) and made.qa_outputs.weight.shape == (2, 32)
    assert {name.removeprefix("bert.") for name in made.state_dict() if name.startswith("bert.")} == set(encoder)
    assert all(torch.equal(made.state_dict()[f"bert.{name}"], value) for name, value in encoder.items())
    assert "--task question-answering takes an encoder" in QUESTION_ANSWERING.obstacle(GPT2Config())


SETS = (
    *("stages.finetune.steps=120", "stages.finetune.lr=5.0e-3", "stages.gate_taylor.batches=2"),
    *("stages.recover.rank=4", "stages.recover.steps=10", "stages.recover.lr=1.0e-3"),
    *("stages.recover.lr_at_hidden=null", "data.held=60"),
)


@pytest.fixture(scope="session")
def pruned(bert: Path, asked: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A result of a run that begins with a base model."""
    output = tmp_path_factory.mktemp("runs") / "answers"
    raw = with_options("gate-taylor", model=str(bert), task="question-answering", keep=0.8, sets=SETS)
    run(raw, bert, asked, output=output, quiet=True)
    return output


@pytest.mark.slow
def test_a_run_makes_a_head_trains_prunes_and_tells_f1_and_exact_match(pruned: Path) -> None:
    records = RunRecords.checked(json.loads((pruned / "records.json").read_text()), "records")
    assert [*records.recipe.knobs()] == ["finetune", "gate_taylor", "recover"]
    assert records.recipe.data["held"] == 80  # whole titles of 40
    for one in records.report.models:
        f1, exact, whole = (one.value(name) for name in (F1, EXACT, WHOLE))
        assert f1 is not None and exact is not None and f1 >= exact > 0.6 and whole is not None and whole < 0.5
    assert records.guard.verdict == "ok" and "of the lead over the whole text" in records.guard.message()
    model, info = AutoModelForQuestionAnswering.from_pretrained(pruned, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and model.config.intermediate_size < 48
    card, page = (pruned / "README.md").read_text(), (pruned / "report.html").read_text()
    assert "pipeline_tag: question-answering" in card and "Tasks: F1" in card and "±" in card
    assert "Tasks: exact match" in page and "start_logits.argmax" in page


@pytest.mark.slow
@pytest.mark.engines
def test_onnx_gives_starts_and_ends_and_computes_the_same(pruned: Path, call: Call, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    live = exported(call, pruned, tmp_path / "onnx")
    with torch.no_grad():
        live.get_parameter("qa_outputs.bias")[1] += 1
    assert encoder_parity(ONNX, tmp_path / "onnx", encoder_reference(live, None)).opens == "no"


@pytest.mark.slow
def test_evaluate_scores_a_file_of_questions(pruned: Path, call: Call, tmp_path: Path) -> None:
    rows = tmp_path / "fresh.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in questions(40, seed=5)))
    code, out, _ = call("evaluate", pruned, "--task", "question-answering", "--data", rows, "--json")
    numbers = json.loads(out)["models"][0]["measurements"]
    assert code == 0 and [one["name"] for one in numbers] == ["fresh/f1", "fresh/exact_match", "fresh-whole-text/f1"]
    assert numbers[0]["value"] > 0.6 and numbers[0]["n"] == 40


@pytest.mark.slow
def test_a_run_learns_that_some_questions_have_no_answer(bert: Path, tmp_path: Path) -> None:
    """From a file as it is published, with a title for every ten questions."""
    rows = with_some_unanswerable(270)
    articles = [published([{**row, "title": f"t{i}"} for row in rows[i::27]])["data"][0] for i in range(27)]
    data = tmp_path / "train-v2.0.json"
    data.write_text(json.dumps({"version": "v2.0", "data": articles}))
    raw = with_options("gate-taylor", model=str(bert), task="question-answering", keep=0.8, sets=SETS)
    result = run(raw, bert, data, output=tmp_path / "out", quiet=True)
    records = RunRecords.checked(result.records, "records")
    assert records.data is not None and records.data.columns["is_impossible"] == 270
    assert any("90 of 270 questions have no answer" in note for note in records.data.notes)
    for one in records.report.models:
        exact, never = one.value(EXACT), one.value(NEVER)
        assert exact is not None and never is not None and exact > 0.6 > 0.5 > never > 0.2
    assert records.guard.verdict == "ok"


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--model", "LLAMA"), "is a causal language model; --task question-answering takes an encoder"),
        (("--data", "MOODS"), "fields are: sentence, label; wanted question, context and answers"),
    ],
)
def test_what_cannot_work_is_refused_in_a_line(
    more: tuple[str, str],
    said: str,
    bert: Path,
    asked: Path,
    moods: Path,
    tiny_folder: Path,
    call: Call,
    tmp_path: Path,
) -> None:
    given = {"--model": bert, "--task": "question-answering", "--data": asked, "--output": tmp_path / "out"}
    given |= {more[0]: {"LLAMA": tiny_folder, "MOODS": moods}[more[1]]}
    code, out, error = call("run", "gate-taylor", *(part for pair in given.items() for part in pair))
    assert (code, out) == (2, "") and len(error.splitlines()) == 1 and said in error
