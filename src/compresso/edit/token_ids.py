"""Gives the kept tokens their new numbers wherever a model writes token ids down: config, generation config,
modules.
"""

from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from compresso.errors import CheckpointError

_ONE_ID = (
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "unk_token_id",
    "sep_token_id",
    "cls_token_id",
    "mask_token_id",
    "decoder_start_token_id",
    "forced_bos_token_id",
    "forced_eos_token_id",
)
"""Fields that hold an id or a list of ids, of which generation understands any number."""
_IDS = ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids")
"""Fields that hold lists of ids, or lists of lists: an entry with a removed token says nothing any more."""


def token_ids(model: PreTrainedModel) -> set[int]:
    """The ids that the config and the generation config give a meaning: beginning, end, padding and their like."""
    ids: set[int] = set()
    for config in _configs(model):
        for field in _ONE_ID:
            value = getattr(config, field, None)
            ids.update(value if isinstance(value, list | tuple) else () if value is None else (value,))
    return ids


def refuse_named(model: PreTrainedModel, kept: Sequence[int]) -> None:
    """Raise CheckpointError if the model's config names a token that is not kept."""
    size = int(model.config.vocab_size)
    if lost := sorted(i for i in token_ids(model) - set(kept) if 0 <= i < size):
        raise CheckpointError(f"the model's config gives the tokens {lost} a meaning, so they may not leave; keep them")


def renumber_(model: PreTrainedModel, size: int, kept: Sequence[int]) -> None:
    """Bring all ids and sizes of a vocabulary in line with the rows that were kept.

    Args:
        model: whose embedding and head hold only the kept rows already.
        size: rows before; ids from there on belonged to no row and remain behind the last one.
        kept: their old ids, ascending. A meaning whose token was removed becomes None.
    """
    new = {old: i for i, old in enumerate(kept)}

    def renumbered(value: Any) -> Any:
        """An id, or a list of what can be renumbered; None for what was removed."""
        if isinstance(value, list | tuple):
            found = [renumbered(one) for one in value]
            return (
                None
                if None in found and not isinstance(value[0], list | tuple)
                else [one for one in found if one is not None]
            )
        if value < 0:  # some configs say "none" like this
            return value
        return value - size + len(kept) if value >= size else new.get(value)

    for config in _configs(model):
        for field in _ONE_ID:
            value = getattr(config, field, None)
            if isinstance(value, list | tuple):
                setattr(config, field, [one for one in map(renumbered, value) if one is not None] or None)
            elif value is not None:
                setattr(config, field, renumbered(value))
        for field in _IDS:
            value = getattr(config, field, None)
            if value:
                listed = [renumbered(one) for one in value]
                setattr(config, field, [one for one in listed if one is not None] or None)
    model.config.vocab_size = len(kept)
    for module in model.modules():
        if isinstance(getattr(module, "vocab_size", None), int):
            module.vocab_size = len(kept)  # pyright: ignore[reportArgumentType]
        padding = getattr(module, "padding_idx", None)
        if isinstance(padding, int) and (not isinstance(module, nn.Embedding) or module.num_embeddings == len(kept)):
            module.padding_idx = new.get(padding if padding >= 0 else padding + size)  # pyright: ignore[reportArgumentType]


def _configs(model: PreTrainedModel) -> list[Any]:
    generation = getattr(model, "generation_config", None)
    return [model.config] if generation is None else [model.config, generation]
