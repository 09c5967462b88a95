"""Labelled texts: the columns that are read, what a label may be, and that the order of rows decides nothing."""

import json
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from tests.tasks.conftest import tokenizer
from transformers import BertConfig

from compresso.data.labelled import LABELLED, Labels, encode_labelled, known_names, labels_of, parse_labelled
from compresso.data.record_forms import BadRecord, records_from
from compresso.data.records import Labelled, Records
from compresso.data.registry import load_records
from compresso.errors import DataError

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """write(rows): a .jsonl file of them."""

    def _write(*rows: object) -> Path:
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return _write


def records(*labels: object) -> Records:
    return records_from([{"text": f"w{i % 20}", "label": label} for i, label in enumerate(labels)], "here", LABELLED)


@pytest.mark.parametrize(
    ("row", "wanted"),
    [
        ({"text": "a", "label": 1}, Labelled("a", None, 1)),
        ({"sentence": "a", "label": "good", "idx": 7}, Labelled("a", None, "good")),
        ({"sentence": "a", "label": 1.0}, Labelled("a", None, 1)),  # as pandas writes a column that had gaps
        ({"sentence": "a", "label": "1.0"}, Labelled("a", None, 1)),
        ({"sentence1": "a", "sentence2": "b", "label": 0}, Labelled("a", "b", 0)),
        ({"premise": "a", "hypothesis": "b", "label": 2}, Labelled("a", "b", 2)),
        ({"question": "a", "sentence": "b", "label": 0}, Labelled("a", "b", 0)),
        ({"Quality": "1", "#1 ID": "7", "#1 String": "a", "#2 String": "b"}, Labelled("a", "b", 1)),
        ({"sentence1": "a", "sentence2": "b", "gold_label": "neutral"}, Labelled("a", "b", "neutral")),
        ({"text_a": "a", "text_b": "b", "label": 0}, Labelled("a", "b", 0)),
        ({"question1": "a", "question2": "b", "label": " 1 "}, Labelled("a", "b", 1)),
    ],
)
def test_the_columns_that_are_read(row: object, wanted: Labelled) -> None:
    assert parse_labelled(row) == wanted


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"text": "a"}, "fields are: text; wanted text, sentence, or sentence1 . sentence2, and label"),
        ({"sentence1": "a", "label": 1}, "fields are: sentence1, label; wanted text"),
        ({"text": " ", "label": 1}, "field 'text' is empty"),
        ({"sentence1": "a", "sentence2": "", "label": 1}, "field 'sentence2' is empty"),
        ({"text": 5, "label": 1}, "field 'text' is a number; wanted a string"),
        ({"text": "a", "label": 0.5}, "field 'label' is 0.5; wanted a whole number or a name"),
        ({"text": "a", "label": "0.5"}, "field 'label' is '0.5'; wanted a whole number or a name"),
        ({"text": "a", "label": float("nan")}, "field 'label' is nan; wanted a whole number or a name"),
        ({"text": "a", "label": -1.0}, "field 'label' is -1, which is none"),
        ({"text": "a", "label": True}, "field 'label' is true; wanted"),
        ({"text": "a", "label": [1]}, "field 'label' is a list"),
        ({"text": "a", "label": None}, "field 'label' is null"),
        ({"text": "a", "label": -1}, "field 'label' is -1, which is none: the rows of a test set"),
        ({"text": "a", "label": "-1"}, "field 'label' is -1"),
        ({"text": "a", "label": ""}, "field 'label' is ''"),
        (["a", 1], "holds a list; wanted an object with text"),
    ],
)
def test_what_is_no_labelled_text_says_why(row: object, said: str) -> None:
    with pytest.raises(BadRecord, match=said):
        parse_labelled(row)


def test_a_bad_row_is_named_or_skipped_and_counted(write: Write) -> None:
    path = write({"text": "a", "label": 1}, {"text": "b", "label": -1}, {"text": "c", "label": 0})
    said = r"rows.jsonl:2: field 'label' is -1.*Repair it, or add --skip-bad"
    with pytest.raises(DataError, match=said):
        load_records(path, form=LABELLED)
    found = load_records(path, form=LABELLED, skip_bad=True)
    assert [row.label for row in found.rows if isinstance(row, Labelled)] == [1, 0]
    assert found.n_bad == 1 and "rows.jsonl:2" in found.bad[0] and found.kind == "labelled"


def test_parquet_and_other_kinds_of_data(tmp_path: Path, write: Write) -> None:
    table = pyarrow.table({"idx": [0, 1], "sentence": ["a", "b"], "label": [1, 0]})
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    found = load_records(tmp_path / "rows.parquet", form=LABELLED)
    assert list(found.rows) == [Labelled("a", None, 1), Labelled("b", None, 0)]
    plain = tmp_path / "plain.txt"
    plain.write_text("One.\n\nTwo.")
    for data, said in ((plain, "plain.txt:1: holds a Text; wanted an object"), ("world", "wanted text, sentence")):
        with pytest.raises(DataError, match=said):
            load_records(data, form=LABELLED)
    # and as text a labelled row is what it was
    assert load_records(write({"text": "a", "label": 1})).kind == "text"


