"""Bytes of a picture file as pixels.

PNG (W3C, third edition) is read here, so that label maps, and tests, want no more than what is installed: 8 bits a
channel, grey, colours, a palette, with or without transparency, not interlaced. Every other format, JPEG among them, is
read by Pillow where that is installed.
"""

import importlib.util
import io
import struct
import zlib
from pathlib import Path

import numpy
import torch
from torch import Tensor

from compresso.data.record_forms import BadRecord

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm")
MOST_PIXELS = 64_000_000
"""Of one picture: a header of a few bytes may claim any number."""
_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_WIDE = ("I", "F")
"""Pillow's modes of 16 and 32 bits, which it would cut off at 255."""
_PHONES = "MPO"
"""JPEG files of telephones, whose further frames are of the same moment."""
_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # by the colour type


def colours(data: bytes) -> Tensor:
    """A picture's red, green and blue, uint8 [3, height, width]; transparency is left out, grey is all three.

    Raises BadRecord: it cannot be read.
    """
    if not data.startswith(_SIGNATURE):
        return _by_pillow(data, "RGB").permute(2, 0, 1).contiguous()
    pixels, palette, kind = _png(data)
    if palette is not None:
        return palette[pixels[..., 0].long()].permute(2, 0, 1).contiguous()
    shown = pixels[..., :1].expand(-1, -1, 3) if kind in (0, 4) else pixels[..., :3]
    return shown.permute(2, 0, 1).contiguous()


def numbers(data: bytes) -> Tensor:
    """A label map's numbers, uint8 [height, width]: grey, or places in a palette.

    Raises BadRecord: it cannot be read, or has colours.
    """
    if not data.startswith(_SIGNATURE):
        raise BadRecord("is no PNG; label maps are PNG files with one channel, whose numbers are the classes")
    pixels, _, kind = _png(data)
    if kind not in (0, 3):
        raise BadRecord("is a PNG with colours; wanted one channel, whose numbers are the classes")
    return pixels[..., 0].contiguous()


def _by_pillow(data: bytes, mode: str) -> Tensor:
    if importlib.util.find_spec("PIL") is None:
        raise BadRecord("is no PNG, and reading other pictures needs Pillow; pip install pillow, or give PNG files")
    from PIL import Image, UnidentifiedImageError  # pyright: ignore[reportMissingImports]

    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.width * image.height > MOST_PIXELS:
                raise BadRecord(_too_large(image.width, image.height))
            if image.mode.startswith(_WIDE):
                raise BadRecord(f"is a {image.format} of more than 8 bits a channel (mode {image.mode}); wanted 8 bits")
            if (frames := getattr(image, "n_frames", 1)) > 1 and image.format != _PHONES:
                raise BadRecord(f"is a {image.format} of {frames} pictures; wanted one")
            return torch.from_numpy(numpy.array(image.convert(mode)))
    except UnidentifiedImageError as error:  # its own message names an object in memory
        raise BadRecord(
            f"is no picture that Pillow reads: its bytes, which begin with {data[:8]!r}, are of no format it knows"
        ) from error
    except (OSError, Image.DecompressionBombError) as error:
        raise BadRecord(f"is no picture that Pillow reads ({error})") from error


def _too_large(width: int, height: int) -> str:
    return f"has {width} x {height} pixels; wanted {MOST_PIXELS:,} at most"


