"""Pictures with a class for each pixel: how a row is read, or a folder, and pixels and classes in the size of a model.

    image or img, and label, annotation or mask: both files' bytes, rows of parquet or arrow files
    FOLDER/images/NAME.png (or .jpg), FOLDER/labels/NAME.png: files of the same name

A label map is a PNG with one channel, whose numbers are the classes. One number, 255 where the model's config does not
say another (`semantic_loss_ignore_index`), marks pixels that are passed over; where preprocessor_config.json says
do_reduce_labels, so does 0, and each other number is the class before it. A map of nothing else teaches nothing: it
is left out with its picture, and counted.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from compresso.core.counted import counted
from compresso.core.picture import Picture, PixelInput
from compresso.core.row import Row
from compresso.data.augmentations import IGNORED
from compresso.data.labelled_pictures import IMAGES, Unreadable, chosen, files_in, sized
from compresso.data.pictures import bytes_of, colours, numbers
from compresso.data.record_forms import BadRecord, RecordForm, Taken, type_name, unused_of
from compresso.data.records import Mapped, Records
from compresso.data.survival import Encoded, Lost, Stats, of_one_class
from compresso.errors import DataError

_MAPS = ("label", "annotation", "mask")
_WANTED = "image (or img) and label (or annotation, mask), or a folder with images/ and labels/"


def take_mapped(value: object) -> Taken:
    """The picture and the label map that `value` describes, and the columns that were not read. Raises BadRecord."""
    if not isinstance(value, Mapping):
        raise BadRecord(f"holds {type_name(value)}; wanted an object with {_WANTED}")
    image = next((name for name in IMAGES if name in value), None)
    classes = next((name for name in _MAPS if name in value), None)
    if image is None or classes is None:
        found = ", ".join(str(name) for name in list(value)[:8]) or "none"
        raise BadRecord(f"fields are: {found}; wanted {_WANTED}")
    record = Mapped(bytes_of(value[image], image), bytes_of(value[classes], classes))
    return Taken(record, unused_of(value, (image, classes)), (image, classes))


def _side_by_side(folder: Path) -> Iterator[tuple[str, object]]:
    """A row for each picture in images/ with the map of its name in labels/. Raises DataError for one without, and for
    a map without a picture.
    """
    images, labels = folder / "images", folder / "labels"
    if not images.is_dir() or not labels.is_dir():
        return
    pictures, maps = _by_name(images), _by_name(labels)
    for name, path in maps.items():
        if name not in pictures:
            raise DataError(f"{path}: no picture of this name lies in {images}; add it, or take the label map away")
    for name, path in pictures.items():
        if name not in maps:
            raise DataError(f"{path}: no label map of this name lies in {labels}; add it, or take the picture away")
        yield str(path), {"image": path, "label": maps[name]}


def _by_name(folder: Path) -> dict[str, Path]:
    """The pictures of a folder by their names without suffixes. Raises DataError for two of one name."""
    found: dict[str, Path] = {}
    for path in files_in(folder):
        if path.stem in found:
            raise DataError(f"{path}: {found[path.stem].name} has the same name without its suffix; take one away")
        found[path.stem] = path
    return found


MAPPED = RecordForm((*IMAGES, *_MAPS), take_mapped, _WANTED, folder=_side_by_side)
"""Rows of a segmentation."""


def encode_mapped(
    records: Records,
    inputs: PixelInput,
    passed_over: int,
    names: tuple[str, ...] | None,
    limit: int | None = None,
    skip_bad: bool | None = False,
    learns: bool = True,
) -> Encoded:
    """Pictures and classes in a model's size.

    Args:
        records: pictures with label maps.
        inputs: how the model sees them.
        passed_over: the number in a map that is no class.
        names: of the classes of a model that has its head already; None for those of the data: all numbers up to the
            largest.
        limit: most records, evenly spaced ones.
        skip_bad: leave records out (counted) of which a file cannot be read, or whose sizes differ, instead of
            raising; None where nobody can choose.
        learns: whether a model is trained on them, and could do so with a new head.

    Returns those whose map has a pixel with a class in the model's size, and how many of each source have none.

    Raises DataError, naming the place: a file cannot be read, a map has another size than its picture, or a number that
    is no class; or no map has a pixel with a class.
    """
    places, rows, largest, unlabelled = chosen(records, limit), list[Row](), 0, Counter[str]()
    occur = set[int]()
    unreadable = Unreadable(skip_bad)
    for source, i in places:
        record = records.rows[i]
        assert isinstance(record, Mapped)  # the form of the task
        try:
            pixels, classes = _read(record)
        except BadRecord as error:
            unreadable.add(source, f"{records.place(i)}: {error}")
            continue
        if inputs.reduced:
            none = (classes == 0) | (classes == passed_over)
            classes = torch.where(none, torch.tensor(passed_over, dtype=torch.uint8), classes - 1)
        known = classes != passed_over
        top = int(classes[known].max()) if bool(known.any()) else 0
        if names is not None and top >= len(names):
            first = int(inputs.reduced)
            beside = f"0 and {passed_over} are" if inputs.reduced else f"{passed_over} is"
            raise DataError(
                f"{records.place(i)}: the label map has the class {top + first}; the model has {len(names)} ({first} to"
                f" {len(names) - 1 + first}), and {beside} passed over. Relabel the map, or"
                f" {'start from a model without a head' if learns else 'leave it out'}"
            )
        if top == IGNORED:
            raise DataError(
                f"{records.place(i)}: the label map has the class {IGNORED}, which is none beside {passed_over};"
                " relabel the map"
            )
        largest = max(largest, top)
        classes = torch.where(known, classes, torch.tensor(IGNORED, dtype=torch.uint8))
        size = (inputs.height, inputs.width)
        seen = _nearest(classes, *size)
        if bool((seen == IGNORED).all()):
            unlabelled[source] += 1
            continue
        occur |= set(seen.unique().tolist()) - {IGNORED}
        picture = Picture(sized(pixels, *size), inputs, seen)
        rows.append(Row(input_ids=[], labels=[], source=source, picture=picture))
    unreadable.check(len(rows) + unlabelled.total())
    if not rows:
        raise DataError(
            f"{records.source}: no pixel of {counted(len(places), 'label map')} has a class, all are {passed_over},"
            " which is passed over; relabel the maps"
        )
    if names is None:
        if largest < 1:
            raise DataError(f"{records.source}: all pixels are of one class; wanted at least two")
        names = tuple(str(i) for i in range(largest + 1))
    n = Counter(source for source, _ in places)
    lost = tuple(
        Lost(source, n[source], unlabelled=unlabelled[source], unreadable=unreadable.of[source]) for source in n
    )
    stats = Stats(
        len(places),
        0,
        0,
        unlabelled.total(),
        len(rows),
        0,
        len(rows),
        refused=unreadable.total,
        read=len(records.rows),
    )
    notes = of_one_class(records.source, occur, names)
    return Encoded(rows, stats, names, lost, unreadable.named, notes)


def _read(record: Mapped) -> tuple[Tensor, Tensor]:
    """Pixels and classes of one record, of one size. Raises BadRecord."""
    what = "picture"
    try:
        pixels = colours(record.image)
        what = "label map"
        classes = numbers(record.classes)
    except BadRecord as error:
        raise BadRecord(f"the {what} {error}") from error
    if pixels.shape[-2:] != classes.shape:
        high, wide = pixels.shape[-2:]
        raise BadRecord(
            f"the picture has {wide} x {high} pixels, its label map {classes.shape[1]} x {classes.shape[0]}; wanted a"
            " map of the picture's size"
        )
    return pixels, classes


def _nearest(classes: Tensor, height: int, width: int) -> Tensor:
    """Classes uint8 [height, width] in another size: those of the nearest pixels."""
    if classes.shape == (height, width):
        return classes
    return functional.interpolate(classes[None, None], (height, width), mode="nearest-exact")[0, 0]
