"""What a smaller model learns from a larger one: divergences between next-token distributions, and distances between
hidden states.

    forward   KL(teacher || student)                                  Hinton et al., arXiv 1503.02531; Minitron, arXiv
              2407.14679
    reverse   KL(student || teacher)                                  MiniLLM, arXiv 2306.08543
    js        b KL(teacher || M) + (1 - b) KL(student || M),          generalised Jensen-Shannon; GKD, arXiv 2306.13649,
              equation 1
              M = b teacher + (1 - b) student
    mse       mean over outcomes of (logits - teacher's logits)^2     Ba and Caruana, arXiv 1312.6184; segmenters of
              arXiv 2309.02617


The first three are multiplied by the squared temperature (Hinton et al., section 2), so that a temperature does not
change the size of gradients; Minitron's training code leaves this factor out, and trains at temperature 1.

Unusual: `chunked` takes the gradients of a piece of the tokens as soon as the loss of that piece is known, and keeps
only those of the hidden states and of the head. Logits, as wide as the vocabulary, exist for one piece at a time, and
nothing is computed twice.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.nn import functional

from compresso.core.squarehead import squared_error, wide

Divergence = Literal["forward", "reverse", "js"]
Comparison = Literal["forward", "reverse", "js", "mse"]
"""A divergence of distributions, or the distance of logits."""
Distance = Literal["cosine", "mse"]
ChunkLoss = Callable[[slice, Tensor], tuple[Tensor, Tensor]]
"""Rows [start, stop) and their hidden states -> the loss to differentiate [], and numbers to log [k]; both are summed
over the pieces.
"""


def divergences(
    student: Tensor, teacher: Tensor, kind: Divergence, temperature: float = 1.0, beta: float = 0.5
) -> Tensor:
    """The divergence of each row's distributions in nats times temperature^2 [n], float32 or wider.

    Args:
        student, teacher: finite logits [n, vocab].
        kind: as in this file's header.
        temperature: logits are divided by it.
        beta: weight of the teacher in the mixture of "js"; not used by the others.

    Raises:
        ValueError: unequal shapes, a temperature not above 0 and a beta outside (0, 1).
    """
    if student.shape != teacher.shape or student.dim() != 2:
        raise ValueError(
            f"wanted two tensors of logits [n, vocab], got {list(student.shape)} and {list(teacher.shape)}"
        )
    if not temperature > 0:
        raise ValueError(f"temperature={temperature} divides the logits; give a number above 0")
    q, p = (wide(logits).div(temperature).log_softmax(-1) for logits in (student, teacher))
    return between(q, p, kind, beta) * temperature**2


def compared(student: Tensor, teacher: Tensor, kind: Comparison, temperature: float = 1.0, beta: float = 0.5) -> Tensor:
    """The divergence of each row as `divergences`, or with "mse" the mean squared difference of its logits [n], float32
    or wider, for which temperature and beta mean nothing.
    """
    if kind == "mse":
        return (wide(student) - wide(teacher)).square().mean(-1)
    return divergences(student, teacher, kind, temperature, beta)


def between(q: Tensor, p: Tensor, kind: Divergence, beta: float = 0.5) -> Tensor:
    """The divergence of each row's distributions in nats [n], from log-probabilities of the student and of the teacher.

    Args:
        q, p: [n, outcomes], finite; of the student, of the teacher.
        kind, beta: as in `divergences`.

    Raises:
        ValueError: a beta outside (0, 1).
    """
    if kind == "forward":
        return _kl(p, q)
    if kind == "reverse":
        return _kl(q, p)
    if not 0 < beta < 1:
        raise ValueError(
            f"beta={beta} is the teacher's share of a mixture; give a number between 0 and 1, both excluded"
        )
    mixture = torch.logaddexp(p + math.log(beta), q + math.log1p(-beta))
    return beta * _kl(p, mixture) + (1 - beta) * _kl(q, mixture)


def chunked(loss: ChunkLoss, hidden: Tensor, parameters: Sequence[Tensor], chunk: int) -> tuple[Tensor, Tensor]:
    """A loss over tokens, computed and differentiated `chunk` tokens at a time: the sums of what `loss` returns ([],
    [k]).

    Args:
        loss: of one piece; it must depend on nothing that needs a gradient but its second argument and `parameters`.
        hidden: [n, hidden], n >= 1.
        parameters: the leaves that `loss` uses; they get a gradient if they need one.
        chunk: tokens a piece, at least 1.

    Raises:
        ValueError: there are no tokens or a piece would hold none.
    """
    if not hidden.shape[0] or chunk < 1:
        raise ValueError(f"{hidden.shape[0]} tokens in pieces of {chunk}; wanted at least one token, and one a piece")
    apply = cast(Callable[..., tuple[Tensor, Tensor]], _Chunked.apply)  # pyright: ignore[reportUnknownMemberType]
    return apply(loss, chunk, hidden, *parameters)


def hidden_distance(student: Tensor, teacher: Tensor, kind: Distance) -> Tensor:
    """Mean distance of hidden states [n, width] over tokens, [] in float32 or wider.

    "cosine": 1 - cosine (Minitron's default); "mse": mean squared difference.

    Raises:
        ValueError: unequal shapes.
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"hidden states are {list(student.shape)} and {list(teacher.shape)}; select the remaining dimensions"
        )
    if kind == "mse":
        return squared_error(student, teacher, "none")
    ours, theirs = wide(student), wide(teacher)
    return 1 - functional.cosine_similarity(ours, theirs, dim=-1).mean()


