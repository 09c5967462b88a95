"""What an architecture tells the rest of the program, and how one is found for a config."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LayerShape:
    """The widths of one decoder layer; 0 heads or 0 channels mean that the sub-layer (with its norm) is not there.

    Args:
        query_heads: attention heads.
        kv_heads: key/value heads, a divisor of `query_heads`.
        channels: FFN intermediate units.
    """

    query_heads: int
    kv_heads: int
    channels: int
