"""Texts that are kept or passed on, without the folders of the machine that they were written on.

Messages of engines and libraries name files in full, and so the home folder, its owner, and temporary folders. In
records, cards and reports a file goes by its last part; what is temporary is called that.
"""

import getpass
import os
import platform
import re
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

_PART = r"[^\s/\\:;,'\"`()<>|]+"
_PATH = re.compile(rf"(?<![\w:/.~<\\])/(?:{_PART}/)+(?:{_PART})?|\b[A-Za-z]:\\(?:{_PART}\\)*(?:{_PART})?")
_BEING_WRITTEN = re.compile(r"\.(\S+?)\.[A-Za-z0-9]{1,24}\.\d+\.(?:partial|tmp)\b")
_TEMPORARY = "a temporary file"
_TEXTS = frozenset({"samples", "segmented", "sha256", "fingerprint"})
"""Fields that hold no message: what a model wrote is a measurement, and a picture in base64 is full of slashes."""


def without_places(text: str) -> str:
    """A message with each absolute path as its last part.

    >>> without_places("/home/somebody/models/small/config.json is damaged")
    'config.json is damaged'
    """
    if "/" not in text and "\\" not in text:  # most texts of a record, and no path
        return _BEING_WRITTEN.sub(r"\1", text)
    for folder, name in _known():
        inside = re.compile(rf"(?<![\w:/.~]){re.escape(folder)}(?:((?:[/\\]{_PART})+)|(?![\w-]))")
        text = inside.sub(lambda found, name=name: name if name == _TEMPORARY else _last(found[1] or "", name), text)
    return _BEING_WRITTEN.sub(r"\1", _PATH.sub(lambda found: _last(found[0], "a folder"), text))


def without_places_in(record: Mapping[str, object]) -> dict[str, object]:
    """A record with each of its messages so; texts that were measured, and hashes, stay as they are."""
    return {key: value if key in _TEXTS else _cleaned(value) for key, value in record.items()}


def _cleaned(value: object) -> object:
    match value:
        case str():
            return without_places(value)
        case Mapping():
            return without_places_in(value)
        case list() | tuple():
            return [_cleaned(one) for one in value]
        case _:
            return value


def _known() -> list[tuple[str, str]]:
    """Folders that may hold any character, and what stands for each; the longest first, as one may lie in another."""
    named = [
        (tempfile.gettempdir(), _TEMPORARY),
        (sys.prefix, "the Python environment"),
        (sys.base_prefix, "the Python environment"),
        (str(Path(__file__).parents[2]), "the Python environment"),
        *((os.environ[name], "the home folder") for name in ("HOME", "USERPROFILE", "HF_HOME") if os.environ.get(name)),
        *((os.environ[name], name) for name in ("COMPRESSO_DATA",) if os.environ.get(name)),
        (str(Path.cwd()), "the working folder"),
    ]
    folders: dict[str, str] = {}
    for folder, name in named:
        for one in (folder.rstrip("/\\"), str(Path(folder).resolve())):
            if len(Path(one).parts) > 1:
                folders.setdefault(one, name)
    return sorted(folders.items(), key=lambda one: -len(one[0]))


def _last(path: str, otherwise: str) -> str:
    """A path's last part, unless that tells who or where this is."""
    last = re.split(r"[/\\]", path.rstrip("/\\"))[-1]
    return otherwise if last in {"", _user(), platform.node()} else last


def _user() -> str:
    """The user's name; "" where the system knows none."""
    try:
        return getpass.getuser()
    except (OSError, KeyError, ImportError):  # by the version of Python
        return ""
