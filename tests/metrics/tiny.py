"""A model small enough to run many times, whose counts can be written down."""

from transformers import LlamaConfig, LlamaForCausalLM


def tiny(tied: bool = True, channels: int = 24) -> LlamaForCausalLM:
    """Hidden 16, 2 layers, 4 query heads and 2 key/value heads of 4, 40 tokens, 2048 positions."""
    sizes = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 40,
    }
    return LlamaForCausalLM(LlamaConfig(**sizes, intermediate_size=channels, tie_word_embeddings=tied)).eval()
