"""How close a given answer is to those that people gave: exact match and F1 of words (SQuAD, arXiv 1606.05250, section
6.1), without case, punctuation, articles and spaces more than one.
"""

import re
import string
from collections import Counter
from collections.abc import Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def plain(answer: str) -> str:
    """An answer as it is compared.

    >>> plain("The  Panthers' defense, (2015)")
    'panthers defense 2015'
    """
    return " ".join(_ARTICLES.sub(" ", answer.lower().translate(_PUNCTUATION)).split())


def exact_match(given: str, answers: Sequence[str]) -> bool:
    """Whether an answer is one of several.

    >>> exact_match("the Rhine.", ["Rhine", "river Rhine"])
    True
    """
    return any(plain(given) == plain(one) for one in answers)


def answer_f1(given: str, answers: Sequence[str]) -> float:
    """The F1 of the words of an answer, against the nearest of several; 0 of none.

    >>> answer_f1("the river Rhine", ["Rhine"]), answer_f1("Elbe", ["Rhine", "Elbe"])
    (0.6666666666666666, 1.0)
    """
    return max((_f1(plain(given).split(), plain(one).split()) for one in answers), default=0.0)


def _f1(given: Sequence[str], wanted: Sequence[str]) -> float:
    if not given or not wanted:
        return float(given == wanted)
    shared = sum((Counter(given) & Counter(wanted)).values())
    return 2 * shared / (len(given) + len(wanted))
