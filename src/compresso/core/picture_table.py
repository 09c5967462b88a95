"""What a model of pictures takes on one machine when it is narrower and narrower: time and memory by its
multiply-accumulates.

A network of stages has no layers that are alike, so that no curve of one module tells the others; what is measured are
whole networks, from the dense one down, each with the same share of every layer's channels. Between two of them time
and memory are read off a line; below the smallest nothing is known, and nothing is promised.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any, Literal

from compresso.core import strict_json
from compresso.core.cost_table import Field, monotone

FORMAT = 1
Quantity = Literal["milliseconds", "bytes"]


@dataclass(frozen=True)
class Width:
    """One network that was measured.

    Args:
        share: of each layer's channels.
        macs: multiply-accumulates of one picture.
        milliseconds: of one forward of one picture, the median.
        bytes: the largest resident size of a process that loads it and reads one picture, libraries included.
    """

    share: float
    macs: float
    milliseconds: float
    bytes: float


@dataclass(frozen=True)
class PictureTable:
    """Time and memory of a model of pictures.

    Args:
        model: facts of the dense network.
        machine: hardware, device, threads and system.
        dtype: of the weights.
        widths: the networks, in any order.
        created: date and time, UTC.
        versions: of the packages.

    Raises:
        ValueError: fewer than two networks, or a number that is not positive and finite.
    """

    model: Mapping[str, Field]
    machine: Mapping[str, Field]
    dtype: str
    widths: tuple[Width, ...]
    created: str = ""
    versions: Mapping[str, str] = field(default_factory=dict[str, str])

    def __post_init__(self) -> None:
        """Order the networks and make both curves monotone, as noise would let a wider one cost less."""
        numbers = [value for one in self.widths for value in asdict(one).values()]
        if len(self.widths) < 2 or not all(math.isfinite(value) and value > 0 for value in numbers):
            raise ValueError("wanted at least two networks with finite numbers above 0; measure it again")
        ordered = sorted(self.widths, key=lambda one: one.macs)
        times, sizes = (monotone([getattr(one, name) for one in ordered]) for name in ("milliseconds", "bytes"))
        level = zip(ordered, times, sizes, strict=True)
        smooth = tuple(Width(one.share, one.macs, ms, size) for one, ms, size in level)
        object.__setattr__(self, "widths", smooth)

    def of(self, quantity: Quantity, macs: float) -> float:
        """What a network of so many multiply-accumulates takes; beyond either end what that one takes."""
        points = [(one.macs, float(getattr(one, quantity))) for one in self.widths]
        if macs <= points[0][0]:
            return points[0][1]
        for (low, first), (high, second) in pairwise(points):
            if macs <= high:
                return first + (second - first) * (macs - low) / (high - low) if high > low else second
        return points[-1][1]

    def to_json(self) -> str:
        """As JSON text that `from_dict` reads, parsed."""
        told = {"format": FORMAT, "kind": "pictures", **asdict(self)}
        return json.dumps(told, indent=1, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> "PictureTable":
        """Read what `to_json` wrote. Raises ValueError for anything else."""
        return cls.from_dict(strict_json.loads(text))

    @classmethod
    def from_dict(cls, told: object) -> "PictureTable":
        """Read it, parsed. Raises ValueError for anything else."""
        wanted = "not a table of a model of pictures; wanted what `compresso latency --output` writes for one"
        if not isinstance(told, dict) or told.get("kind") != "pictures" or told.get("format") != FORMAT:  # pyright: ignore
            raise ValueError(wanted)
        given: dict[str, Any] = {str(name): value for name, value in told.items() if name not in ("format", "kind")}  # pyright: ignore
        try:
            widths: Sequence[Mapping[str, Any]] = given.pop("widths")
            return cls(widths=tuple(Width(**{key: float(n) for key, n in one.items()}) for one in widths), **given)
        except KeyError as error:
            raise ValueError(f"{wanted} ({error} is missing)") from error
        except (TypeError, AttributeError, OverflowError) as error:
            raise ValueError(f"{wanted} ({error})") from error
