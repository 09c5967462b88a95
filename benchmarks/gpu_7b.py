"""LLaMA-7B shapes on one GPU, random bfloat16 weights: what a mask-training step costs, and how fast what it leaves
runs.

    python benchmarks/gpu_7b.py [--pairs 5] [--rounds 3]

Step: sequence 1024, one sequence, LoRA of rank 8 on q and v (the published configuration), gates on heads, channels and
hidden dimensions; with and without recomputing activations. Peak memory of each alone, time of the two interleaved.
Speed: dense beside 5.4, 5.0 and 4.5 billion parameters (heads and channels leave in equal shares of importance drawn at
random, since speed depends on widths alone), with equal widths in all layers and with widths of each layer's own, at
multiples of 64 channels and at any count. Every variant is timed in turn with the dense model; "bound" is what reading
fewer bytes allows. Eager decoding of such a model waits for Python to launch kernels, so the same step is also captured
as a CUDA graph and replayed ("graph"). Results go to results/gpu_7b.json and gpu_7b.md.
"""

import argparse
import copy
import gc
import statistics
import sys
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from common import RESULTS, machine, write
from compresso.arch.base import arch_for
from compresso.core.budget import Budget
from compresso.core.cost import CostModel
from compresso.edit.shrink import shrink_
from compresso.metrics.latency import speed_measurements
from compresso.solve.allocate import allocate
from steps import Step, batch, masked_steps, plain_step

SEQUENCE, PROMPT, NEW = 1024, 1024, 16
KINDS = (("prefill", "speedup"), ("decode", "speedup"), ("graph", "speedup"), ("decode", "bound"))
SIZES = {"5.4B": 5.423e9, "5.0B": 5.0e9, "4.5B": 4.5e9}
"""Parameters in all; LLM-Pruner's 20 % preset has 5,422,977,024."""
LAYOUTS = {
    "uniform, channels x 64": {"uniform_over": ("head", "channel"), "multiple_of": {"channel": 64}},
    "native, channels x 64": {"multiple_of": {"channel": 64}},
    "native, any width": {},
}
"""Any width is timed at the first size only: it shows what multiples are worth."""


def dense(layers: int, hidden: int) -> LlamaForCausalLM:
    """LLaMA-7B's shape (or a narrower, shallower one for trials) with random weights."""
    torch.manual_seed(0)
    heads = hidden // 128
    config = LlamaConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=hidden * 43 // 16,
        vocab_size=32000,
    )
    config.max_position_embeddings = 4096
    device = "cuda" if torch.cuda.is_available() else "cpu"
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


def cut(full: LlamaForCausalLM, share: float, knobs: dict[str, object]) -> LlamaForCausalLM:
    """A copy without the units whose random scores are lowest; `share` is the share of all parameters that stays."""
    model = copy.deepcopy(full)
    arch = arch_for(model.config)
    axes = arch.axes(model)
    generator = torch.Generator().manual_seed(1)
    scores = {axis.name: torch.rand(axis.size, generator=generator) for axis in axes}
    budget = Budget(share, "total", ("head", "channel"), floor={"head": 1}, **knobs)  # type: ignore[arg-type]
    shrink_(model, axes, allocate(axes, scores, CostModel(axes, arch.weights(model)), budget))
    return model


def free() -> None:
    """Give memory back to the device, so that the next peak is its own."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def seconds(step: Step) -> float:
    """Wall seconds of a step, the device's work included."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    started = time.perf_counter()
    step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def step_of(kind: str, per_call: int, checkpointing: bool, layers: int, hidden: int) -> Step:
    """A fresh model with its adapters, and the step that trains it."""
    model = dense(layers, hidden)
    rows = batch(1, SEQUENCE, model.device)
    if kind == "LoRA":
        one = plain_step(model, rows, bf16=True, checkpointing=checkpointing)
        return lambda: [one() for _ in range(per_call)] and None
    many = masked_steps(model, rows, bf16=True, checkpointing=checkpointing)
    return lambda: many(per_call)


def training(pairs: int, per_call: int, layers: int, hidden: int) -> list[dict[str, object]]:
    """Step time and peak memory of LoRA and of mask training, with and without checkpointing."""
    rows: list[dict[str, object]] = []
    for checkpointing in (True, False):
        peaks: dict[str, float] = {}
        for kind in ("LoRA", "masks"):
            step = step_of(kind, 2, checkpointing, layers, hidden)
            step()
            peaks[kind] = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else float("nan")
            del step
            free()
        steps = {kind: step_of(kind, per_call, checkpointing, layers, hidden) for kind in ("LoRA", "masks")}
        took: dict[str, list[float]] = {kind: [] for kind in steps}
        for pair in range(pairs + 1):
            for kind, step in steps.items():
                elapsed = seconds(step) / per_call
                if pair:  # the first warms up
                    took[kind].append(elapsed)
        del steps
        free()
        ratios = [mine / plain for mine, plain in zip(took["masks"], took["LoRA"], strict=True)]
        rows.append(
            {
                "checkpointing": checkpointing,
                "lora_step_s": round(statistics.median(took["LoRA"]), 4),
                "mask_step_s": round(statistics.median(took["masks"]), 4),
                "time_ratio": round(statistics.median(ratios), 4),
                "time_ratio_range": [round(min(ratios), 4), round(max(ratios), 4)],
                "lora_peak_gib": round(peaks["LoRA"], 2),
                "mask_peak_gib": round(peaks["masks"], 2),
                "peak_ratio": round(peaks["masks"] / peaks["LoRA"], 4),
            }
        )
        print(rows[-1], flush=True)
    return rows


