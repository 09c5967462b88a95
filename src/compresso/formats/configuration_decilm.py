"""The config of a DeciLM checkpoint as vLLM's `nemotron_nas` reads it: one entry a block, by attribute.

This file lies beside the weights and needs nothing but transformers.
"""

from transformers import LlamaConfig


class Entry(dict):
    """A mapping whose keys are attributes too, so that it is read by attribute and written as JSON."""

    def __getattr__(self, name):
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


def entry(value):
    """A mapping, and those within it, as entries."""
    return Entry({key: entry(inner) if isinstance(inner, dict) else inner for key, inner in value.items()})


class DeciLMConfig(LlamaConfig):
    """`block_configs[i].attention.{no_op, n_heads_in_group}` and `.ffn.{no_op, intermediate_size}` of each layer."""

    model_type = "nemotron-nas"

    def __setattr__(self, key, value):
        if key == "block_configs" and value is not None:
            value = [entry(block) for block in value]
        super().__setattr__(key, value)

    def validate_architecture(self):
        """Heads need not divide the hidden size: `head_dim` is given."""
