"""Decode speed of mixtures in llama.cpp: dense, with fewer experts, and with fewer blocks, as GGUF in f16 and q4_0.

    python benchmarks/moe_llama_cpp.py --model moe-nano [--rounds 7]

Files are read in turn by one thread (`benchmarks/llama_cpp_speed.mjs`); a ratio is the median over rounds of dense over
the file, both of one round. What leaves is as in `benchmarks/moe.py`; a layer without its mixture has no place in a
GGUF. Writes results/moe_llama_cpp.md.
"""

import argparse
import tempfile
from pathlib import Path
from statistics import median

import torch

from common import RESULTS, machine
from compresso.arch.base import arch_for
from compresso.formats.gguf import save_gguf
from engines import NEW, PROMPT, llama_cpp_run
from moe import METHODS, applied, begun

CASES = ("dense", "expert drop, 5 of 8", "block drop, 2 of 6")


def main() -> None:
    """Write the files, time them in turn, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args()
    torch.set_num_threads(1)
    where, lines = machine(), list[str]()
    for dtype in ("f16", "q4_0"):
        with tempfile.TemporaryDirectory() as scratch:
            paths = [Path(scratch) / f"{i}.gguf" for i in range(len(CASES))]
            for path, case in zip(paths, CASES, strict=True):
                job = applied(begun(given.model, Path(scratch) / case, 0), *METHODS[case])
                save_gguf(job.model, arch_for(job.model.config).shapes(job.model), path, job.tokenizer, dtype)
            told = llama_cpp_run(paths, given.rounds)
            for i, case in enumerate(CASES):
                ratios = [a / b for a, b in zip(told["decode"][0], told["decode"][i], strict=True)]
                lines.append(
                    f"| {case} | {dtype} | {paths[i].stat().st_size:,} | {NEW / median(told['decode'][i]):,.0f} |"
                    f" {median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) |"
                )
    head = [
        "# A mixture in llama.cpp",
        "",
        f"`benchmarks/moe_llama_cpp.py`, {where['processor']}, 1 thread of {where['cores']} cores;"
        f" {given.rounds} rounds in turn, {NEW} tokens behind {PROMPT}."
        " The mixture of 6.4M parameters of `benchmarks/moe.py`, seed 0, on a machine that does other work. Ratios to"
        " dense of the same dtype: median over rounds, and their range.",
        "",
        "| what left | dtype | bytes | decode tokens/s | of dense |",
        "|---|---|---:|---:|---:|",
    ]
    (RESULTS / "moe_llama_cpp.md").write_text("\n".join([*head, *lines]) + "\n", "utf-8")


if __name__ == "__main__":
    main()
