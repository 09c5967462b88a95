"""One number that somebody will quote, with everything needed to believe it; the same type in every command and file.

`how` keeps kinds of numbers apart: what a clock or a model's answers gave (measured), what follows exactly from the
shapes (counted), and what a formula predicts (estimated). Tables never put two of them in one column.
"""

import os
import platform
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, StringConstraints, model_validator

How = Literal["measured", "counted", "estimated"]
Setting = str | bool | int | FiniteFloat | None
"""A value of a protocol."""
Protocol = Annotated[dict[str, Setting], Field(min_length=1)]
"""What was done to get a number: corpus, split, sequence length, shots, batch, rounds, ... Never empty."""

_PACKAGES = {"compresso": "compresso-llm", "torch": "torch", "transformers": "transformers"}


@cache
def installed(package: str) -> str:
    """The version of an installed package, read once a process: each reading parses a file of hundreds of lines, and a
    run asks some thirty times.

    Raises importlib.metadata.PackageNotFoundError where it is not installed.
    """
    return version(package)


class Strict(BaseModel):
    """Base of all records: frozen, and an unknown field or a NaN is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Environment(Strict):
    """Where a number was made.

    Args:
        device: "cpu" or "cuda:0".
        hardware: name of the processor or GPU.
        threads: of torch on the CPU.
        system: operating system.
        dtype: of the weights while measured, "float32"; None where it does not matter.
        versions: package -> version.
    """

    device: str
    hardware: str
    threads: int
    system: str
    dtype: str | None = None
    versions: dict[str, str]

    @classmethod
    def here(
        cls, device: torch.device | str = "cpu", dtype: torch.dtype | None = None, **packages: str
    ) -> "Environment":
        """The environment of this process; `packages` names further distributions that matter: `lm_eval="lm_eval"`."""
        device = torch.device(device)
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
        return cls(
            device=str(device),
            hardware=name,
            threads=torch.get_num_threads(),
            system=platform.system(),
            dtype=None if dtype is None else str(dtype).removeprefix("torch."),
            versions={key: installed(package) for key, package in {**_PACKAGES, **packages}.items()},
        )


class Measurement(Strict):
    """One number.

    Args:
        name: "perplexity", "piqa/acc", "decode", "parameters/blocks", ...; one name always has one unit.
        value: the number.
        unit: "tokens/s", "bytes", "nats/token", "share", "1" for a ratio or count without unit.
        how: measured, counted or estimated.
        stderr: standard error of `value` over items, in its unit.
        low, high: smallest and largest value over rounds, in its unit; or the limits of the interval that the protocol
            names under "interval".
        n: items, tokens or rounds behind the value.
        protocol: everything that was decided to get the number.
        seed: of random draws; None where nothing was drawn.
        environment: where it was made.
        remark: a sentence a reader must see beside the number, such as "no speed-up: zeros are stored dense".
    """

    name: str
    value: FiniteFloat
    unit: str
    how: How
    stderr: FiniteFloat | None = None
    low: FiniteFloat | None = None
    high: FiniteFloat | None = None
    n: int | None = None
    protocol: Protocol
    seed: int | None = None
    environment: Environment
    remark: str | None = None

    def same_protocol(self, other: "Measurement") -> bool:
        """Whether two numbers may stand in one column: same name, unit, kind and protocol."""
        return (self.name, self.unit, self.how, self.protocol) == (other.name, other.unit, other.how, other.protocol)


class Sample(Strict):
    """What a model wrote after a prompt, greedily.

    Args:
        prompt: the text given.
        text: the continuation.
        tokens: number of new tokens.
        repetition: share of the continuation's 4-grams that occurred before in it, 0..1.
        degenerate: whether it counts as broken (loops, or is empty).
    """

    prompt: str
    text: str
    tokens: int
    repetition: FiniteFloat
    degenerate: bool


Png = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9+/]+={0,2}$")]
"""A PNG file in base64."""
Colour = Annotated[str, StringConstraints(pattern=r"^#[0-9a-f]{6}$")]


class Segmented(Strict):
    """What a segmenter said of a picture.

    Args:
        number: of the picture among those held out.
        picture: what the model was given.
        labels: its own classes, each in its colour; black where none is counted.
        given: the classes that the model gives.
        right: the share of counted pixels that are given their class, 0..1.
        classes: name -> colour of those that occur in either.
    """

    number: int
    picture: Png
    labels: Png
    given: Png
    right: FiniteFloat
    classes: dict[str, Colour]


class Change(Strict):
    """What became of a share between the dense model and a smaller one, on the same items.

    Args:
        name: of the measurement, such as "trust/ethics"; shares are 0..1, and more is better where it is a score.
        dense, smaller: both models' shares; None where that was not measured.
        difference: the smaller one's less the dense one's.
        low, high: its 95 % interval.
        n: items that both answered.
        test: how it was tested, or how the interval was made.
        p, p_adjusted: of the test, and corrected for the number of tests; None where there are none.
        verdict: "not comparable" for a model that is broken, whatever its numbers say.
        words: what to read beside it.
    """

    name: str
    dense: FiniteFloat | None = None
    smaller: FiniteFloat | None = None
    difference: FiniteFloat | None = None
    low: FiniteFloat | None = None
    high: FiniteFloat | None = None
    n: int | None = None
    test: str = ""
    p: FiniteFloat | None = None
    p_adjusted: FiniteFloat | None = None
    verdict: Literal["within noise", "rose", "fell", "at chance", "not comparable", "not measured"]
    words: str = ""


class ModelResults(Strict):
    """What was measured of one model.

    Args:
        name: what a table calls it: "dense", "compresso", or the folder's name.
        model: name of the checkpoint, without a path.
        fingerprint: "sha256:..." of its weights; the same weights always have the same one.
        measurements: all numbers.
        samples: texts it wrote.
        segmented: pictures, as a segmenter sees them.
        not_measured: what could not be measured -> why.
        changes: how its answers differ from the dense model's, item by item, where both were asked the same.
    """

    name: str
    model: str
    fingerprint: str
    measurements: tuple[Measurement, ...] = ()
    samples: tuple[Sample, ...] = ()
    segmented: tuple[Segmented, ...] = ()
    not_measured: dict[str, str] = {}
    changes: tuple[Change, ...] = ()

    def value(self, name: str) -> float | None:
        """The first number of that name, or None."""
        return next((one.value for one in self.measurements if one.name == name), None)


class Report(Strict):
    """What `evaluate` and `measure` write, and what a run's records hold under "report".

    Args:
        format: version of this schema.
        created: ISO date and time, UTC.
        models: results of each model, the dense one first.
    """

    format: Literal[2] = 2
    created: str
    models: tuple[ModelResults, ...]

    @model_validator(mode="before")
    @classmethod
    def _read_format_1(cls, data: object) -> object:
        """Release 0.1 called the models "subjects"."""
        return upgraded(data, from_format=1, key="subjects", new_key="models")


def upgraded(data: object, *, from_format: int, key: str, new_key: str) -> object:
    """A record of an older format as the next one, which differs in the name of one key; anything else as it is.

    Args:
        data: what was read from JSON.
        from_format: the older format; the next one is one higher.
        key, new_key: the key's name in the older format and in the next.

    Returns:
        A new mapping; `data` itself if it is of another format, or mixes the two, which its validation then reports.
    """
    if not isinstance(data, dict) or data.get("format") != from_format or new_key in data:
        return data
    return {new_key if name == key else name: value for name, value in data.items()} | {"format": from_format + 1}


def _processor() -> str:
    """The CPU's name as the system tells it."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text("utf-8").splitlines() if path.exists() else []
    named = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), None)
    return f"{named or platform.machine()}, {os.cpu_count()} cores"
