"""Accounts, records and run folders made by hand: a dense model of two layers and what runs made of it."""

import copy
import json
import math
from pathlib import Path
from typing import Any

from compresso.core.plan import Plan
from compresso.metrics.guard import judge
from compresso.metrics.record import Environment, Measurement, ModelResults, Report, Sample
from compresso.report.records import RunRecords

DENSE, SMALL, SMALLER = "sha256:" + "d" * 64, "sha256:" + "a" * 64, "sha256:" + "b" * 64
OLD, NEW = "2026-01-01T00:00:00+00:00", "2026-02-01T00:00:00+00:00"
TEXT = {"corpus": "wikitext2", "split": "test", "seq_len": 2048}
TASK = {"shots": 0, "limit": 50}
ROUNDS = {"batch": 1, "rounds": 5}
PLAN = Plan(
    {
        "layers.0.heads": (0, 2, 3),
        "layers.0.channels": tuple(range(5)),
        "layers.1.heads": (),
        "layers.1.channels": (1, 2),
    }
)
UNITS = {"layers.0.heads": "3/4", "layers.0.channels": "5/8", "layers.1.heads": "0/4", "layers.1.channels": "2/8"}


def environment(hardware: str = "a processor") -> Environment:
    return Environment(
        device="cpu", hardware=hardware, threads=1, system="Linux", dtype="float32", versions={"torch": "2.13.0"}
    )


def number(
    name: str,
    value: float,
    unit: str = "1",
    how: Any = "measured",
    protocol: Any = None,
    hardware: str = "a processor",
    **more: Any,
):
    return Measurement(
        name=name, value=value, unit=unit, how=how, protocol=protocol or TEXT, environment=environment(hardware), **more
    )  # fmt: skip


def numbers(total: int, perplexity: float, accuracy: float, speed: float) -> tuple[Measurement, ...]:
    """A plausible set for one model."""
    return (
        number("parameters/total", total, "parameters", "counted", {"tied": "counted once"}),
        number("bytes/disk", 4 * total, "bytes", "measured", {"files": "safetensors"}),
        number("wikitext2/perplexity", perplexity, stderr=0.05, n=1000),
        number("piqa/acc", accuracy, "share", protocol=TASK, stderr=0.05, n=50, seed=0),
        number("decode/batch1", speed, "tokens/s", protocol=ROUNDS, low=0.95 * speed, high=1.05 * speed, n=5),
    )


def dense(*more: Measurement, samples: tuple[Sample, ...] = ()) -> ModelResults:
    measured = (*numbers(1000, 10.0, 0.6, 100.0), *more)
    return ModelResults(
        name="dense", model="tiny", fingerprint=DENSE, measurements=measured, samples=samples or said("a dog.")
    )


def pruned(
    name: str = "compresso", fingerprint: str = SMALL, perplexity: float = 12.0, remark: str | None = None
) -> ModelResults:
    relative = (
        number("decode_speedup/batch1", 0.9, "1", protocol=ROUNDS, low=0.8, high=1.0, n=5, remark=remark),
        number("decode_bound/batch1", 1.4, "1", "estimated", {"formula": "ratio of bytes read"}),
        number("kl", 0.25, "nats/token", stderr=0.01),
    )
    measured = (*numbers(700, perplexity, 0.55, 90.0), *relative)
    return ModelResults(
        name=name, model=name, fingerprint=fingerprint, measurements=measured, samples=said("a a a a", broken=True)
    )


def said(text: str, broken: bool = False) -> tuple[Sample, ...]:
    return (Sample(prompt="This is", text=text, tokens=4, repetition=0.75 if broken else 0.0, degenerate=broken),)


def report_of(*models: ModelResults, created: str = OLD) -> Report:
    return Report(created=created, models=models)


def curves(n: int = 20) -> dict[str, list[float | None]]:
    """What learning gates under a Lagrangian logs; the multipliers start after the first update."""
    rise = [0.3 * i / n for i in range(n)]
    return {
        "update": [float(i) for i in range(n)],
        "sparsity": rise,
        "target": [min(0.3, 2 * value) for value in rise],
        "open": [1 - value for value in rise],
        "lambda1": [None, *(0.1 * i for i in range(1, n))],
        "lambda2": [None, *(0.2 * i for i in range(1, n))],
        "language": [2 + 1 / (i + 1) for i in range(n)],
        "loss": [2.1 + 1 / (i + 1) for i in range(n)],
    }


def records(measured: Report | None = None, model: str = "tiny", **changes: Any) -> dict[str, Any]:
    """The records of a run, as its records.json holds them."""
    made: dict[str, Any] = {
        "format": 3,
        "recipe": {
            "name": "compresso",
            "title": "learned gates",
            "paper": "2310.05015",
            "description": "Our default.",
            "data": {"source": "rows.jsonl", "prompt": True},
            "stages": [
                {"learn_gates": {"keep": 0.7, "of": "blocks", "kinds": ["head", "channel"]}},
                {"recover": {"steps": 20}},
            ],
        },
        "model": {"name": model, "fingerprint": DENSE},
        "data": {
            "source": "rows.jsonl, 48 rows",
            "kind": "text",
            "sha256": "c" * 64,
            "skipped_lines": 0,
            "skipped": [],
            "examples": {"n": 48, "tokens": 960},
        },
        "prompt": {"version": "v1", "sha256": "e" * 64},
        "seed": 3,
        "versions": {"compresso": "0.1.0", "torch": "2.13.0"},
        "machine": {"system": "Linux", "processor": "x86_64", "threads": 1, "cuda": None},
        "before": {
            "parameters": {"total": 1000, "blocks": 800},
            "macs_per_token": 900,
            "kv_bytes_per_token": 64,
            "held_loss": 2.0,
        },
        "after": {
            "parameters": {"total": 760, "blocks": 560},
            "macs_per_token": 650,
            "kv_bytes_per_token": 24,
            "held_loss": 2.2,
        },
        "stages": {
            "learn_gates": {"units_kept": UNITS, "kept_share_of_blocks": 0.7, "curve": curves(), "seconds": 12.5},
            "recover": {"curve": {"update": [0.0, 1.0], "loss": [2.4, 2.3]}, "seconds": 130.0},
        },
        "seconds": 150.0,
        "layout": "native",
        "dtype": "float32",
        "bytes": 3040,
        "reopened_max_abs_difference": 0.0,
        "guard": judge(vocabulary=1000, dense_loss=2.0, pruned_loss=2.0 + math.log(2)).model_dump(mode="json"),
        "report": (measured or report_of(dense(), pruned())).model_dump(mode="json"),
    }
    return copy.deepcopy({**made, **changes})


def checked(facts: dict[str, Any]) -> RunRecords:
    return RunRecords.checked(facts, "the records")


def run_folder(folder: Path, facts: dict[str, Any] | None = None, plan: Plan = PLAN) -> Path:
    """A run's folder, without its weights."""
    folder.mkdir(parents=True)
    (folder / "records.json").write_text(json.dumps(records() if facts is None else facts))
    (folder / "plan.json").write_text(plan.to_json())
    return folder


def report_file(path: Path, *models: ModelResults, created: str = OLD) -> Path:
    path.write_text(report_of(*models, created=created).model_dump_json())
    return path
