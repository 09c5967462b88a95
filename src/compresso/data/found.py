"""What is found in a file before it is a record."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Found:
    """One object of a file: where it begins, and the object, or why there is none; columns of it that were not read."""

    place: str
    value: object = None
    wrong: str = ""
    unread: tuple[str, ...] = ()
