"""Whether zeros make anything faster on a CPU: linears with 70 % of them where an engine might skip them.

    python benchmarks/sparse_speed.py MODEL [--layers 12] [--rounds 5]

The smallest 70 % of each linear of the blocks become zero: how many there are decides about time, not which. torch
multiplies by all linears in turn, so that weights come from memory as in decoding: dense, and as rows of what is not 0
(CSR) by torch and by scipy, at one token and at 128. ONNX Runtime and OpenVINO run the graphs of both models, float32
and 8 bits, on a prompt of 128 tokens and 32 more; OpenVINO also with its packing of sparse weights switched on for
linears with half zeros and more, and how many kernels then are sparse ones is read from the compiled graph.

One thread, variants of an engine in turn, ratios are medians of rounds, dense over own. Times are of the processor, not
of the wall, so that others on the machine count less. 2 of 4 in tensor cores needs a GPU and is not measured.
"""

import argparse
import copy
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from scipy.sparse import csr_array
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PreTrainedModel

from common import RESULTS, machine, write
from compresso.arch.base import arch_for
from compresso.checkpoint.load import load_model
from compresso.checkpoint.source import open_source
from compresso.core.sparsity import lowest_share
from compresso.edit.stock import as_stock
from compresso.engines.onnx_runtime import OnnxModel
from compresso.engines.openvino import OpenVinoModel, names_read
from compresso.formats.onnx import GRAPH, library, save_onnx
from compresso.metrics.traffic import paired
from compresso.sweep.targets import Where, chosen, names_of
from engines import NEW, PROMPT, in_turn, size

RATE = "CPU_SPARSE_WEIGHTS_DECOMPRESSION_RATE"
SHARE, HALF = 0.7, 0.5
"""Of zeros; and from which on OpenVINO is asked to pack."""
EXACT = 1e-6
"""Of its norm: how far a product over what is not 0 may be from the dense one."""
WORTH = 1.1
"""The ratio from which on, in every round, a variant is called faster."""
Row = dict[str, Any]
LINEARS, PARTS = "all linears", ["linears", "graphs"]


class PackingModel(OpenVinoModel):
    """A folder in OpenVINO that packs sparse weights where it can."""

    def _open(self, folder: Path, threads: int) -> set[str]:
        core = library("openvino").Core()
        settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads, RATE: HALF}
        self._compiled = core.compile_model(core.read_model(str(folder / GRAPH)), "CPU", settings)
        return names_read(self._compiled)

    def kernels(self) -> tuple[int, int]:
        """Matrix products of the compiled graph, and those by a sparse kernel."""
        found = [node.get_rt_info() for node in self._compiled.get_runtime_model().get_ops()]
        types = [str(info["primitiveType"].value) for info in found if _is_product(info)]
        return len(types), sum("sparse" in one for one in types)


def _is_product(info: Any) -> bool:
    return "layerType" in info and str(info["layerType"].value) in ("FullyConnected", "MatMul")


def row(engine: str, what: str, part: str, dense: Sequence[float], own: Sequence[float], **more: Any) -> Row:
    """What was measured of a variant: its speed over that of dense."""
    ratios, noise = paired(dense, own)
    found = {"engine": engine, "variant": what, "part": part, "ratio": round(statistics.median(ratios), 3)}
    found |= {"rounds": [round(one, 3) for one in ratios], "noise": round(noise, 3)}
    return found | {"ms": round(1000 * statistics.median(own), 2)} | more


