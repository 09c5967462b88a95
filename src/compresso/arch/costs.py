"""The cost of a live model: its shapes counted, and measured by what else its run has budgets of."""

from transformers import PreTrainedModel

from compresso.arch.base import Arch
from compresso.arch.queries import WITHIN, axes_of
from compresso.core.cost import CostModel
from compresso.core.cost_table import Field
from compresso.core.measures import NONE, Measures
from compresso.errors import BudgetError


def cost_of(arch: Arch, model: PreTrainedModel, measures: Measures = NONE) -> CostModel:
    """Counts a model as it is, under masks of query heads, too.

    Args:
        arch, model: the model; on any device, meta included.
        measures: what else a budget may be a share of.

    Raises:
        BudgetError: the table of its times does not hold for it.
    """
    axes, weights = axes_of(arch, model, WITHIN), arch.weights(model)
    if measures == NONE:
        return CostModel(axes, weights)
    try:
        return CostModel(axes, weights, measured=measures.of(axes, CostModel(axes, weights), shape_facts(arch, model)))
    except ValueError as error:
        raise BudgetError(f"{error}; measure this model with `compresso latency`") from error


def shape_facts(arch: Arch, model: PreTrainedModel) -> dict[str, Field]:
    """What a table of times is compared by: one number, or, where layers differ, their numbers in a row.

    Args:
        arch, model: the model; on any device, meta included.
    """
    shapes = arch.shapes(model)
    config = model.config
    groups = sorted({shape.query_heads // shape.kv_heads for shape in shapes if shape.kv_heads})
    width = getattr(config, "head_dim", None)
    return {
        "model_type": str(config.model_type),
        **({"hidden_size": int(config.hidden_size)} if hasattr(config, "hidden_size") else {}),
        **({"head_dim": int(width)} if width else {}),
        **({"queries_per_kv_head": _told(groups)} if groups else {}),
        **({"vocab_size": int(config.vocab_size)} if hasattr(config, "vocab_size") else {}),
        "layers": len(shapes),
        "kv_heads": _told([shape.kv_heads for shape in shapes]),
        "channels": _told([shape.channels for shape in shapes]),
    }


def _told(numbers: list[int]) -> int | str:
    """One number if all are the same, else all of them."""
    return numbers[0] if len(set(numbers)) == 1 else ",".join(map(str, numbers))
