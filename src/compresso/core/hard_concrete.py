"""Gates that are exactly 0 or 1 with positive probability, yet have a gradient: the hard-concrete distribution.

Louizos, Welling and Kingma, "Learning sparse neural networks through L0 regularization" (arXiv 1712.01312), with the
constants and the evaluation rule of CoFi (arXiv 2204.00408), which Compresso (arXiv 2310.05015) keeps. One parameter a
gate, `log_alpha`; high means open.

Unusual: the temperature divides the logit when a gate is drawn, and multiplies a constant in the probability that it is
open; both are right. Ranking and rounding for evaluation run in float64 on the CPU, so that every device removes the
same units.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional

from compresso.core.axis import Kind

TEMPERATURE = 2 / 3
STRETCH_LOW = -0.1
STRETCH_HIGH = 1.1
EPSILON = 1e-6
"""Distance that noise and probabilities keep from 0 and 1."""
MAGIC = 0.8
"""Factor on log_alpha in the value a surviving gate has at evaluation."""
LOG_ALPHA_LOW = math.log(0.01)
LOG_ALPHA_HIGH = math.log(100)
INITIAL_SPREAD = 0.01
"""Standard deviation of a fresh log_alpha."""
OPEN = 10.0
"""Mean of a fresh log_alpha for everything but FFN channels; the first clamp brings it to ln 100."""

_THRESHOLD = TEMPERATURE * math.log(
    -STRETCH_LOW / STRETCH_HIGH
)  # a gate is open where log_alpha + logit(u) exceeds this: -1.598597


def keep_probability(log_alpha: Tensor) -> Tensor:
    """Probability that a gate is above zero, in log_alpha's shape and dtype (float32 or float64), within [1e-6, 1 -
    1e-6].

    Raises:
        TypeError: narrower dtypes, in which sums over thousands of gates lose whole units.

    >>> keep_probability(torch.tensor([0.0], dtype=torch.float64))
    tensor([0.8318], dtype=torch.float64)
    """
    _require_wide(log_alpha)
    return torch.sigmoid(log_alpha - _THRESHOLD).clamp(EPSILON, 1 - EPSILON)


def sample(log_alpha: Tensor, u: Tensor) -> Tensor:
    """Gate values in [0, 1] for uniform noise u; log_alpha [n] with u [n] or [batch, n] gives u's shape.

    The gradient is zero where a value saturates at 0 or 1.

    >>> sample(torch.zeros(3), torch.tensor([[0.1, 0.5, 0.9]]))
    tensor([[0.0000, 0.5000, 1.0000]])
    """
    _require_wide(log_alpha)
    s = torch.sigmoid((torch.log(u) - torch.log1p(-u) + log_alpha) / TEMPERATURE)
    return functional.hardtanh(s * (STRETCH_HIGH - STRETCH_LOW) + STRETCH_LOW, 0.0, 1.0)


def soft_value(log_alpha: Tensor) -> Tensor:
    """The value in (0, 1) that a surviving gate has at evaluation: sigmoid(0.8 log_alpha / temperature)."""
    return torch.sigmoid(log_alpha * (MAGIC / TEMPERATURE))


def expected_kept(log_alpha: Tensor) -> int:
    """How many gates of one axis [n] the deterministic rule keeps."""
    n = len(log_alpha)
    return n - round(n - keep_probability(_exact(log_alpha)).sum().item())


def removal_order(scores: Tensor) -> Tensor:
    """Unit indices [n] on the CPU, the first to go first: ascending score, equal scores by ascending index."""
    return torch.sort(_exact(scores), stable=True).indices


def clamp_(log_alpha: Tensor) -> Tensor:
    """Bring log_alpha back to [ln 0.01, ln 100] in place, outside of autograd; done after every update."""
    with torch.no_grad():
        return log_alpha.clamp_(LOG_ALPHA_LOW, LOG_ALPHA_HIGH)


def initial_log_alpha(
    kind: Kind,
    size: int,
    generator: torch.Generator,
    *,
    droprate: float = 0.01,
    mean: float | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Fresh log_alpha [size] on the generator's device: Normal(mean, 0.01).

    Args:
        kind: decides the mean: ln((1 - droprate) / droprate) for FFN channels, 10 for all others.
        droprate: initial removal rate that FFN channels start from, in (0, 1).
        mean: overrides the mean of the kind (LLM-Shearing starts every gate at 5).

    Raises:
        ValueError: `droprate` is outside (0, 1).
    """
    if not 0 < droprate < 1:
        raise ValueError(f"droprate={droprate} has no finite log_alpha; give a rate between 0 and 1, such as 0.01")
    if mean is None:
        mean = math.log((1 - droprate) / droprate) if kind == Kind.CHANNEL else OPEN
    return torch.empty(size, dtype=dtype, device=generator.device).normal_(mean, INITIAL_SPREAD, generator=generator)


def _exact(values: Tensor) -> Tensor:
    """The same numbers in float64 on the CPU, without gradient."""
    return values.detach().to(device="cpu", dtype=torch.float64)


def _require_wide(log_alpha: Tensor) -> None:
    if log_alpha.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"gates need float32 or float64, got {log_alpha.dtype}; keep log_alpha out of the model's reduced precision"
        )
