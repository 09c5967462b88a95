"""One parameter of a model as it is counted, and what it counts as."""

from dataclasses import dataclass
from enum import StrEnum


class Group(StrEnum):
    """What a parameter counts as."""

    BLOCKS = "blocks"
    """Linear layers inside decoder layers: q, k, v, o, gate, up, down and their like, with their biases."""
    EMBEDDINGS = "embeddings"
    """Token and position embeddings and the language-model head; tied ones once."""
    NORMS = "norms"


@dataclass(frozen=True, slots=True)
class Weight:
    """One parameter as the counter sees it.

    Args:
        name: qualified parameter name.
        shape: its dense shape.
        group: what it counts as.
        macs: multiply-accumulates each entry costs per token (1 for a Linear weight or a tied head, 0 for lookups,
            norms and biases).
        cached: how many of its outputs are values of the key/value cache per token, in the dense model.
        output: the dimension of its outputs, if some are cached.
        routed: how many units along its first dimension a token uses, however many there are (top-k of the experts
            whose weights it stacks); 0 for all.
    """

    name: str
    shape: tuple[int, ...]
    group: Group
    macs: int = 0
    cached: int = 0
    output: int = 0
    routed: int = 0
