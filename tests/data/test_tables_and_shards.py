"""Tables, packed files, folders and patterns: the same rows come out, what is not read is counted, and mixtures are
refused.
"""

import csv
import gzip
import io
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from compresso.data.formats import read_file
from compresso.data.labelled import LABELLED
from compresso.data.records import Instruction, Text
from compresso.data.registry import load_records
from compresso.errors import DataError

ROWS = [{"instruction": f'Say "{i}", now.\nPlease', "input": "", "output": f"{i}", "id": i + 1} for i in range(5)]
PARSED = [Instruction(str(row["instruction"]), "", str(row["output"])) for row in ROWS]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def table(delimiter: str) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(ROWS[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(ROWS)
    return text.getvalue().encode()


def zstd(content: bytes) -> bytes:
    return pyarrow.compress(content, codec="zstd", asbytes=True)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", table(",")),
        ("a.CSV", b"\xef\xbb\xbf" + table(",")),
        ("a.tsv", table("\t")),
        ("a.csv.gz", gzip.compress(table(","))),
        ("a.csv.zst", zstd(table(","))),
        ("a.jsonl.zst", zstd(LINES[:50]) + zstd(LINES[50:])),
        ("a.json.zst", zstd(json.dumps(ROWS).encode())),
    ],
)
def test_one_table_in_many_files(write, name: str, content: bytes) -> None:
    read = read_file(write(name, content))
    assert (read.rows, read.n_bad, read.passed_over) == (PARSED, 0, {"id": 5})
    assert read.places[0].startswith(name + ":")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"text,text\na,b\n", ":1: the header names the column 'text' twice"),
        (b"name,age\na,b\n", "columns are: name, age; wanted instruction + output"),
        (b"text,id\na,1\nb\n", ":3: has 1 fields, the header 2"),
        (b"instruction,output\n,b\n", ":2: field 'instruction' is empty"),
        (b'text\n"a"b\n', ":2: bad quoting"),
        (b"text\n\xff\n", ":2: byte 1 of the line is not UTF-8"),
        (b"text\n", "holds no record"),
    ],
)
def test_a_bad_table_is_refused_by_line(write, content: bytes, message: str) -> None:
    path = write("a.csv", content)
    with pytest.raises(DataError) as raised:
        read_file(path)
    assert str(raised.value).startswith(str(path)) and message in str(raised.value)


def test_a_column_of_numbers_without_a_name_is_counted(write) -> None:
    assert read_file(write("a.csv", ",text\n0,a\n1,b\n")).passed_over == {"(no name)": 2}


def test_bad_rows_of_a_table_are_skipped_and_counted_on_request(write) -> None:
    read = read_file(write("a.csv", b"text,id\na,1\nb\nc,2,3\nd,4\n"), skip_bad=True)
    assert (read.rows, read.n_bad) == ([Text("a"), Text("d")], 2)
    assert read.bad[1].endswith("a.csv:4: has 3 fields, the header 2. Repair it".removesuffix(". Repair it"))


SENTENCES = ['"Begins with a mark.', "plain", 'ends with one"', 'a "word" in marks', '"all of it"', '"', "it's"]


def test_a_tsv_without_quoting_keeps_every_line(write) -> None:
    """As GLUE's files are: a quotation mark is a letter wherever it stands."""
    content = "sentence\tlabel\n" + "".join(f"{one}\t{i % 2}\n" for i, one in enumerate(SENTENCES))
    read = read_file(write("a.tsv", content), form=LABELLED)
    assert [row.text for row in read.rows] == SENTENCES  # pyright: ignore
    assert read.n_bad == 0


def test_mrpc_as_it_is_published_keeps_every_pair(write) -> None:
    rows = "".join(f'{i % 2}\t{i}\t{i + 99}\t"He said {i}.\t{i} said he."\n' for i in range(8))
    read = read_file(write("a.tsv", "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n" + rows), form=LABELLED)
    assert [(row.text, row.second) for row in read.rows] == [  # pyright: ignore
        (f'"He said {i}.', f'{i} said he."') for i in range(8)
    ]


@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
@pytest.mark.parametrize("extra", [[], ["a\ttab"], ["a line\nbreak"]])
@pytest.mark.parametrize("columns", [1, 2])
def test_a_tsv_that_was_quoted_comes_back(write, quoting: Any, extra: list[str], columns: int) -> None:
    text, wanted = io.StringIO(), [*SENTENCES, *extra]
    rows = [["text", "id"][:columns], *([one, "7"][:columns] for one in wanted)]
    csv.writer(text, delimiter="\t", quoting=quoting).writerows(rows)
    assert [row.text for row in read_file(write("a.tsv", text.getvalue())).rows] == wanted  # pyright: ignore


def test_a_tsv_with_a_short_line_names_it_and_swallows_nothing(write) -> None:
    content = "sentence\tlabel\n" + '"a\t0\nc"\t1\nb\nd\t1\n'
    read = read_file(write("a.tsv", content), skip_bad=True, form=LABELLED)
    assert [row.text for row in read.rows] == ['"a', 'c"', "d"] and read.n_bad == 1  # pyright: ignore
    assert read.bad[0].endswith("a.tsv:4: has 1 fields, the header 2")


