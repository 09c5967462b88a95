"""What the activations of a training step take, from a config alone; an estimate."""

from typing import Any

import torch
from transformers import PreTrainedConfig

from compresso.arch.outputs import any_input
from compresso.checkpoint.kinds import from_config


def activation_bytes(
    config: PreTrainedConfig, tokens: int, width: int, checkpointing: bool, chunk: int | None = None
) -> int:
    """What a backward pass finds stored, in bytes, roughly.

    Of transformers: per token and layer 8 hidden vectors, q, k, v and 4 FFN vectors; thrice the logits. Of models of
    pictures without one hidden size: what each module without parts writes, and thrice the logits of every pixel.

    Args:
        config: of the model.
        tokens: in memory at a time; pictures, for the latter.
        width: bytes of a number.
        checkpointing: whether layers are computed again in the backward pass; the latter always keep all.
        chunk: tokens whose logits (then those of two models) exist at a time; None for all.
    """
    if not hasattr(config, "num_hidden_layers") or not hasattr(config, "hidden_size"):
        return tokens * _of_a_picture(config, width)
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention = head * (
        2 * config.num_attention_heads + 2 * getattr(config, "num_key_value_heads", config.num_attention_heads)
    )
    widths = (getattr(config, name, None) for name in ("intermediate_size", "ffn_dim", "n_inner"))
    ffn = next(filter(None, widths), 4 * config.hidden_size)
    layer = 8 * config.hidden_size + attention + 4 * ffn
    layers = config.num_hidden_layers * (config.hidden_size if checkpointing else layer) + (
        layer if checkpointing else 0
    )
    logits = 3 * tokens if chunk is None else 6 * min(chunk, tokens)
    return tokens * layers * width + logits * 4 * getattr(config, "vocab_size", 0)  # a classifier's are few


def _of_a_picture(config: PreTrainedConfig, width: int) -> int:
    """Bytes that one picture leaves behind in a forward pass, taken on the meta device."""
    with torch.device("meta"):
        model = from_config(config)
    written = list[int]()

    def see(out: Any) -> None:
        """Count a tensor; what stands in for an attention that is not there gives a pair, and no memory."""
        written.extend([out.numel()] if isinstance(out, torch.Tensor) else [])

    for module in model.modules():
        if next(module.children(), None) is None:
            module.register_forward_hook(lambda _, __, out: see(out))
    picture = any_input(config).to("meta")
    with torch.no_grad():
        model.eval()(pixel_values=picture)
    return sum(written) * width + 3 * 4 * int(config.num_labels or 0) * picture[0, 0].numel()
