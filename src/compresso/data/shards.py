"""Which files a folder or a pattern of names stands for, in order of their names.

    data/                 every data file in it, of one format; or a data set that `datasets` saved to disk
    data/part-*.jsonl     those that match; ** goes through folders

Files of several splits beside each other are refused, because a run would train on what it is to be tested with.
"""

import glob
import re
from collections.abc import Collection, Sequence
from pathlib import Path

from compresso.core.counted import counted
from compresso.errors import DataError

_SAVED = "dataset_info.json"
_SAVED_SPLITS = "dataset_dict.json"
_SPLIT = re.compile(r"(?:^|[^a-z])(train|training|test|testing|validation|valid|val|dev|eval)(?:[^a-z]|$)")
_SAME = {"training": "train", "testing": "test", **dict.fromkeys(("valid", "val", "dev", "eval"), "validation")}
_NAMED = 5


def is_pattern(name: str) -> bool:
    """Whether a name has * or ? or [...] in it, and is no file itself."""
    return glob.has_magic(name) and not Path(name).expanduser().exists()


def shards(name: str, suffixes: tuple[str, ...], split: str = "train", instead: str = "") -> list[Path]:
    """The files that a folder or a pattern stands for.

    Args:
        name: of a folder, or a pattern.
        suffixes: of data files.
        split: taken where a saved data set holds several.
        instead: what else the folder might have held, for the error; "" where files alone are read.

    Raises:
        DataError: there are none, or they are of several formats or splits.
    """
    folder = Path(name).expanduser()
    if not folder.is_dir():
        found = [Path(path) for path in sorted(glob.glob(str(folder), recursive=True)) if Path(path).is_file()]  # noqa: PTH207 - the pattern may be absolute
        if not found:
            raise DataError(f"data '{name}': no file matches this pattern; check it, and quote it from the shell")
        return _alike(name, _known(name, found, suffixes), suffixes)
    if (folder / _SAVED_SPLITS).is_file():
        inner = folder / split
        if not inner.is_dir():
            have = sorted(path.name for path in folder.iterdir() if path.is_dir())
            raise DataError(
                f"data {name} has no split '{split}'; it has {', '.join(have) or 'none'}: name the folder of one"
            )
        folder = inner
    found = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    if (folder / _SAVED).is_file() and (saved := [path for path in found if path.suffix == ".arrow"]):
        return saved  # beside them lie files that describe the data set
    known = [path for path in found if path.name.lower().endswith(suffixes)]
    if not known and instead:
        inside = sorted(f"{path.name}/" if path.is_dir() else path.name for path in folder.iterdir())
        more = f" and {len(inside) - 8} more" if len(inside) > 8 else ""
        raise DataError(
            f"data {name}: wanted {instead}, or files of rows with these columns ({', '.join(suffixes)}); the folder"
            f" holds {', '.join(inside[:8]) or 'nothing'}{more}"
        )
    if not known:
        raise DataError(
            f"data {name}: no data file lies in this folder; wanted {', '.join(suffixes)}, or a pattern such as"
            f" {name.rstrip('/')}/**/*.jsonl"
        )
    return _alike(name, known, suffixes)


def unread(folder: Path, read: Collection[object]) -> tuple[str, ...]:
    """Sentences on the files of a folder that are none of `read`, and on empty folders in it; none where all is read.

    Hidden files, and a saved data set, which says itself what its files are, are not looked at.
    """
    if (folder / _SAVED_SPLITS).is_file() or (folder / _SAVED).is_file():
        return ()
    said: list[str] = []
    inner = (path for path in sorted(folder.iterdir()) if path.is_dir() and not path.name.startswith("."))
    if empty := [path.name for path in inner if not any(each.is_file() for each in path.rglob("*"))]:
        said.append(f"{folder.name}: {counted(len(empty), 'folder', 'is')} empty: {_some(empty)}")
    inside = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file() and path not in read)
    left = sorted(str(path) for path in inside if not any(part.startswith(".") for part in path.parts))
    if left:
        said.append(f"{folder.name}: {counted(len(left), 'file', 'is')} not read: {_some(left)}")
    return tuple(said)


def _some(names: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    return ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED:,} more" if len(names) > _NAMED else "")


def _known(name: str, found: list[Path], suffixes: tuple[str, ...]) -> list[Path]:
    """The files, none of which may be of a format that is not read: a pattern names them."""
    if strange := next((path for path in found if not path.name.lower().endswith(suffixes)), None):
        raise DataError(f"data '{name}' matches {strange.name}, which is no data file; wanted {', '.join(suffixes)}")
    return found


def _alike(name: str, files: list[Path], suffixes: tuple[str, ...]) -> list[Path]:
    """The files, if they are of one format and of one split."""
    formats = sorted({_format(path, suffixes) for path in files})
    if len(formats) > 1:
        raise DataError(
            f"data {name} holds files of several formats ({', '.join(formats)}); name one kind by a pattern, such as"
            f" '*{formats[0]}'"
        )
    splits = {split for path in files if (split := _split_of(path))}
    if len(splits) > 1:
        listed = ", ".join(path.name for path in files[:_NAMED])
        raise DataError(
            f"data {name} holds files of several splits ({', '.join(sorted(splits))}: {listed}); name the one to train"
            " on"
        )
    return files


def _format(path: Path, suffixes: tuple[str, ...]) -> str:
    """The suffix of a data file without that of its packing."""
    name = path.name.lower()
    longest = max((suffix for suffix in suffixes if name.endswith(suffix)), key=len)
    return longest.removesuffix(".gz").removesuffix(".zst")


def _split_of(path: Path) -> str:
    """The split that a file's name says, or ""."""
    match = _SPLIT.search(path.name.lower())
    return _SAME.get(match[1], match[1]) if match else ""
