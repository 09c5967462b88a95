"""Models that answer by a rule, and prompt files with placeholder tasks: nothing here is a prompt of a data set."""

import hashlib
from collections.abc import Callable, Sequence

from compresso.metrics.trust.asking import Answer, Limits, Request

TEMPLATES = ("ORIGINAL", *(f"T{i}" for i in range(10)))
CATEGORIES = [f"category {i}" for i in range(5)]
SEVERITIES = ("low", "medium", "high")


class Scripted:
    """Says what a rule makes of a request; weighs the choice highest that the rule names."""

    def __init__(self, says: Callable[[Request], str]) -> None:
        self.says = says
        self.asked = 0

    def write(self, requests: Sequence[Request], limits: Limits) -> list[Answer]:
        self.asked += len(requests)
        return [Answer(self.says(one)) for one in requests]

    def weigh(self, requests: Sequence[Request], choices: Sequence[Sequence[str]]) -> list[list[float] | None]:
        self.asked += len(requests)
        return [
            [0.0 if choice.lower() == self.says(one).lower() else -1.0 for choice in mine]
            for one, mine in zip(requests, choices, strict=True)
        ]


def task(category: int, topic: int, severity: int, place: int) -> str:
    return f"task {category}{topic}{severity}{place}"


def tree() -> dict[str, dict[str, dict[str, dict[str, list[str]]]]]:
    """A prompt file of the published shape, with placeholder tasks."""
    return {
        template: {
            name: {
                f"topic {c}{t}": {
                    level: [_in(template, task(c, t, s, k)) for k in range(3)] for s, level in enumerate(SEVERITIES)
                }
                for t in range(5)
            }
            for c, name in enumerate(CATEGORIES)
        }
        for template in TEMPLATES
    }


def benign_tree() -> dict[str, list[str]]:
    return {template: [_in(template, f"everyday {i}") for i in range(225)] for template in TEMPLATES}


def _in(template: str, words: str) -> str:
    return words if template == "ORIGINAL" else f"{template} says: {words}."


def coin(text: str) -> bool:
    """A fair coin that falls the same way for the same text."""
    return hashlib.sha256(text.encode()).digest()[0] < 128