def test_labels_are_numbered_by_name_or_number_whatever_the_order_of_rows() -> None:
    names = labels_of(records("pos", "neg", "pos", "neg", "mid", "mid"))
    assert names == Labels(("mid", "neg", "pos"), {"mid": 0, "neg": 1, "pos": 2})
    assert labels_of(records("mid", "neg", "neg", "mid", "pos", "pos")) == names
    stars = labels_of(records(*(5, 10, 1) * 3))
    assert stars.names == ("1", "5", "10") and stars.numbers == {1: 0, 5: 1, 10: 2}


def test_labels_of_a_model_with_a_head_are_its_own() -> None:
    known = known_names(BertConfig(id2label={1: "yes", 0: "no"}))
    assert known == ("no", "yes") and known_names(BertConfig(num_labels=3)) == ("LABEL_0", "LABEL_1", "LABEL_2")
    by_name, by_number = labels_of(records("yes", "no", "no"), known), labels_of(records(1, 1, 1), known)
    assert by_name.names == by_number.names == known
    assert by_name.numbers["yes"] == by_number.numbers[1] == 1
    for label in (2, "maybe"):
        with pytest.raises(DataError, match=rf"label {label!r} is none of the model's 2: 0 \(no\), 1 \(yes\)"):
            labels_of(records(label), known)


def test_a_model_whose_classes_are_called_by_numbers_is_asked_by_them() -> None:
    """One that was trained on labels from 1 reads its own data as it did then."""
    own = labels_of(records(2, 1, 1, 2))
    assert own.names == ("1", "2")
    again = labels_of(records(1, 1), own.names)
    assert [again.numbers[label] for label in (1, 2)] == [0, 1]
    for label in (0, 3):
        with pytest.raises(DataError, match=rf"label {label} is none of the model's 2: 1, 2; relabel"):
            labels_of(records(label), own.names)
    assert labels_of(records(1, 0), ("01", "1")).numbers[1] == 1  # two names of one number: places count


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        ((1, "good", 1, "good"), r"numbers \(1\) and names \('good'\), at here: record 1 and here: record 2; wanted"),
        ((1, 1, 1), "all labels are 1; wanted at least two"),
        (range(9), "9 labels in 9 rows; wanted classes"),
    ],
)
def test_labels_that_are_no_classes(labels: tuple[object, ...], said: str) -> None:
    with pytest.raises(DataError, match=said):
        labels_of(records(*labels))


def test_rows_have_special_tokens_one_label_and_types_for_pairs() -> None:
    tokens = tokenizer()
    single = encode_labelled(records(*("a", "b") * 3), tokens, Labels(("a", "b"), {"a": 0, "b": 1}), 32)
    assert single.rows[1] == {"input_ids": [2, tokens.convert_tokens_to_ids("w1"), 3], "labels": [1], "source": "here"}
    assert single.labels == ("a", "b") and (single.stats.rows, single.stats.tokens, single.stats.truncated) == (
        6,
        18,
        0,
    )
    rows = [{"sentence1": "w1 w2 w3 w4", "sentence2": "w5", "label": i % 2} for i in range(4)]
    pairs = encode_labelled(
        records_from(rows, "here", LABELLED), tokens, Labels(("0", "1"), {0: 0, 1: 1}), 6, limit=2, segments=True
    )
    assert len(pairs.rows) == 2 and pairs.stats.truncated == 2 and pairs.stats.n == 2
    assert [row["labels"] for row in pairs.rows] == [[0], [0]]  # evenly spaced: rows 0 and 2
    assert len(pairs.rows[0]["input_ids"]) == 6 and pairs.rows[0]["token_type_ids"][-2:] == [1, 1]


def test_one_class_alone_of_a_models_is_said_by_its_name() -> None:
    tokens, known = tokenizer(), ("no", "yes")
    for labels, said in (((1, 1, 1), 1), ((1, 0, 1), 0)):
        given = records(*labels)
        notes = encode_labelled(given, tokens, labels_of(given, known), 32).notes
        assert ["here: only class 'yes' occurs of 2 classes" in one for one in notes] == [True] * said
    given = records(1, 1)
    assert encode_labelled(given, tokens, Labels(("one",), {1: 0}), 32).notes == (), "a model of one class has no other"


def test_rows_that_cannot_be_encoded() -> None:
    labels = Labels(("0", "1"), {0: 0, 1: 1})
    mixed = [{"text": "w1", "label": 0}, {"sentence1": "w1", "sentence2": "w2", "label": 1}]
    with pytest.raises(
        DataError, match="some rows hold one text and some two, such as here: record 1 and here: record 2"
    ):
        encode_labelled(records_from(mixed, "here", LABELLED), tokenizer(), labels, 32)
    with pytest.raises(DataError, match=r"the tokenizer gives id \d+, the vocabulary has 4"):
        encode_labelled(records(0, 1), tokenizer(), labels, 32, vocab_size=4)
