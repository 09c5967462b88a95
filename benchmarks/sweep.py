"""One-shot pruning against a plain forward of the same model: how much the sweep costs beside the passes it cannot do
without.

    python benchmarks/sweep.py [--pairs 5] [--threads 1] [--against CHECKOUT]

A LLaMA of 8 layers (hidden 512, FFN 1376, random weights) and 8 x 256 tokens. Each job gets fresh weights. CPU seconds
of the process, forward and jobs in turn, the median of ratios over rounds; peak memory of each job in a process of its
own, over that of the forward. A sequential sweep needs two passes over each block but the last, 1.9 forwards.

--against times the classes of a checkout of locuslab/wanda (`lib/layerwrapper.py`, `lib/sparsegpt.py`) or
IST-DASLab/sparsegpt (`sparsegpt.py`) in the same rounds. Their own loops do not run on today's transformers; here their
classes get what these loops give them: each linear its own statistic, one sample at a time, blocks in order, the last
one run again. `torch.cuda.synchronize`, which they call, does nothing here.
"""

import argparse
import copy
import importlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from common import high_water_mib, machine, write
from compresso.arch.base import arch_for
from compresso.core.sparsity import lowest_in_groups, lowest_in_rows
from compresso.sweep.one_shot import compensated, obs_choice, zeroed
from compresso.sweep.sweep import second_moment, squares, sweep
from compresso.sweep.targets import Where, chosen

SHAPE = {
    "hidden_size": 512,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "intermediate_size": 1376,
    "vocab_size": 32000,
}
ROWS, LENGTH = 8, 256
WANTED = {"wanda 50 %": 2.3, "wanda 2:4": 2.2, "sparsegpt 50 %": 4.2}
Job = Callable[[LlamaForCausalLM, Tensor], None]


def model() -> LlamaForCausalLM:
    """58 million random parameters: speed does not depend on their values."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SHAPE)).eval()


def tokens() -> Tensor:
    """Random token ids [rows, length]."""
    return torch.randint(0, SHAPE["vocab_size"], (ROWS, LENGTH), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def forward(network: LlamaForCausalLM, ids: Tensor) -> None:
    """A plain forward, row by row, without the head."""
    for row in ids:
        network.model(input_ids=row[None], use_cache=False)


def wanda(network: LlamaForCausalLM, ids: Tensor, pattern: tuple[int, int] | None = None) -> None:
    """Ours: 50 % of each row, or n of m kept."""
    choose = (
        (lambda score: lowest_in_groups(score, *pattern)) if pattern else (lambda score: lowest_in_rows(score, 0.5))
    )
    groups = chosen(network, arch_for(network.config), Where(), pattern[1] if pattern else 1)
    edit = zeroed(network, lambda _, score: (choose(score), {}))
    sweep(network, arch_for(network.config), groups, list(ids.split(1)), squares, edit)


def sparsegpt(network: LlamaForCausalLM, ids: Tensor) -> None:
    """Ours: 50 %."""
    groups = chosen(network, arch_for(network.config), Where(), 1)
    edit = compensated(network, choose=obs_choice(0.5, None, "exact"))
    sweep(network, arch_for(network.config), groups, list(ids.split(1)), second_moment, edit)


JOBS: dict[str, Job] = {"wanda 50 %": wanda, "wanda 2:4": partial(wanda, pattern=(2, 4)), "sparsegpt 50 %": sparsegpt}


def theirs(checkout: Path) -> dict[str, Job]:
    """Jobs with a checkout's classes. Raises SystemExit if it has none of them."""
    sys.path[:0] = [str(checkout), str(checkout / "lib")]
    torch.cuda.synchronize = lambda *_: None
    found: dict[str, Job] = {}
    for name, file, kind, edit in (
        ("wanda 50 %", "layerwrapper", "WrappedGPT", _by_score),
        ("sparsegpt 50 %", "sparsegpt", "SparseGPT", lambda one: one.fasterprune(0.5)),
    ):
        if any((checkout / folder / f"{file}.py").is_file() for folder in ("", "lib")):
            found[name] = partial(_with_classes, getattr(importlib.import_module(file), kind), edit)
    if not found:
        raise SystemExit(
            f"--against {checkout}: wanted a checkout with lib/layerwrapper.py, lib/sparsegpt.py or sparsegpt.py"
        )
    return found