@torch.inference_mode()
def captured_step(model: LlamaForCausalLM, rows: int) -> Step:
    """One decoding step behind PROMPT cached tokens as a CUDA graph; every replay computes the same step."""
    ids = torch.randint(1, 32000, (rows, PROMPT), generator=torch.Generator().manual_seed(0)).to(model.device)
    cache = model(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values
    token = ids[:, -1:].clone()

    def step() -> None:
        fresh = copy.copy(cache)
        fresh.layers = [
            copy.copy(layer) for layer in cache.layers
        ]  # the step appends to these, not to the cache itself
        model(input_ids=token, past_key_values=fresh, use_cache=True)

    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()

    def replay(read: object = (cache, token)) -> None:
        """Run the graph; `read` holds what it reads, which must outlive it."""
        graph.replay()

    return replay


def graph_speedup(full: LlamaForCausalLM, small: LlamaForCausalLM, rows: int, rounds: int) -> dict[str, object]:
    """Milliseconds a replayed decoding step takes, dense and small in turn, and their ratio."""
    steps = [captured_step(full, rows), captured_step(small, rows)]
    took: list[list[float]] = [[], []]
    for number in range(rounds + 1):
        for step, times in zip(steps, took, strict=True):
            elapsed = seconds(lambda step=step: [step() for _ in range(NEW)] and None) / NEW * 1000
            if number:
                times.append(elapsed)
    ratios = [dense_ms / small_ms for dense_ms, small_ms in zip(*took, strict=True)]
    return {
        f"graph_batch{rows}_dense_ms": round(statistics.median(took[0]), 3),
        f"graph_batch{rows}_ms": round(statistics.median(took[1]), 3),
        f"graph_batch{rows}_speedup": round(statistics.median(ratios), 3),
    }


def speeds(rounds: int, layouts: list[str], layers: int, hidden: int) -> list[dict[str, object]]:
    """Prefill and decode of each variant beside dense."""
    full = dense(layers, hidden)
    total = sum(parameter.numel() for parameter in full.parameters())
    rows: list[dict[str, object]] = []
    for size, parameters in SIZES.items():
        for layout, knobs in LAYOUTS.items():
            if layout not in layouts or (layout == "native, any width" and size != next(iter(SIZES))):
                continue
            model = cut(full, parameters / 6_738_415_616, dict(knobs))
            found = speed_measurements({"dense": full, "small": model}, (1, 8), PROMPT, NEW, rounds)
            values = {one.name: one.value for one in found["small"]}
            base = {one.name: one.value for one in found["dense"]}
            row: dict[str, object] = {
                "size": size,
                "layout": layout,
                "parameters": sum(parameter.numel() for parameter in model.parameters()),
                "share": round(sum(parameter.numel() for parameter in model.parameters()) / total, 4),
            }
            for at in ("batch1", "batch8"):
                for what in ("prefill", "decode"):
                    row[f"{what}_{at}_dense_tokens_s"] = round(base[f"{what}/{at}"], 1)
                    row[f"{what}_{at}_tokens_s"] = round(values[f"{what}/{at}"], 1)
                    row[f"{what}_{at}_speedup"] = round(values[f"{what}_speedup/{at}"], 3)
                row[f"decode_{at}_bound"] = round(values[f"decode_bound/{at}"], 3)
            if torch.cuda.is_available():
                for size_of_batch in (1, 8):
                    row |= graph_speedup(full, model, size_of_batch, rounds)
            rows.append(row)
            print(row, flush=True)
            del model
            free()
    return rows


def table(steps: list[dict[str, object]], rows: list[dict[str, object]]) -> str:
    """Markdown of both."""
    lines = [
        "| recompute activations | LoRA step, ms | mask step, ms | time ratio | LoRA peak, GiB | mask peak, GiB |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for row in steps:
        times = [1000 * float(str(row[f"{kind}_step_s"])) for kind in ("lora", "mask")]
        lines.append(
            f"| {'yes' if row['checkpointing'] else 'no'} | {times[0]:.0f} | {times[1]:.0f} | {row['time_ratio']} "
            f"| {row['lora_peak_gib']} | {row['mask_peak_gib']} |"
        )
    titles = ("prefill x", "decode x", "graph decode x", "bytes bound")
    columns = [f"{what}_{at}_{kind}" for at in ("batch1", "batch8") for what, kind in KINDS]
    lines += [
        "",
        "| size | layout | " + " | ".join(f"{title}{at}" for at in ("", ", batch 8") for title in titles) + " |",
    ]
    lines += ["|---|---|" + "---:|" * len(columns)]
    lines += [
        "| " + " | ".join(str(row.get(column, "-")) for column in ["size", "layout", *columns]) + " |" for row in rows
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, print and store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=5, help="steps a timing")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layouts", nargs="+", default=list(LAYOUTS), choices=list(LAYOUTS))
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=4096)
    given = parser.parse_args()
    facts = machine()
    steps = training(given.pairs, given.steps, given.layers, given.hidden)
    rows = speeds(given.rounds, given.layouts, given.layers, given.hidden)
    result = {
        "what": "LLaMA-7B shapes, random bfloat16 weights: mask-training step against LoRA, and speed after removal",
        "sequence": SEQUENCE,
        "prompt_tokens": PROMPT,
        "new_tokens": NEW,
        "training": steps,
        "speed": rows,
        "machine": facts,
        "command": " ".join(["python", "benchmarks/gpu_7b.py", *sys.argv[1:]]),
    }
    write("gpu_7b", result)
    (RESULTS / "gpu_7b.md").write_text(table(steps, rows), "utf-8")
    print(table(steps, rows))


if __name__ == "__main__":
    main()
