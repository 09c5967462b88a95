"""Knobs that many stages share, as values that a stage is composed of. They hold data, and read it in a few ways.

A stage names a group as a field with the defaults of its own: `removes: Removes = Removes(kinds=(Kind.HEAD,))`.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le
from torch import Tensor

from compresso.core.axis import Axis, Kind
from compresso.core.budget import Budget
from compresso.core.quantities import Budgeted
from compresso.stage.flat import group
from compresso.training.duration import Duration, shortened, updates
from compresso.training.order import ShuffledBatches

Count = Annotated[int, Ge(1)]
_WORDS = {
    Kind.HIDDEN: "hidden dimensions",
    Kind.QUERY: "query heads",
    Kind.HEAD_CHANNEL: "channels of heads",
}


@group(last=("layout", "multiple_of", "floor"))
class Removes:
    """What may leave, and down to which size.

    Args:
        keep: share of `of` that stays, of the model that the stage receives.
        of: "blocks" (parameters of the layers), "total" (all parameters), "macs" (a token), "kv" (cache entries),
            "bytes_at_context" (weights and cache) or "milliseconds" (measured); the run says at which context, and by
            which table.
        kinds: what may be removed.
        layout: "free" or "uniform" (equal widths in all layers).
        multiple_of: kind -> multiple that kept counts are rounded to.
        floor: kind -> fewest units a layer keeps; "keep" for its share of them.

    Raises ValueError for kinds that hold the vocabulary.
    """

    keep: Annotated[float, Gt(0), Le(1)] = 0.7
    of: Budgeted = "blocks"
    kinds: tuple[Kind, ...] = (Kind.HEAD, Kind.CHANNEL)
    layout: Literal["free", "uniform"] = "free"
    multiple_of: Mapping[Kind, Count] | None = None
    floor: Mapping[Kind, Annotated[int, Ge(0)] | Literal["keep"]] | None = None

    def __post_init__(self) -> None:
        """Refuse tokens as units."""
        if Kind.VOCAB in self.kinds:
            raise ValueError(
                "kinds names vocab, which only the stage 'cut_vocab' removes: the tokenizer has to follow. Leave it"
                " out, and put cut_vocab before this stage"
            )

    def budget(self) -> Budget:
        """The budget these knobs describe."""
        return Budget(
            self.keep,
            self.of,
            self.kinds,
            uniform_over=self.kinds if self.layout == "uniform" else (),
            multiple_of=self.multiple_of or {},
            floor=self.floor or {},
        )

    def only(self, *known: Kind, what: str) -> None:
        """Refuse kinds that a stage cannot choose among. what: becomes of the others, such as "are scored". Raises
        ValueError.
        """
        if not self.kinds or not set(self.kinds) <= set(known):
            words = [_WORDS.get(kind, f"{kind}s") for kind in known]
            raise ValueError(
                f"kinds={[*map(str, self.kinds)]}: only {', '.join(words[:-1])} and {words[-1]} {what}; give"
                f" [{', '.join(known)}] or one of them"
            )

    def no_queries(self) -> None:
        """Refuse query heads, for stages that would not keep as many of them in every key/value head. Raises
        ValueError.
        """
        if Kind.QUERY in self.kinds:
            raise ValueError("kinds names query: query heads leave one by one in the stage 'bonsai' alone; name head")

    def among(self, axes: Sequence[Axis]) -> list[Axis]:
        """The axes whose units may be removed."""
        return [axis for axis in axes if axis.kind in self.kinds]


@group()
class Calibrates:
    """What a stage looks at before it decides.

    Args:
        batches, batch, micro_batch: calibration batches, their examples, and examples a forward pass.
    """

    batches: Count = 16
    batch: Count = 16
    micro_batch: Count = 4

    @property
    def examples(self) -> int:
        """How many are looked at in all, at most: no example is looked at twice."""
        return self.batches * self.batch

    def among(self, n: int) -> int:
        """How many are looked at of the `n` that there are."""
        return min(self.examples, n)

    def read(self, source: ShuffledBatches) -> Iterator[dict[str, Tensor]]:
        """The batches, `micro_batch` examples at a time; each example once at most, so that where there are fewer than
        asked for the last batch is a smaller one.

        source: its batches hold `batch` examples.
        """
        n = self.among(source.examples)
        return (
            source.at(first // self.batch, range(start, min(start + self.micro_batch, self.batch, n - first)))
            for first in range(0, n, self.batch)
            for start in range(0, min(self.batch, n - first), self.micro_batch)
        )


@group()
class TunesLora:
    """The adapters that learn in the place of weights.

    Args:
        rank, alpha, targets, dropout: LoRA.
    """

    rank: Count = 8
    alpha: Annotated[float, Gt(0)] = 16.0
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    dropout: Annotated[float, Ge(0), Le(1)] = 0.0


@group()
class AdamW:
    """How what learns follows its gradients.

    Args:
        lr, lr_schedule, warmup, clip: AdamW.
        lr_at_hidden: hidden size that `lr` is meant for; other widths scale it by (lr_at_hidden / hidden size)^0.75.
            None: as it is.
    """

    lr: Annotated[float, Ge(0)] = 5e-4
    lr_at_hidden: Count | None = None
    lr_schedule: Literal["constant", "linear", "cosine"] = "cosine"
    warmup: Annotated[int, Ge(0)] = 0
    clip: Annotated[float, Ge(0)] | None = 1.0


@group(last=("checkpointing", "save_adapter", "precision", "max_steps", "save_every"))
class Trains:
    """How long a stage trains, and how.

    Args:
        steps: updates or epochs.
        batch: examples an update, over all processes and micro-batches; micro_batch: examples a forward pass.
        checkpointing: recompute activations in the backward pass.
        save_adapter: also keep the adapter as it was before merging, in the result's folder `adapters`.
        precision: "auto", "no" or "bf16" autocast.
        max_steps: cap on all updates together; phases shrink with it.
        save_every: updates between training checkpoints.
    """

    steps: Duration = 300
    batch: Count = 16
    micro_batch: Count = 16
    checkpointing: bool = False
    save_adapter: bool = False
    precision: Literal["auto", "no", "bf16"] = "auto"
    max_steps: Count | None = None
    save_every: Count = 50

    def updates(self, examples: int, phases: Sequence[int | str] | None = None) -> list[int]:
        """Updates of each phase under the cap, on `examples` training examples; one phase of `steps` if none are
        named.
        """
        asked = [updates(one, examples, self.batch) for one in ([self.steps] if phases is None else phases)]
        return shortened(asked, self.max_steps)


@group(last=("evaluations", "patience"))
class Watches:
    """Whether the best state on held-out examples is kept, against overfitting.

    Args:
        evaluations: how often the held-out loss is looked at, before the first update, after the last and evenly
            between; 0 never, and the last state is kept.
        patience: evaluations in a row that may be no better than the best before training stops.

    Raises ValueError for one evaluation, which compares nothing.
    """

    evaluations: Annotated[int, Ge(0), Le(10)] = 0
    patience: Count = 2

    def __post_init__(self) -> None:
        """Refuse a single evaluation."""
        if self.evaluations == 1:
            raise ValueError("evaluations=1 compares nothing; give 0, or 2 to 10")