def products(weights: Sequence[Tensor], tokens: int, rounds: int) -> list[Row]:
    """All linears in turn, at so many tokens; AssertionError if a sparse product is not the dense one."""
    generator = torch.Generator().manual_seed(0)
    given = {weight.shape[1]: torch.randn(tokens, weight.shape[1], generator=generator) for weight in weights}
    inputs = [given[weight.shape[1]] for weight in weights]
    rows_of = [weight.to_sparse_csr() for weight in weights]
    arrays = [csr_array(weight.numpy()) for weight in weights]
    ways: dict[str, Callable[[int], Any]] = {
        "dense": lambda i: linear(inputs[i], weights[i]),
        "dense, by numpy": lambda i: (weights[i].numpy() @ inputs[i].T.numpy()).T,
        "torch CSR": lambda i: (rows_of[i] @ inputs[i].T).T,
        "scipy CSR": lambda i: (arrays[i] @ inputs[i].T.numpy()).T,
    }
    apart: dict[str, float] = {}
    for name, way in ways.items():
        off = [_apart(torch.as_tensor(way(i)), ways["dense"](i)) for i in range(len(weights))]
        apart[name] = max(off)
        assert apart[name] <= EXACT, f"{name}: {apart[name]:.1e} of its norm from dense"
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            begun = time.process_time()
            for i in range(len(weights)):
                way(i)
            seconds[name].append(time.process_time() - begun)
    part = f"{tokens} token{'s' * (tokens > 1)}"
    return [row(LINEARS, name, part, seconds["dense"], own, difference=apart[name]) for name, own in seconds.items()]


