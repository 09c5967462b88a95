"""Whether a pruned model is worth writing: a few numbers against thresholds, decided before the checkpoint takes its
name.

Thresholds and why:

    perplexity on held text, pruned over dense warn from 1.5: published models that lost a fifth of their parameters and
        were tuned lie at 1.3 to 1.75 times the dense
            perplexity, those that were pruned without a look at the data far above (LLM-Pruner, arXiv 2305.11627,
            WikiText-2: 12.62 to 17.58 tuned, 19.09 to 74.63 untuned).
        refuse from 5: models cut in half and tuned lie at 3 to 3.6 times (38.12 to 45.70), the same untuned at 8 to 11
            (106 to 141). Of those that lost a fifth, whole channels untuned lie at 5.9 and magnitude at 46 (582), with
            45 and 43 % on seven multiple-choice tasks where the dense model has 63 and guessing 36.
    loss on held text
        refuse from ln(vocabulary): a guess that takes all tokens as equally likely does as well.
    share of greedy continuations that are broken, over that of the dense model
        warn from .25 more, if the 95 % interval of the rise (Newcombe's, of two Wilson intervals; Statistics in
        Medicine 17, 1998, method 10) excludes none. Texts alone never refuse: greedy continuations loop long before a
        model is useless, and a few dozen of them bound a share by a fifth either way.

A dense model whose own loss is within half a nat of that guess has nothing to lose, and nothing can be said of what
became of it: the verdict is "unchecked", as it is without data.
"""

import math
from typing import Literal

import torch
from pydantic import FiniteFloat
from scipy.stats import binomtest
from transformers import PreTrainedModel

from compresso.errors import DataError, NumericError
from compresso.metrics.record import Strict

WARN_GROWTH = 1.5
REFUSE_GROWTH = 5.0
LEAST_KNOWLEDGE = 0.5
"""Nats by which a dense model must beat a uniform guess to be judged by its loss."""
ROUNDING = 1e-3
"""Nats by which sums of a uniform guess may come out below its loss."""
WARN_RISE = 0.25
CONFIDENCE = 0.95

Verdict = Literal["ok", "warn", "refuse", "unchecked"]


class Check(Strict):
    """One number and what it means.

    Args:
        name: "perplexity_growth", "loss", "degenerate".
        verdict: "unchecked" if nothing was measured, or it cannot be judged.
        value: what was compared; None if there is nothing to compare.
        unit: of value and thresholds.
        warn_from, refuse_from: thresholds; None where there is no such verdict.
        words: the check in a sentence, with number and threshold, or the reason why it was not made.
    """

    name: str
    verdict: Verdict
    value: FiniteFloat | None
    unit: str
    warn_from: FiniteFloat | None
    refuse_from: FiniteFloat | None
    words: str


class Guard(Strict):
    """The verdict on a pruned model and the checks behind it.

    Args:
        verdict: "refuse" if a check refuses, else "warn" if one warns, else "unchecked" if the loss was not checked (a
            text that is not broken proves little), else "ok".
        checks: all of them, made or not.
    """

    verdict: Verdict
    checks: tuple[Check, ...]

    def message(self) -> str:
        """One line: what was found, with numbers and thresholds, and for a refusal the cure."""
        telling = [one.words for one in self.checks if one.verdict == self.verdict] if self.verdict != "ok" else []
        words = "; ".join(dict.fromkeys(telling or [one.words for one in self.checks]))
        match self.verdict:
            case "refuse":
                return (
                    f"The result has collapsed: {words}. Keep more, recover longer or with other data, or pass"
                    " --allow-collapsed."
                )
            case "warn":
                return f"The result has lost much: {words}."
            case "unchecked":
                return f"Whether the result still works is not known: {words}."
            case _:
                return f"The result passes: {words}."


def judge(
    *,
    vocabulary: int,
    dense_loss: float | None,
    pruned_loss: float | None,
    dense_degenerate: float | None = None,
    pruned_degenerate: float | None = None,
    texts: int = 0,
) -> Guard:
    """Decide; None stands for what was not measured.

    Args:
        vocabulary: tokens that a uniform guess chooses from.
        dense_loss, pruned_loss: nats a token on the same held text.
        dense_degenerate, pruned_degenerate: share of broken texts, 0..1, on the same prompts.
        texts: how many prompts there were.

    Raises:
        DataError: a share outside 0..1, or no vocabulary.
        NumericError: a loss that is not finite.
    """
    if vocabulary < 2:
        raise DataError(f"vocabulary={vocabulary}; wanted at least 2")
    for name, loss in (("dense_loss", dense_loss), ("pruned_loss", pruned_loss)):
        if loss is not None and not math.isfinite(loss):
            raise NumericError(f"{name}={loss}; the model overflows on the held text, use float32 or bfloat16")
    for name, rate in (("dense_degenerate", dense_degenerate), ("pruned_degenerate", pruned_degenerate)):
        if rate is not None and not 0 <= rate <= 1:
            raise DataError(f"{name}={rate}; wanted a share from 0 to 1")
    guess = math.log(vocabulary)
    why = _nothing_to_lose(dense_loss, guess)
    loss = _growth(dense_loss, pruned_loss, why)
    broken = _degenerate(dense_degenerate, pruned_degenerate, texts, why)
    checks = (loss, _level(dense_loss, pruned_loss, guess, why), broken)
    found = {one.verdict for one in checks}
    return Guard(verdict="refuse" if "refuse" in found else "warn" if "warn" in found else loss.verdict, checks=checks)


