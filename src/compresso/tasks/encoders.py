"""What the tasks of encoders of texts have in common: whom they refuse, what they read, how much they hold out, and how
a new head comes on top.
"""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from compresso.checkpoint.kinds import head_on_decoder, is_causal
from compresso.core.counted import counted
from compresso.data.records import Records
from compresso.errors import DataError
from compresso.tasks.pictures import seen_by

PROBED = 4
"""Examples that a masked and a smaller model are compared on."""
_LEAST_HELD, _MOST_HELD = 32, 256


def obstacle(config: PreTrainedConfig, head: Any, task: str) -> str:
    """Why no model with this config does a task; "" for an encoder of texts.

    Args:
        config: of the model.
        head: transformers' class that opens one with a head for the task.
        task: its name.
    """
    if is_causal(config):
        return f"({config.model_type}) is a causal language model; --task {task} takes an encoder, such as BERT"
    if named := head_on_decoder(config):
        return f"({config.model_type}) is a decoder, {named}; --task {task} takes an encoder, such as BERT"
    if type(config) not in head._model_mapping:
        able = seen_by(config)
        cure = f"; of pictures, give --task {able[0]}" if able else ""
        return f"({config.model_type}) reads no text; --task {task} takes an encoder of texts, such as BERT{cure}"
    return ""


def with_tokenizer(tokenizer: PreTrainedTokenizerBase | None, records: Records) -> PreTrainedTokenizerBase:
    """The tokenizer. Raises DataError without one."""
    if tokenizer is None:
        raise DataError(f"{records.source}: the model has no tokenizer to read texts with; add its files to the model")
    return tokenizer


def leave_room(tokenizer: PreTrainedTokenizerBase, max_length: int, pairs: bool, context: int | None = None) -> None:
    """Raise DataError if no word fits beside a tokenizer's special tokens, or none of each text of a pair.

    Args:
        tokenizer: of the model.
        max_length: most tokens of an example.
        pairs: whether there are pairs of texts.
        context: tokens that the model reads at most, where that is known; too few of them are the model's own fault.
    """
    special = tokenizer.num_special_tokens_to_add(pair=pairs)
    least = special + 1 + pairs
    if max_length < least:
        raise DataError(
            f"max_length={max_length}: wanted at least {least}, for {counted(special, 'special token')} and a word"
            f"{' of each text' if pairs else ''}; {longer(least, context)}"
        )


def longer(least: int, context: int | None) -> str:
    """How to have at least so many tokens in an example of a model, of whose context nothing may be known."""
    if context is not None and context < least:
        return f"the model reads no more than {counted(context, 'token')}: give one that reads more"
    return "raise data.max_length"


def tells_segments(config: PreTrainedConfig) -> bool:
    """Whether a model tells the texts of a pair apart by type ids."""
    return getattr(config, "type_vocab_size", 1) > 1


def held_out(n_rows: int) -> int:
    """A fifth of so many examples, but enough for a score and no more than takes seconds."""
    return min(max(n_rows // 5, _LEAST_HELD), _MOST_HELD)


def padding(config: PreTrainedConfig) -> int:
    """The id that pads a batch: the model's own, or 0 where that has no row."""
    own = config.pad_token_id
    return own if isinstance(own, int) and 0 <= own < config.vocab_size else 0


def under_new_head(model: PreTrainedModel, auto: Any, fields: Mapping[str, object], seed: int) -> PreTrainedModel:
    """A model of another class around the same encoder, whose own modules are moved, not copied.

    Where the class wants a part of the encoder that is not there (a pooler), it is new, too; one that it has no use for
    is let go. What the class ties to the embedding is tied.

    Args:
        model: an encoder, with a head or without; its modules belong to the result.
        auto: transformers' auto class of the result.
        fields: of the result's config, beside those of the model's.
        seed: of what is drawn.
    """
    config = copy.deepcopy(model.config)
    for name, value in fields.items():
        setattr(config, name, value)
    with torch.random.fork_rng(devices=[]), torch.device(model.device):
        torch.manual_seed(seed)
        made: PreTrainedModel = auto.from_config(
            config, dtype=model.dtype, attn_implementation=model.config._attn_implementation
        )
    made.config.architectures = [type(made).__name__]  # by which a later stage knows that the head is there
    encoder, fresh = model.base_model, dict(made.base_model.named_children())
    there = dict(encoder.named_children())
    for name in there.keys() - fresh.keys():
        setattr(encoder, name, None)
    for name in [name for name in fresh if name not in there]:
        setattr(encoder, name, fresh[name])
    for name, value in vars(made.base_model).items():  # such as whether MobileViT's last convolution runs
        if isinstance(value, bool) and name != "training":
            setattr(encoder, name, value)
    for module in encoder.modules():
        if isinstance(getattr(module, "config", None), PreTrainedConfig):
            module.config = made.config  # pyright: ignore[reportArgumentType]  # no tensor and no module
    setattr(made, made.base_model_prefix, encoder)
    made.tie_weights()
    return made.train(model.training)
