"""Bad safetensors files end in one CheckpointError with little memory; what is accepted, safetensors' own reader
accepts (the oracle).
"""

import json
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from compresso.checkpoint import header
from compresso.checkpoint.header import read_header
from compresso.errors import CheckpointError

GOOD = save(
    {"a": torch.arange(6.0).reshape(2, 3), "b.é": torch.zeros(4, dtype=torch.bfloat16), "empty": torch.zeros(0, 3)},
    {"format": "pt"},
)


def built(entries: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype: Any = "F32", shape: Any = (1,), offsets: Any = (0, 4)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


BAD: dict[str, tuple[bytes, str]] = {
    "empty file": (b"", "cannot hold a header"),
    "seven bytes": (b"\0" * 7, "cannot hold a header"),
    "header longer than file": (built({}, length=1 << 40), "claims 1099511627776 bytes"),
    "largest length": (b"\xff" * 8 + b"{}", "truncated or not safetensors"),
    "a pickle": (b"\x80\x02}q\x00." + b"\0" * 32, "truncated or not safetensors"),
    "half of the file": (GOOD[: len(GOOD) // 2], "truncated"),
    "last byte gone": (GOOD[:-1], "truncated"),
    "bytes appended": (GOOD + b"\0", "appended"),
    "not UTF-8": (built(b'{"\xff":1}'), "UTF-8"),
    "not JSON": (built(b"hello world"), "'{' is missing"),
    "unclosed": (built(b'{"a":'), "no entry"),
    "ends in a name": (built(b'{"abcdef'), "not what safetensors writes"),
    "trailing comma": (built(b'{"__metadata__":{},}'), "a name is missing"),
    "text after it": (built(b'{"__metadata__":{}} x'), "text after its end"),
    "nested": (built(b'{"a":' + b"[" * 100_000), "no entry"),
    "nested in an entry": (built(b'{"a":{"dtype":' + b"[" * 2_000 + b"}"), "not what safetensors writes"),
    "metadata not text": (built({"__metadata__": {"a": 1}}), "a name is missing"),
    "entry too long": (built({"a": entry(shape=[1] * 3_000)}, b"\0" * 4), "no entry"),
    "entry is a number": (built({"a": 1}), "no entry"),
    "same name twice": (
        built(b'{"a":%s,"a":%s}' % ((json.dumps(entry()).encode(),) * 2), b"\0" * 4),
        "'a' occurs twice",
    ),
    "unknown dtype": (built({"a": entry(dtype="F33")}, b"\0" * 4), "unknown dtype F33"),
    "dtype a list": (built({"a": entry(dtype=["F32"])}, b"\0" * 4), "unknown dtype"),
    "negative shape": (built({"a": entry(shape=[-1])}, b"\0" * 4), "no proper shape"),
    "boolean shape": (built({"a": entry(shape=[True])}, b"\0" * 4), "no proper shape"),
    "float shape": (built({"a": entry(shape=[1.0])}, b"\0" * 4), "no proper shape"),
    "no shape": (built({"a": {"dtype": "F32", "data_offsets": [0, 4]}}, b"\0" * 4), "no proper shape"),
    "shape that overflows": (built({"a": entry(shape=[1 << 62, 1 << 62])}, b"\0" * 4), "not what its offsets"),
    "number of 5000 digits": (
        built(b'{"a":{"dtype":"F32","shape":[' + b"9" * 3_000 + b'],"data_offsets":[0,4]}}', b"\0" * 4),
        "no proper shape",
    ),
    "shape that lies": (built({"a": entry(shape=[2])}, b"\0" * 4), "not what its offsets"),
    "offsets reversed": (built({"a": entry(offsets=[4, 0])}, b"\0" * 4), "not what its offsets"),
    "three offsets": (built({"a": entry(offsets=[0, 4, 4])}, b"\0" * 4), "no proper shape"),
    "outside the file": (built({"a": entry(offsets=[4, 8])}, b"\0" * 4), "leaves 4 bytes unused"),
    "beyond the end": (built({"a": entry(), "b": entry(offsets=[4, 8])}, b"\0" * 4), "need 8 bytes, the file holds 4"),
    "overlapping": (built({"a": entry(), "b": entry(offsets=[2, 6])}, b"\0" * 6), "'b' overlaps"),
    "same bytes twice": (built({"a": entry(), "b": entry()}, b"\0" * 4), "overlaps"),
    "hole": (built({"a": entry(), "b": entry(offsets=[6, 10])}, b"\0" * 10), "leaves 2 bytes unused"),
    "half a byte": (built({"a": entry("F4", [1], [0, 0])}), "not what its offsets"),
    "newline in a name": (built({"a\nb\x1b": entry(dtype="?")}, b"\0" * 4), r"'a\\nb\\x1b' has unknown dtype"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_file_is_one_line_that_names_it(name: str, tmp_path: Path) -> None:
    data, message = BAD[name]
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=message) as raised:
        read_header(path)
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 600


def test_good_file_reads_as_safetensors_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(GOOD)
    tensors = read_header(path)
    assert {name: (info.dtype, info.shape) for name, info in tensors.items()} == {
        "a": ("F32", (2, 3)),
        "b.é": ("BF16", (4,)),
        "empty": ("F32", (0, 3)),
    }


@example(changes=[(26, "delete", 0), (215, "insert", 0)])  # NUL behind the object, with the length unchanged
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    changes=st.lists(
        st.tuples(
            st.integers(0, len(GOOD) - 1),
            st.sampled_from(["set", "insert", "delete", "cut"]),
            st.sampled_from(b'\0\1\xff{}[]",:019-e \\'),
        ),
        min_size=1,
        max_size=4,
    )
)
def test_what_is_accepted_safetensors_accepts(changes: list[tuple[int, str, int]], tmp_path: Path) -> None:
    data = bytearray(GOOD)
    for at, what, byte in changes:
        if what == "set":
            data[at : at + 1] = bytes([byte])
        elif what == "insert":
            data[at:at] = bytes([byte])
        else:
            del data[at : at + 1 if what == "delete" else None]
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    try:
        tensors = read_header(path)
    except CheckpointError:
        return
    try:
        with safe_open(path, "pt") as file:
            assert {name: list(info.shape) for name, info in tensors.items()} == {
                name: file.get_slice(name).get_shape()
                for name in file.keys()  # noqa: SIM118
            }
    except SafetensorError as error:
        pytest.fail(f"accepted, but safetensors says {error}: {bytes(data)!r}")


@pytest.mark.slow
def test_memory_stays_bounded(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    hostile = (
        built({"__metadata__": {"a": "x" * 25_000_000}, "a": entry(offsets=[0, 1])}, b"\0" * 4),
        built(b'{"a":' + b"[[]," * 5_000_000),
        built({f"{i}": 1 for i in range(1_000_000)}),
    )
    for data in hostile:
        path.write_bytes(data)
        tracemalloc.start()
        with pytest.raises(CheckpointError):
            read_header(path)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 150_000_000
    path.write_bytes(built(b"{}" + b" " * header.MAX_HEADER_BYTES))
    with pytest.raises(CheckpointError, match="at most 32000000 are read"):
        read_header(path)


def test_number_of_entries_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(header, "MAX_TENSORS", 50)
    path = tmp_path / "model.safetensors"
    none = entry(shape=[0], offsets=[0, 0])
    for n, told in ((50, None), (51, "more than 50 tensors")):
        path.write_bytes(built({str(i): none for i in range(n)}))
        if told is None:
            assert len(read_header(path)) == n
        else:
            with pytest.raises(CheckpointError, match=told):
                read_header(path)
    path.write_bytes(built({"__metadata__": {str(i): "" for i in range(51)}}))
    with pytest.raises(CheckpointError, match="more than 50 notes"):
        read_header(path)
