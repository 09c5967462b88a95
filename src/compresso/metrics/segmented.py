"""A few held-out pictures as a segmenter sees them: what it was given, the classes drawn, and those that it gives."""

import base64
import colorsys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from compresso.core.loss import logits_of
from compresso.core.losses import IGNORED
from compresso.core.row import Row
from compresso.core.segments import at_labels
from compresso.data.pictures import png
from compresso.metrics.record import Segmented

SHOWN = 3
"""Pictures, spread evenly over those held out."""
LARGEST = 160
"""Pixels of the longer side of what is kept; every n-th pixel of a larger picture."""
_GOLDEN = 0.618034


def colour_of(number: int) -> tuple[int, int, int]:
    """The colour that a class is drawn in, 0 to 255 each; neighbours in number are far apart in hue."""
    red, green, blue = colorsys.hsv_to_rgb(number * _GOLDEN % 1, 0.75 if number % 2 else 0.5, 0.9 - 0.25 * (number % 3))
    return round(255 * red), round(255 * green), round(255 * blue)


@torch.inference_mode()
def segmented(
    model: PreTrainedModel,
    rows: Sequence[Row],
    collate: Callable[[Sequence[Row]], dict[str, Tensor]],
    names: Sequence[str],
) -> tuple[Segmented, ...]:
    """What a segmenter, in evaluation mode, says of a few pictures that have a label map.

    Args:
        rows: held out; the same ones are shown of every model that is asked about them.
        collate: a batch of them, with pixel_values and labels [n, height, width].
        names: of the classes.
    """
    n = min(SHOWN, len(rows))
    shown: list[Segmented] = []
    for number in (len(rows) * i // n for i in range(n)):
        picture = rows[number].get("picture")
        if picture is None or picture.classes is None:
            continue
        batch = {name: value.to(model.device) for name, value in collate([rows[number]]).items()}
        given = at_labels(logits_of(model, batch), batch["labels"]).argmax(1)[0].cpu()
        labels = batch["labels"][0].cpu()
        counted = labels != IGNORED
        present: list[int] = sorted({*labels[counted].tolist(), *given.flatten().tolist()})
        shown.append(
            Segmented(
                number=number,
                picture=file_of(picture.pixels),
                labels=file_of(_drawn(labels)),
                given=file_of(_drawn(given)),
                right=float((given == labels)[counted].float().mean()) if bool(counted.any()) else 0.0,
                classes={names[i]: "#{:02x}{:02x}{:02x}".format(*colour_of(i)) for i in present},
            )
        )
    return tuple(shown)


def file_of(pixels: Tensor) -> str:
    """A picture [3, height, width], uint8, as base64 of a PNG file of at most `LARGEST` pixels a side."""
    step = -(-max(pixels.shape[1:]) // LARGEST)
    return base64.b64encode(png(pixels[:, ::step, ::step])).decode()


def _drawn(classes: Tensor) -> Tensor:
    """Classes [height, width] in their colours [3, height, width], uint8; what is passed over is black."""
    found = torch.zeros(3, *classes.shape, dtype=torch.uint8)
    for number in classes.unique().tolist():
        if number != IGNORED:
            found[:, classes == number] = torch.tensor(colour_of(number), dtype=torch.uint8).unsqueeze(1)
    return found
