"""Rows of labelled pictures from parquet and from folders, in the size of a model; what is wrong is named by its
place.
"""

from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch
from tests.tasks.scenes import THINGS, scene

from compresso.core.picture import PixelInput
from compresso.data.labelled import labels_of
from compresso.data.labelled_pictures import PICTURED, encode_pictured, sized
from compresso.data.pictures import png
from compresso.data.registry import load_records
from compresso.errors import DataError


def written(path: Path, rows: list[dict[str, Any]]) -> Path:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def pictures(n: int) -> list[dict[str, Any]]:
    made = [scene(seed) for seed in range(n)]
    return [{"image": {"bytes": png(pixels), "path": "a.png"}, "label": kind} for pixels, _, kind in made]


def test_rows_of_a_table_are_pictures_and_labels(tmp_path: Path) -> None:
    records = load_records(written(tmp_path / "train.parquet", pictures(9)), form=PICTURED)
    found = encode_pictured(records, PixelInput(16, 16), labels_of(records))
    assert found.labels == ("0", "1", "2") and [row["labels"] for row in found.rows] == [[i % 3] for i in range(9)]
    assert torch.equal(found.rows[4]["picture"].pixels, scene(4)[0]) and found.rows[4]["input_ids"] == []
    assert found.stats.rows == 9 and records.kind == "pictured"


def test_a_folder_of_folders_is_the_same_data_by_name(tmp_path: Path) -> None:
    for seed in range(9):
        folder = tmp_path / "train" / THINGS[seed % 3]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{seed}.png").write_bytes(png(scene(seed)[0]))
    (tmp_path / "train" / "square" / "notes.txt").write_text("of no use")
    records = load_records(tmp_path / "train", form=PICTURED)
    found = encode_pictured(records, PixelInput(16, 16), labels_of(records))
    assert found.labels == ("cross", "disc", "square") and len(found.rows) == 9
    assert records.source == "train (9 pictures)"
    known = labels_of(records, ("square", "disc", "cross"))
    again = encode_pictured(records, PixelInput(16, 16), known, limit=3)
    assert [row["labels"] for row in again.rows] == [[2], [1], [0]]
    assert again.stats.n == 3 and again.stats.read == 9


def test_one_class_alone_of_a_models_is_said_by_its_name(tmp_path: Path) -> None:
    for rows, n in ((pictures(9)[::3], 1), (pictures(9), 0)):
        records = load_records(written(tmp_path / "train.parquet", rows), form=PICTURED)
        notes = encode_pictured(records, PixelInput(16, 16), labels_of(records, THINGS)).notes
        assert ["only class 'square' occurs of 3 classes" in one for one in notes] == [True] * n


def test_pictures_are_brought_to_the_models_size() -> None:
    flat = torch.full((3, 20, 30), 77, dtype=torch.uint8)
    assert torch.equal(sized(flat, 8, 12), torch.full((3, 8, 12), 77, dtype=torch.uint8))
    half = torch.arange(16, dtype=torch.uint8).reshape(1, 1, 16).expand(3, 2, 16) * 10
    assert sized(half, 1, 8)[0, 0].tolist()[1:-1] == pytest.approx([20 * i + 5 for i in range(1, 7)], abs=1)


@pytest.mark.parametrize(
    "change,said",
    [
        ({"image": {"bytes": b"", "path": "x"}}, r"row 2: field 'image' holds no bytes of a picture"),
        ({"label": -1}, r"row 2: field 'label' is -1, which is none"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    rows = pictures(4)
    rows[1] = {**rows[1], **change}
    with pytest.raises(DataError, match=said):
        load_records(written(tmp_path / "train.parquet", rows), form=PICTURED)


def test_a_picture_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    rows = pictures(9)
    rows[2]["image"]["bytes"] = rows[2]["image"]["bytes"][:60]
    records = load_records(written(tmp_path / "train.parquet", rows), form=PICTURED)
    with pytest.raises(DataError, match=r"train.parquet: row 3: the picture is a damaged PNG"):
        encode_pictured(records, PixelInput(16, 16), labels_of(records))


def test_other_columns_are_told(tmp_path: Path) -> None:
    path = written(tmp_path / "train.parquet", [{"picture": 1, "name": "a"}])
    with pytest.raises(DataError, match=r"columns are: picture, name; wanted image \(or img\) and label"):
        load_records(path, form=PICTURED)
