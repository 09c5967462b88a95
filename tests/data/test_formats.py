"""Good files of every format read back what was written; each kind of bad file is refused by file and line, and counted
on request.
"""

import gzip
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from compresso.data import lines
from compresso.data.columns import TEXTS, parse
from compresso.data.formats import read_file
from compresso.data.record_forms import BadRecord, records_from
from compresso.data.records import Chat, Instruction, Message, Records, Text, Window, digest
from compresso.errors import DataError

GOOD = {"instruction": "Add.", "input": "1 2", "output": "3"}
ROWS = [
    GOOD,
    {"instruction": "Greet.", "input": None, "output": "Hello", "text": "ignored"},
    {"instruction": "Stop.", "output": ""},
]
PARSED = [Instruction("Add.", "1 2", "3"), Instruction("Greet.", "", "Hello"), Instruction("Stop.", "", "")]


def as_lines(rows: list) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", as_lines(ROWS).encode()),
        ("a.jsonl", b"\xef\xbb\xbf" + as_lines(ROWS).replace("\n", "\r\n\r\n").encode()),
        ("a.jsonl.gz", gzip.compress(as_lines(ROWS[:1]).encode()) + gzip.compress(as_lines(ROWS[1:]).encode())),
        ("a.json", json.dumps(ROWS).encode()),
        ("a.JSON", json.dumps(ROWS, indent=2).encode()),
        ("a.json", as_lines(ROWS).encode()),
        ("a.json.gz", gzip.compress(json.dumps(ROWS).encode())),
    ],
)
def test_json_in_all_its_forms(write, name: str, content: bytes) -> None:
    read = read_file(write(name, content))
    assert (read.rows, read.n_bad, read.bad) == (PARSED, 0, ())


@settings(max_examples=40)
@given(
    st.lists(
        st.tuples(st.text(st.characters(exclude_categories=["Cs"])), st.sampled_from([None, 0, 4])),
        min_size=1,
        max_size=6,
    )
)
def test_any_text_survives_json(tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, int | None]]) -> None:
    folder = tmp_path_factory.mktemp("json")
    (folder / "a.jsonl").write_text(
        "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text, _ in rows), newline=""
    )
    (folder / "b.json").write_text(
        json.dumps([{"text": text} for text, _ in rows], indent=rows[0][1], ensure_ascii=False), newline=""
    )
    wanted = [Text(text) for text, _ in rows]
    assert read_file(folder / "a.jsonl").rows == wanted == read_file(folder / "b.json").rows


def test_text_files_are_split_at_blank_lines(write) -> None:
    assert read_file(write("a.txt", "One.\nStill one.\n\n \n\nTwo.\r\n")).rows == [
        Text("One.\nStill one."),
        Text("Two."),
    ]
    assert read_file(write("b.txt.gz", gzip.compress(b"One.\nTwo.\n"))).rows == [Text("One."), Text("Two.")]


