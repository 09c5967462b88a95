"""Pictures as a segmenter sees them: the files hold what was drawn, and the shares are those of the labels."""

import base64
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from compresso.core.losses import IGNORED
from compresso.core.picture import Picture, PixelInput
from compresso.core.row import Row
from compresso.data.pictures import colours
from compresso.metrics.record import Segmented
from compresso.metrics.segmented import LARGEST, SHOWN, colour_of, file_of, segmented


def read(file: str) -> Tensor:
    return colours(base64.b64decode(file))


class Says(nn.Module):
    """Gives each pixel a class that is told."""

    device = torch.device("cpu")

    def __init__(self, given: Tensor) -> None:
        super().__init__()
        self.given = given

    def forward(self, **_: Any) -> Any:
        logits = nn.functional.one_hot(self.given, 4).permute(2, 0, 1).unsqueeze(0).float()
        return SimpleNamespace(logits=logits)


@pytest.mark.parametrize("size", [(5, 7), (60, 80), (LARGEST, LARGEST), (300, 500), (1, 641)])
def test_a_written_png_holds_every_nth_pixel(size: tuple[int, int]) -> None:
    pixels = torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    step = next(n for n in range(1, 9) if -(-max(size) // n) <= LARGEST)
    assert torch.equal(read(file_of(pixels)), pixels[:, ::step, ::step])


def test_colours_of_a_data_set_are_told_apart() -> None:
    found = [colour_of(i) for i in range(32)]
    assert len(set(found)) == 32
    assert (0, 0, 0) not in found  # what is passed over


def test_what_is_shown_is_what_was_given_and_labelled() -> None:
    given = torch.tensor([[0, 1, 2], [3, 3, 3]])
    labels = torch.tensor([[0, 1, 1], [IGNORED, 3, 0]])
    pixels = torch.randint(0, 256, (3, 2, 3), dtype=torch.uint8)
    maps = labels.masked_fill(labels == IGNORED, 255).to(torch.uint8)
    inputs = PixelInput(2, 3)
    rows = [Row(input_ids=[], labels=[], picture=Picture(pixels, inputs, maps)) for _ in range(7)]

    def collate(some: Any) -> dict[str, Tensor]:
        return {"pixel_values": torch.zeros(len(some), 3, 2, 3), "labels": labels.unsqueeze(0)}

    model: Any = Says(given)
    shown = segmented(model, rows, collate, ("sky", "road", "car", "tree"))
    assert [one.number for one in shown] == [0, 2, 4]
    assert len(shown) == SHOWN
    first = shown[0]
    assert first.right == pytest.approx(3 / 5)
    assert list(first.classes) == ["sky", "road", "car", "tree"]
    assert torch.equal(read(first.picture), pixels)
    wanted = torch.tensor([[colour_of(int(i)) for i in line] for line in given], dtype=torch.uint8).permute(2, 0, 1)
    assert torch.equal(read(first.given), wanted)
    assert read(first.labels)[:, 1, 0].tolist() == [0, 0, 0]
    assert tuple(read(first.labels)[:, 0, 2].tolist()) == colour_of(1)


@pytest.mark.parametrize("field", ["picture", "labels", "given"])
def test_what_is_no_base64_is_refused(field: str) -> None:
    sound = {
        "number": 0,
        "picture": "aa==",
        "labels": "aa==",
        "given": "aa==",
        "right": 0.5,
        "classes": {"sky": "#00ff00"},
    }
    Segmented(**sound)
    for bad in ('aa" onerror="x', "", "data:,", "aa\n"):
        with pytest.raises(ValidationError):
            Segmented(**{**sound, field: bad})
    with pytest.raises(ValidationError):
        Segmented(**{**sound, "classes": {"sky": "red;background:url(x)"}})