def _nothing_to_lose(dense: float | None, guess: float) -> str:
    """Why a dense model of this loss cannot be damaged; "" if it can, or if its loss is not known."""
    if dense is None or dense <= guess - LEAST_KNOWLEDGE:
        return ""
    known = f"is not {LEAST_KNOWLEDGE} nats below a uniform guess ({guess:.3f})"
    return f"the dense model's loss {dense:.3f} {known}, so it has nothing to lose"


def _growth(dense: float | None, pruned: float | None, why: str) -> Check:
    """The check of perplexity against dense; not made for the reason `why`."""
    verdict: Verdict = "unchecked"
    growth = None if dense is None or pruned is None else math.exp(min(pruned - dense, 700.0))
    if growth is None:
        why = "the loss on held text was not measured, for want of data or a tokenizer"
    elif not why:
        verdict = "refuse" if growth >= REFUSE_GROWTH else "warn" if growth >= WARN_GROWTH else "ok"
        why = (
            f"perplexity on held text is {growth:.3g} times the dense one (warned from {WARN_GROWTH:g}, refused from"
            f" {REFUSE_GROWTH:g})"
        )
    return Check(
        name="perplexity_growth",
        verdict=verdict,
        value=growth,
        unit="1",
        warn_from=WARN_GROWTH,
        refuse_from=REFUSE_GROWTH,
        words=why,
    )


def _level(dense: float | None, pruned: float | None, guess: float, why: str) -> Check:
    """The check of the loss itself; not made for the reason `why`."""
    verdict: Verdict = "unchecked"
    if dense is None or pruned is None:
        why = "the loss on held text was not measured, for want of data or a tokenizer"
    elif not why:
        verdict = "refuse" if pruned >= guess - ROUNDING else "ok"
        why = f"loss on held text is {pruned:.3f} nats a token (refused from {guess:.3f}, a uniform guess)"
    return Check(
        name="loss", verdict=verdict, value=pruned, unit="nats/token", warn_from=None, refuse_from=guess, words=why
    )


def _degenerate(dense: float | None, pruned: float | None, texts: int, why: str) -> Check:
    """The check of how many more texts are broken; not made for the reason `why`."""
    verdict: Verdict = "unchecked"
    rise = None if dense is None or pruned is None else pruned - dense
    if dense is None or pruned is None or rise is None or not texts:
        why = "no text was generated, for want of a tokenizer or prompts"
    elif not why:
        low, high = rise_interval(dense, pruned, texts)
        verdict = "warn" if rise >= WARN_RISE and low > 0 else "ok"
        why = (
            f"broken texts went from {dense:.0%} to {pruned:.0%} of {texts}, {100 * rise:+.0f} points (95 % interval"
            f" {100 * low:+.0f} to {100 * high:+.0f}; warned from {100 * WARN_RISE:+g})"
        )
    return Check(
        name="degenerate", verdict=verdict, value=rise, unit="share", warn_from=WARN_RISE, refuse_from=None, words=why
    )


def rise_interval(before: float, after: float, n: int) -> tuple[float, float]:
    """The 95 % interval of the rise of a share, by Newcombe's method 10.

    Args:
        before, after: shares of `n` trials each, 0..1; the pairing of the trials is not used, which widens it.

    >>> [round(bound, 3) for bound in rise_interval(56 / 70, 48 / 70, 70)]
    [-0.253, 0.031]
    """
    low_b, high_b = wilson(before, n)
    low_a, high_a = wilson(after, n)
    rise = after - before
    return (
        rise - math.hypot(after - low_a, high_b - before),
        rise + math.hypot(high_a - after, before - low_b),
    )


def wilson(share: float, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share of n trials."""
    found = binomtest(round(share * n), n).proportion_ci(CONFIDENCE, method="wilson")
    return float(found.low), float(found.high)


def check_finite(model: PreTrainedModel, stage: str) -> None:
    """Refuse a model with NaN or Inf in a weight. Raises NumericError naming the stage and the tensor."""
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise NumericError(
                f"stage '{stage}' left NaN or Inf in {name}; nothing was written. Lower its learning rate"
            )
