"""The nano model: a LLaMA of a few million parameters that knows the embedded world, shipped with the package."""

from pathlib import Path


def path() -> Path:
    """The folder of the checkpoint, ready for `AutoModelForCausalLM.from_pretrained`."""
    return Path(__file__).parent
