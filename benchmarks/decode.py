"""Decode speed of pruned models against dense, beside the bound that bytes read set; interleaved in one process.

    python benchmarks/decode.py [--rounds 9] [--threads 1]

A LLaMA that reads 134 million parameters a token (hidden 1024, 8 layers, random weights), float32, batch 1. Each
variant is cut by `shrink_`, saved, and loaded again by `AutoModelForCausalLM.from_pretrained`, so what is timed is what
a user opens. A speed-up over bound of 1.0 is all that memory traffic allows. Wanted on a CPU: at least 0.85.
"""

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

import compresso  # noqa: F401 - registers the per-layer model classes
from common import machine, write
from compresso.arch.base import arch_for
from compresso.core.budget import Budget
from compresso.core.cost import CostModel
from compresso.edit.shrink import shrink_
from compresso.formats.hf import save_checkpoint
from compresso.metrics.latency import speed_measurements
from compresso.metrics.traffic import weight_bytes_read
from compresso.solve.allocate import allocate

VARIANTS = {
    "heads and channels, 70 %, per layer": {"keep": 0.7, "kinds": ("head", "channel")},
    "heads and channels, 50 %, per layer": {"keep": 0.5, "kinds": ("head", "channel")},
    "heads and channels, 50 %, uniform": {
        "keep": 0.5,
        "kinds": ("head", "channel"),
        "uniform_over": ("head", "channel"),
    },
    "heads, channels and hidden, 50 %, per layer": {
        "keep": 0.5,
        "kinds": ("head", "channel", "hidden"),
        "multiple_of": {"hidden": 64},
    },
}


def dense() -> PreTrainedModel:
    """The model all variants are cut from."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=1024,
        num_hidden_layers=8,
        num_attention_heads=16,
        num_key_value_heads=16,
        intermediate_size=2816,
        vocab_size=32000,
    )
    return LlamaForCausalLM(config).eval()


def cut(knobs: dict[str, object], folder: Path) -> tuple[PreTrainedModel, str]:
    """A variant with random scores, reopened from disk, and the layout it was written in."""
    model = dense()
    arch = arch_for(model.config)
    axes = arch.axes(model)
    generator = torch.Generator().manual_seed(1)
    scores = {axis.name: torch.rand(axis.size, generator=generator) for axis in axes}
    shrink_(model, axes, allocate(axes, scores, CostModel(axes, arch.weights(model)), Budget(**knobs)))  # type: ignore[arg-type]
    layout = save_checkpoint(model, arch.shapes(model), folder)
    return AutoModelForCausalLM.from_pretrained(folder).eval(), layout


def main() -> None:
    """Measure, print and store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    facts, models, layouts = machine(), {"dense": dense()}, {"dense": "uniform"}
    with tempfile.TemporaryDirectory() as scratch:
        for number, (name, knobs) in enumerate(VARIANTS.items()):
            models[name], layouts[name] = cut(knobs, Path(scratch) / str(number))
        speeds = speed_measurements(models, batches=(1,), prompt_tokens=64, new_tokens=24, rounds=given.rounds)
    rows = []
    for name, found in speeds.items():
        values = {one.name: one.value for one in found}
        decode = next(one for one in found if one.name == "decode/batch1")
        bound, speedup = (values.get(f"decode_{what}/batch1", 1.0) for what in ("bound", "speedup"))
        row = {
            "variant": name,
            "layout": layouts[name],
            "mb_per_token": round(weight_bytes_read(models[name]) / 1e6, 1),
            "bytes_bound": round(bound, 3),
        }
        row |= {
            "tokens_per_s": round(decode.value, 2),
            "range": [round(end, 2) for end in (decode.low, decode.high) if end is not None],
        }
        rows.append(row | {"speedup": round(speedup, 3), "speedup_over_bound": round(speedup / bound, 3)})
        print(rows[-1], flush=True)
    worst = min(row["speedup_over_bound"] for row in rows[1:])
    median = statistics.median(row["speedup_over_bound"] for row in rows[1:])
    write(
        "decode",
        {
            "what": "decode speed-up of pruned models / bytes bound, float32, batch 1",
            "rounds": given.rounds,
            "rows": rows,
            "worst_speedup_over_bound": worst,
            "median_speedup_over_bound": median,
            "machine": facts,
            "command": " ".join(["python", "benchmarks/decode.py", *sys.argv[1:]]),
        },
    )
    print(f"speed-up over bound: worst {worst}, median {median}")


if __name__ == "__main__":
    main()
