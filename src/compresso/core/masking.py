"""Which tokens of a text a masked language model has to guess, and what it sees in their place (Devlin et al., arXiv
1810.04805, section 3.1 and appendix A.1).

Of the tokens that are no special ones 15 % are asked for. Of these 80 % are seen as the mask, 10 % as another token
drawn from all but the special ones, and 10 % as they are. Departure: the shares are draws for each asked token, as in
BERT's code, while the number of asked tokens of a text is exact, and one at least.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch

SHARE, AS_MASK, AS_OTHER = 0.15, 0.8, 0.1
"""Of the tokens, those asked for; of these, those seen as the mask, and those seen as another token."""
_NONE = -100


@dataclass(frozen=True, slots=True)
class Masking:
    """What masking knows of a vocabulary.

    Args:
        mask_id: of the mask.
        n_ids: ids below this may be seen in the place of others.
        special: ids that are neither asked for nor seen in the place of others, ascending.
    """

    mask_id: int
    n_ids: int
    special: tuple[int, ...]

    def maskable(self, ids: Sequence[int]) -> list[int]:
        """Places of the tokens that may be asked for."""
        apart = frozenset(self.special)
        return [place for place, one in enumerate(ids) if one not in apart]


def own_seed(ids: Sequence[int]) -> int:
    """A seed that a text has by itself, so that every model is asked the same of it.

    >>> own_seed([1, 2]) == own_seed((1, 2)) != own_seed([2, 1])
    True
    """
    return int.from_bytes(hashlib.blake2b(repr(tuple(ids)).encode(), digest_size=8).digest()) >> 1


def masked(ids: Sequence[int], masking: Masking, seed: int, share: float = SHARE) -> tuple[list[int], list[int]]:
    """What is seen of a text, and its labels: of an asked token the token, -100 elsewhere.

    Args:
        ids: of the text, with its special tokens.
        masking: of the vocabulary.
        seed: the same one asks for the same.
        share: of the tokens that may be asked for, rounded to a number of them, at least one.

    Raises:
        ValueError: no token may be asked for.
    """
    places = masking.maskable(ids)
    if not places:
        raise ValueError(f"none of {len(ids)} tokens may be masked; give texts of more than special tokens")
    draw = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(places), generator=draw)[: max(1, round(share * len(places)))]
    asked = sorted(int(which) for which in order)
    fates = [float(one) for one in torch.rand(len(asked), generator=draw)]
    inside = [one for one in masking.special if one < masking.n_ids]
    drawn = torch.randint(max(1, masking.n_ids - len(inside)), (len(asked),), generator=draw)
    others = [int(one) for one in drawn]
    seen, labels = list(ids), [_NONE] * len(ids)
    for which, fate, other in zip(asked, fates, others, strict=True):
        place = places[which]
        labels[place] = ids[place]
        if fate < AS_MASK:
            seen[place] = masking.mask_id
        elif fate < AS_MASK + AS_OTHER:
            for special in inside:  # ascending, so that the draw passes over each
                other += other >= special
            seen[place] = other
    return seen, labels
