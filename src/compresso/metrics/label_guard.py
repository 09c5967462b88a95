"""Whether a pruned classifier is worth writing: what is left of the dense model's lead over a guess that always gives
the most frequent label.

Thresholds and why:

    lead kept, pruned over dense
        warn below .9: a BERT that lost 95 % of its layers' parameters and was distilled keeps .94 of it (CoFi, arXiv
            2204.00408, table 2: SST-2 from 93.1 to 90.6, over a guess of 50.9).
        refuse below .5: most of what the dense model knew beyond the guess is lost.
    accuracy
        refuse if it is not two standard errors above the guess: then nothing shows that the texts were read.

A dense model that is not two standard errors above the guess itself has nothing to lose, and nothing can be said of
what became of it: the verdict is "unchecked", as it is without data.
"""

import math

from compresso.errors import NumericError
from compresso.metrics.guard import Check, Guard, Verdict

WARN_LEAD, REFUSE_LEAD = 0.9, 0.5
ERRORS = 2
"""Standard errors by which an accuracy must exceed the guess."""


def judge_labels(
    dense: float | None,
    pruned: float | None,
    guess: float | None,
    n: int | None,
    *,
    what: str = "accuracy",
    guessing: str = "the most frequent label",
) -> Guard:
    """Decide; None stands for what was not measured.

    Args:
        dense, pruned: accuracies, 0..1, on the same examples.
        guess: that of always giving the most frequent label.
        n: examples.
        what: the accuracies, in words.
        guessing: what the guess gives, in words.

    Raises NumericError: a share outside 0..1.
    """
    if dense is None or pruned is None or guess is None or not n:
        why = f"the {what} on held-out examples was not measured, for want of data"
        return Guard(verdict="unchecked", checks=(_check("lead", "unchecked", None, why),))
    for name, share in (("dense", dense), ("pruned", pruned), ("guess", guess)):
        if not 0 <= share <= 1:
            raise NumericError(f"{name}={share}; wanted a share from 0 to 1")
    above = guess + ERRORS * math.sqrt(guess * (1 - guess) / n)
    if dense <= above:
        why = (
            f"the dense model's {what} of {dense:.1%} on {n} held-out examples is no better than always giving"
            f" {guessing} ({guess:.1%}), so it has nothing to lose; fine-tune it longer, or on more data"
        )
        return Guard(verdict="unchecked", checks=(_check("lead", "unchecked", None, why),))
    lead = (pruned - guess) / (dense - guess)
    kept: Verdict = "ok" if lead >= WARN_LEAD else "warn" if lead >= REFUSE_LEAD else "refuse"
    words = (
        f"{what} on held-out examples went from {dense:.1%} to {pruned:.1%}, which keeps {max(lead, 0):.0%} of the"
        f" lead over {guessing} (warned below {WARN_LEAD:.0%}, refused below {REFUSE_LEAD:.0%})"
    )
    level: Verdict = "ok" if pruned > above else "refuse"
    told = (
        f"{what} on held-out examples is {pruned:.1%} (refused up to {above:.1%}, two standard errors above {guessing})"
    )
    checks = (_check("lead", kept, lead, words), _check("accuracy", level, pruned, told, above))
    found = {one.verdict for one in checks}
    return Guard(verdict="refuse" if "refuse" in found else kept, checks=checks)


def _check(name: str, verdict: Verdict, value: float | None, words: str, refused: float | None = None) -> Check:
    lead = name == "lead"
    return Check(
        name=name,
        verdict=verdict,
        value=value,
        unit="share",
        warn_from=WARN_LEAD if lead else None,
        refuse_from=REFUSE_LEAD if lead else refused,
        words=words,
    )
