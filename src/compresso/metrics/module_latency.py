"""What each kind of module takes at each of a few widths, timed in place: inside whole models, where weights come from
memory as they do in use, not from a processor's cache.

Every model that is timed has all widths in it, in other layers each time, and the models take turns: what disturbs the
machine disturbs all widths alike. A layer's attention counts from the layer's begin to the end of the attention, its
FFN from there to the layer's end, so that norms and residual sums are counted where they leave. What no layer holds
(embeddings, head, final norm) is the rest of the forward.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import fmean, median

import torch
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from compresso.arch.base import Arch, arch_for
from compresso.core.latency_table import Conditions
from compresso.errors import ArchError
from compresso.metrics.forwards import TOKENS, Forwards
from compresso.metrics.shaped import ShapedModels, Widths


@dataclass(frozen=True)
class ModuleTimes:
    """Milliseconds of one forward, medians.

    Args:
        fixed: what no layer holds.
        attention, ffn: units of a layer -> its attention, its FFN; 0 for a sub-layer that is not there.
        measured: forwards that they are over.
    """

    fixed: float
    attention: dict[int, float]
    ffn: dict[int, float]
    measured: int


class Stamps:
    """Moments of one forward, in order, of the processor or of a GPU's stream."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._moments: list[float] = []
        self._events: list[torch.cuda.Event] = []

    def __call__(self, *_: object) -> None:
        """Note this moment; hooks call it with what they see."""
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._events.append(event)
        else:
            self._moments.append(1000 * time.perf_counter())

    def take(self) -> list[float]:
        """The moments since the last time, in milliseconds after some instant."""
        if self._cuda:
            torch.cuda.synchronize()
            found = [self._events[0].elapsed_time(event) for event in self._events] if self._events else []
            self._events.clear()
            return found
        found = list(self._moments)
        self._moments.clear()
        return found


def time_modules(
    make: ShapedModels,
    levels: tuple[Sequence[int], Sequence[int]],
    layers: int,
    conditions: Conditions,
    rounds: int,
    *,
    stamps: Stamps | None = None,
    advance: Callable[[str], None] = lambda _: None,
) -> ModuleTimes:
    """Time every level of both kinds of module.

    Args:
        make: builds the models.
        levels: key/value heads and channels to be timed, ascending, all units last.
        layers: of the model.
        conditions: what a forward is.
        rounds: turns of each model that count, after one that does not.
        stamps: None for those of the models' device.
        advance: called before each turn.

    Raises:
        ArchError: modules that are not run one after the other, attention first.
    """
    stamps = stamps or Stamps(make.device)
    shapes = latin(*levels, layers)
    each = 1 if conditions.phase == "prefill" else TOKENS
    works = [Forwards(make.model(widths), conditions, each * (rounds + 1)) for widths in shapes]
    fixed: list[float] = []
    seen: tuple[dict[int, list[float]], dict[int, list[float]]] = ({}, {})
    for turn in range(rounds + 1):
        for number, (work, widths) in enumerate(zip(works, shapes, strict=True), start=1):
            advance(f"model {number} of {len(shapes)}, {f'round {turn} of {rounds}' if turn else 'warm-up'}")
            if turn == 0:
                work.read()
            with stamped(work.model, arch_for(work.model.config), make.attention, stamps):
                for _ in range(each):
                    stamps()
                    work()
                    stamps()
                    parts, rest = split(stamps.take(), len(widths))
                    if turn:
                        fixed.append(rest)
                        for kind in (0, 1):
                            _add(seen[kind], widths, parts, kind)
    attention, ffn = ({n: median(times) for n, times in sorted(one.items())} for one in seen)
    return ModuleTimes(median(fixed), attention, ffn, len(fixed))


def latin(heads: Sequence[int], channels: Sequence[int], layers: int) -> list[Widths]:
    """Widths of models that together hold every level in every layer, each pair of kinds in many combinations.

    The first layer is never without attention, since a key/value cache begins with it.

    >>> latin([0, 2], [0, 4], 3)
    [[(2, 0), (2, 4), (0, 4)], [(2, 4), (0, 0), (2, 0)]]
    """
    found: list[Widths] = []
    for shift in range(max(len(heads), len(channels))):
        widths = [
            (heads[(layer + shift) % len(heads)], channels[(layer + layer // len(heads) + shift) % len(channels)])
            for layer in range(layers)
        ]
        widths[0] = (widths[0][0] or heads[-1], widths[0][1])
        found.append(widths)
    return found


@contextmanager
def stamped(model: PreTrainedModel, arch: Arch, attention: str, stamps: Stamps) -> Iterator[None]:
    """While the block runs, each layer notes when it begins, when its attention is done and when it ends.

    attention: name of that module within a layer.
    """
    handles: list[RemovableHandle] = []
    for block in arch.blocks(model):
        handles.append(block.register_forward_pre_hook(stamps))
        handles.append(block.get_submodule(attention).register_forward_hook(stamps))
        handles.append(block.register_forward_hook(stamps))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def split(moments: Sequence[float], layers: int) -> tuple[list[tuple[float, float]], float]:
    """Attention and FFN of each layer, and the rest, from the moments of one forward.

    Args:
        moments: begin, then of each layer begin, end of attention and end, then end.
        layers: how many.

    Raises:
        ArchError: others than these were noted.
    """
    if len(moments) != 3 * layers + 2:
        raise ArchError(
            f"a forward noted {len(moments)} moments where {3 * layers + 2} were wanted: its layers do not run one"
            " after the other, so that their modules cannot be timed apart"
        )
    parts = [(moments[i + 1] - moments[i], moments[i + 2] - moments[i + 1]) for i in range(1, 3 * layers + 1, 3)]
    whole = moments[-1] - moments[0]
    return parts, max(0.0, whole - sum(attention + ffn for attention, ffn in parts))


def _add(seen: dict[int, list[float]], widths: Widths, parts: Sequence[tuple[float, float]], kind: int) -> None:
    """Of each width in a model the mean over its layers, so that their sum is that of the forward."""
    for level in {one[kind] for one in widths}:
        times = [part[kind] for one, part in zip(widths, parts, strict=True) if one[kind] == level]
        seen.setdefault(level, []).append(fmean(times))
