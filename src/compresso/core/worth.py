"""What units are worth to a model, from the scores of its masked sub-models, and how far that can be believed."""

from functools import partial
from typing import Literal

from torch import Tensor

from compresso.core.l1_regression import l1_regression
from compresso.core.regression import Fit, Linear, cross_validated_tau, ridge

Regression = Literal["ridge", "published"]


def worths(regression: Regression, x: Tensor, y: Tensor, seed: int) -> tuple[Linear, float]:
    """A linear model of sub-models' scores, and the Kendall tau between scores and what fits without them predict.

    Args:
        regression: "ridge", in closed form, or "published", Bonsai's (arXiv 2402.05406).
        x: [masks, columns], bool, 1 for on; every mask is followed by its complement.
        y: [masks]; higher for better sub-models, so that a coefficient is what a unit is worth.
        seed: of the published one.

    Raises ValueError for fewer than ten masks, and as the regressions do.
    """
    fit: Fit = partial(ridge, together=2)
    if regression == "published":
        fit = partial(l1_regression, seed=seed, together=2)
    return fit(x, y), cross_validated_tau(fit, x, y, together=2)
