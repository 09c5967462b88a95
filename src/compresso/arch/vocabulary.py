"""The tokens of a language model as an axis, whatever its architecture: rows of the embedding and of the head, tied or
not.

Embedding and head are found as transformers finds them, so nothing has to be written down per architecture.
"""

from torch import nn
from transformers import PreTrainedModel

from compresso.core.axis import Axis, Kind, Slice
from compresso.errors import ArchError


def vocabulary_axis(model: PreTrainedModel) -> Axis:
    """The axis `vocab`: one unit a row of the embedding, with the head's row and bias entry.

    Raises:
        ArchError: embedding and head do not have as many rows.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tensors = [
        tensor for module in (embedding, head) if isinstance(module, nn.Module) for tensor in module.parameters()
    ]
    names = {
        parameter: name for name, parameter in model.named_parameters()
    }  # a tied head goes by the embedding's name
    size = len(tensors[0])
    if any(len(tensor) != size for tensor in tensors):
        raise ArchError(
            f"embedding and head have {[len(tensor) for tensor in tensors]} rows; wanted a row of each for every token"
        )
    slices = tuple(Slice(name, 0) for name in dict.fromkeys(names[tensor] for tensor in tensors))
    container = next(name for name, module in model.named_modules() if module is embedding)
    return Axis("vocab", Kind.VOCAB, size, slices, (), container)