@torch.no_grad()
def _by_score(one: Any) -> None:
    """Wanda's choice as its loop makes it: the scores of each row sorted, the lower half zeroed."""
    weight = one.layer.weight.data
    score = weight.abs() * one.scaler_row.reshape(1, -1).sqrt()
    order = torch.sort(score, dim=-1, stable=True)[1][:, : weight.shape[1] // 2]
    weight[torch.zeros_like(score, dtype=torch.bool).scatter_(1, order, True)] = 0


@torch.no_grad()
def _with_classes(kind: Any, edit: Callable[[Any], None], network: LlamaForCausalLM, ids: Tensor) -> None:
    """Block after block: statistics of every linear, its edit, the block's new outputs."""
    states = [network.model.embed_tokens(row[None]) for row in ids]
    positions = torch.arange(ids.shape[1])[None]
    rotary = network.model.rotary_emb(states[0], positions)
    for block in network.model.layers:
        linears = [module for module in block.modules() if isinstance(module, nn.Linear)]
        ones = [kind(linear) for linear in linears]
        handles = [
            linear.register_forward_hook(lambda _, given, out, one=one: one.add_batch(given[0], out))
            for linear, one in zip(linears, ones, strict=True)
        ]
        for state in states:
            block(state, position_embeddings=rotary)
        for handle in handles:
            handle.remove()
        for one in ones:
            edit(one)
        states = [block(state, position_embeddings=rotary) for state in states]


def cpu_seconds(job: Job, network: LlamaForCausalLM, ids: Tensor) -> float:
    """CPU seconds of this process."""
    begun = time.process_time()
    job(network, ids)
    return time.process_time() - begun


def peak_mib(name: str) -> float:
    """Peak resident MiB of a fresh process that does one job."""
    done = subprocess.run([sys.executable, __file__, "--only", name], capture_output=True, text=True, check=True)
    return float(done.stdout.strip().splitlines()[-1])


def main() -> None:
    """Measure, print and store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--against", type=Path, help="a checkout of locuslab/wanda or IST-DASLab/sparsegpt")
    parser.add_argument("--only", choices=["forward", *JOBS], help="do one job and print the peak memory in MiB")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    network, ids = model(), tokens()
    if given.only:
        (forward if given.only == "forward" else JOBS[given.only])(network, ids)
        print(high_water_mib())
        return
    facts = machine()
    others = {f"{name}, the checkout's": job for name, job in theirs(given.against).items()} if given.against else {}
    jobs = {**JOBS, **others}
    ratios: dict[str, list[float]] = {name: [] for name in jobs}
    for pair in range(given.pairs + 1):
        for name, job in jobs.items():
            plain = cpu_seconds(forward, network, ids)
            took = cpu_seconds(job, copy.deepcopy(network), ids)
            plain = (plain + cpu_seconds(forward, network, ids)) / 2  # one before and one after: clocks drift
            if pair:  # the first round warms up
                ratios[name].append(took / plain)
                print(f"{name}: {took:.2f} s, {took / plain:.2f} forwards", flush=True)
    base = peak_mib("forward")
    rows = {
        name: {
            "forwards_median": round(statistics.median(found), 3),
            "forwards_range": [round(min(found), 3), round(max(found), 3)],
            **(
                {"wanted_at_most": WANTED[name], "peak_mib_over_forward": round(peak_mib(name) - base, 1)}
                if name in JOBS
                else {}
            ),
        }
        for name, found in ratios.items()
    }
    for name in set(JOBS) & {name.removesuffix(", the checkout's") for name in others}:
        against = [mine / other for mine, other in zip(ratios[name], ratios[f"{name}, the checkout's"], strict=True)]
        rows[name]["of_the_checkouts_time"] = round(statistics.median(against), 3)
    result = {
        "what": "CPU seconds of one-shot pruning / those of a plain forward without head",
        "model": SHAPE,
        "tokens": [ROWS, LENGTH],
        "rounds": given.pairs,
        "forward_peak_mib": round(base, 1),
        "jobs": rows,
        "machine": facts,
        "command": " ".join(
            [
                "python",
                "benchmarks/sweep.py",
                *(["--pairs", str(given.pairs)] if given.pairs != 5 else []),
                *(["--against", "CHECKOUT"] if given.against else []),
            ]
        ),
    }
    write(Path(__file__).stem, result)
    lines = [
        "| job | forwards, median | range | wanted | peak MiB over a forward | of the checkout's time |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        low, high = row["forwards_range"]
        more = (row.get(key, "") for key in ("wanted_at_most", "peak_mib_over_forward", "of_the_checkouts_time"))
        lines.append(
            f"| {name} | {row['forwards_median']} | {low} to {high} | {' | '.join(str(one) for one in more)} |"
        )
    setting = f"{result['what']}; {ROWS} x {LENGTH} tokens, {facts['processor']}, {given.threads} thread"
    text = f"# One-shot pruning, in plain forwards\n\n{setting}.\n\n"
    (Path(__file__).parent / "results" / "sweep.md").write_text(text + "\n".join(lines) + "\n", "utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
