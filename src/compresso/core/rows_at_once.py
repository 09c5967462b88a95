"""How many log-probabilities are made together."""

_AT_ONCE_BYTES = 2**26
"""Most bytes of float32 log-probabilities that are made at once: 512 tokens of a vocabulary of 32,000."""


def rows_at_once(vocabulary: int) -> int:
    """Positions whose log-probabilities are made together, so that memory does not grow with the window."""
    return max(1, _AT_ONCE_BYTES // (4 * vocabulary))