def test_bad_quoting_of_a_csv_costs_its_own_line_alone(write) -> None:
    content = 'text,id\n"a,1\nb,2\nc,3\n"d" e,4\n"f,\n2",5\n'
    read = read_file(write("a.csv", content), skip_bad=True)
    assert read.rows == [Text("b"), Text("c"), Text("f,\n2")] and read.n_bad == 2
    assert [one.partition(":")[2].partition(":")[0] for one in read.bad] == ["2", "5"]


def test_a_cell_may_be_longer_than_the_csv_module_allows(write) -> None:
    limit = csv.field_size_limit()
    assert read_file(write("a.csv", "text\n" + "x" * (limit + 1))).rows == [Text("x" * (limit + 1))]
    assert csv.field_size_limit() == limit, "the module's own limit is put back"


@pytest.mark.parametrize("content", [zstd(LINES)[:-9], b"this is not zstd"])
def test_broken_zstd_is_named(write, content: bytes) -> None:
    with pytest.raises(DataError, match="broken zstd data"):
        read_file(write("a.jsonl.zst", content))


def test_columns_that_a_parquet_file_has_beside_are_counted(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    assert read_file(tmp_path / "a.parquet").passed_over == {"id": 5}


def test_a_folder_is_its_files_in_order(tmp_path: Path) -> None:
    for i in (3, 1, 2):
        (tmp_path / f"part-{i}.jsonl").write_text(json.dumps({"text": f"{i}", "id": i}))
    (tmp_path / "README.md").write_text("about")
    (tmp_path / ".hidden.jsonl").write_text("broken")
    for name in (str(tmp_path), f"{tmp_path}/", f"{tmp_path}/part-*.jsonl", f"{tmp_path}/**/*.jsonl"):
        records = load_records(name)
        assert records.rows == [Text("1"), Text("2"), Text("3")] and records.passed_over == {"id": 3}
        assert list(records.places) == ["part-1.jsonl:1", "part-2.jsonl:1", "part-3.jsonl:1"]
        assert str(tmp_path) not in records.source and "3 files" in records.source and not records.parts
    assert load_records(str(tmp_path), limit=2).rows == [Text("1"), Text("2")]
    assert load_records(f"{tmp_path}/part-1.jsonl,{tmp_path}/part-[23].jsonl").places[1] == "part-2.jsonl:1"


def test_shards_must_hold_one_kind(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "a"}))
    (tmp_path / "b.jsonl").write_text(json.dumps(ROWS[0]))
    with pytest.raises(DataError, match=r"b\.jsonl:1: is of kind instruction, the lines before it of kind text"):
        load_records(str(tmp_path))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ((), "no data file lies in this folder"),
        (("a.jsonl", "b.txt"), r"several formats \(\.jsonl, \.txt\).*such as '\*\.jsonl'"),
        (("train.jsonl", "test.jsonl"), r"several splits \(test, train: test\.jsonl, train\.jsonl\)"),
        (("train-0-of-1.parquet", "validation-0-of-1.parquet"), r"several splits \(train, validation"),
    ],
)
def test_a_folder_that_is_no_one_thing_is_refused(tmp_path: Path, files: tuple[str, ...], message: str) -> None:
    for name in files:
        (tmp_path / name).write_text(json.dumps({"text": "a"}))
    with pytest.raises(DataError, match=message):
        load_records(str(tmp_path))


def test_files_of_a_folder_that_are_no_shards_are_named(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text('{"text": "once"}\n')
    assert not load_records(tmp_path).notes
    (tmp_path / "notes.md").write_text("by hand")
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "c.jsonl").write_text('{"text": "twice"}\n')
    (note,) = load_records(tmp_path).notes
    assert note.endswith(": 2 files are not read: more/c.jsonl, notes.md")


def test_a_pattern_names_only_data(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("about")
    with pytest.raises(DataError, match=r"matches a\.md, which is no data file"):
        load_records(f"{tmp_path}/*")
    with pytest.raises(DataError, match="no file matches this pattern"):
        load_records(f"{tmp_path}/*.jsonl")


@pytest.mark.parametrize("splits", [False, True])
def test_a_data_set_that_was_saved_to_disk(tmp_path: Path, splits: bool) -> None:
    made = datasets.Dataset.from_list(ROWS)
    saved = datasets.DatasetDict({"train": made, "test": made.select([0])}) if splits else made
    saved.save_to_disk(str(tmp_path / "saved"), **({} if splits else {"num_shards": 2}))
    records = load_records(str(tmp_path / "saved"))
    assert records.rows == PARSED and records.passed_over == {"id": 5}
    assert records.places[0].startswith("data-00000-of-0000")
    if splits:
        assert load_records(str(tmp_path / "saved"), split="test").rows == PARSED[:1]
        with pytest.raises(DataError, match="no split 'dev'; it has test, train"):
            load_records(str(tmp_path / "saved"), split="dev")


def test_alpaca_rows_with_and_without_history_go_together(write) -> None:
    rows = [{**ROWS[0]}, {**ROWS[1], "history": [["q", "a"]]}, {**ROWS[2], "history": []}]
    records = load_records(write("a.jsonl", "".join(json.dumps(row) + "\n" for row in rows)))
    assert [type(row).__name__ for row in records.rows] == ["Instruction", "Chat", "Instruction"]
    assert records.kind == "mixed"
