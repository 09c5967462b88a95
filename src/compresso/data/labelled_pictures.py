"""Pictures with a label each: how a row is read, or a folder, and pixels in the size of a model.

image or img, and label (CIFAR-10's fine_label, coarse_label of CIFAR-100): rows of parquet or arrow files
FOLDER/NAME/*.png                                                        a folder of pictures for each class
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import Tensor
from torch.nn import functional

from compresso.core.picture import Picture, PixelInput
from compresso.core.row import Row
from compresso.data.bad_lines import REPAIR, skips
from compresso.data.labelled import Labels, label_of
from compresso.data.pictures import SUFFIXES, bytes_of, colours
from compresso.data.record_forms import NAMED_BAD, BadRecord, RecordForm, Taken, type_name, unused_of
from compresso.data.records import Pictured, Records
from compresso.data.survival import Encoded, Lost, Stats, of_one_class
from compresso.errors import DataError

IMAGES = ("image", "img")
_LABELS = ("label", "fine_label", "coarse_label")
_WANTED = "image (or img) and label, or a folder of pictures for each class"


def take_pictured(value: object) -> Taken:
    """The labelled picture that `value` describes, and the columns that were not read. Raises BadRecord."""
    if not isinstance(value, Mapping):
        raise BadRecord(f"holds {type_name(value)}; wanted an object with {_WANTED}")
    image = next((name for name in IMAGES if name in value), None)
    label = next((name for name in _LABELS if name in value), None)
    if image is None or label is None:
        found = ", ".join(str(name) for name in list(value)[:8]) or "none"
        raise BadRecord(f"fields are: {found}; wanted {_WANTED}")
    record = Pictured(bytes_of(value[image], image), label_of(value, label))
    return Taken(record, unused_of(value, (image, label)), (image, label))


def files_in(folder: Path) -> list[Path]:
    """The pictures that lie in a folder, by name; hidden files, which programs leave behind, are none."""
    return sorted(
        path
        for path in folder.iterdir()
        if path.suffix.lower() in SUFFIXES and path.is_file() and not path.name.startswith(".")
    )


def _by_class(folder: Path) -> Iterator[tuple[str, object]]:
    """A row for each picture in the folders of a folder, whose names are the labels; hidden folders are none."""
    for inner in sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")):
        for path in files_in(inner):
            yield str(path), {"image": path, "label": inner.name}


PICTURED = RecordForm((*IMAGES, *_LABELS), take_pictured, _WANTED, folder=_by_class)
"""Rows of a classification of pictures."""


def sized(pixels: Tensor, height: int, width: int) -> Tensor:
    """Pixels uint8 [channels, height, width] in another size, bilinear, smoothed where it is smaller."""
    if pixels.shape[-2:] == (height, width):
        return pixels
    wide = functional.interpolate(
        pixels.unsqueeze(0).float(), (height, width), mode="bilinear", antialias=True, align_corners=False
    )
    return wide[0].round().clamp(0, 255).to(pixels.dtype)


def chosen(records: Records, limit: int | None) -> list[tuple[str, int]]:
    """The sources and places of most `limit` records, evenly spaced ones, so that data sorted by label keeps all."""
    n = len(records.rows)
    places = range(n) if limit is None or limit >= n else [i * n // limit for i in range(limit)]
    sources = [name for name, part in records.by_source() for _ in part]
    return [(sources[i], i) for i in places]


class Unreadable:
    """Records whose pictures cannot be read: raised as they come, or left out and counted.

    Args:
        skip_bad: whether they are left out; None where nobody can choose.
    """

    def __init__(self, skip_bad: bool | None) -> None:
        self.skip_bad = skip_bad
        self.of: Counter[str] = Counter()
        self.named: tuple[str, ...] = ()

    @property
    def total(self) -> int:
        """How many there are."""
        return self.of.total()

    def add(self, source: str, why: str) -> None:
        """Count one of a source. Raises DataError where none is left out."""
        if not self.skip_bad:
            raise DataError(f"{why}. {REPAIR}{skips(self.skip_bad, ' such records')}.")
        self.of[source] += 1
        self.named = (*self.named, why)[:NAMED_BAD]

    def check(self, rows: int) -> None:
        """Raise DataError if no picture is left."""
        if self.total and not rows:
            raise DataError(f"no picture can be read, of {self.total}; the first: {self.named[0]}")


def encode_pictured(
    records: Records, inputs: PixelInput, labels: Labels, limit: int | None = None, skip_bad: bool | None = False
) -> Encoded:
    """Pictures in a model's size, and numbers of labels.

    Args:
        records: labelled pictures.
        inputs: how the model sees them.
        labels: all that occur.
        limit: most records.
        skip_bad: leave pictures out (counted) that cannot be read, instead of raising; None where nobody can choose.

    Raises DataError, naming the place: a picture cannot be read, or none can.
    """
    rows: list[Row] = []
    unreadable = Unreadable(skip_bad)
    places = chosen(records, limit)
    for source, i in places:
        record = records.rows[i]
        assert isinstance(record, Pictured)  # the form of the task
        try:
            pixels = sized(colours(record.image), inputs.height, inputs.width)
        except BadRecord as error:
            unreadable.add(source, f"{records.place(i)}: the picture {error}")
            continue
        one = Row(input_ids=[], labels=[labels.numbers[record.label]], source=source, picture=Picture(pixels, inputs))
        rows.append(one)
    unreadable.check(len(rows))
    stats = Stats(len(places), 0, 0, 0, len(rows), 0, len(rows), refused=unreadable.total, read=len(records.rows))
    n = Counter(source for source, _ in places)
    lost = tuple(Lost(source, n[source], unreadable=unreadable.of[source]) for source in n)
    notes = of_one_class(records.source, {label for row in rows for label in row["labels"]}, labels.names)
    return Encoded(rows, stats, labels.names, lost, unreadable.named, notes)
