"""Text files that a download left half: one line instead of what gzip, zstd or the disk says of them."""

import gzip
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pytest

from compresso.data.lines import decoded_lines, whole_text
from compresso.errors import DataError

TEXT = "".join(f"line {i * i} of many\n" for i in range(400)).encode()
READERS: list[Callable[[Path], object]] = [whole_text, lambda path: list(decoded_lines(path))]
ZSTD = pyarrow.compress(TEXT, codec="zstd", asbytes=True) if pyarrow.Codec.is_available("zstd") else b""


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("name", ["rows.gz", "rows.zst"])
def test_a_packed_file_cut_anywhere_is_one_line(name: str, read: Callable[[Path], object], tmp_path: Path) -> None:
    packed = gzip.compress(TEXT) if name.endswith(".gz") else ZSTD
    path = tmp_path / name
    for kept in range(1, len(packed), 97):
        path.write_bytes(packed[:kept])
        with pytest.raises(DataError) as caught:
            read(path)
        assert f"{path}: broken " in str(caught.value) and "fetch or compress the file again" in str(caught.value)
        assert "\n" not in str(caught.value)
    path.write_bytes(packed)
    assert read(path)


@pytest.mark.parametrize("read", READERS)
def test_what_is_not_packed_or_not_there_is_one_line(read: Callable[[Path], object], tmp_path: Path) -> None:
    path = tmp_path / "rows.gz"
    path.write_bytes(TEXT)
    with pytest.raises(DataError, match="broken gzip data"):
        read(path)
    with pytest.raises(DataError, match=r"absent.txt: cannot be read \(No such file or directory\)"):
        read(tmp_path / "absent.txt")
    with pytest.raises(DataError, match="cannot be read"):
        read(tmp_path)
