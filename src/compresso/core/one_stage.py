"""One-stage distillation of an encoder into a rounded one: soft labels, attentions and hidden states at once (XTC, Wu
et al., arXiv 2206.01859, section 3.2; used by arXiv 2301.12017), and which layers teach which.

    loss = CE(student, softmax(teacher)) + sum over layers of MSE(attention) + sum over layers of MSE(hidden)

Layers are counted from 0. Hidden states are counted as transformers lists them: 0 is what the embeddings give, i + 1
what layer i gives.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from compresso.core.squarehead import wide


@dataclass(frozen=True)
class LayerMap:
    """What the student's layers are compared with.

    Args:
        attentions: of each of the student's layers, the teacher's layer.
        hiddens: of the student's embeddings and of each of its layers, the teacher's hidden state.
    """

    attentions: tuple[int, ...]
    hiddens: tuple[int, ...]


def layer_map(student: int, teacher: int, taken: Sequence[int] | None = None) -> LayerMap:
    """Who teaches a student of so many layers, as the public scripts have it.

    Args:
        student, teacher: layers of each.
        taken: the teacher's layers that the student's began as; None where it was not reduced: student layer i then has
            the teacher's layer i k + k - 1, with k = teacher / student.

    With layers taken, attentions are theirs, and hidden states those behind them; the student's embeddings are compared
    with the hidden state before the layer in front of the first one taken, as published, or with the embeddings where
    that is none (there the script would count from the end).

    Raises:
        ValueError: the counts do not fit, or a layer is not there.

    >>> layer_map(5, 12, [2, 4, 6, 8, 10])
    LayerMap(attentions=(2, 4, 6, 8, 10), hiddens=(1, 3, 5, 7, 9, 11))
    """
    if taken is None:
        each, rest = divmod(teacher, max(student, 1))
        if rest or not each:
            raise ValueError(
                f"{student} layers of the student do not divide the teacher's {teacher}; say which ones it began as"
            )
        return LayerMap(tuple(i * each + each - 1 for i in range(student)), tuple(i * each for i in range(student + 1)))
    if len(taken) != student or not taken or not all(0 <= i < teacher for i in taken):
        raise ValueError(
            f"layers {list(taken)}: wanted {student} of the teacher's 0 to {teacher - 1}, one for each of the student's"
        )
    return LayerMap(tuple(taken), (max(taken[0] - 1, 0), *(i + 1 for i in taken)))


def soft_cross_entropy(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """-sum of softmax(teacher) log softmax(student) of each row [n], nats, float32 or wider, times temperature^2.

    Its gradient is that of KL(teacher || student). The public scripts divide by the number of classes, too.

    Args:
        student, teacher: logits [n, classes].
        temperature: divides both.

    Raises:
        ValueError: unequal shapes, or a temperature not above 0.

    >>> round(float(soft_cross_entropy(Tensor([[2.0, 0.0, -1.0]]), Tensor([[1.0, 1.0, 0.0]]))), 5)
    1.48057
    """
    if student.shape != teacher.shape or student.dim() != 2:
        raise ValueError(
            f"wanted two tensors of logits [n, classes], got {list(student.shape)} and {list(teacher.shape)}"
        )
    if not temperature > 0:
        raise ValueError(f"temperature={temperature} divides the logits; give a number above 0")
    q, p = (wide(logits).div(temperature).log_softmax(-1) for logits in (student, teacher))
    return -(p.exp() * q).sum(-1) * temperature**2


def attention_distance(student: Tensor, teacher: Tensor, counted: Tensor) -> Tensor:
    """Mean squared difference of attention probabilities over heads and pairs of tokens that both count [].

    Args:
        student, teacher: [batch, heads, seq, seq].
        counted: [batch, seq], bool; padding does not. Without it the mean would depend on how long others are.

    Raises:
        ValueError: unequal shapes.
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"attentions are {list(student.shape)} and {list(teacher.shape)}; select the heads that are left, or"
            " compare none"
        )
    pairs = (counted[:, None, :, None] & counted[:, None, None, :]).to(student.device)
    squares = (wide(student) - wide(teacher)).square() * pairs
    return squares.sum() / (pairs.sum() * student.shape[1]).clamp(min=1)