def _png(data: bytes) -> tuple[Tensor, Tensor | None, int]:
    """Pixels [height, width, channels], the palette [256, 3] if there is one, and the colour type. Raises BadRecord."""
    try:
        chunks = _chunks(data)
        width, height, depth, kind, _, _, interlaced = struct.unpack(">IIBBBBB", chunks[b"IHDR"])
        channels = _CHANNELS[kind]
    except (struct.error, KeyError) as error:
        raise BadRecord("is a damaged PNG") from error
    if not width or not height or width * height > MOST_PIXELS:
        raise BadRecord(_too_large(width, height))
    if depth != 8 or interlaced:
        raise BadRecord(
            f"is a PNG of {depth} bits a channel{', interlaced' if interlaced else ''}; wanted 8 bits, not interlaced"
        )
    if len(frames := chunks.get(b"acTL", b"")) >= 4 and (n := int.from_bytes(frames[:4], "big")) > 1:
        raise BadRecord(f"is a PNG of {n} pictures; wanted one")
    size = height * (1 + width * channels)
    try:
        packed = zlib.decompressobj().decompress(chunks.get(b"IDAT", b""), size)
    except zlib.error as error:
        raise BadRecord("is a damaged PNG") from error
    if len(packed) != size:
        raise BadRecord("is a damaged PNG: it ends early")
    lines = numpy.frombuffer(packed, dtype=numpy.uint8).reshape(height, 1 + width * channels)
    pixels = torch.from_numpy(_unfiltered(lines, channels).reshape(height, width, channels))
    if kind != 3:
        return pixels, None, kind
    listed = numpy.frombuffer(chunks.get(b"PLTE", b""), dtype=numpy.uint8)
    palette = torch.zeros(256, 3, dtype=torch.uint8)
    palette[: len(listed) // 3] = torch.from_numpy(listed[: len(listed) // 3 * 3].reshape(-1, 3).copy())
    return pixels, palette, kind


def _chunks(data: bytes) -> dict[bytes, bytes]:
    """Name -> content, parts of one name joined."""
    found, place = dict[bytes, bytes](), len(_SIGNATURE)
    while place + 8 <= len(data):
        (length,), name = struct.unpack(">I", data[place : place + 4]), data[place + 4 : place + 8]
        found[name] = found.get(name, b"") + data[place + 8 : place + 8 + length]
        place += 12 + length
    return found


def _unfiltered(lines: numpy.ndarray, channels: int) -> numpy.ndarray:
    """Bytes of each line [height, width * channels] from the differences that its filter took (section 9).

    Raises BadRecord for a filter that there is none of.
    """
    height, length = len(lines), lines.shape[1] - 1
    whole = numpy.zeros((height + 1, length), dtype=numpy.uint8)  # above the first line lie zeros
    for row in range(height):
        kind, given, above = int(lines[row, 0]), lines[row, 1:], whole[row]
        if kind == 0:
            whole[row + 1] = given
        elif kind == 1:
            steps = given.reshape(-1, channels)
            whole[row + 1] = numpy.add.accumulate(steps, axis=0, dtype=numpy.uint8).reshape(-1)
        elif kind == 2:
            whole[row + 1] = given + above
        elif kind in (3, 4):
            whole[row + 1] = _from_left(given.tolist(), above.tolist(), channels, kind)
        else:
            raise BadRecord(f"is a damaged PNG: line {row + 1} has the filter {kind}")
    return whole[1:]


def _from_left(given: list[int], above: list[int], channels: int, kind: int) -> list[int]:
    """One line whose filter looks to the left and above: their mean (3), or Paeth's choice (4)."""
    line = list[int]()
    for i, step in enumerate(given):
        left, up = (line[i - channels], above[i]) if i >= channels else (0, above[i])
        if kind == 3:
            guess = (left + up) // 2
        else:
            corner = above[i - channels] if i >= channels else 0
            to_left, to_up, to_corner = abs(up - corner), abs(left - corner), abs(left + up - 2 * corner)
            guess = left if to_left <= to_up and to_left <= to_corner else up if to_up <= to_corner else corner
        line.append((step + guess) & 255)
    return line


def png(pixels: Tensor) -> bytes:
    """A PNG of uint8 [3, height, width] or [height, width], for what we draw ourselves."""
    lines = pixels.unsqueeze(-1) if pixels.dim() == 2 else pixels.permute(1, 2, 0)
    height, width, channels = lines.shape
    flat = torch.cat([torch.zeros(height, 1, dtype=torch.uint8), lines.reshape(height, -1)], dim=1)
    header = struct.pack(">IIBBBBB", width, height, 8, 0 if channels == 1 else 2, 0, 0, 0)
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(flat.contiguous().numpy().tobytes())), (b"IEND", b""))
    return _SIGNATURE + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in parts
    )


def bytes_of(cell: object, name: str) -> bytes:
    """The file behind a cell: bytes, `{"bytes", "path"}` as data sets have them, or a path that a folder's reader gave.

    Raises BadRecord: it holds none.
    """
    if isinstance(cell, dict):
        cell = cell.get("bytes")
    if isinstance(cell, Path):
        return cell.read_bytes()
    if not isinstance(cell, bytes) or not cell:
        raise BadRecord(f"field '{name}' holds no bytes of a picture; wanted those of a PNG or JPEG file")
    return cell
