"""A config that says another head count for one layer, for families whose attention reads it off the model's config
(Phi-3).
"""

from typing import Any

from transformers import PreTrainedConfig


class LayerConfig:
    """The model's own config, but for one layer's count of attention heads; everything else is read off that config as
    it is then.
    """

    def __init__(self, config: PreTrainedConfig, num_attention_heads: int) -> None:
        self.config, self.num_attention_heads = config, num_attention_heads

    def __getattr__(self, name: str) -> Any:
        if name == "config" or name.startswith("__"):  # asked for while this is being copied
            raise AttributeError(name)
        return getattr(self.config, name)


def config_of_layer(config: PreTrainedConfig, heads: int, head_dim: int) -> PreTrainedConfig | LayerConfig:
    """What an attention of that many heads has to read;
    the model's own config, told `head_dim`, if that says the same.
    """
    tell_head_dim_(config, head_dim)
    return config if config.num_attention_heads == heads else LayerConfig(config, heads)


def tell_head_dim_(config: PreTrainedConfig, head_dim: int) -> None:
    """Give a config without the field `head_dim`, which its class obeys, that field, where the heads it counts would
    otherwise be of another width.
    """
    if getattr(config, "head_dim", None) is None and config.hidden_size // config.num_attention_heads != head_dim:
        config.head_dim = head_dim
