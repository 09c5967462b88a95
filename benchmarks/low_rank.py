"""Low rank and slicing on a real model: what plain and whitened truncation, and SliceGPT, cost in perplexity, and what
the exported model is worth in time and bytes against the dense one, timed in turns in one process.

    COMPRESSO_DATA=folder python benchmarks/low_rank.py MODEL --scratch FOLDER [--keeps 0.8 0.9 0.6] [--examples 64]
        [--windows 40] [--rounds 5] [--length 512] [--new-tokens 32] [--threads 1] [--methods activations slicegpt none]
    python benchmarks/low_rank.py --report

`keep` is the share of its numbers that both factors of a linear have together, embeddings staying whole; of slicegpt it
is that of the stream's dimensions, embeddings and head included. Calibrated on windows of the RedPajama sample, scored
on WikiText-2 and the C4 sample, no training, float32. Each result is exported (low-rank, sliced) and opened by
transformers; that is scored and timed, beside the dense model. A finished row is a line of results/low_rank.jsonl, with
what it was taken on.
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import compresso
from common import RESULTS, machine
from compresso.checkpoint.source import open_source
from compresso.checkpoint.tokenizer import load_tokenizer
from compresso.metrics.corpora import corpus
from compresso.metrics.latency import speed_measurements
from compresso.metrics.perplexity import PerplexityProtocol, perplexity
from kept import stored
from real_model import SCORED, TEXT

LINES = RESULTS / "low_rank.jsonl"
FULL = {"examples": 64, "windows": 40, "rounds": 5, "length": 512, "new_tokens": 32}
"""What a row that is not shortened is taken on."""


def scored(model: PreTrainedModel, folder: str, root: Path, given: argparse.Namespace) -> dict[str, Any]:
    """Perplexity of both texts; folder: of the tokenizer."""
    tokenizer, found = load_tokenizer(open_source(folder, packed=True)), dict[str, Any]()
    for name, place in SCORED.items():
        texts = corpus(place if name == place else root / place, data_root=root)
        how = PerplexityProtocol(name, texts.split, "blank line", given.length, bos="none", max_windows=given.windows)
        result = perplexity(model, tokenizer, texts.texts, how, batch_size=2)
        found[name] = {"value": result.value, "loss": result.loss, "stderr": result.stderr, "tokens": result.n_tokens}
    return found


def opened(folder: str | Path) -> PreTrainedModel:
    """A folder as transformers opens it once compresso is imported, in float32."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def smaller(method: str, keep: float, root: Path, given: argparse.Namespace) -> dict[str, Any]:
    """One row: compress, export, score, time."""
    folder = given.scratch / f"{Path(given.model).name}-{method}-{keep}"
    calibration = {"examples": given.examples, "batch": 1}
    stage = (
        {"slicegpt": {"keep": keep, "only_if_smaller": False, **calibration}}
        if method == "slicegpt"
        else {"svd": {"keep": keep, "whiten": method, "calibration": calibration}}
    )
    data = {"source": "alpaca-gpt4", "max_length": given.length, "prompt": False, "pack": True, "held": 2, "limit": 400}
    result = compresso.run(
        {"name": "mine", "data": data, "stages": [stage]},
        given.model,
        root / TEXT,
        output=folder,
        measure="none",
        allow_collapsed=True,
        overwrite=True,
    )
    noted = result.records["stages"][next(iter(stage))]
    form = "sliced" if method == "slicegpt" else "low-rank"
    small = folder.with_name(f"{folder.name}-{form}")
    told = compresso.export(folder, small, format=form, overwrite=True)
    models = {"dense": opened(given.model), "smaller": opened(small)}
    found = scored(models["smaller"], given.model, root, given)
    speeds = speed_measurements(
        models, batches=(1,), prompt_tokens=given.length, new_tokens=given.new_tokens, rounds=given.rounds
    )
    values = {one.name.removesuffix("/batch1"): (one.value, one.low, one.high) for one in speeds["smaller"]}
    numbers = {name: sum(one.numel() for one in model.parameters()) for name, model in models.items()}
    return {"found": found, "seconds": noted["seconds"], "speed": values, "numbers": numbers, "bytes": told["bytes"]}


