"""PNG files read as they were drawn: every filter of the standard, written by an independent encoder of its formulas;
files that another program wrote; and what is damaged, foreign or too large, in one line.
"""

import importlib.util
import io
import struct
import zlib
from typing import Any

import numpy
import pytest
import torch

from compresso.data.pictures import bytes_of, colours, numbers, png
from compresso.data.record_forms import BadRecord


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def encoded(
    pixels: numpy.ndarray, kind: int, filters: list[int], palette: bytes = b"", depth: int = 8, interlaced: int = 0
) -> bytes:
    """pixels [height, width, channels]; a filter for each line, by the formulas of the standard, byte by byte."""
    height, width, channels = pixels.shape
    raw = pixels.reshape(height, -1).astype(int)
    at = lambda y, x: int(raw[y, x]) if y >= 0 and x >= 0 else 0  # noqa: E731
    body = b""
    for y, how in enumerate(filters):
        line = [how]
        for x in range(width * channels):
            a, b, c = at(y, x - channels), at(y - 1, x), at(y - 1, x - channels)
            p = a + b - c
            paeth = min((abs(p - a), 0, a), (abs(p - b), 1, b), (abs(p - c), 2, c))[2]
            line.append((at(y, x) - (0, a, b, (a + b) // 2, paeth)[how]) % 256)
        body += bytes(line)
    header = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, interlaced)
    middle = chunk(b"PLTE", palette) if palette else b""
    packed = zlib.compress(body)
    halves = chunk(b"IDAT", packed[:7]) + chunk(b"IDAT", packed[7:])
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + middle + halves + chunk(b"IEND", b"")


def drawn(height: int, width: int, channels: int, seed: int = 0) -> numpy.ndarray:
    return numpy.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=numpy.uint8)


@pytest.mark.parametrize("channels,kind", [(1, 0), (3, 2), (2, 4), (4, 6)])
@pytest.mark.parametrize("filters", [[0] * 5, [1] * 5, [2] * 5, [3] * 5, [4] * 5, [4, 3, 2, 1, 0]])
def test_every_filter_gives_back_what_was_drawn(channels: int, kind: int, filters: list[int]) -> None:
    pixels = drawn(5, 7, channels)
    found = colours(encoded(pixels, kind, filters)).permute(1, 2, 0).numpy()
    wanted = pixels[..., :3] if channels > 2 else pixels[..., :1].repeat(3, -1)
    assert (found == wanted).all()


def test_a_palette_is_colours_in_a_picture_and_numbers_in_a_label_map() -> None:
    places, palette = drawn(4, 4, 1) % 3, bytes([10, 20, 30, 40, 50, 60, 70, 80, 90])
    data = encoded(places, 3, [4, 1, 3, 2], palette)
    assert (numbers(data).numpy() == places[..., 0]).all()
    wanted = numpy.array(list(palette)).reshape(3, 3)[places[..., 0]]
    assert (colours(data).permute(1, 2, 0).numpy() == wanted).all()


def test_what_is_written_here_reads_back() -> None:
    for pixels in (torch.randint(0, 256, (3, 6, 5), dtype=torch.uint8), torch.randint(0, 9, (6, 5), dtype=torch.uint8)):
        data = png(pixels)
        assert torch.equal(colours(data) if pixels.dim() == 3 else numbers(data), pixels)


def test_a_file_of_another_program_is_read() -> None:
    vl_convert = pytest.importorskip("vl_convert", reason="vl-convert-python: not installed")
    shapes = '<rect width="6" height="4" fill="#ff8000"/><rect x="2" width="2" height="4" fill="#0010ff"/>'
    data = vl_convert.svg_to_png(f'<svg xmlns="http://www.w3.org/2000/svg" width="6" height="4">{shapes}</svg>', 1)
    found = colours(data)
    assert found.shape == (3, 4, 6)
    assert found[:, 1].T.tolist() == [[255, 128, 0]] * 2 + [[0, 16, 255]] * 2 + [[255, 128, 0]] * 2


GOOD = encoded(drawn(3, 3, 3), 2, [0, 1, 2])


@pytest.mark.parametrize(
    "data,said",
    [
        (GOOD[:40], "is a damaged PNG"),
        (GOOD[:8], "is a damaged PNG"),
        (encoded(drawn(3, 3, 3), 2, [0, 1])[:-4], "it ends early"),
        (encoded(drawn(1, 1, 1), 0, [0], depth=16), "is a PNG of 16 bits a channel; wanted 8 bits"),
        (encoded(drawn(1, 1, 1), 0, [0], interlaced=1), "interlaced; wanted 8 bits, not interlaced"),
        (GOOD.replace(struct.pack(">II", 3, 3), struct.pack(">II", 99999, 99999)), "has 99999 x 99999 pixels"),
        (GOOD.replace(struct.pack(">II", 3, 3), struct.pack(">II", 0, 3)), "has 0 x 3 pixels"),
    ],
)
def test_what_cannot_be_read_is_said(data: bytes, said: str) -> None:
    with pytest.raises(BadRecord, match=said):
        colours(data)


def test_a_filter_that_there_is_none_of_is_damage() -> None:
    lines = zlib.compress(bytes([5, 1, 2, 3]))
    header = struct.pack(">IIBBBBB", 3, 1, 8, 0, 0, 0, 0)
    with pytest.raises(BadRecord, match="line 1 has the filter 5"):
        numbers(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", lines))


def test_a_label_map_is_a_png_of_one_channel() -> None:
    with pytest.raises(BadRecord, match="is a PNG with colours; wanted one channel"):
        numbers(GOOD)
    with pytest.raises(BadRecord, match="label maps are PNG files"):
        numbers(b"\xff\xd8\xff\xe0")


def test_other_formats_want_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "PIL" else real(name))
    with pytest.raises(BadRecord, match=r"needs Pillow; pip install pillow, or give PNG files"):
        colours(b"\xff\xd8\xff\xe0")


def test_pillow_reads_a_jpeg() -> None:
    image: Any = pytest.importorskip("PIL.Image", reason="Pillow: not installed")
    stream = io.BytesIO()
    image.new("RGB", (6, 4), (200, 100, 50)).save(stream, "JPEG", quality=100)
    found = colours(stream.getvalue())
    assert found.shape == (3, 4, 6) and (found.float().mean((1, 2)) - torch.tensor([200.0, 100, 50])).abs().max() < 3
    with pytest.raises(BadRecord, match="is no picture that Pillow reads"):
        colours(b"\xff\xd8\xff\xe0")
    with pytest.raises(
        BadRecord, match=r"reads: its bytes, which begin with b'hello', are of no format it knows"
    ) as no:
        colours(b"hello")
    assert "BytesIO" not in str(no.value)


@pytest.mark.parametrize(("mode", "kind"), [("I;16", "TIFF"), ("F", "TIFF"), ("I", "TIFF"), ("I;16", "PPM")])
def test_more_than_eight_bits_are_refused_rather_than_cut_off(mode: str, kind: str) -> None:
    image: Any = pytest.importorskip("PIL.Image", reason="Pillow: not installed")
    stream = io.BytesIO()
    image.fromarray(numpy.full((4, 6), 257, dtype={"I;16": "uint16", "F": "float32", "I": "int32"}[mode])).save(
        stream, kind
    )
    with pytest.raises(BadRecord, match=rf"is a {kind} of more than 8 bits a channel \(mode .*\); wanted 8 bits"):
        colours(stream.getvalue())


@pytest.mark.parametrize("kind", ["GIF", "PNG", "TIFF", "WEBP"])
def test_a_file_of_several_pictures_is_refused_and_one_of_a_kind_read(kind: str) -> None:
    image: Any = pytest.importorskip("PIL.Image", reason="Pillow: not installed")
    frames = [image.new("RGB", (6, 4), (40 * i, 0, 0)) for i in range(1, 4)]
    one, several = io.BytesIO(), io.BytesIO()
    frames[0].save(one, kind)
    frames[0].save(several, kind, save_all=True, append_images=frames[1:])
    assert colours(one.getvalue()).shape == (3, 4, 6)
    with pytest.raises(BadRecord, match=f"is a {kind} of 3 pictures; wanted one"):
        colours(several.getvalue())


def test_bytes_are_found_as_data_sets_hold_them() -> None:
    assert bytes_of(b"x", "image") == b"x" and bytes_of({"bytes": b"x", "path": "a.png"}, "image") == b"x"
    for cell in ("text", b"", None, {"path": "a.png"}):
        with pytest.raises(BadRecord, match="field 'image' holds no bytes of a picture"):
            bytes_of(cell, "image")
