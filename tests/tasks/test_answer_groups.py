"""Questions of few titles: what a message tells to give is a cure, and what is scored need not be learned from."""

import json
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from tests.tasks.conftest import SIZES, tokenizer
from tests.tasks.test_question_answering import encoded, questions, records, with_some_unanswerable
from transformers import BertConfig

import compresso
from compresso.errors import DataError
from compresso.tasks.base import Reading
from compresso.tasks.question_answering import QUESTION_ANSWERING


def planned(model: Path, data: Path, held: int) -> dict[str, Any]:
    sets = [f"data.held={held}"]
    task = "question-answering"
    return compresso.plan("gate-taylor", str(model), task=task, keep=0.8, data=str(data), sets=sets)["data"]


@pytest.mark.parametrize(
    ("titles", "texts", "held", "said"),
    [
        (
            ["T"],
            9,
            1,
            "all of the title 'T', which is not divided; give questions of other titles, too, or leave 'title'",
        ),
        (["T"], 9, 1000, "all of the title 'T', which is not divided"),
        (["T"], 1, 1, "all of the title 'T', which is not divided; give questions of other titles, too$"),
        ([""], 1, 1, "all of one text, which is not divided; give questions about other texts, too$"),
        (["T", "U"], 9, 1000, "are held out; give more, or lower data.held"),
        (["T", "U"], 1, 1000, "are held out; give more, or lower data.held"),
    ],
)
def test_a_cure_for_too_few_titles_is_one(
    titles: list[str], texts: int, held: int, said: str, bert: Path, tmp_path: Path
) -> None:
    """What the message tells to give is given, and the rows are taken."""
    made = questions(36)
    rows = [{**made[i % texts], "title": titles[i % len(titles)], "id": i} for i in range(36)]
    data = tmp_path / "rows.jsonl"

    def tried(rows: list[dict[str, Any]], held: int) -> dict[str, Any]:
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return planned(bert, data, held)

    with pytest.raises(DataError, match=said):
        tried(rows, held)
    if "lower" in said:
        assert tried(rows, 1)["held"] == 18
    elif "leave 'title'" in said:
        assert tried([{**row, "title": None} for row in rows], 1)["held"] == 4
    found = tried([*rows, *({**row, "title": "V", "context": row["context"] + " w1"} for row in rows)], 1)
    assert found["held"] in (18, 36) and not any("lower data.held" in note for note in found["notes"])


def test_where_fewer_cannot_be_held_out_nobody_is_told_to_lower_their_number(bert: Path, tmp_path: Path) -> None:
    """One title of two is held out whole, and it is the larger one."""
    names = sorted(["T", "U"], key=lambda name: sha256(name.encode()).digest())
    rows = [{**row, "title": names[i % 9 == 0]} for i, row in enumerate(questions(36))]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    cure = "what shares a title or a text is held out together: give more of others"
    for held in (1, 32):
        found = planned(bert, data, held)
        assert found["held"] == 32
        assert f"32 of 36 examples are held out, more than stay to learn from; {cure}" in found["notes"]


def test_questions_without_any_answer_are_scored_though_nothing_could_be_learned_from_them() -> None:
    rows = [row for row in with_some_unanswerable(12) if not row["answers"]["text"]]
    assert rows
    with pytest.raises(DataError, match="no question has an answer, so there is nothing to learn"):
        encoded(rows)
    made = QUESTION_ANSWERING.encode(records(rows), tokenizer(), Reading(32, learns=False), BertConfig(**SIZES))
    assert len(made.rows) == len(rows) and all(row["labels"] == [0, 0] for row in made.rows)
