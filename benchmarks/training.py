"""Throughput of training steps: tokens a second, and the share of the machine's matrix rate that is put to use.

    python benchmarks/training.py [--device cuda|cpu] [--limit-s N] [--rounds 3] [--compiled] [--report]

LoRA (peft alone), learned masks, and distillation from a teacher in memory and from kept outcomes, at the shapes of
LLaMA-7B (on a GPU) and of SmolLM2-135M, random weights; with and without recomputing activations; and what the loss in
pieces, torch's RMSNorm and compiled blocks change. LoRA of rank 8 on q and v; masks on heads, channels and hidden
dimensions. bfloat16 on a GPU, where wall time counts; float32 on a CPU, where this process' CPU seconds do.

What is timed together runs in turns, round after round, and a ratio is the median of the rounds' ratios. "Share" is the
arithmetic that a step owes (`Shape.flops` in training_steps.py says which; what is computed twice counts once) over
time and over the best rate of a product of two large random matrices, measured first.

A timing is a line of results/training.jsonl as soon as it is taken; the newest run of each device counts. Most wanted
ones come first, and after `--limit-s` seconds no other starts. Blocks are compiled only on demand, in a process of
their own that `--compile-limit-s` ends. `--report` writes training.json and training.md of the lines; a run ends with
it, too.
"""

import argparse
import gc
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from common import RESULTS, machine
from compresso.edit.recompute import recompute_
from training_report import LINES, report
from training_steps import SHAPES, Bench, Shape, Timed, compile_blocks_, fuse_norms_, matrix_rate

Variant = tuple[str, bool, str]
"""What is trained, whether activations are recomputed, and a switch: "", "norms" or "compiled"."""
PAIR: list[Variant] = [("LoRA", False, ""), ("mask", False, ""), ("LoRA", True, ""), ("mask", True, "")]
TAUGHT: list[Variant] = [
    ("LoRA, our loop", False, ""),
    ("distil, live", False, ""),
    ("distil, cached", False, ""),
    ("LoRA, fused loss", False, ""),
]
NORMS: list[Variant] = [("LoRA", False, ""), ("LoRA", False, "norms"), ("mask", False, ""), ("mask", False, "norms")]
AGAIN: list[Variant] = [("distil, live", False, ""), ("distil, live", True, "")]
COMPILED: list[Variant] = [
    ("LoRA", False, ""),
    ("LoRA", False, "compiled"),
    ("LoRA", True, ""),
    ("LoRA", True, "compiled"),
]
GROUPS: dict[str, list[tuple[str, int, int, int, list[list[Variant]]]]] = {
    "cuda": [
        ("7B", 1, 1024, 4, [PAIR]),
        ("7B", 4, 1024, 2, [PAIR, TAUGHT]),
        ("135M", 8, 1024, 4, [PAIR, TAUGHT, NORMS, AGAIN]),
        ("7B", 4, 1024, 2, [NORMS, AGAIN]),
    ],
    "cpu": [("135M", 1, 256, 1, [PAIR, TAUGHT, NORMS, AGAIN])],
}
"""Shape, rows and length of the batch, steps a timing, and what is timed in turns; models are kept for one line."""


COMPILED_AT: dict[str, list[tuple[str, int, int, int]]] = {
    "cuda": [("135M", 8, 1024, 4), ("7B", 1, 1024, 4), ("7B", 4, 1024, 2)],
    "cpu": [("135M", 1, 256, 1)],
}
"""Likewise, where blocks are compiled."""


@dataclass(frozen=True)
class Run:
    """What all timings of a run share: where they go, when to stop, and how many are taken."""

    device: torch.device
    started: float
    limit: float
    rounds: int
    steps: int | None
    name: str
    lines: Path

    def over(self) -> bool:
        """Whether no other timing may start."""
        return time.perf_counter() - self.started > self.limit

    def keep(self, line: dict[str, Any]) -> None:
        """Append a line, and show it."""
        with self.lines.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"run": self.name, "device": self.device.type, **line}) + "\n")
        print(f"{time.perf_counter() - self.started:6.1f} s", line, flush=True)


def timed(bench: Bench, steps: dict[str, Timed], variant: Variant, n: int) -> tuple[float, float | None]:
    """Mean seconds of `n` steps, and the GiB that they took beside what lay there before."""
    kind, again, switch = variant
    if kind not in steps:
        made = bench.lora() if kind == "LoRA" else bench.mask() if kind == "mask" else bench.looped(kind)
        steps[kind] = made
    model = bench.trained(kind)
    recompute_(model, on=again)
    fuse_norms_(model, on=switch == "norms")
    if switch == "compiled":
        compile_blocks_(model, on=True)
    before = 0
    if bench.device.type == "cuda":
        gc.collect()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    seconds = steps[kind](n)
    if switch == "compiled":
        compile_blocks_(model, on=False)
    peak = (torch.cuda.max_memory_allocated() - before) / 2**30 if bench.device.type == "cuda" else None
    return seconds, peak