def report() -> None:
    """Write results/low_rank.md."""
    done = stored(LINES)
    where = f"{done[-1]['machine']['processor']}, {done[-1]['machine']['threads']} thread(s)"
    text = [
        "# Low rank and slicing on a real model, without training",
        "",
        f"Float32; perplexity ± one standard error over windows; {where}. Speed-ups over dense are medians of rounds in"
        " turns, with the extremes: prefill of a window, then further tokens, batch 1. Below 1 it is slower. See"
        " `benchmarks/low_rank.py`.",
        "",
    ]
    if short := [line for line in done if any(line["taken_on"][key] < FULL[key] for key in FULL)]:
        on = short[-1]["taken_on"]
        text += [
            f"**Shortened**: {on['examples']} windows of {on['length']} tokens to calibrate on, {on['windows']} of each"
            f" text to score by, {on['rounds']} timed rounds of {on['new_tokens']} new tokens, on a machine that did"
            " other work meanwhile. So few tokens are fewer than the widest linears have inputs: whitening fits them"
            " alone. Orders are worth more than values.",
            "",
        ]
    text += [
        "| model | method | share kept | parameters, millions | WikiText-2 | C4 sample | seconds | prefill | decode |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for line in sorted(done, key=lambda line: (line["model"], -line["keep"], line["method"])):
        scores = [
            f"{line['found'][name]['value']:,.1f} ± {line['found'][name]['value'] * line['found'][name]['stderr']:,.1f}"
            for name in SCORED
        ]
        dense = line["method"] == "dense"
        numbers = line["numbers"]["dense" if dense else "smaller"] / 1e6
        speeds = [
            "1" if dense else "{:.2f} ({:.2f} to {:.2f})".format(*line["speed"][f"{what}_speedup"])
            for what in ("prefill", "decode")
        ]
        seconds = "" if dense else f"{line['seconds']:.0f}"
        name = {"activations": "svd, whitened", "none": "svd, plain"}.get(line["method"], line["method"])
        cells = [line["model"], name, f"{line['keep']:g}", f"{numbers:.1f}", *scores, seconds, *speeds]
        text.append(f"| {' | '.join(cells)} |")
    (RESULTS / "low_rank.md").write_text("\n".join([*text, ""]), "utf-8")


def main() -> None:
    """Do what is missing, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--scratch", type=Path)
    parser.add_argument("--methods", nargs="+", default=["activations", "slicegpt", "none"])
    parser.add_argument("--keeps", type=float, nargs="+", default=[0.8, 0.9, 0.6])
    for name, value in FULL.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--report", action="store_true", help="write the table of what is done, and do nothing more")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if not given.report:
        root = Path(os.environ["COMPRESSO_DATA"])
        given.scratch.mkdir(parents=True, exist_ok=True)
        where = {key: value for key, value in machine().items() if key != "load_before"}
        of_row = {"model": Path(given.model).name, "taken_on": {key: getattr(given, key) for key in FULL}}
        todo = [("dense", 1.0), *((how, keep) for keep in given.keeps for how in given.methods)]
        for method, keep in todo:
            if any(
                (line["model"], line["method"], line["keep"]) == (of_row["model"], method, keep)
                for line in stored(LINES)
            ):
                continue
            if method == "dense":
                model = opened(given.model)
                numbers = {"dense": sum(one.numel() for one in model.parameters())}
                row = {"found": scored(model, given.model, root, given), "numbers": numbers, "speed": {}}
            else:
                row = smaller(method, keep, root, given)
            with LINES.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"method": method, "keep": keep, **of_row, **row, "machine": where}) + "\n")
            print(method, keep, row, flush=True)
    report()


if __name__ == "__main__":
    main()
