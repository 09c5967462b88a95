"""Which layers, heads and hidden dimensions of a teacher a student of fewer is compared with, for `qat`; no method."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from compresso.arch.base import Arch
from compresso.core.one_stage import LayerMap, layer_map
from compresso.errors import RecipeError
from compresso.job import Job
from compresso.training.one_stage_objective import Taught


def paired(
    job: Job, taught: Taught, teacher: PreTrainedModel, layers: Sequence[int] | None, *, attentions: bool
) -> Taught:
    """The student and its teacher with the pairs of what is left.

    Args:
        job: of the student; its plan says what is left.
        taught: without pairs.
        teacher: the dense model.
        layers: the teacher's, from 0, one for each of the student's; None for those it has kept.
        attentions: whether probabilities are compared.

    Raises:
        RecipeError: layers that fit neither model, or attentions of which single query heads have left.
    """
    ours, theirs, kept = list(job.arch.blocks(job.model)), list(job.arch.blocks(teacher)), job.plan.kept
    pairs = layer_pairs(len(ours), len(theirs), kept, layers, attentions=attentions)
    dimensions = kept.get("hidden")
    return replace(
        taught,
        ours=ours,
        theirs=theirs,
        pairs=pairs,
        heads=[_heads(kept, job.arch, teacher, layer) for layer in pairs.attentions],
        dimensions=None if dimensions is None else torch.tensor(dimensions),
    )


def layer_pairs(
    ours: int, theirs: int, kept: Mapping[str, Sequence[int]], layers: Sequence[int] | None, *, attentions: bool
) -> LayerMap:
    """Which layers of the teacher teach which.

    Args:
        ours, theirs: layers of the student and of its teacher.
        kept: the plan of what is left of the teacher's units.
        layers, attentions: as `paired` takes them.

    Raises RecipeError as `paired`.
    """
    try:
        pairs = layer_map(ours, theirs, layers or kept.get("layers"))
    except ValueError as error:
        raise RecipeError(f"teacher_layers: {error}") from error
    if attentions and any(name.endswith(".queries") for name in kept):
        raise RecipeError("single query heads have left, and attentions cannot be paired; set attention_weight: 0")
    return pairs


def _heads(kept: Mapping[str, Sequence[int]], arch: Arch, teacher: PreTrainedModel, layer: int) -> Tensor | None:
    """Which query heads of one of the teacher's layers are left; None for all."""
    units = kept.get(f"layers.{layer}.heads")
    if units is None:
        return None
    shape = arch.shapes(teacher)[layer]
    each = shape.query_heads // shape.kv_heads
    return torch.tensor([unit * each + i for unit in units for i in range(each)], dtype=torch.int64)