def _apart(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def engines(folders: Mapping[str, Path], dtype: str, rounds: int) -> list[Row]:
    """Both graphs in ONNX Runtime and OpenVINO, and the sparse one in OpenVINO that packs."""
    found: list[Row] = []
    for engine, opening in (("ONNX Runtime", OnnxModel), ("OpenVINO", OpenVinoModel)):
        models: dict[str, OnnxModel] = {name: opening(folder, 1) for name, folder in folders.items()}
        told: dict[str, Any] = {}
        if engine == "OpenVINO":
            packing = PackingModel(folders["70 % zeros"], 1)
            models["70 % zeros, packing on"] = packing
            products_, sparse = packing.kernels()
            told = {"products": products_, "sparse_kernels": sparse}
        times = in_turn(models, rounds, time.process_time)
        for name, parts in times.items():
            for part, own, base in zip((f"prompt of {PROMPT}", f"{NEW} tokens"), parts, times["dense"], strict=True):
                more = told if name.endswith("on") else {}
                folder = folders.get(name, folders["70 % zeros"])
                found.append(row(f"{engine}, {dtype}", name, part, base, own, megabytes=size(folder) / 1e6, **more))
                print(found[-1], flush=True)
    return found


def graphs_of(models: Mapping[str, PreTrainedModel], rounds: int) -> list[Row]:
    """All of the engines that run graphs."""
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as scratch:
        for dtype in ("f32", "int8"):
            folders = {name: Path(scratch, f"{dtype}-{i}") for i, name in enumerate(models)}
            for name, folder in folders.items():
                model = models[name]
                save_onnx(model, arch_for(model.config).shapes(model), folder, dtype=dtype)
            rows += engines(folders, dtype, rounds)
    return rows


def beside(rows: Sequence[Row]) -> list[str]:
    """For each number of tokens, the fastest product over what is not 0 against the fastest dense one."""
    found: list[str] = []
    for part in dict.fromkeys(one["part"] for one in rows if one["engine"] == LINEARS):
        mine = [one for one in rows if (one["engine"], one["part"]) == (LINEARS, part)]
        base, own = (
            min((one for one in mine if ("dense" in one["variant"]) == dense), key=lambda one: one["ms"])
            for dense in (True, False)
        )
        found.append(f"{part} {base['ms'] / own['ms']:.2f} ({own['variant']}, {own['ms']} ms; {base['ms']} ms dense)")
    return found


def report(rows: Sequence[Row], told: str, facts: Mapping[str, Any], rounds: int) -> str:
    """results/sparse_speed.md."""
    lines = ["# Zeros on a CPU", ""]
    faster = [one for one in rows if one["engine"] != LINEARS and min(one["rounds"]) > WORTH]
    said = "; ".join(f"{one['engine']}, {one['variant']}, {one['part']}: {one['ratio']:.2f}" for one in faster)
    packing = [one for one in rows if "products" in one and one["part"] == f"{NEW} tokens"]
    products_, kernels = (sum(one[name] for one in packing) for name in ("products", "sparse_kernels"))
    lines += [
        f"Of the engines that run whole models, at least a tenth faster in every round: {said or 'none'}. Of products"
        f" over what is not 0, the fastest beside the fastest dense one: {'; '.join(beside(rows))}.",
        "",
        f"{told} Ratios are speeds over dense in time of the processor, medians of {rounds} rounds in turn, with the"
        " least and greatest round; one thread. OpenVINO packs sparse weights of 8-bit products on processors with AMX;"
        f" this one has {'it' if facts['amx'] else 'none'}, and {kernels} of {products_} products in the graphs that"
        " were compiled with packing on are sparse kernels. 2 of 4 in tensor cores needs a GPU and was not measured.",
        "",
        "| engine | model | part | of dense | least to greatest | ms | MB |",
        "|---|---|---|---:|---:|---:|---:|",
    ]
    for one in rows:
        megabytes = f"{one['megabytes']:.0f}" if "megabytes" in one else "-"
        lines.append(
            f"| {one['engine']} | {one['variant']} | {one['part']} | {one['ratio']:.2f} |"
            f" {min(one['rounds']):.2f} to {max(one['rounds']):.2f} | {one['ms']:.1f} | {megabytes} |"
        )
    where = f"{facts['processor']}, {facts['threads']} of {facts['cores']} cores (shared)"
    return "\n".join([*lines, "", f"{where}, torch {facts['versions']['torch']}; `benchmarks/sparse_speed.py`.", ""])


def zeroed_(model: PreTrainedModel, names: Sequence[str]) -> PreTrainedModel:
    """The model, the smallest weights of each of these linears 0."""
    with torch.no_grad():
        for name in names:
            weight = model.get_parameter(f"{name}.weight")
            weight.masked_fill_(lowest_share(weight.abs(), SHARE), 0)
    return model


def main() -> None:
    """Measure, print and store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--layers", type=int, help="the first of the model; all if not given")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--parts", nargs="*", default=PARTS, choices=PARTS, help="others stay as they were measured")
    given = parser.parse_args()
    torch.set_num_threads(1)
    cpu = Path("/proc/cpuinfo")
    facts = machine() | {"amx": cpu.exists() and "amx_int8" in cpu.read_text("utf-8")}
    dense = as_stock(load_model(open_source(given.model), dtype=torch.float32))
    arch = arch_for(dense.config)
    if given.layers:
        stack = dense.get_submodule("model")
        stack.layers = nn.ModuleList(arch.blocks(dense)[: given.layers])
        dense.config.num_hidden_layers = given.layers
    names = names_of(chosen(dense, arch, Where()))
    models = {"dense": dense, "70 % zeros": zeroed_(copy.deepcopy(dense), names)}
    sparse = models["70 % zeros"]
    weights = [sparse.get_parameter(f"{name}.weight").detach() for name in names]
    zeros = sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)
    kept = RESULTS / "sparse_speed.json"
    known: list[Row] = json.loads(kept.read_text("utf-8"))["rows"] if kept.exists() else []
    linears = [one for one in known if one["engine"] == LINEARS]
    graphs = [one for one in known if one["engine"] != LINEARS]
    if "linears" in given.parts:
        with torch.no_grad():
            linears = [one for tokens in (1, PROMPT) for one in products(weights, tokens, given.rounds)]
        print(linears, flush=True)
    if "graphs" in given.parts:
        graphs = graphs_of(models, given.rounds)
    rows = linears + graphs
    layers = f" --layers {given.layers}" if given.layers else ""
    command = f"python benchmarks/sparse_speed.py MODEL{layers} --rounds {given.rounds}"
    told = f"{Path(given.model).name}, {len(arch.blocks(dense))} layers: {100 * zeros:.1f} % of the weights of their"
    told += f" {len(names)} linears ({sum(weight.nbytes for weight in weights) / 2**20:.0f} MiB) are 0."
    write("sparse_speed", {"rows": rows, "told": told, "zeros": zeros, "machine": facts, "command": command})
    (RESULTS / "sparse_speed.md").write_text(report(rows, told, facts, given.rounds), "utf-8")


if __name__ == "__main__":
    main()
