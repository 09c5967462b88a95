"""A bad line is refused with a cure that works: none leaves out what is everything, or what nobody can leave out."""

import json
from pathlib import Path
from typing import Any

import pytest

from compresso.data import bad_lines
from compresso.data.labelled import LABELLED
from compresso.data.registry import load_records
from compresso.errors import DataError
from compresso.metrics.corpora import corpus

GOOD, BAD = {"text": "a b", "label": "x"}, {"text": "a b", "label": -1}


def refused(path: Path, **options: Any) -> str:
    with pytest.raises(DataError) as error:
        load_records(path, form=LABELLED, **options)
    return str(error.value)


def written(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_skipping_is_advised_where_something_is_left_and_the_caller_can(tmp_path: Path) -> None:
    for name, rows in (("before", (GOOD, BAD)), ("behind", (BAD, BAD, GOOD))):
        path = written(tmp_path / f"{name}.jsonl", *rows)
        assert "Repair it, or add --skip-bad to skip and count bad lines." in refused(path)
        assert refused(path, skip_bad=None).endswith("Repair it.")
        assert load_records(path, form=LABELLED, skip_bad=True).n_bad == len(rows) - 1  # what is advised works


def test_no_line_is_good(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path / "bad.jsonl", *[BAD] * 5)
    assert refused(path).endswith("None of its 5 lines is good, so repair the file.")
    with pytest.raises(DataError, match="no record among 5 bad lines"):
        load_records(path, form=LABELLED, skip_bad=True)
    monkeypatch.setattr(bad_lines, "LOOKED_AT", 3)
    assert "None of the first 4 lines is good" in refused(path)


def test_an_object_around_rows_is_told_where_they_lie(tmp_path: Path) -> None:
    rows = tmp_path / "nest.json"
    rows.write_text(json.dumps({"rows": [GOOD, GOOD], "version": 1}))
    said = refused(rows)
    assert "skip-bad" not in said and "Its rows lie in 'rows': write that list alone, or a row a line" in said
    alone = refused(written(tmp_path / "one.jsonl", BAD))
    assert alone.endswith("Repair it; the file holds nothing else.")


def test_a_corpus_is_read_by_commands_that_skip_nothing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"texts\.jsonl:2: .*Repair it\.$"):
        corpus(written(tmp_path / "texts.jsonl", {"text": "one"}, {"text": 3}, {"text": "two"}))
