"""How many there are, in words that fit one of them too."""

from collections.abc import Mapping


def counted(n: int, noun: str, verb: str = "") -> str:
    """A number with what it counts, and the verb that goes with it.

    Args:
        n: how many.
        noun: of one; several take an s.
        verb: "is", "was" or "" for none; of one, too.

    >>> counted(1, "example", "is"), counted(2_000, "example", "is"), counted(0, "bad line")
    ('1 example is', '2,000 examples are', '0 bad lines')
    """
    one = n == 1
    spoken = {"is": "are", "was": "were"}.get(verb, verb) if not one else verb
    return f"{n:,} {noun}{'' if one else 's'}{' ' if verb else ''}{spoken}"


def survivors(examples: Mapping[str, int]) -> int:
    """Records that gave an example, of counts as `data.survival.Stats` names them; older records do not know all of
    them.
    """
    empty = examples.get("empty", 0) - examples.get("blank", 0)
    return examples.get("n", 0) - examples.get("dropped", 0) - empty - examples.get("refused", 0)
