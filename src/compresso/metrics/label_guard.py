"""Whether a pruned classifier is worth writing: what is left of the dense model's lead over a guess that always gives
the most frequent label.

Thresholds and why:

    lead kept, pruned over dense
        warn below .9: a BERT that lost 95 % of its layers' parameters and was distilled keeps .94 of it (CoFi, arXiv
            2204.00408, table 2: SST-2 from 93.1 to 90.6, over a guess of 50.9).
        refuse below .5: most of what the dense model knew beyond the guess is lost.
    accuracy
        refuse if it is not two standard errors above the guess: then nothing shows that the texts were read.

    loss, where a task has so many labels
        warn from twice, and refuse from ten times, that of a uniform guess, ln(labels), if it is more than twice the
            dense model's as well: a network may be wrong and sure of it, but not on the mean of all examples by so
            much unless its logits are broken. It needs no lead, and so speaks where the accuracies cannot.

A dense model that is not two standard errors above the guess itself may have nothing to lose, and nothing can be said
of what became of it: the verdict on the lead is "unchecked", as it is without data.
"""

import math

from compresso.errors import NumericError
from compresso.metrics.guard import Check, Guard, Verdict

WARN_LEAD, REFUSE_LEAD = 0.9, 0.5
ERRORS = 2
"""Standard errors by which an accuracy must exceed the guess."""
WARN_LOSS, REFUSE_LOSS = 2.0, 10.0
"""Times that of a uniform guess."""


def judge_labels(
    dense: float | None,
    pruned: float | None,
    guess: float | None,
    n: int | None,
    *,
    what: str = "accuracy",
    guessing: str = "the most frequent label",
    losses: tuple[float | None, float | None] = (None, None),
    labels: int | None = None,
) -> Guard:
    """Decide; None stands for what was not measured.

    Args:
        dense, pruned: accuracies, 0..1, on the same examples.
        guess: that of always giving the most frequent label.
        n: examples.
        what: the accuracies, in words.
        guessing: what the guess gives, in words.
        losses: of dense and pruned on the same examples, nats a label.
        labels: how many there are; None where losses say nothing.

    Raises NumericError: a share outside 0..1.
    """
    beside = [] if labels is None or None in losses else [_of_loss(*losses, math.log(max(labels, 2)))]  # pyright: ignore
    if dense is None or pruned is None or guess is None or not n:
        why = f"the {what} on held-out examples was not measured, for want of data"
        return _guard(_check("lead", "unchecked", None, why))
    for name, share in (("dense", dense), ("pruned", pruned), ("guess", guess)):
        if not 0 <= share <= 1:
            raise NumericError(f"{name}={share}; wanted a share from 0 to 1")
    above = guess + ERRORS * math.sqrt(guess * (1 - guess) / n)
    if dense <= above:
        why = f"the dense model's {what} of {dense:.1%} on {n} held-out examples is "
        if dense <= guess:
            why += f"no better than always giving {guessing} ({guess:.1%}), so it has nothing to lose"
        else:
            why += (
                f"within two standard errors of always giving {guessing} ({guess:.1%}, so up to {above:.1%}), and what"
                " it lost cannot be told"
            )
        return _guard(_check("lead", "unchecked", None, f"{why}; fine-tune it longer, or on more data"), *beside)
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
    return _guard(_check("lead", kept, lead, words), _check("accuracy", level, pruned, told, above), *beside)


def _guard(*checks: Check) -> Guard:
    """The verdict is the worst of the checks."""
    found = {one.verdict for one in checks}
    worst: tuple[Verdict, ...] = ("refuse", "warn", "unchecked", "ok")
    return Guard(verdict=next(one for one in worst if one in found), checks=checks)


def _of_loss(dense: float, pruned: float, uniform: float) -> Check:
    """Whether a loss is one that a network with sound logits has."""
    worse = pruned > 2 * dense
    level: Verdict = "ok"
    if worse and pruned >= WARN_LOSS * uniform:
        level = "refuse" if pruned >= REFUSE_LOSS * uniform else "warn"
    words = (
        f"the loss on held-out examples went from {dense:.4g} to {pruned:.4g} nats, where a uniform guess has"
        f" {uniform:.3g} (warned from {WARN_LOSS * uniform:.3g}, refused from {REFUSE_LOSS * uniform:.3g})"
    )
    return Check(
        name="loss",
        verdict=level,
        value=pruned,
        unit="nats",
        warn_from=WARN_LOSS * uniform,
        refuse_from=REFUSE_LOSS * uniform,
        words=words,
    )


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
