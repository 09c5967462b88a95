"""A student that begins as chosen layers of its teacher: one of two, as DistilBERT does (Sanh et al., arXiv 1910.01108,
section 3, "student initialization"), or any list, as XTC's scripts have it (arXiv 2206.01859, section 3.3).

Embeddings, head and the layers that stay keep their weights; nothing is scored, and training makes up for the rest.
Departure: DistilBERT drops token types and pooler, too; here they stay.
"""

from collections.abc import Sequence
from typing import Annotated

import torch
from annotated_types import Ge
from transformers import PreTrainedModel

from compresso.arch.base import Arch
from compresso.arch.whole_layers import NAME, with_layers
from compresso.core.axis import Axis, Kind
from compresso.core.cost import CostModel
from compresso.core.plan import Plan
from compresso.errors import RecipeError
from compresso.job import Job
from compresso.stage import Effects, Passes, stage


@stage(
    "keep_layers",
    title="keeps every second layer, or those of a list",
    paper="1910.01108",
    effects=Effects.SHAPES,
    when="Encoders, before `qat` or `distill`: half of the layers at the dense width, by no score.",
    failures="What is left knows little until it is trained; `drop_layers` chooses by what the model loses.",
    any_task=True,
    once="it keeps the layers that it is told to, by no share of the model",
)
class KeepLayers:
    """Knobs of a student's beginning.

    Args:
        every: one layer of so many stays, the last of them.
        layers: instead, those that stay, counted from 0.
    """

    every: Annotated[int, Ge(2)] = 2
    layers: tuple[Annotated[int, Ge(0)], ...] | None = None

    def __post_init__(self) -> None:
        """Refuse a list that is empty or not ascending. Raises ValueError."""
        given = self.layers
        if given is not None and (not given or list(given) != sorted(set(given))):
            raise ValueError(
                f"layers={list(given)}: wanted the layers that stay, each once, from the first to the last"
            )

    def reaches_layers(self) -> bool:
        """It takes whole layers of models, too, that have no axis of them."""
        return True

    def budget(self) -> None:
        """None: it says layers, not a share."""
        return

    def check(self, model: PreTrainedModel, arch: Arch) -> None:
        """Refuse layers that are not there, and stages, none of which can leave. Raises RecipeError."""
        if not arch.shapes(model):
            raise RecipeError(
                f"keep_layers: a {arch.name} has stages, which all stay, and no one list of layers; drop layers by a"
                " score, such as by gate_taylor with kinds: [layer], where its stages have some"
            )
        self._kept(len(arch.blocks(model)))

    def dry_run_plan(self, axes: Sequence[Axis], cost: CostModel) -> Plan:
        """The plan itself. Raises RecipeError as `check`."""
        axis = next(axis for axis in axes if axis.kind == Kind.LAYER)
        return Plan({axis.name: self._kept(axis.size)})

    def work(self, model: PreTrainedModel, arch: Arch) -> Sequence[Passes]:
        """None: it looks at nothing."""
        return []

    def __call__(self, job: Job) -> Job:
        """Take the others out."""
        axes = with_layers(job.arch.axes(job.model), job.arch, job.model)
        size = next(axis.size for axis in axes if axis.name == NAME)
        mask = torch.zeros(size)
        mask[list(self._kept(size))] = 1
        return job.without({NAME: mask}, "keep_layers")

    def _kept(self, size: int) -> tuple[int, ...]:
        """Which of so many layers stay. Raises RecipeError."""
        kept = tuple(range(self.every - 1, size, self.every)) if self.layers is None else self.layers
        if not kept:
            cure = f"give 2 to {size}" if size > 1 else "leave the stage out"
            of = "one layer" if size == 1 else f"{size} layers"
            raise RecipeError(f"keep_layers: every={self.every} keeps none of the model's {of}; {cure}")
        if kept[-1] >= size:
            raise RecipeError(
                f"keep_layers: layers={list(kept)}, and the model has the layers 0 to {size - 1}; name some of those"
            )
        return kept
