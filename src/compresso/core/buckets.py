"""What is kept of a distribution over a large vocabulary: its k largest log-probabilities, and one bucket for the rest.

    bucketed P = (P(i_1), ..., P(i_k), 1 - sum)       i_1 ... i_k: the teacher's k most probable outcomes

Both models are compared on these k + 1 buckets. No divergence grows when outcomes are merged (the data-processing
inequality), so what is found is a lower bound of the divergence over all outcomes; forward, it lacks exactly

    KL(P || Q) - KL(bucketed P || bucketed Q) = P(rest) KL(P given the rest || Q given the rest)

and with as many buckets as outcomes nothing. The student is pushed towards the teacher's probability of each of the k
outcomes and of all others together, and is free in how it shares the rest out.

A temperature divides the logits before they are merged, so what was kept serves one temperature.
"""

import torch
from torch import Tensor

from compresso.core.distillation import Divergence, between
from compresso.core.squarehead import wide


def strongest(logits: Tensor, n: int, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """The `n` most probable outcomes of each row, and the log-probabilities of the buckets.

    Args:
        logits: finite [rows, outcomes].
        n: at least 1; more than there are outcomes are all of them.
        temperature: logits are divided by it.

    Returns:
        Outcomes [rows, k] int64, most probable first, and float32 or wider [rows, k + 1], the last of the rest; [rows,
        k] where nothing is left over.

    Raises:
        ValueError: `n` below 1.
    """
    if n < 1:
        raise ValueError(f"{n} outcomes of each row are to be kept; give 1 or more")
    outcomes = logits.topk(min(n, logits.shape[-1]), dim=-1).indices
    return outcomes, bucketed(logits, outcomes, temperature)


def bucketed(logits: Tensor, outcomes: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probabilities of some outcomes of each row, and of the rest together.

    Args:
        logits: finite [rows, outcomes].
        outcomes: different ones of each row [rows, k], int64.
        temperature: logits are divided by it.

    Returns:
        [rows, k + 1] in float32 or wider, [rows, k] where `outcomes` are all there are.

    Raises:
        ValueError: a temperature not above 0.
    """
    if not temperature > 0:
        raise ValueError(f"temperature={temperature} divides the logits; give a number above 0")
    scaled = wide(logits).div(temperature)
    whole = scaled.logsumexp(-1, keepdim=True)
    named = scaled.gather(-1, outcomes) - whole
    if outcomes.shape[-1] == logits.shape[-1]:
        return named
    # not log(1 - sum): that loses a small rest, and its gradient with it, in rounding
    rest = scaled.scatter(-1, outcomes, -torch.inf).logsumexp(-1, keepdim=True) - whole
    return torch.cat([named, rest], dim=-1)


def merged(log_probs: Tensor, n: int) -> Tensor:
    """What `strongest` would have given of whole distributions.

    Args:
        log_probs: [rows, outcomes], the most probable first.
        n: how many stay by themselves.

    Returns:
        [rows, n + 1], the last of the rest; all of them where nothing is left over.
    """
    if n >= log_probs.shape[-1]:
        return log_probs
    return torch.cat([log_probs[:, :n], log_probs[:, n:].logsumexp(-1, keepdim=True)], dim=-1)


def bucket_divergences(
    student: Tensor, outcomes: Tensor, teacher: Tensor, kind: Divergence, temperature: float = 1.0, beta: float = 0.5
) -> Tensor:
    """The divergence of each row's buckets in nats times temperature^2 [rows], float32 or wider.

    Args:
        student: finite logits [rows, outcomes].
        outcomes, teacher: as `strongest` gave them, at this temperature.
        kind, temperature, beta: as in `core.distillation.divergences`.

    Raises:
        ValueError: shapes that do not belong together, and as `divergences`.
    """
    all_of_them = outcomes.shape[-1] == student.shape[-1]
    wanted = (student.shape[0], outcomes.shape[-1] + (0 if all_of_them else 1))
    if outcomes.shape[0] != student.shape[0] or tuple(teacher.shape) != wanted:
        raise ValueError(
            f"{list(teacher.shape)} buckets of {list(outcomes.shape)} outcomes do not belong to logits"
            f" {list(student.shape)}; wanted {list(wanted)}"
        )
    return between(bucketed(student, outcomes, temperature), wide(teacher), kind, beta) * temperature**2
