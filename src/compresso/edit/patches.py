"""Forward patches by name: what records keep of them, and `compresso.load` and a resumed run apply again."""

from collections.abc import Sequence

from transformers import PreTrainedModel

from compresso.edit import prefill, round_inputs
from compresso.errors import ArchError


def patch_(model: PreTrainedModel, patches: Sequence[str]) -> None:
    """Apply patches by name.

    Raises:
        ArchError: a patch that is unknown, or that does not fit the model.
    """
    for patch in patches:
        what, *words = patch.split()
        if what == prefill.PATCH and all(word.isdigit() for word in words):
            prefill.skip_in_prefill_(model, [int(word) for word in words])
        elif what == round_inputs.PATCH and words and words[0] in round_inputs.RANGES:
            round_inputs.round_inputs_(model, round_inputs.range_of(words[0]), words[1:])
        else:
            raise ArchError(f"forward patch '{patch[:80]}' is unknown to this compresso; use the version that wrote it")


def unpatch_(model: PreTrainedModel) -> None:
    """Compute as the weights alone say."""
    prefill.run_every_layer_(model)
    round_inputs.keep_inputs_(model)
