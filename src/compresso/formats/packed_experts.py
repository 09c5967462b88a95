"""Experts under the names that checkpoints have, one linear each, as engines read packed ones.

transformers stacks experts in memory, and says how its own checkpoints are unstacked; of gpt-oss, whose files hold
stacks, it says nothing. It unpacks experts while it reads them, of symmetric grids alone (5.23): zero points of experts
are passed over in silence, which is why they are not written. vLLM was not tried.
"""

from collections.abc import Mapping

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from compresso.errors import ExportError


def check_experts(model: nn.Module, stacks: Mapping[str, Tensor], symmetric: bool, rounds_inputs: bool) -> None:
    """Raise ExportError for experts that would not be read as they are.

    Args:
        model: that has them.
        stacks: those that are to be packed, by full name.
        symmetric: whether their grids are.
        rounds_inputs: whether activations are rounded, too.
    """
    first = next(iter(stacks))
    if not symmetric:
        raise ExportError(
            f"cannot pack {first}: transformers passes over zero points of stacked experts; round with symmetric: true"
        )
    if rounds_inputs:
        raise ExportError(f"cannot pack {first}: experts are written as codes of weights alone; round no activations")
    others = [name for name, parameter in model.named_parameters() if parameter.dim() == 3 and name not in stacks]
    if others:
        raise ExportError(
            f"cannot pack {first}: {others[0]} was not rounded, and transformers unpacks all experts of a model or"
            " none; round all of them, or none: where.ignore: ['*.experts.*'] in the stage that rounds"
        )


def unstacked(model: PreTrainedModel, name: str, stack: Tensor) -> dict[str, Tensor]:
    """Each expert's linears [out, in], views, by the name of their module in a checkpoint.

    Raises ExportError where the family's checkpoints hold stacks.
    """
    found = as_written(model, {name: stack})
    if any(one.dim() != 2 or not own.endswith(".weight") for own, one in found.items()):
        raise ExportError(
            f"checkpoints of a {model.config.model_type} hold {name} as one stack, which no reader takes as codes; keep"
            " the checkpoint that the run wrote"
        )
    return {own.removesuffix(".weight"): one for own, one in found.items()}


def written_linears(model: PreTrainedModel, linears: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of linears by the names that their modules have in a checkpoint."""
    found = as_written(model, {f"{name}.weight": weight for name, weight in linears.items()})
    return {name.removesuffix(".weight"): weight for name, weight in found.items()}


def as_written(model: PreTrainedModel, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under the names, and in the pieces, of a checkpoint."""
    found: dict[str, Tensor] = revert_weight_conversion(model, state)
    return found
