"""Corpora: names, files and what is refused; local copies where the environment has them."""

import gzip
import json
import os
from pathlib import Path

import pytest

from compresso.errors import DataError
from compresso.metrics.corpora import corpus

LOCAL = os.environ.get("COMPRESSO_DATA")


def rows(texts: list[str]) -> str:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("notes.txt", "One.\n\nTwo.\n"),
        ("notes.txt.gz", "One.\n\nTwo.\n"),
        ("notes.jsonl", rows(["One.", "Two."])),
        ("notes.jsonl.gz", rows(["One.", "Two."])),
        ("notes.json", json.dumps([{"text": "One."}, {"text": "Two."}])),
    ],
)
def test_every_file_of_texts_gives_them_in_order(tmp_path: Path, name: str, content: str) -> None:
    path = tmp_path / name
    path.write_bytes(gzip.compress(content.encode()) if name.endswith(".gz") else content.encode())
    found = corpus(path)
    assert (found.name, found.split, found.texts, found.source) == ("notes", "all", ("One.", "Two."), name)
    assert found.remark == f"Texts: {name}; 2 documents."
    assert corpus(path, "held").split == "held"


def test_the_same_texts_have_the_same_identity(tmp_path: Path) -> None:
    one, other, third = (tmp_path / name for name in ("a.jsonl", "b.txt", "c.txt"))
    one.write_text(rows(["One.", "Two."]))
    other.write_text("One.\n\nTwo.")
    third.write_text("One.\n\nThree.")
    assert corpus(one).sha256 == corpus(other).sha256 != corpus(third).sha256


def test_a_folder_of_local_copies_stands_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("COMPRESSO_DATA", raising=False)
    folder = tmp_path / "given" / "datasets" / "text"
    folder.mkdir(parents=True)
    (folder / "wikitext2_raw_test.jsonl.gz").write_bytes(gzip.compress(rows(["", " = Title = "]).encode()))
    (folder / "c4_sample_300.jsonl.gz").write_bytes(gzip.compress(rows(["A page."]).encode()))
    wiki, c4 = (corpus(name, data_root=tmp_path / "given") for name in ("wikitext2", "c4"))
    assert (wiki.name, wiki.split, wiki.texts) == ("wikitext2", "test", ("", " = Title = "))
    assert (c4.name, c4.split, c4.texts) == ("c4", "validation", ("A page.",))
    assert "local copy wikitext2_raw_test.jsonl.gz (the whole split)" in wiki.source
    assert "300 documents" in c4.remark
    (tmp_path / "other").mkdir()
    monkeypatch.setenv("COMPRESSO_DATA", str(tmp_path / "other"))
    assert corpus("wikitext2", data_root=tmp_path / "given") == wiki


def test_bad_corpora_are_refused_with_the_cure(tmp_path: Path) -> None:
    empty, blank, other = (tmp_path / name for name in ("empty.txt", "blank.jsonl", "rows.jsonl"))
    empty.write_text("")
    blank.write_text(rows(["", " \n"]))
    other.write_text('{"instruction": "Say hello.", "output": "Hello."}\n')
    for name, message in [
        (empty, "the file is empty"),
        (blank, "all of its 2 texts are empty"),
        (other, "of kind 'instruction'; perplexity is measured on texts"),
        (tmp_path / "none.txt", "no such file"),
        ("wikitxt2", "did you mean 'wikitext2'"),
    ]:
        with pytest.raises(DataError, match=message):
            corpus(name)
    with pytest.raises(DataError, match="no such folder"):
        corpus("wikitext2", data_root=tmp_path / "none")


@pytest.mark.skipif(not LOCAL, reason="COMPRESSO_DATA: no folder with local copies")
def test_the_local_copies_are_whole() -> None:
    wiki, c4 = corpus("wikitext2"), corpus("c4")
    assert len(wiki.texts) == 4358 and wiki.texts[0] == ""
    assert len(c4.texts) == 300 and all(text.strip() for text in c4.texts)


def test_a_folder_of_texts_is_named_without_its_path_and_says_what_it_left_out(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    for i in range(2):
        (tmp_path / "texts" / f"part-{i}.jsonl").write_text(json.dumps({"text": f"Once {i}.", "title": "T"}))
    found = corpus(str(tmp_path / "texts"))
    assert (found.name, found.texts) == ("texts", ("Once 0.", "Once 1."))
    assert str(tmp_path) not in found.remark and "Columns passed over: title (2 rows)." in found.remark
