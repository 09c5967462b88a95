"""The parity check: what a model computes, what an engine computes from the files written of it, and whether that is
the same.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from compresso.engines.transformers_process import continued

TEXT = "The house by the river is 42 years old, and the"


class Format(StrEnum):
    """What is written of a model, and opened by engines; all but the first are formats of `compresso export`."""

    CHECKPOINT = "checkpoint"
    GGUF = "gguf"
    ONNX = "onnx"
    PACKED = "compressed-tensors"
    DECI = "vllm-deci"
    LOW_RANK = "low-rank"
    SLICED = "sliced"


@dataclass(frozen=True)
class Reference:
    """What a model computes, in float32.

    Args:
        ids: of a text [seq].
        logits: after each of them [seq, vocabulary].
        greedy: the likeliest next ids, one after the other [new_tokens].
        dtype: that the written weights have: f32, f16, bf16 or a quantised one.
        rounding: largest difference that rounding makes to a logit: of its activations, as an engine does, or of
            weights that were turned into another basis.
    """

    ids: Tensor
    logits: Tensor
    greedy: Tensor
    dtype: str = "f32"
    rounding: float = 0.0


@dataclass(frozen=True)
class Parity:
    """How an engine compares with the live model.

    Args:
        engine: its name, with the format that it read.
        opens: "yes" only if it opens and computes the same.
        reason: one line; empty for a plain yes.
        difference: largest, of probabilities (llama.cpp, vLLM) or of logits (others); None if nothing was computed.
        same_tokens: how many of the greedy tokens come before the first that differs.
    """

    engine: str
    opens: Literal["yes", "no", "not installed", "not checked"]
    reason: str = ""
    difference: float | None = None
    same_tokens: int | None = None


class Engine(Protocol):
    """A program that opens a model in one format.

    Modules of this package list theirs as `ENGINES` and are found by `compresso.engines.registry`.
    """

    @property
    def name(self) -> str:
        """As it stands in records and reports; one engine in two formats has two names."""
        ...

    @property
    def program(self) -> str:
        """As messages call it."""
        ...

    @property
    def reads(self) -> Format:
        """What it opens."""
        ...

    @property
    def command(self) -> str:
        """What a model card says of it: shell commands, with {folder} for the model and {code} for the option that lets
        the code of a native checkpoint run; empty for none.
        """
        ...

    @property
    def listed(self) -> "Listed":
        """When it stands in the results of `compresso verify`."""
        ...

    def missing(self) -> str | None:
        """Why it cannot be run here, with the cure; None if it can."""
        ...

    def parity(self, written: Path, reference: Reference) -> Parity:
        """Open what was written and compare it; a refusal of the engine is a "no".

        Args:
            written: a file or folder of the format that it reads.
            reference: of the model that it was written from.

        Raises:
            CheckpointError: the folder brings code, so that it is not opened.
        """
        ...


@dataclass(frozen=True)
class Listed:
    """When an engine is run by `compresso verify`.

    Args:
        if_absent: whether it is listed also where it could not be run.
        instead_of: name of another, listed before: this one is run only where that one says "no".
    """

    if_absent: bool = True
    instead_of: str | None = None


ALWAYS = Listed()


def reference_of(model: PreTrainedModel, ids: Tensor, dtype: str = "f32") -> Reference:
    """What a live float32 model computes after ids [seq], without a cache."""
    logits, greedy = continued(model, ids)
    return Reference(ids, logits, greedy, dtype)


def ids_of(tokenizer: PreTrainedTokenizerBase | None, size: int) -> Tensor:
    """Ids [seq] of a text; without a tokenizer, or where it writes ids that have no row, a few that the model has."""
    ids = [] if tokenizer is None else list(tokenizer(TEXT)["input_ids"])
    if not ids or max(ids) >= size:
        return torch.arange(1, 13) * 7919 % size
    return torch.tensor(ids, dtype=torch.long)


def within_rounding(found: Tensor, wanted: Tensor, within: float) -> bool:
    """Whether the difference of two logits [seq, vocabulary] is at most a share of the largest logit, or of 1 if that
    is more; NaN is not.
    """
    return float((found - wanted).abs().max()) <= within * max(1.0, float(wanted.abs().max()))


def judged(
    engine: str, difference: float, within: bool, found: Sequence[int], wanted: Sequence[int], what: str
) -> Parity:
    """Yes if the difference is allowed. Tokens may part where two are equally likely, so they are counted, not judged.

    Args:
        engine: its name.
        difference: largest, of what was compared.
        within: whether it is allowed.
        found: greedy ids of the engine.
        wanted: those of the live model.
        what: was compared, such as logits.
    """
    same = next(
        (step for step, (one, other) in enumerate(zip(found, wanted, strict=True)) if one != other), len(wanted)
    )
    reason = "" if within else f"{what} differ by up to {difference:.2g}"
    return Parity(engine, "yes" if within else "no", reason, difference, same)
