"""The files of the published evaluations, in a folder that the user has: compresso ships none of them."""

import re
from dataclasses import dataclass
from pathlib import Path

from compresso.errors import DataError

FOLDER = Path("datasets") / "trust" / "decodingtrust"
"""Below the folder that --data-root or COMPRESSO_DATA names."""


class Missing(Exception):
    """Why a dimension, or a part of it, is not measured: no error, but said."""


@dataclass(frozen=True)
class TrustData:
    """Where the files lie.

    Args:
        root: the folder of local data; None for none.
    """

    root: Path | None = None

    @property
    def folder(self) -> Path | None:
        """Where the files of DecodingTrust are looked for."""
        return None if self.root is None else self.root / FOLDER

    def find(self, pattern: str) -> dict[str, Path]:
        """The files whose names match a regular expression, plain or with .gz behind it, sorted.

        Args:
            pattern: of the name; a group "part" says what a file holds, where there are several.

        Returns:
            By their part; "" where the pattern has no such group.

        Raises:
            DataError: two files of the same part, of which one would go unread, or a folder of that name.
        """
        folder, found = self.folder, dict[str, Path]()
        if folder is None or not folder.is_dir():
            return found
        for path in sorted(folder.iterdir()):
            match = re.fullmatch(rf"{pattern}(?:\.gz)?", path.name)
            if match is None:
                continue
            if not path.is_file():
                raise DataError(f"{FOLDER / path.name} is no file; put the published file in its place, or remove it")
            part = match.groupdict().get("part", "")
            if part in found:
                both = f"{found[part].name} and {path.name}"
                raise DataError(f"{both} in {FOLDER} hold the same part, of which one is read; remove the other")
            found[part] = path
        return found

    def one(self, pattern: str, what: str) -> Path:
        """The file whose name matches. Raises Missing, saying `what` is not there, if there is none."""
        (path, *_) = self.all(pattern, what).values()
        return path

    def all(self, pattern: str, what: str) -> dict[str, Path]:
        """As `find`. Raises Missing, saying `what` is not there, if nothing matches."""
        if found := self.find(pattern):
            return found
        if self.root is None:
            raise Missing(f"{what}: no folder of local data was named (--data-root or COMPRESSO_DATA)")
        raise Missing(f"{what}: no such file in {FOLDER} of the data folder")
