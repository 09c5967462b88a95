"""Which experts go into which: those that leave join the one of those that stay that is most like them (as in M-SMoE,
arXiv 2310.01334, section 3.1, whose groups form around the experts that are used most).
"""

from collections.abc import Sequence

from torch import Tensor


def cosines(products: Tensor) -> Tensor:
    """Cosines of vectors whose products [n, n] are given, float64; 0 with a vector of zeros."""
    wide = products.double()
    size = wide.diagonal().clamp(min=0).sqrt()
    return wide / (size[:, None] * size).clamp(min=1e-300)


def likeness(routing: Tensor, outputs: Tensor) -> Tensor:
    """How like experts are [experts, experts], float64: the mean of two cosines.

    Args:
        routing: products of the routed probabilities of experts, summed over tokens [experts, experts].
        outputs: what each expert writes, summed over the same tokens [experts, hidden].
    """
    return (cosines(routing) + cosines(outputs.double() @ outputs.double().T)) / 2


def joined(like: Tensor, stay: Sequence[int]) -> dict[int, list[int]]:
    """Which of those that leave join each of those that stay, in ascending order; of equals the first is joined.

    >>> import torch
    >>> joined(torch.tensor([[1.0, 0.2, 0.9], [0.2, 1.0, 0.3], [0.9, 0.3, 1.0]]), stay=[0, 1])
    {0: [2], 1: []}
    """
    found: dict[int, list[int]] = {one: [] for one in stay}
    for expert in range(len(like)):
        if expert not in found:
            found[stay[int(like[expert, list(stay)].argmax())]].append(expert)
    return found


def shares(often: Tensor, members: Sequence[int]) -> Tensor:
    """The weight of each of an expert's group, the one that stays first, by how often each was chosen [members],
    float64; where none was, the first has all.
    """
    counts = often.double()[list(members)]
    if not float(counts.sum()):
        counts[0] = 1
    return counts / counts.sum()
