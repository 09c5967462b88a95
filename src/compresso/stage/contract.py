"""What a stage must do and what it may offer. Dry runs, checks, plans and memory estimates ask for nothing else.

    Stage        always: the act itself, and the passes it takes (`work`), so that every stage has a cost
    Shrinks      a budget that is tried on the shapes before weights are read
    PlansShapes  with Shrinks: the shapes, where a budget alone does not describe them
    ReachesLayers with Shrinks: it takes whole layers, too, where axes name none
    ChecksModel  a look at the shapes before weights are read
    ChecksData   a look at the examples before weights are read
    ChecksTaught a look at what stages before it left of the dense model that teaches it
    ChecksProcesses  a look at how many processes there are, before weights are read
    Learns       what it trains, and for how long
    Compresses   how many weights it zeroes, or rounds to how many bits
    Merges       how many experts it averages, and what that takes
    Remarks      what it does otherwise than it was asked to, in sentences
    NeedsMore    needs data, though its card does not say so, by its knobs
    Follows      another stage has to stand before it, by its knobs
    FitsModel    knobs that depend on the model it meets
    Sweeps       goes through the blocks one by one, so that weights may stay on disk
    LearnsBlocks with Sweeps: trains each block on the way, which takes memory beside it

Which of them a stage offers is decided by its methods: there is nothing to inherit.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Protocol, runtime_checkable

from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from compresso.arch.base import Arch
from compresso.core.axis import Axis
from compresso.core.budget import Budget
from compresso.core.cost import CostModel
from compresso.core.plan import Plan
from compresso.core.row import Row
from compresso.stage.work import Learning, Passes

if TYPE_CHECKING:  # a job knows nothing of stages, and this module of jobs and sweeps their types alone
    from compresso.edit.merge_experts import Merging
    from compresso.job import Job
    from compresso.sweep.calibration import Calibration
    from compresso.sweep.compressed import Compressed
    from compresso.sweep.shares import ShareAllocation, ShareSearch
    from compresso.sweep.targets import Groups


@runtime_checkable
class Stage(Protocol):
    """One act of a recipe."""

    def __call__(self, job: "Job") -> "Job":
        """Do it and return the job that follows."""
        ...

    def work(self, model: PreTrainedModel, arch: Arch) -> Sequence[Passes]:
        """The passes it takes on a model, which has shapes but no weights; none where it runs nothing."""
        ...


@runtime_checkable
class Shrinks(Protocol):
    """A stage that removes units."""

    def budget(self) -> Budget | None:
        """How much stays; None where no share of the model describes the choice, which `PlansShapes` then does."""
        ...


@runtime_checkable
class PlansShapes(Protocol):
    """A stage whose shapes do not follow from a budget alone: a ratio of units, a range of layers, whole layers."""

    def dry_run_plan(self, axes: Sequence[Axis], cost: CostModel) -> Plan:
        """A plan for units that are all alike. Raises ValueError or BudgetError if there is none."""
        ...


@runtime_checkable
class ReachesLayers(Protocol):
    """A stage that removes whole layers also of models that have no axis of them."""

    def reaches_layers(self) -> bool:
        """It does."""
        ...


@runtime_checkable
class ChecksModel(Protocol):
    """A stage that can refuse a model by its shapes."""

    def check(self, model: PreTrainedModel, arch: Arch) -> object:
        """Raise CompressoError for a model, without weights, that the stage cannot work on."""
        ...


@runtime_checkable
class KeepsZeros(Protocol):
    """A stage that keeps the zeros of the weights it finds, and needs some."""

    def check_zeros(self, job: "Job") -> object:
        """Raise RecipeError for weights of which too few are 0."""
        ...


@runtime_checkable
class ChecksTaught(Protocol):
    """A stage that can refuse to be taught by the dense model, by what stages before it took away."""

    def check_taught(self, layers: int, dense: int, removed: Plan) -> object:
        """Raise RecipeError if the model it would meet cannot learn from the dense one.

        Args:
            layers, dense: how many there are of each model.
            removed: what stages before it took, of the dense model's units.
        """
        ...


@runtime_checkable
class ChecksData(Protocol):
    """A stage that can refuse examples."""

    def check_data(
        self,
        rows: Sequence[Row],
        tokenizer: PreTrainedTokenizerBase | None,
        config: PreTrainedConfig,
        window: int | None,
    ) -> None:
        """Raise CompressoError for data that the stage cannot work on; window: tokens that plain text was cut to."""
        ...


@runtime_checkable
class ChecksProcesses(Protocol):
    """A stage that several processes can run as some of its knobs are set alone."""

    def check_processes(self, n: int) -> None:
        """Raise RecipeError for a number of processes that cannot run the stage."""
        ...


@runtime_checkable
class ChecksLabels(Protocol):
    """A stage that can refuse the classes that a run decides among."""

    def check_labels(self, labels: Sequence[str]) -> None:
        """Raise CompressoError for classes, by their names in the order of their numbers, that it cannot work on."""
        ...


@runtime_checkable
class Learns(Protocol):
    """A stage that trains."""

    def learning(self) -> Learning:
        """What it trains, and for how long."""
        ...


@runtime_checkable
class Compresses(Protocol):
    """A stage that zeroes or rounds weights where they are."""

    def compressed(self, model: PreTrainedModel, arch: Arch) -> "Compressed":
        """Which of them, and what they take then; from shapes alone."""
        ...


@runtime_checkable
class Merges(Protocol):
    """A stage that may average experts, which takes a time that no number of tokens changes."""

    def merging(self, model: PreTrainedModel, arch: Arch) -> "Merging | None":
        """How many of which width; None where none are. From shapes alone."""
        ...


@runtime_checkable
class Remarks(Protocol):
    """A stage that may have to do otherwise than it was asked to."""

    def remarks(self, model: PreTrainedModel, arch: Arch) -> list[str]:
        """A sentence for each such thing on a model; none if there are none. From shapes alone."""
        ...


@runtime_checkable
class NeedsMore(Protocol):
    """A stage that needs more than its card says if its knobs ask for it."""

    def needs_more(self) -> tuple[str, ...]:
        """What it needs beside that: "data"."""
        ...


@runtime_checkable
class Follows(Protocol):
    """A stage that, as its knobs are set, works on what another left in the same run."""

    def follows(self) -> tuple[str, str]:
        """The stage that has to stand before it, and why, with the cure; two empty words if any may."""
        ...


class FindsShares(Protocol):
    """A stage that can search for a share of zeros of each layer."""

    @property
    def allocation(self) -> "ShareAllocation": ...

    @property
    def search(self) -> "ShareSearch": ...

    def check(self, model: PreTrainedModel, arch: Arch) -> "Groups":
        """The linears that it works on. Raises RecipeError or ArchError."""
        ...


@runtime_checkable
class FitsModel(Protocol):
    """A stage of which some knobs only act on some models."""

    def fitted(self, axes: Sequence[Axis]) -> Stage:
        """The stage that it is on a model with these axes; the same where all of its knobs act."""
        ...


@runtime_checkable
class Sweeps(Protocol):
    """A stage that sweeps over the blocks: one of them is in memory at a time, so a model may be larger.

    Args:
        calibration: what it is calibrated on.
        keeps_moments: whether it holds a second moment [in, in] of each group of linears.
    """

    keeps_moments: ClassVar[bool]

    @property
    def calibration(self) -> "Calibration": ...

    def check(self, model: PreTrainedModel, arch: Arch) -> "Groups":
        """The linears that it works on. Raises RecipeError or ArchError."""
        ...


@runtime_checkable
class LearnsBlocks(Protocol):
    """A sweep that trains each block with gradients.

    Args:
        learned_bytes: held meanwhile for each of the block's weights.
    """

    learned_bytes: ClassVar[int]
