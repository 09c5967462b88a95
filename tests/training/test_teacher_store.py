"""What a teacher said is read back as it was written, whole or not at all, and by the same training alone."""

import shutil
from pathlib import Path

import pytest
import torch

from compresso.errors import ResumeError
from compresso.training.teacher_store import CHUNK, Taught, TeacherStore, bytes_of

ROWS = list(range(0, 3 * CHUNK + 6, 2))  # one chunk and a half
PLACES = [row % 5 for row in ROWS]


def store(folder: Path, **more: int) -> TeacherStore:
    return TeacherStore(folder, {"seed": 0, **more}, ROWS, PLACES)


def taught(row: int) -> Taught:
    generator = torch.Generator().manual_seed(row)
    return Taught(
        torch.randint(0, 50, (row % 5, 3), generator=generator, dtype=torch.int32),
        torch.randn(row % 5, 4, generator=generator),
    )


def fill(one: TeacherStore) -> None:
    for number in one.missing():
        one.write(number, [taught(row) for row in one.chunks[number]])


def test_rows_are_read_in_any_order_and_those_without_a_place_too(tmp_path: Path) -> None:
    one = store(tmp_path)
    assert one.missing() == [0, 1]
    fill(one)
    assert store(tmp_path).missing() == []
    chosen = [ROWS[-1], 0, 4, 4, 10, ROWS[CHUNK], 2]
    found = store(tmp_path).read(chosen)
    assert torch.equal(found.outcomes, torch.cat([taught(row).outcomes for row in chosen]))
    assert torch.equal(found.log_probs, torch.cat([taught(row).log_probs for row in chosen]))
    assert found.outcomes.dtype == torch.int32 and found.log_probs.dtype == torch.float32
    with pytest.raises(KeyError):
        store(tmp_path).read([1])


def test_a_chunk_that_is_missing_or_damaged_is_the_only_one_written_again(tmp_path: Path) -> None:
    fill(store(tmp_path))
    before = {path.name: path.read_bytes() for path in tmp_path.glob("batch-*/*.safetensors")}
    (file,) = (tmp_path / "batch-000000").glob("*.safetensors")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    again = store(tmp_path)
    assert again.missing() == [0]
    fill(again)
    assert {path.name: path.read_bytes() for path in tmp_path.glob("batch-*/*.safetensors")} == before


def test_another_training_s_chunks_are_refused(tmp_path: Path) -> None:
    fill(store(tmp_path))
    with pytest.raises(ResumeError, match="top was 'absent', is 32"):
        store(tmp_path, top=32).missing()
    (tmp_path / "same.json").unlink()
    with pytest.raises(ResumeError):
        store(tmp_path).missing()


def test_what_was_killed_before_its_first_chunk_leaves_nothing_behind(tmp_path: Path) -> None:
    fill(store(tmp_path, top=32))
    for path in tmp_path.glob("batch-*"):
        shutil.rmtree(path)
    fill(store(tmp_path))
    assert store(tmp_path).missing() == []
    with pytest.raises(ResumeError):
        store(tmp_path, top=32).missing()


@pytest.mark.parametrize("top", [3, 50])
def test_bytes_are_those_of_what_is_kept(top: int) -> None:
    kept = Taught(torch.zeros(7, top, dtype=torch.int32), torch.zeros(7, min(top + 1, 50)))
    assert bytes_of(7, top, 50) == sum(one.numel() * one.element_size() for one in (kept.outcomes, kept.log_probs))
    assert bytes_of(7, 99, 50) == bytes_of(7, 50, 50)
