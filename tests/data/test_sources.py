"""Rows know which source they came from, also after a limit and with packing,
and one source's rows are what they were.
"""

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from compresso.data import nano
from compresso.data.instructions import encode
from compresso.data.registry import load_records


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(nano.path())


@pytest.fixture
def both(tmp_path: Path) -> str:
    """Six instructions in one file, four texts in another."""
    (tmp_path / "asked.jsonl").write_text(
        "".join(json.dumps({"instruction": f"say {i}", "output": f"{i}"}) + "\n" for i in range(6))
    )
    (tmp_path / "told.jsonl").write_text(
        "".join(json.dumps({"text": f"once upon a time there were {i}"}) + "\n" for i in range(4))
    )
    return f"{tmp_path / 'asked.jsonl'},{tmp_path / 'told.jsonl'}"


@pytest.mark.parametrize(("limit", "wanted"), [(None, [6, 4]), (5, [3, 2]), (100, [6, 4])])
def test_rows_carry_the_name_of_their_source(
    tokenizer: PreTrainedTokenizerBase, both: str, limit: int | None, wanted: list[int]
) -> None:
    rows = encode(load_records(both), tokenizer, 64, prompt_on=False, limit=limit).rows
    assert [row.get("source") for row in rows] == ["asked.jsonl"] * wanted[0] + ["told.jsonl"] * wanted[1]


def test_packed_rows_hold_one_source_each(tokenizer: PreTrainedTokenizerBase, both: str) -> None:
    texts = both.split(",")[1]
    joined = encode(load_records(f"{texts},{texts}"), tokenizer, 8, prompt_on=False, pack=True).rows
    alone = encode(load_records(texts), tokenizer, 8, prompt_on=False, pack=True).rows
    assert joined == alone + alone
