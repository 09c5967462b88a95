"""What each engine makes of a model, dense and pruned, in each layout and precision: opens, difference, speed, size,
memory.

    python benchmarks/engines.py [--rounds 5]

A LLaMA of 57 million parameters (hidden 768, 8 layers, 12 heads, random weights, the embedded model's tokenizer) is cut
to 70 and 50 % of its blocks by random scores, channels in multiples of 32, and written in every layout. transformers
and ONNX Runtime open the folder or what is exported from it, llama.cpp the GGUF file. Each engine reads 128 tokens and
writes 32, one thread; the variants of one engine and precision take turns in one process, and speeds are medians over
the rounds, as ratios to dense. The bound is dense bytes over its own: what reading fewer weights allows. Differences
are those of `compresso verify`: logits, or probabilities in llama.cpp. Peak memory is that of a process of its own that
opens one file, reads and writes once.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from common import RESULTS, high_water_mib, machine, write
from compresso.arch.base import arch_for
from compresso.checkpoint.load import load_model
from compresso.checkpoint.source import open_source
from compresso.checkpoint.tokenizer import load_tokenizer
from compresso.core.budget import Budget
from compresso.core.cost import CostModel
from compresso.data import nano
from compresso.edit.shrink import shrink_
from compresso.edit.stock import as_stock
from compresso.engines import llama_cpp
from compresso.engines.onnx_runtime import ONNX, OnnxModel
from compresso.engines.parity import ids_of, reference_of
from compresso.formats.gguf import save_gguf
from compresso.formats.hf import save_checkpoint
from compresso.formats.onnx import save_onnx
from compresso.metrics.latency import speed_measurements
from compresso.solve.allocate import allocate

PROMPT, NEW = 128, 32
VARIANTS: dict[str, tuple[float, str]] = {
    "dense": (1.0, "uniform"),
    "70 %, uniform": (0.7, "uniform"),
    "70 %, native": (0.7, "native"),
    "50 %, uniform": (0.5, "uniform"),
    "50 %, native": (0.5, "native"),
    "50 %, padded": (0.5, "padded"),
}
Times = Mapping[str, tuple[list[float], list[float]]]
"""Variant -> seconds of prefill and of decode, a number a round."""


def made(keep: float, layout: str, folder: Path) -> None:
    """Write a variant."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=768,
        num_hidden_layers=8,
        num_attention_heads=12,
        intermediate_size=2048,
        vocab_size=1024,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    model = LlamaForCausalLM(config).eval()
    arch = arch_for(config)
    axes = arch.axes(model)
    if keep < 1:
        generator = torch.Generator().manual_seed(1)
        scores = {axis.name: torch.rand(axis.size, generator=generator) for axis in axes}
        even = ("head", "channel") if layout == "uniform" else ()
        budget = Budget(keep, kinds=("head", "channel"), uniform_over=even, multiple_of={"channel": 32})  # type: ignore[arg-type]
        shrink_(model, axes, allocate(axes, scores, CostModel(axes, arch.weights(model)), budget))
    save_checkpoint(
        model, arch.shapes(model), folder, layout=layout, tokenizer=AutoTokenizer.from_pretrained(nano.path())
    )  # type: ignore[arg-type]


def onnx_times(folders: Mapping[str, Path], rounds: int) -> Times:
    """Prefill and decode in ONNX Runtime, the variants in turn."""
    return in_turn({name: OnnxModel(folder, threads=1) for name, folder in folders.items()}, rounds)


def in_turn(models: Mapping[str, OnnxModel], rounds: int, clock: Callable[[], float] = time.perf_counter) -> Times:
    """Prefill and decode of open models, in turn, by a clock; the first round does not count."""
    prompt = torch.arange(PROMPT).unsqueeze(0) % 1000 + 3
    found: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in models}
    for round_ in range(rounds + 1):
        for name, model in models.items():
            begun = clock()
            logits, past = model(prompt, model.empty())
            read = clock()
            for _ in range(NEW):
                logits, past = model(logits[:, -1:].argmax(dim=-1), past)
            if round_:
                found[name][0].append(read - begun)
                found[name][1].append(clock() - read)
    return found


def llama_cpp_run(files: list[Path], rounds: int) -> dict[str, Any]:
    """What llama_cpp_speed.mjs says of files."""
    asked = {
        "files": [str(path) for path in files],
        "prompt": [i % 1000 + 3 for i in range(PROMPT)],
        "new_tokens": NEW,
        "rounds": rounds,
    }
    script = Path(__file__).with_name("llama_cpp_speed.mjs")
    done = subprocess.run(
        ["node", str(script), str(llama_cpp.modules())],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.strip().splitlines()[-1])


def transformers_times(folders: Mapping[str, Path], rounds: int) -> dict[str, tuple[float, float]]:
    """Ratios of prefill and decode speed to dense, in transformers."""
    models = {name: as_stock(load_model(open_source(folder), dtype=torch.float32)) for name, folder in folders.items()}
    found = speed_measurements(models, (1,), PROMPT, NEW, rounds)
    values = {name: {one.name: one.value for one in numbers} for name, numbers in found.items()}
    return {
        name: (one.get("prefill_speedup/batch1", 1.0), one.get("decode_speedup/batch1", 1.0))
        for name, one in values.items()
    }


def ratios(times: Times) -> dict[str, tuple[float, float]]:
    """Speed of each variant over that of dense, round by round, the median."""
    dense = times["dense"]
    return {
        name: tuple(
            statistics.median(base / own for base, own in zip(dense[part], mine[part], strict=True)) for part in (0, 1)
        )  # type: ignore[misc]
        for name, mine in times.items()
    }


