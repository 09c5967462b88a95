"""A mask-training step against a plain PEFT LoRA step: same model, same batch, interleaved in one process.

    python benchmarks/mask_training.py [--pairs 7] [--threads 1]

Plain: peft's LoRA on q and v, the model's own loss, AdamW, without compresso (steps.py). Ours: the objective and loop
of `learn_gates` with gates on heads, FFN channels and hidden dimensions, noise per example, projection after every
update. CPU seconds of the process (wall time beside them), median over pairs. Peak memory of each in a process of its
own, the median of three: it varies by 2 %. Wanted: time and memory at most 1.10 times the plain step.
"""

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from common import high_water_mib, machine, write
from steps import Step, batch, masked_steps, plain_step

SHAPE = {
    "hidden_size": 512,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "intermediate_size": 1376,
    "vocab_size": 32000,
}
ROWS, LENGTH = 4, 256


def model() -> LlamaForCausalLM:
    """58 million random parameters: speed does not depend on their values."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SHAPE))


def plain() -> Step:
    """One plain LoRA step."""
    return plain_step(model(), batch(ROWS, LENGTH))


def masked(per_call: int) -> Step:
    """`per_call` steps of mask training."""
    many = masked_steps(model(), batch(ROWS, LENGTH))
    return lambda: many(per_call)


def peak_mib(which: str) -> float:
    """Peak resident MiB of a fresh process that runs three steps of one kind."""
    done = subprocess.run([sys.executable, __file__, "--only", which], capture_output=True, text=True, check=True)
    return float(done.stdout.strip().splitlines()[-1])


def main() -> None:
    """Measure, print and store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--steps", type=int, default=3, help="steps a timing")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--only", choices=["plain", "masked"], help="run three steps of one kind and print the peak memory in MiB"
    )
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.only:
        step = plain() if given.only == "plain" else masked(1)
        for _ in range(3):
            step()
        print(high_water_mib())
        return
    facts = machine()
    plain_one, masked_all = plain(), masked(given.steps)
    rows: list[dict[str, float]] = []
    for pair in range(given.pairs + 1):
        took: dict[str, float] = {}
        for name, step, times in (("plain", plain_one, given.steps), ("masked", masked_all, 1)):
            cpu, wall = time.process_time(), time.perf_counter()
            for _ in range(times):
                step()
            took[f"{name}_cpu_s"] = (time.process_time() - cpu) / given.steps
            took[f"{name}_wall_s"] = (time.perf_counter() - wall) / given.steps
        if pair:  # the first pair warms up
            rows.append(took)
            print({name: round(value, 3) for name, value in took.items()}, flush=True)
    ratios = [row["masked_cpu_s"] / row["plain_cpu_s"] for row in rows]
    memory = {which: round(statistics.median(peak_mib(which) for _ in range(3)), 1) for which in ("plain", "masked")}
    result = {
        "what": "mask-training step / plain PEFT LoRA step",
        "model": SHAPE,
        "tokens_per_step": ROWS * LENGTH,
        "pairs": len(rows),
        "time_ratio_median": round(statistics.median(ratios), 4),
        "time_ratio_range": [round(min(ratios), 4), round(max(ratios), 4)],
        "wall_ratio_median": round(statistics.median(row["masked_wall_s"] / row["plain_wall_s"] for row in rows), 4),
        "plain_cpu_s_median": round(statistics.median(row["plain_cpu_s"] for row in rows), 4),
        "peak_mib": memory,
        "peak_ratio": round(memory["masked"] / memory["plain"], 4),
        "machine": facts,
        "command": " ".join(["python", "benchmarks/mask_training.py", *sys.argv[1:]]),
    }
    write(Path(__file__).stem, result)
    print(f"time ratio {result['time_ratio_median']}, peak memory ratio {result['peak_ratio']}")


if __name__ == "__main__":
    main()
