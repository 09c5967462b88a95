"""A mask-training step against a plain PEFT LoRA step: same model, same batch, interleaved in one process.

    python benchmarks/mask_training.py [--pairs 7] [--threads 1]

Plain: peft's LoRA on q and v, the model's own loss, AdamW, written here without compresso. Ours: the objective and loop of
`learn_gates` with gates on heads, FFN channels and hidden dimensions, noise per example, projection after every update. CPU seconds of
the process (wall time beside them), median over pairs. Peak memory of each in a process of its own. Wanted: time and memory at most 1.10
times the plain step.
"""

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from common import machine, write
from compresso.arch.base import arch_for
from compresso.core.constraint import ShareOfModel
from compresso.core.cost import CostModel
from compresso.core.gates import Gates
from compresso.drive.fit import fit
from compresso.drive.groups import Group
from compresso.drive.objectives import GatedObjective
from compresso.drive.progress import Progress
from compresso.edit.lora import attach_

SHAPE = {"hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8, "intermediate_size": 1376, "vocab_size": 32000}
ROWS, LENGTH = 4, 256
Step = Callable[[], None]


def model() -> LlamaForCausalLM:
    """58 million random parameters: speed does not depend on their values."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SHAPE))


def batch() -> dict[str, torch.Tensor]:
    """The one batch of both."""
    ids = torch.randint(1, 32000, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def plain_step() -> Step:
    """LoRA as peft's own documentation writes it."""
    lora = get_peft_model(model(), LoraConfig(r=8, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    optimizer = torch.optim.AdamW([p for p in lora.parameters() if p.requires_grad], lr=5e-5)
    rows = batch()

    def step() -> None:
        loss = lora(**rows, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


class OneBatch:
    """The same batch at every update."""

    global_batch = ROWS

    def __init__(self) -> None:
        self._rows = batch()

    def at(self, update: int, rows: range) -> dict[str, torch.Tensor]:
        return {name: value[rows.start : rows.stop] for name, value in self._rows.items()}


def masked_steps(per_call: int) -> Step:
    """`per_call` updates of mask training."""
    base = model()
    arch = arch_for(base.config)
    axes = arch.axes(base)
    cost = CostModel(axes, arch.weights(base))
    chosen = [axis for axis in axes if axis.kind in ("head", "channel", "hidden")]
    gates = Gates(chosen, {axis.name: torch.linspace(-1, 3, axis.size) for axis in chosen})
    lora = attach_(base, 8, 8.0)
    objective = GatedObjective(
        lora, gates, ShareOfModel(cost, 0.7), starts=0, progress=lambda k: 1.0, use_lagrangian=False, noise="example", seed=0
    )
    groups = [Group("lora", [p for p in lora.parameters() if p.requires_grad], 5e-5), Group("gates", objective.gate_parameters(), 0.02)]

    def after(update: int) -> dict[str, float]:
        objective.clamp_()
        objective.project_(update)
        return {}

    def step() -> None:
        with objective.attached():
            fit(objective, groups, OneBatch(), per_call, seed=0, after_update=after, progress=Progress("silent"))

    return step


def peak_mib(which: str) -> float:
    """Peak resident MiB of a fresh process that runs three steps of one kind."""
    done = subprocess.run([sys.executable, __file__, "--only", which], capture_output=True, text=True, check=True)
    return float(done.stdout.strip().splitlines()[-1])


def high_water_mib() -> float:
    """Peak resident MiB of this process since it was started; getrusage would count what its parent held before."""
    status = Path("/proc/self/status").read_text("utf-8").splitlines()
    return int(next(line for line in status if line.startswith("VmHWM")).split()[1]) / 1024


def main() -> None:
    """Measure, print and store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--steps", type=int, default=3, help="steps a timing")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", choices=["plain", "masked"], help="run three steps of one kind and print the peak memory in MiB")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.only:
        step = plain_step() if given.only == "plain" else masked_steps(1)
        for _ in range(3):
            step()
        print(high_water_mib())
        return
    facts = machine()
    plain, masked = plain_step(), masked_steps(given.steps)
    rows: list[dict[str, float]] = []
    for pair in range(given.pairs + 1):
        took: dict[str, float] = {}
        for name, step, times in (("plain", plain, given.steps), ("masked", masked, 1)):
            cpu, wall = time.process_time(), time.perf_counter()
            for _ in range(times):
                step()
            took[f"{name}_cpu_s"] = (time.process_time() - cpu) / given.steps
            took[f"{name}_wall_s"] = (time.perf_counter() - wall) / given.steps
        if pair:  # the first pair warms up
            rows.append(took)
            print({name: round(value, 3) for name, value in took.items()}, flush=True)
    ratios = [row["masked_cpu_s"] / row["plain_cpu_s"] for row in rows]
    memory = {which: round(peak_mib(which), 1) for which in ("plain", "masked")}
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
