"""What both models of a run were found to be, and the report of it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from compresso.checkpoint.source import Identity, Source
from compresso.metrics.guard import Guard
from compresso.metrics.record import Change, Environment, Measurement, ModelResults, Report, Sample, Segmented
from compresso.metrics.size import size_measurements

DENSE, PRUNED = "dense", "pruned"
"""What the two models of a run are called in its records, whatever was done."""
COMPRESSED = "compressed"
"""What the second is called to a person while nobody has noted yet what was done to it."""
_SHOWN = 80
"""Characters of a text in a message."""


@dataclass
class Evaluated:
    """What one model was found to be: numbers, texts or pictures, and what was not measured, with the reason."""

    measurements: list[Measurement] = field(default_factory=list[Measurement])
    samples: tuple[Sample, ...] = ()
    segmented: tuple[Segmented, ...] = ()
    not_measured: dict[str, str] = field(default_factory=dict[str, str])
    changes: list[Change] = field(default_factory=list[Change])

    def numbers(self, loss: float | None, examples: int) -> dict[str, float]:
        """What was measured, by name, the first of each; with the loss on so many held-out examples, if any."""
        found = {one.name: one.value for one in reversed(self.measurements)} | {"texts": float(len(self.samples))}
        return found | ({} if loss is None else {"loss": loss, "examples": float(examples)})


@dataclass(frozen=True)
class FinalEvaluation:
    """Both models' results, and the verdict on the smaller one."""

    dense: Evaluated
    pruned: Evaluated
    guard: Guard

    def example(self) -> str:
        """One text of each model on the first prompt whose texts differ, in a sentence; "" where there are none."""
        pairs = list(zip(self.dense.samples, self.pruned.samples, strict=False))
        for dense, pruned in sorted(pairs, key=lambda pair: pair[0].text == pair[1].text):
            shown = [" ".join(text.split())[:_SHOWN] for text in (dense.prompt, dense.text, pruned.text)]
            return f" Asked {shown[0]!r}, the dense model writes {shown[1]!r}, the {COMPRESSED} one {shown[2]!r}."
        return ""

    def report(self, dense: Source, result: Identity, folder: Path, counts: Mapping[str, Mapping[str, Any]]) -> Report:
        """The report, once the smaller model is written.

        Args:
            dense: the model the run started from.
            result, folder: the checkpoint that was written.
            counts: "before" and "after", as `measure.size.counts` gives them.
        """
        here = Environment.here()
        sizes = (
            (DENSE, dense.identity, self.dense, size_measurements(counts["before"], dense.folder, here)),
            (PRUNED, result, self.pruned, size_measurements(counts["after"], folder, here)),
        )
        models = tuple(
            ModelResults(
                name=name,
                model=identity.name,
                fingerprint=identity.fingerprint,
                measurements=(*size, *results.measurements),
                samples=results.samples,
                segmented=results.segmented,
                not_measured=results.not_measured,
                changes=tuple(results.changes),
            )
            for name, identity, results, size in sizes
        )
        return Report(created=datetime.now(UTC).isoformat(timespec="seconds"), models=models)
