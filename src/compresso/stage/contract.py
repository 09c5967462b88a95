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

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol, runtime_checkable

from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from compresso.arch.base import Arch
from compresso.core.axis import Axis, Kind
from compresso.core.budget import Budget
from compresso.core.cost import CostModel
from compresso.core.plan import Plan
from compresso.core.row import Row
from compresso.stage.knobs import Trains, TunesLora

if TYPE_CHECKING:  # a job knows nothing of stages, and this module of jobs and sweeps their types alone
    from compresso.edit.merge_experts import Merging
    from compresso.job import Job
    from compresso.sweep.calibration import Calibration
    from compresso.sweep.compressed import Compressed
    from compresso.sweep.shares import ShareAllocation, ShareSearch
    from compresso.sweep.targets import Groups


@dataclass(frozen=True)
class Foreign:
    """A model that is no form of the run's own: its parameters, and its multiply-accumulates of a whole example."""

    parameters: int
    macs: int


@dataclass(frozen=True)
class Passes:
    """Passes that a stage runs its model through.

    Args:
        what: they are for, in a word: "calibration", "search", "training", "teacher".
        examples: that pass, those of later updates counted anew; at most, since data may hold fewer. None where the
            length of the data decides.
        forwards, backwards: of the whole model, on each of them.
        weights: whether the backward passes take gradients of weights, which cost as much again as those of
            activations.
        dense: whether it is the dense model that runs, not the stage's own.
        other: another model that runs in the place of both; None for none.
    """

    what: str
    examples: int | None
    forwards: float = 1
    backwards: float = 0
    weights: bool = False
    dense: bool = False
    other: Foreign | None = None


@dataclass(frozen=True)
class Learning:
    """What a stage trains.

    Args:
        trains: how.
        phases: durations in the order of training.
        lora: the adapters that learn; None where all weights do.
        gates: kinds of units that have a gate that learns.
        by_adapters: units are scored by their adapters, which targets must allow.
        teacher: the dense model runs beside it.
        chunk: tokens whose logits exist at a time; None for all.
        cached: the teacher runs before it instead, and this many outcomes of each place are kept on disk; None where it
            does not.
        frozen: no weights of the model learn, and no adapters do.
        own: of a model, the numbers that learn beside its weights, by name; None for none.
        spreads: whether FSDP 2 spreads the model over processes meanwhile, and a live teacher's blocks.
        other: counts another model that teaches in the place of the dense one; None where that does.
    """

    trains: Trains
    phases: Sequence[int | str]
    lora: TunesLora | None
    gates: Sequence[Kind] = ()
    by_adapters: bool = False
    teacher: bool = False
    chunk: int | None = None
    cached: int | None = None
    frozen: bool = False
    own: Callable[[PreTrainedModel], dict[str, int]] | None = None
    spreads: bool = False
    other: Callable[[], Foreign] | None = None

    @property
    def updates(self) -> int | None:
        """Updates in all; the cap, or None without one, where an epoch's length decides."""
        if not all(isinstance(phase, int) for phase in self.phases):
            return self.trains.max_steps
        return sum(self.trains.updates(1, self.phases))

    def passes(self) -> list[Passes]:
        """The passes of the training, and the teacher's."""
        examples = None if self.updates is None else self.updates * self.trains.batch
        own = Passes("training", examples, backwards=1, weights=self.lora is None and not self.frozen)
        if not self.teacher:
            return [own]
        other = self.other and self.other()
        return [own, Passes("teacher", examples, dense=other is None, other=other)]

    def parameters_of_teacher(self, dense: int) -> int:
        """Of the model that teaches, 0 for none. dense: those of the dense one."""
        if not self.teacher:
            return 0
        return dense if self.other is None else self.other().parameters


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


def learned_bytes(stage: Sweeps) -> int:
    """What a sweep holds for each weight of the block it is at, beside the block; 0 where nothing learns."""
    return stage.learned_bytes if isinstance(stage, LearnsBlocks) else 0


def sweep_passes(stage: Sweeps, model: PreTrainedModel, arch: Arch, looks: int = 0) -> Passes:
    """The passes of a sweep: each block runs for its statistics, and again for what the edited one outputs.

    looks: passes over the dense blocks before it.
    """
    groups, n_blocks = stage.check(model, arch), len(arch.blocks(model))
    of_blocks = [
        len({group.turn for group in here}) if stage.calibration.true_sequential else 1
        for here in groups.values()
        if here
    ]
    again = max(groups, default=0)  # the last edited block's output is not asked for
    return Passes("calibration", stage.calibration.examples, (sum(of_blocks) + again + looks * n_blocks) / n_blocks)


def search_passes(stage: FindsShares, model: PreTrainedModel, arch: Arch, looked_at: int = 0) -> list[Passes]:
    """The passes of a search for shares: a look at the dense model, each layer at each share alone, from its block on,
    and as many candidates as may be asked for at each stage of selection; none where shares are uniform.

    looked_at: examples that statistics of the dense model are taken on.
    """
    if stage.allocation == "uniform":
        return []
    search, n_blocks = stage.search, len(arch.blocks(model))
    sizes = [
        min(n * search.batch, search.examples) for n in search.evolution.sizes(-(-search.examples // search.batch))
    ]
    levels = 2 * int(search.reach / search.step + 0.5) + 1
    alone = levels * sum(n_blocks - layer for layer in stage.check(model, arch)) / n_blocks
    found = [Passes("search", looked_at), Passes("search", sizes[-1], 3), Passes("search", sizes[0], alone)]
    tried = search.evolution.most if stage.allocation == "evolve" else [0] * len(sizes)
    return found + [Passes("search", size, n) for size, n in zip(sizes, tried, strict=True)]
