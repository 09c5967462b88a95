"""Plain values of files and recipes: which of them are whole numbers, and how a message shows one so that its type is
seen.
"""


def whole_number(value: object) -> int | None:
    """The whole number that a value is; None for anything else, true and false among it.

    >>> whole_number(34), whole_number(34.0), whole_number(34.5), whole_number("34"), whole_number(True)
    (34, 34, None, None, None)
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return int(value) if isinstance(value, int) or value.is_integer() else None


def shown(value: object, most: int = 40) -> str:
    """A value as a message shows it, no more than `most` characters of it: strings alone in quotes, and true, false and
    null as JSON writes them.

    >>> shown("False"), shown(False), shown(2.5), shown(None)
    ("'False'", 'false', '2.5', 'null')
    >>> shown("a" * 60, 12)
    "'aaaaaaaa..."
    """
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = repr(value[: most + 1] if isinstance(value, str) else value)
    return text if len(text) <= most else text[: most - 3] + "..."