def measure(
    run: Run, shape: Shape, called: tuple[str, int, int, int], at: str, groups: Sequence[Sequence[Variant]]
) -> None:
    """Time groups of variants, each in turns; the first turn, of one step, warms up. `at` tells groups apart."""
    if run.over():
        return
    name, rows, length, usual = called
    n = run.steps or usual
    bench, steps = Bench(shape, rows, length, run.device), dict[str, Timed]()
    for number, group in enumerate(groups):
        for turn in range(run.rounds + 1):
            for variant in group:
                if run.over():
                    return
                seconds, peak = timed(bench, steps, variant, n if turn else 0)
                if turn:
                    kind, again, switch = variant
                    owed = shape.flops(kind, length) * rows * length
                    what = {"shape": name, "rows": rows, "length": length, "group": f"{at}.{number}", "turn": turn}
                    what |= {"kind": kind, "recompute": again, "switch": switch, "steps": n}
                    run.keep(what | {"step_s": seconds, "owed_flops": owed, "peak_gib": peak})


def shapes(layers: int | None, hidden: int | None) -> dict[str, Shape]:
    """The shapes; for trials of so many layers or so narrow, and named so."""
    if layers is None and hidden is None:
        return SHAPES
    found: dict[str, Shape] = {}
    for name, shape in SHAPES.items():
        heads = shape.heads if hidden is None else hidden // 32
        kv = shape.kv if hidden is None else heads if shape.kv == shape.heads else 1
        width = hidden or shape.hidden
        found[name] = replace(
            shape,
            layers=layers or shape.layers,
            hidden=width,
            heads=heads,
            kv=kv,
            ffn=width * shape.ffn // shape.hidden,
            vocab=shape.vocab if hidden is None else 1000,
        )
    return found


def free() -> None:
    """Give memory back before the next models are built."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def compiled(given: argparse.Namespace, name: str) -> None:
    """Time compiled blocks in another process, which is ended when its time is up; its lines stay."""
    command = [sys.executable, __file__, "--only-compiled", name, *sys.argv[1:]]
    try:
        subprocess.run(command, check=True, timeout=given.compile_limit_s)
    except subprocess.TimeoutExpired:
        print(f"compiled blocks: ended after {given.compile_limit_s} s", flush=True)
    except subprocess.CalledProcessError as error:
        print(f"compiled blocks: ended with {error.returncode}", flush=True)


def main() -> None:
    """Measure, store and show."""
    started = time.perf_counter()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--limit-s", type=float, default=float("inf"), help="start no timing after so many seconds")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, help="steps a timing, in place of a few")
    parser.add_argument("--threads", type=int, default=1, help="of a CPU")
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--compiled", action="store_true", help="compile blocks, too, behind everything else")
    parser.add_argument("--compile-limit-s", type=float, default=120.0)
    parser.add_argument("--only-compiled", metavar="RUN", help=argparse.SUPPRESS)
    parser.add_argument("--layers", type=int, help="for trials")
    parser.add_argument("--hidden", type=int, help="for trials; a multiple of 32")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the lines and the report")
    parser.add_argument("--report", action="store_true", help="measure nothing")
    given = parser.parse_args()
    lines: Path = given.out / LINES
    if given.report:
        print(report(lines))
        return
    device = torch.device(given.device)
    if device.type == "cpu":
        torch.set_num_threads(given.threads)
    given.out.mkdir(parents=True, exist_ok=True)
    name = given.only_compiled or time.strftime("%Y-%m-%d %H:%M:%S")
    run = Run(device, started, given.limit_s, given.rounds, given.steps, name, lines)
    sizes = shapes(given.layers, given.hidden)
    groups = [one for one in GROUPS[device.type] if one[0] in given.shapes]
    if given.only_compiled:
        for number, called in enumerate(COMPILED_AT[device.type]):
            if called[0] in given.shapes:
                measure(run, sizes[called[0]], called, f"compiled {number}", [COMPILED])
                free()
        return
    run.keep(
        {
            "machine": machine(),
            "matrix": matrix_rate(device),
            "command": " ".join(["python", "benchmarks/training.py", *sys.argv[1:]]),
            "trial": given.layers is not None or given.hidden is not None,
        }
    )
    for number, (shape, rows, length, n, together) in enumerate(groups):
        measure(run, sizes[shape], (shape, rows, length, n), str(number), together)
        free()
    if given.compiled:
        compiled(given, name)
    print(report(lines))


if __name__ == "__main__":
    main()
