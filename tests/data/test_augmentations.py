"""Pictures and their label maps move together; a seed decides everything; what is not asked for does not happen."""

import pytest
import torch

from compresso.core.picture import Picture, PixelInput
from compresso.data.augmentations import IGNORED, Augmentation, augmented

STILL = Augmentation(flip=0.0)


def told(seed: int = 0, side: int = 24) -> Picture:
    """A picture whose red says the class: blocks of 6 pixels."""
    draw = torch.Generator().manual_seed(seed)
    blocks = torch.randint(0, 4, (side // 6, side // 6), generator=draw)
    classes = blocks.repeat_interleave(6, 0).repeat_interleave(6, 1)
    pixels = torch.stack([classes * 60, classes * 0 + 9, 200 - classes * 50])
    return Picture(pixels.to(torch.uint8), PixelInput(side, side), classes.to(torch.uint8))


def test_nothing_happens_where_nothing_is_asked_for() -> None:
    given = told()
    found = augmented(given, STILL, 3)
    assert torch.equal(found.pixels, given.pixels) and torch.equal(found.classes, given.classes)


def test_a_mirror_image_is_the_mirror_image_of_both() -> None:
    given = told()
    found = augmented(given, Augmentation(flip=1.0), 3)
    assert torch.equal(found.pixels, given.pixels.flip(-1)) and torch.equal(found.classes, given.classes.flip(-1))


@pytest.mark.parametrize(
    "how",
    [
        Augmentation(shift=0.3),
        Augmentation(scale=(0.5, 2.0)),
        Augmentation(rotate=20.0),
        Augmentation(shift=0.2, scale=(0.7, 1.5), rotate=10.0),
    ],
)
def test_each_pixel_keeps_its_class(how: Augmentation) -> None:
    """Away from borders between blocks, red is still 60 times the class."""
    kept = total = ignored = 0
    for seed in range(20):
        found = augmented(told(seed), how, seed)
        classes = found.classes.long()
        known = classes != IGNORED
        right = (found.pixels[0].long() - 60 * classes).abs() <= 20
        kept, total, ignored = (
            kept + int((right & known).sum()),
            total + int(known.sum()),
            ignored + int((~known).sum()),
        )
        assert set(classes[known].tolist()) <= {0, 1, 2, 3}
    assert kept > 0.75 * total
    assert ignored > 0


def test_a_seed_decides_and_another_decides_otherwise() -> None:
    how = Augmentation(shift=0.3, scale=(0.5, 2.0), rotate=5.0, jitter=0.5)
    one, same, other = (augmented(told(), how, seed) for seed in (1, 1, 2))
    assert torch.equal(one.pixels, same.pixels) and torch.equal(one.classes, same.classes)
    assert not torch.equal(one.pixels, other.pixels)


def test_a_rotation_turns_pixels_by_the_angle() -> None:
    """The centre of gravity of a bright spot right of the middle of a wide picture goes where trigonometry says."""
    pixels = torch.zeros(3, 40, 80, dtype=torch.uint8)
    pixels[:, 19:21, 69:71] = 255
    how = Augmentation(flip=0.0, rotate=20.0)
    for seed in range(5):
        found = augmented(Picture(pixels, PixelInput(40, 80)), how, seed).pixels[0].float()
        if found.sum() == 0:
            continue
        weight = found / found.sum()
        y = float((weight.sum(1) * torch.arange(40)).sum()) - 19.5
        x = float((weight.sum(0) * torch.arange(80)).sum()) - 39.5
        assert (x**2 + y**2) ** 0.5 == pytest.approx(30.0, abs=0.6)
        assert abs(y) <= 30 * 0.343


def test_jitter_changes_colours_alone() -> None:
    given = told()
    found = augmented(given, Augmentation(flip=0.0, jitter=0.5), 4)
    assert torch.equal(found.classes, given.classes) and not torch.equal(found.pixels, given.pixels)
    flat = Picture(torch.full((3, 4, 4), 100, dtype=torch.uint8), PixelInput(4, 4))
    values = {int(augmented(flat, Augmentation(flip=0.0, jitter=0.5), s).pixels[0, 0, 0]) for s in range(40)}
    assert min(values) >= 50 and max(values) <= 150 and len(values) > 20
