"""Where the links in a model folder may lead: a folder from elsewhere must not make us read, or copy, a file of ours.

A link is followed to its end before it is judged. It may end in the folder itself; in the hub's cache in the
repository's own blobs, wherever that folder lies; and in the folders that the environment variable COMPRESSO_LINKS
names, as only the owner of a disk can say that links to it are his own.
"""

import os
from collections.abc import Iterator
from pathlib import Path

from compresso.errors import CheckpointError, quoted

ALLOWED = "COMPRESSO_LINKS"
"""Environment variable with the folders that links may lead into, separated as in PATH."""
_READ = (
    ".json",
    ".safetensors",
    ".gguf",
    ".jinja",
    ".model",
    ".txt",
    ".tiktoken",
    ".spm",
    ".bpe",
    ".codes",
    ".md",
)  # what transformers may open in a model folder, or a result carries over
_CARRIED = ("LICENSE", "LICENCE", "NOTICE", "COPYING")
_TEMPLATES = "additional_chat_templates"


def check_links(folder: Path) -> None:
    """Raise CheckpointError, naming link and target, if a file that may be read is a link that leads elsewhere or
    nowhere.
    """
    for path in _read(folder):
        if not path.is_symlink():
            continue
        try:
            target = path.resolve(strict=True)
        except FileNotFoundError as error:
            raise CheckpointError(
                f"{path} is a link to {path.readlink()}, and nothing lies there. Fetch the model again."
            ) from error
        except (OSError, RuntimeError) as error:  # Python raises the one or the other, by version
            raise CheckpointError(f"{path} is a link that leads to no file: {_line(error)}. Copy the file.") from error
        if not is_own(target, folder):
            raise CheckpointError(
                f"{path} leads out of the model folder, to {target}. Copy the file into it; or, if links to"
                f" {target.parent} are your own, set {ALLOWED}={target.parent}."
            )


def is_own(target: Path, folder: Path) -> bool:
    """Whether a resolved path is a file of the model in `folder`."""
    named = [Path(one).expanduser().resolve() for one in os.environ.get(ALLOWED, "").split(os.pathsep) if one]
    return any(target.is_relative_to(root) for root in (folder.resolve(), *named)) or target.parent in _blobs(folder)


def _blobs(folder: Path) -> set[Path]:
    """Where the hub's cache keeps the files of this snapshot; empty if it is none. A link may stand at each step."""
    steps = (folder.absolute(), folder.resolve())
    return {(one.parent.parent / "blobs").resolve() for one in steps if one.parent.name == "snapshots"}


def _read(folder: Path) -> Iterator[Path]:
    """What may be read of a folder."""
    for path in sorted(folder.iterdir()):
        if path.name.endswith(_READ) or path.name.upper().startswith(_CARRIED) or path.name == _TEMPLATES:
            yield path
        if path.name == _TEMPLATES and path.is_dir():
            yield from sorted(path.iterdir())


def _line(error: Exception) -> str:
    said = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return quoted(said, 200)
