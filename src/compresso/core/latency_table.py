"""What the modules of a model take on one machine: a curve over key/value heads, one over channels, and the rest.

ZipLM (arXiv 2302.04089, section 3.2) prunes to such a table. All layers of a model have modules of the same kind, so
that one curve a kind describes them; a model costs the rest and the sum over its layers. A table holds for the shapes,
the machine and the number of threads that it was measured with, and says how it was measured.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from compresso.core import strict_json
from compresso.core.axis import Axis, Kind
from compresso.core.cost_table import CostTable, Field, every_count, monotone
from compresso.core.plain_values import shown

FORMAT = 1
Phase = Literal["decode", "prefill"]
"""One token after a context that was read before, or the context itself."""
INVARIANTS = ("hidden_size", "head_dim", "queries_per_kv_head", "vocab_size")
"""Facts of a model that must stay while it loses units, for a curve to hold."""


@dataclass(frozen=True)
class Conditions:
    """How one forward was timed.

    Args:
        engine: "torch", "onnxruntime" or "llama.cpp".
        phase: see `Phase`.
        batch: sequences at a time.
        context: tokens of each; before a decoded one, or those of a prefill.
        dtype: of the weights, as the engine names it.
    """

    engine: str
    phase: Phase
    batch: int
    context: int
    dtype: str

    @property
    def words(self) -> str:
        """As it stands in messages: "decode, batch 1, 512 tokens, torch float32"."""
        return f"{self.phase}, batch {self.batch}, {self.context} tokens, {self.engine} {self.dtype}"


@dataclass(frozen=True)
class LatencyTable:
    """Milliseconds of one forward of a model, by module.

    Args:
        model: facts of the shapes that were measured.
        machine: hardware, device, threads and system.
        conditions: how a forward was timed.
        fixed: of embeddings, head, final norm, and whatever no layer holds.
        attention: key/value heads of a layer -> of its attention with its norm.
        ffn: channels of a layer -> of its FFN with its norm.
        how: "in place" (modules timed inside whole models) or "fitted" (to the times of whole files).
        measured: forwards that the medians are over.
        error: of a fit, its largest relative miss; None where nothing was fitted.
        versions: of the packages.
        created: date and time, UTC.

    Raises:
        ValueError: a time that is negative or not finite, or a curve without a level.
    """

    model: Mapping[str, Field]
    machine: Mapping[str, Field]
    conditions: Conditions
    fixed: float
    attention: Mapping[int, float]
    ffn: Mapping[int, float]
    how: str = "in place"
    measured: int = 0
    error: float | None = None
    versions: Mapping[str, str] = field(default_factory=dict[str, str])
    created: str = ""

    def __post_init__(self) -> None:
        """Make both curves monotone (least squares), as noise would let more units cost less, and check all times."""
        for name in ("attention", "ffn"):
            curve: Mapping[int, float] = getattr(self, name)
            times = [self.fixed, *curve.values()]
            if not curve or min(curve) < 0 or not all(math.isfinite(time) and time >= 0 for time in times):
                raise ValueError(f"{name} needs finite times from 0 up at numbers of units from 0 up; measure it again")
            counts = sorted(curve)
            level = dict(zip(counts, monotone([float(curve[n]) for n in counts]), strict=True))
            object.__setattr__(self, name, level)

    def milliseconds(self, widths: Sequence[tuple[int, int]]) -> float:
        """Of a model whose layers have these key/value heads and channels, a pair a layer; 0 for an emptied module."""
        return self.fixed + sum(self.of("attention", heads) + self.of("ffn", channels) for heads, channels in widths)

    def of(self, part: Literal["attention", "ffn"], units: int) -> float:
        """Of one module with so many units, interpolated; beyond the largest measured level what that one takes."""
        curve = self.attention if part == "attention" else self.ffn
        return every_count(curve, units)[units]

    def costs(self, axes: Sequence[Axis]) -> CostTable:
        """The table of a model with these axes, in the form that `LookupCost` reads.

        Raises:
            ValueError: an axis has more units than were measured.
        """
        modules: dict[str, dict[int, float]] = {}
        for axis in axes:
            part = {Kind.HEAD: "attention", Kind.CHANNEL: "ffn"}.get(axis.kind)
            if part is None or not axis.size:
                continue
            curve = self.attention if part == "attention" else self.ffn
            if axis.size > max(curve):
                raise ValueError(
                    f"{axis.name} has {axis.size} units; the latency table measures {part} up to {max(curve)}"
                )
            every = every_count(curve, axis.size)
            modules[axis.name] = {n: every[n] for n in (*(m for m in curve if m < axis.size), axis.size)}
        return CostTable({}, modules, self.fixed, "milliseconds")

    def refuse_other(self, what: str, here: Mapping[str, Field], names: Sequence[str] | None = None) -> None:
        """Raise ValueError, naming the first field that differs, unless the table holds for what is here.

        Args:
            what: "model" or "machine": whose facts they are.
            here: these facts, as the table has them under that name.
            names: those to compare; None for all that either has.
        """
        told = self.model if what == "model" else self.machine
        for name in names or sorted({*told, *here}):
            there, mine = told.get(name, "absent"), here.get(name, "absent")
            if there != mine:
                raise ValueError(f"the latency table is of another {what}: {name} is {there} in it, {mine} here")

    def to_dict(self) -> dict[str, Any]:
        """As plain values that `from_dict` reads."""
        curves = {name: {str(n): ms for n, ms in getattr(self, name).items()} for name in ("attention", "ffn")}
        return {"format": FORMAT, "kind": "latency", **asdict(self), **curves}

    def to_json(self) -> str:
        """As JSON text that `from_json` reads."""
        return json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n"

    @classmethod
    def from_dict(cls, told: object) -> "LatencyTable":
        """Read what `to_dict` wrote.

        Raises:
            ValueError: for anything else.
        """
        wanted = "not a latency table; wanted what `compresso latency --output` writes"
        if not isinstance(told, dict) or told.get("kind") != "latency" or told.get("format") != FORMAT:  # pyright: ignore
            raise ValueError(wanted)
        given: dict[str, Any] = {str(name): value for name, value in told.items() if name not in ("format", "kind")}  # pyright: ignore
        try:
            given["conditions"] = _conditions(given["conditions"])
            for name in ("attention", "ffn"):
                given[name] = {int(n): _number(ms) for n, ms in given[name].items()}
            given["fixed"] = _number(given["fixed"])
            for name in ("model", "machine"):
                if not all(isinstance(value, str | int | float | bool) for value in given[name].values()):
                    raise ValueError(f"{wanted}: {name} holds more than plain values")
            return cls(**given)
        except KeyError as error:
            raise ValueError(f"{wanted} ({error} is missing)") from error
        except (TypeError, AttributeError, OverflowError) as error:
            raise ValueError(f"{wanted} ({error})") from error

    @classmethod
    def from_json(cls, text: str | bytes) -> "LatencyTable":
        """Read what `to_json` wrote. Raises ValueError for anything else."""
        return cls.from_dict(strict_json.loads(text))


def _number(value: object) -> float:
    """A number of a file. Raises TypeError for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{shown(value)} is no number")
    return float(value)


def _conditions(told: Mapping[str, Any]) -> Conditions:
    """Conditions from plain values. Raises ValueError for impossible ones, TypeError for unknown or missing ones."""
    found = Conditions(**told)
    whole = all(type(n) is int and n >= 1 for n in (found.batch, found.context))
    if not whole or found.phase not in ("decode", "prefill") or not all(map(str, (found.engine, found.dtype))):
        raise ValueError(f"a latency table cannot have been measured under {dict(told)}; measure it again")
    return found