def test_parquet(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    assert read_file(path).rows == PARSED
    messages = [{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(messages), path)
    assert read_file(path).rows == [Chat((Message("user", "Hi"), Message("assistant", "Hello")))]


def test_ready_windows_keep_their_order(tmp_path: Path) -> None:
    ids = torch.randint(0, 99, (5, 7), dtype=torch.int32)
    save_file({"input_ids": ids}, tmp_path / "a.safetensors")
    read = read_file(tmp_path / "a.safetensors")
    assert read.rows == [Window(tuple(row)) for row in ids.tolist()] and not read.passed_over
    save_file({"input_ids": ids, "labels": ids.clone()}, tmp_path / "b.safetensors")
    assert read_file(tmp_path / "b.safetensors").passed_over == {"labels": 5}


def test_conversations_are_messages_under_another_name() -> None:
    value = {
        "conversations": [
            {"from": "system", "value": "S"},
            {"from": "human", "value": "Hi"},
            {"from": "gpt", "value": "Hello"},
        ]
    }
    assert parse(value) == Chat((Message("system", "S"), Message("user", "Hi"), Message("assistant", "Hello")))


def test_the_limit_stops_before_later_lines(write) -> None:
    assert len(read_file(write("a.jsonl", as_lines([GOOD, GOOD]) + "broken\n"), limit=2).rows) == 2


GOOD_LINE = json.dumps(GOOD).encode()
BAD_LINES = [
    (b'{"instruction": "Add."', "bad JSON at character 24"),
    (b"[" * 100_000, "bad JSON"),
    (b'{"text": "a"} {"text": "b"}', "bad JSON at character 15 (another value begins)"),
    (b'{"text": ' + b"1" * 5000 + b"}", "bad JSON"),
    (b'{"text": "\xff\xfe"}', "byte 11 of the line is not UTF-8"),
    (b'{"text": "' + b"x" * (10 * 2**20) + b'"}', "the line is longer than 8388608 bytes"),
    (b'{"text": "\\ud800"}', "half of a surrogate pair"),
    (
        b'{"prompt": "Add.", "answer": "3"}',
        "fields are: prompt, answer; wanted instruction + output or response (+ input or context, system, history)",
    ),
    (b"{}", "fields are: none"),
    (b"[1, 2]", "holds a list; wanted an object"),
    (b"null", "holds null; wanted an object"),
    (b'{"instruction": "", "output": "3"}', "'instruction' is empty"),
    (b'{"instruction": "Add.", "output": 3}', "'output' is a number; wanted a string"),
    (b'{"instruction": "Add.", "input": ["1"], "output": "3"}', "'input' is a list; wanted a string"),
    (b'{"text": "of another kind"}', "is of kind text, the lines before it of kind instruction"),
    (b'{"messages": []}', "'messages' is empty; wanted a list of turns"),
    (b'{"messages": "Hi"}', "'messages' is a string; wanted a list of turns"),
    (b'{"messages": [{"role": "tool", "content": "Hi"}]}', "turn 1 has role 'tool'"),
    (b'{"messages": [{"role": "user"}]}', "turn 1: field 'content' is missing"),
    (b'{"messages": [{"role": "user", "content": "Hi"}]}', "no assistant turn"),
    (b'{"messages": [{"role": "user", "content": "Hi"}, {"role": "user", "content": "?"}]}', "turn 2 is by 'user'"),
    (
        b'{"messages": [{"role": "system", "content": "S"}, {"role": "assistant", "content": "?"}]}',
        "turn 2 is by 'assistant'",
    ),
]


@pytest.mark.parametrize(("line", "message"), BAD_LINES, ids=[message for _, message in BAD_LINES])
def test_a_bad_line_is_named_and_on_request_skipped_and_counted(write, line: bytes, message: str) -> None:
    path = write("a.jsonl", GOOD_LINE + b"\n" + GOOD_LINE + b"\n" + line + b"\n" + GOOD_LINE)
    with pytest.raises(DataError) as raised:
        read_file(path)
    assert (
        str(raised.value).startswith(f"{path}:3: ") and message in str(raised.value) and "\n" not in str(raised.value)
    )
    read = read_file(path, skip_bad=True)
    assert (len(read.rows), read.n_bad) == (3, 1)
    assert read.bad[0].startswith(f"{path}:3: ") and message in read.bad[0]


def test_many_bad_lines_are_all_counted_and_the_first_named(write) -> None:
    read = read_file(write("a.jsonl", GOOD_LINE + b"\nbroken" * 20), skip_bad=True)
    assert (len(read.rows), read.n_bad, len(read.bad)) == (1, 20, 5)


def test_a_file_of_bad_lines_only_is_refused_even_when_skipping(write) -> None:
    with pytest.raises(DataError, match="no record among 2 bad lines"):
        read_file(write("a.jsonl", "x\ny\n"), skip_bad=True)


BAD_FILES = [
    ("a.jsonl", b"", "the file is empty"),
    ("a.jsonl", b"\n \n", "holds no record"),
    ("a.json", b"[]", "holds no record"),
    ("a.txt", b"\n\n", "holds no record"),
    ("a.txt", b"fine\n\xff\n", ":2: byte 1 of the line is not UTF-8"),
    ("a.json", b'[\n{"text": "a"},\n{"text": }]', ":3: bad JSON"),
    ("a.json", b'[\n{"text": "a"}\n{"text": "b"}]', ":3: bad JSON (wanted ',' or ']')"),
    ("a.json", b'[\n{"text": "a"},\n', ":3: bad JSON"),
    ("a.json", b'[\n{"text": "a"},\n 7]', ":3: holds a number"),
    ("a.json", b'[\n"\xff"]', ":2: byte 2 of the line is not UTF-8"),
    ("a.jsonl.gz", b"this is not gzip", "broken gzip"),
    ("a.jsonl.gz", gzip.compress(GOOD_LINE * 50)[:-20], "broken gzip"),
    ("a.parquet", b"PAR1 not really PAR1", "not a readable .parquet file"),
    ("a.safetensors", b"\xff" * 64, "not a readable .safetensors file"),
    ("a.xlsx", b"text\nhello", "unknown file format"),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD_FILES, ids=[message for _, _, message in BAD_FILES])
def test_a_bad_file_is_refused_by_name(write, name: str, content: bytes, message: str) -> None:
    path = write(name, content)
    with pytest.raises(DataError) as raised:
        read_file(path)
    assert str(raised.value).startswith(str(path)) and message in str(raised.value) and "\n" not in str(raised.value)


def test_missing_files_and_folders_are_refused(tmp_path: Path) -> None:
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(DataError, match="no such file"):
        read_file(tmp_path / "a.jsonl")
    with pytest.raises(DataError, match="is not a file"):
        read_file(tmp_path / "folder.jsonl")


@pytest.mark.parametrize("unit", [b"\n", b'{"text": ""}\n', b"x"], ids=["blank lines", "records", "one line"])
def test_a_small_gzip_that_grows_without_end_is_refused(write, monkeypatch: pytest.MonkeyPatch, unit: bytes) -> None:
    monkeypatch.setattr(lines, "RATIO_FREE_BYTES", 2**16)
    monkeypatch.setattr(lines, "MAX_LINE_BYTES", 2**12)
    path = write("a.jsonl.gz", gzip.compress(unit * (2**19 // len(unit))))
    with pytest.raises(DataError, match=r"-fold allowed|longer than"):
        read_file(path)
    with pytest.raises(DataError, match="-fold allowed"):
        read_file(path, skip_bad=True)


def test_a_file_above_the_size_cap_is_refused(write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "MAX_BYTES", 1000)
    with pytest.raises(DataError, match="more than 1000 bytes"):
        read_file(write("a.jsonl", as_lines(ROWS) * 20))


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"ids": torch.ones(2, 2, dtype=torch.long)}, "tensors are: ids; wanted input_ids"),
        ({"input_ids": torch.ones(4, dtype=torch.long)}, r"shape \[4\]; wanted \[n, seq\]"),
        ({"input_ids": torch.ones(4, 1, dtype=torch.long)}, r"shape \[4, 1\]"),
        ({"input_ids": torch.ones(0, 8, dtype=torch.long)}, r"shape \[0, 8\]"),
        ({"input_ids": torch.ones(2, 2)}, "float32; wanted an integer type"),
        ({"input_ids": torch.ones(2, 2, dtype=torch.bool)}, "bool; wanted an integer type"),
        ({"input_ids": torch.tensor([[1, 2], [3, -1]])}, "window 2: id -1 is negative"),
    ],
)
def test_bad_windows_are_refused(tmp_path: Path, tensors: dict[str, torch.Tensor], message: str) -> None:
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(DataError, match=message):
        read_file(tmp_path / "a.safetensors")


def test_parquet_without_a_known_column_is_refused(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"image": [b"x"]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="columns are: image"):
        read_file(tmp_path / "a.parquet")


def test_the_digest_sees_content_kind_and_order() -> None:
    rows = [Instruction("a", "b", "c"), Text("a")]
    assert digest(rows) == digest(list(rows)) != digest(rows[::-1])
    assert (
        len(
            {digest([row]) for row in (Instruction("a", "b", "c"), Instruction("a", "", "bc"), Text("a"), Window((1,)))}
        )
        == 4
    )
    assert Records("text", [Text("a")], "x").sha256 == Records("text", [Text("a")], "y").sha256


def test_records_in_memory_are_named_by_their_number() -> None:
    assert records_from([{"text": "a"}, GOOD], "mine", TEXTS).kind == "mixed"
    with pytest.raises(BadRecord, match="mine: record 2: fields are: x"):
        records_from([{"text": "a"}, {"x": 1}], "mine", TEXTS)


def test_one_sentence_a_line_is_a_document_a_line(tmp_path: Path) -> None:
    """Penn Treebank as text, BookCorpus as a table: lower-case, rare words as <unk>, order kept, nothing joined."""
    lines = [" no it was n't black monday ", " but while the <unk> did n't fall apart N times ", " some <unk> <unk>"]
    (tmp_path / "ptb.txt").write_text("\n".join(lines) + "\n")
    (tmp_path / "ptb.jsonl").write_text("".join(json.dumps({"sentence": line.strip()}) + "\n" for line in lines))
    from_text, from_column = (read_file(tmp_path / name).rows for name in ("ptb.txt", "ptb.jsonl"))
    assert [row.text.strip() for row in from_text if isinstance(row, Text)] == [line.strip() for line in lines]
    assert from_column == [Text(line.strip()) for line in lines]