def peak(kind: str, path: Path) -> float:
    """Peak MiB of a process that opens a file, reads and writes once."""
    if kind == "llama.cpp":
        return llama_cpp_run([path], 1)["peak_kib"] / 1024
    done = subprocess.run(
        [sys.executable, __file__, "--open", kind, str(path)], capture_output=True, text=True, check=True
    )
    return float(done.stdout.strip().splitlines()[-1])


def opened(kind: str, path: Path) -> None:
    """Be that process."""
    ids = torch.arange(PROMPT).unsqueeze(0) % 1000 + 3
    if kind == "onnx":
        OnnxModel(path, threads=1).greedy(ids[0], NEW)
    else:
        load_model(open_source(path), dtype=torch.float32).generate(
            ids, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False
        )  # type: ignore[operator]
    print(high_water_mib())


def size(path: Path) -> int:
    """Bytes of a file, or of the weights and graphs in a folder."""
    return (
        path.stat().st_size
        if path.is_file()
        else sum(one.stat().st_size for pattern in ("*.safetensors", "model.onnx*") for one in path.glob(pattern))
    )


def rows_of(
    engine: str,
    kind: str,
    paths: Mapping[str, Path],
    speeds: Mapping[str, tuple[float, float]],
    asks: Callable[[str], Any],
) -> list[Any]:
    """One row a variant."""
    rows: list[Any] = []
    for name, path in paths.items():
        answer = asks(name)
        prefill, decode = speeds[name]
        rows.append(
            {
                "engine": engine,
                "variant": name,
                "opens": answer.opens if answer else "yes",
                "difference": answer.difference if answer else 0.0,
                "same_tokens": answer.same_tokens if answer else None,
                "prefill_ratio": round(prefill, 3),
                "decode_ratio": round(decode, 3),
                "bytes_bound": round(size(paths["dense"]) / size(path), 3),
                "megabytes": round(size(path) / 1e6, 1),
                "peak_mib": round(peak(kind, path), 0),
            }
        )
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    """Measure, print and store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--open", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.open:
        opened(given.open[0], Path(given.open[1]))
        return
    facts, rows = machine(), list[Any]()
    with tempfile.TemporaryDirectory() as scratch:
        base = Path(scratch)
        folders = {name: base / f"hf-{i}" for i, name in enumerate(VARIANTS)}
        for name, (keep, layout) in VARIANTS.items():
            made(keep, layout, folders[name])
        live = {
            name: as_stock(load_model(open_source(folder), dtype=torch.float32)) for name, folder in folders.items()
        }
        tokenizer = load_tokenizer(open_source(folders["dense"]))
        rows += rows_of(
            "transformers, f32", "transformers", folders, transformers_times(folders, given.rounds), lambda name: None
        )
        ids = ids_of(tokenizer, live["dense"].config.vocab_size)
        for dtype in ("f32", "int8"):
            wanted = {name: reference_of(model, ids, dtype) for name, model in live.items()}
            paths = {name: base / f"onnx-{dtype}-{i}" for i, name in enumerate(VARIANTS)}
            for name, path in paths.items():
                save_onnx(live[name], arch_for(live[name].config).shapes(live[name]), path, dtype=dtype)
            asks = lambda name, paths=paths, wanted=wanted: ONNX.parity(paths[name], wanted[name])  # noqa: E731
            rows += rows_of(f"ONNX Runtime, {dtype}", "onnx", paths, ratios(onnx_times(paths, given.rounds)), asks)
        for dtype in ("f32", "q8_0", "q4_0"):
            wanted = {name: reference_of(model, ids, dtype) for name, model in live.items()}
            paths = {name: base / f"{i}-{dtype}.gguf" for i, name in enumerate(VARIANTS)}
            for name, path in paths.items():
                save_gguf(live[name], arch_for(live[name].config).shapes(live[name]), path, tokenizer, dtype)
            told = llama_cpp_run(list(paths.values()), given.rounds)
            times = dict(zip(paths, zip(told["prefill"], told["decode"], strict=True), strict=True))
            asks = lambda name, paths=paths, wanted=wanted: llama_cpp.LLAMA_CPP.parity(paths[name], wanted[name])  # noqa: E731
            rows += rows_of(f"llama.cpp, {dtype}", "llama.cpp", paths, ratios(times), asks)
    write(
        "engines",
        {
            "rows": rows,
            "prompt": PROMPT,
            "new": NEW,
            "machine": facts,
            "command": f"python benchmarks/engines.py --rounds {given.rounds}",
        },
    )
    lines = [
        "| engine | model | opens | difference | prefill, of dense | decode, of dense | bytes bound | MB | peak MiB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        speeds = " | ".join(f"{row[name]:.2f}" for name in ("prefill_ratio", "decode_ratio", "bytes_bound"))
        told = f"{row['engine']} | {row['variant']} | {row['opens']} | {row['difference']:.1g}"
        lines.append(f"| {told} | {speeds} | {row['megabytes']:.0f} | {row['peak_mib']:.0f} |")
    where = f"{facts['processor']}, one of {facts['cores']} cores, torch {facts['versions']['torch']}"
    (RESULTS / "engines.md").write_text(
        "\n".join([*lines, "", f"{given.rounds} rounds in turn, medians; {where}.", ""]), "utf-8"
    )


if __name__ == "__main__":
    main()
