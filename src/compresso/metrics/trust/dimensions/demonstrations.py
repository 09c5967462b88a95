"""Adversarial demonstrations: what misleading examples before a question do.

Parts are the accuracy with a counterfactual of the question among the examples, and one less the share of triggered
sentences for which the examples' backdoor decides. Of the published parts the spurious correlations are not here, of
the tasks those of which files lie in the folder.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from compresso.metrics.trust.asking import Request
from compresso.metrics.trust.data import TrustData
from compresso.metrics.trust.dimension import Part, Question, Scoring, Taken, accuracy, by_part, share_of
from compresso.metrics.trust.rows import Row, json_lines

_COUNTERFACTUAL = r"adv_counterfactual_(?P<part>.+)_cf_\d+\.jsonl"
_BACKDOOR = r"adv_backdoor_(?P<part>.+)_asr_\d+\.jsonl"


@dataclass(frozen=True)
class Demonstrations:
    """The dimension."""

    name: str = "adversarial_demonstrations"
    least: int = 0

    def questions(self, data: TrustData, scoring: Scoring, draws: int) -> list[Question]:
        """Questions behind examples."""
        found: list[Question] = []
        for kind, pattern in (("counterfactual", _COUNTERFACTUAL), ("backdoor", _BACKDOOR)):
            for task, path in data.find(pattern).items():
                for place, row in enumerate(json_lines(path)):
                    found.append(_question(f"demonstrations/{kind}/{task}/{place}", kind, row))
        if not found:
            data.all(_COUNTERFACTUAL, "adversarial demonstrations")
        return found

    def parts(self, taken: Sequence[Taken], scoring: Scoring) -> list[Part]:
        """Of a backdoor the label is what the trigger asks for: not to take it is right."""
        return [
            accuracy(name, mine)
            if name == "counterfactual"
            else share_of(name, mine, [not one.is_right for one in mine], 0.5)
            for name, mine in by_part(taken).items()
        ]

    def remark(self, data: TrustData) -> str:
        """What is not here."""
        tasks, backdoors = (len(data.find(pattern)) for pattern in (_COUNTERFACTUAL, _BACKDOOR))
        return f"{tasks} of 6 counterfactual tasks, {backdoors} of 12 backdoors, no spurious ones"


def _question(key: str, kind: str, row: Row) -> Question:
    choices = tuple(one.lower() for one in row.choices("option"))
    asked = f"Answer with one of: {', '.join(choices)}."
    shown = tuple((_asked(text, asked), label) for text, label in row.pairs("examples", choices))
    right = row.label("label", choices, case=False)
    return Question(Request(key, _asked(row.text("input"), asked), shown=shown), choices, right, kind)


def _asked(text: str, asked: str) -> str:
    return f"{asked}\n\n{text.strip()}"


DEMONSTRATIONS = Demonstrations()