def dynamic_scale(reference: Tensor, loss: Tensor) -> Tensor:
    """reference / loss without a gradient, 0 where the loss is 0: the factor that makes an auxiliary loss as large as
    the main one.

    Minitron (arXiv 2407.14679, section 3): alpha is the ratio of the two losses, taken anew each step.
    """
    reference, loss = reference.detach(), loss.detach()
    return torch.where(loss > 0, reference / loss.clamp(min=torch.finfo(loss.dtype).tiny), torch.zeros_like(loss))


class _Chunked(torch.autograd.Function):
    """Gradients are taken in the forward pass, piece by piece; the backward pass only scales them."""

    @staticmethod
    def forward(ctx: Any, loss: ChunkLoss, chunk: int, hidden: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        wanted = [i for i in range(len(parameters)) if ctx.needs_input_grad[3 + i]]
        learning = bool(wanted) or ctx.needs_input_grad[2]
        to_hidden = torch.empty_like(hidden)
        to_parameters = [torch.zeros_like(parameters[i], dtype=_wider(parameters[i].dtype)) for i in wanted]
        total: Tensor | None = None
        facts: Tensor | None = None
        for start in range(0, hidden.shape[0], chunk):
            rows = slice(start, min(start + chunk, hidden.shape[0]))
            with torch.set_grad_enabled(learning):
                piece = hidden[rows].detach().requires_grad_(learning)
                value, numbers = loss(rows, piece)
                leaves = [piece, *(parameters[i] for i in wanted)]
            if learning:
                to_piece, *others = torch.autograd.grad(value, leaves)
                to_hidden[rows] = to_piece
                for sum_, gradient in zip(to_parameters, others, strict=True):
                    sum_ += gradient
            total = value.detach() if total is None else total + value.detach()
            facts = numbers.detach() if facts is None else facts + numbers.detach()
        assert total is not None and facts is not None  # there is at least one piece
        ctx.save_for_backward(
            to_hidden, *(sum_.to(parameters[i].dtype) for i, sum_ in zip(wanted, to_parameters, strict=True))
        )
        ctx.wanted, ctx.n_parameters = wanted, len(parameters)
        ctx.mark_non_differentiable(facts)
        return total, facts

    @staticmethod
    def backward(ctx: Any, *outgoing: Tensor) -> tuple[Tensor | None, ...]:
        to_hidden, *to_parameters = ctx.saved_tensors
        gradients: list[Tensor | None] = [None] * ctx.n_parameters
        for i, gradient in zip(ctx.wanted, to_parameters, strict=True):
            gradients[i] = gradient * outgoing[0].to(gradient.dtype)
        return None, None, to_hidden * outgoing[0].to(to_hidden.dtype), *gradients


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(P || Q) of each row [n] from log-probabilities [n, vocab]."""
    return (p.exp() * (p - q)).sum(-1)


def _wider(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
