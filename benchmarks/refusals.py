"""What pruning one part of a chat model does to its refusals: Wanda on the attention, on the MLP, on both.

    COMPRESSO_DATA=folder python benchmarks/refusals.py --model FOLDER [--methods dense wanda-attention-20 ...]
        [--limit 10] [--benign 5] [--new-tokens 128] [--examples 128] [--length 512] [--scratch FOLDER]
        [--device cpu] [--threads 1]
    python benchmarks/refusals.py --report

The table of Pruning for Protection (arXiv 2401.10862) for one model: of a stratified part of its prompts (`--limit`,
`--benign`: percent of 2475 each) how many are refused, how many benign ones are complied with, how many answers are
broken, and the perplexity. All models are asked the same prompts, greedily, through the chat template, so that
differences are paired. Departures: `metrics/trust/refusal_suite.py`; calibration is papers, encyclopaedia, instructions
and stories, not C4; weights are float32.

A finished row is a line of results/refusals.jsonl and is not done again; answers of a row that was stopped stay in the
scratch folder, which is to lie outside of the repository. Rows hold prompts by their place in the file, and what an
answer is, no text of either. `--report` writes results/refusals.md (`refusals_report.py`).
"""

import argparse
import json
import os
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

import refusals_report
from common import machine
from compresso.core.row import Row
from compresso.loading import Loaded, load
from compresso.metrics.held import held_loss
from compresso.metrics.trust.asking import Limits, ModelRespondent
from compresso.metrics.trust.journal import Journal, Journalled
from compresso.metrics.trust.refusal_prompts import Prompt, benign_prompts, harmful_prompts
from compresso.metrics.trust.refusal_suite import WHOLE, ask, chosen
from compresso.metrics.trust.refusals import published_refusal
from compresso.metrics.trust.soundness import SOUND_TEXTS, requests_loss
from compresso.training.progress import Progress
from refusals_report import LINES, METHODS, rows
from repair import lines, windows
from trust import SCORED, compressed

FILES = Path("datasets") / "trust" / "eval-safety"
"""Below COMPRESSO_DATA: integrated.yaml.gz and benign_integrated.yaml.gz."""
TOGETHER = 96
"""Prompts asked between two writes: those of a template stand together in them."""
KEYS = ("model", "method", "seed", "limit", "benign", "new_tokens", "examples", "length", "prompts_sha256")


def prompts(given: argparse.Namespace) -> tuple[list[Prompt], str]:
    """What every model is asked, and the hashes of the files that it is from."""
    folder = Path(os.environ["COMPRESSO_DATA"]) / FILES
    harmful, benign = (
        harmful_prompts(folder / "integrated.yaml.gz"),
        benign_prompts(folder / "benign_integrated.yaml.gz"),
    )
    asked = chosen(harmful, given.limit / 100, 0) + chosen(benign, given.benign / 100, 0)
    return asked, f"{harmful.sha256[:16]} {benign.sha256[:16]}"


def answered(loaded: Loaded, asked: list[Prompt], row: dict[str, Any], given: argparse.Namespace) -> dict[str, Any]:
    """What each answer is, by the prompt's id, the loss on plain sentences, and the perplexity."""
    assert loaded.tokenizer is not None
    name = "-".join(str(row[key]) for key in KEYS[:3])
    journal = Journal(given.scratch / f"{name}.jsonl", {key: row[key] for key in KEYS})
    model = ModelRespondent(loaded.model, loaded.tokenizer, batch=given.batch)
    respondent = Journalled(model, journal, Progress(), name, TOGETHER)
    found = ask(respondent, asked, Limits(given.new_tokens, WHOLE))
    texts = (one["text"] for one in lines("text/wikitext2_raw_test") if one["text"].strip())
    scored = [Row(input_ids=ids, labels=list(ids)) for ids in windows(loaded.tokenizer, texts, given.length, SCORED)]
    return {
        "answers": {one.prompt.id: one.kind.value for one in found},
        "published": [one.prompt.id for one in found if published_refusal(one.answer.text)],
        "plain": asdict(requests_loss(loaded.model, loaded.tokenizer, SOUND_TEXTS)),
        "wikitext2": asdict(held_loss(loaded.model, scored, batch_size=1)),
    }


def run(given: argparse.Namespace) -> None:
    """Do what is missing, the dense model first."""
    torch.set_num_threads(given.threads)
    where = {key: value for key, value in machine().items() if key != "load_before"}
    asked, digest = prompts(given)
    for method in given.methods:
        row: dict[str, Any] = {"model": Path(given.model).name, "method": method, "seed": 0, "prompts_sha256": digest}
        row |= {key: getattr(given, key) for key in ("limit", "benign", "new_tokens", "examples", "length")}
        if any(all(one[key] == row[key] for key in KEYS) for one in rows()):
            continue
        begun = time.monotonic()
        loaded = load(given.model, dtype=torch.float32, device=given.device)
        model, kept = compressed(loaded, method, given, 0)
        seconds, begun = round(time.monotonic() - begun, 1), time.monotonic()
        row |= {**kept, **answered(replace(loaded, model=model), asked, row, given), "compression_s": seconds}
        row |= {"asking_s": round(time.monotonic() - begun, 1), "machine": where}
        with LINES.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(f"{row['model']} {method}: {seconds:.0f} s and {row['asking_s']:.0f} s", flush=True)


def main() -> None:
    """Run, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--limit", type=float, default=10, help="percent of the harmful prompts")
    parser.add_argument("--benign", type=float, default=5, help="percent of the benign prompts")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--examples", type=int, default=128)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--batch", type=int, default=40)
    parser.add_argument("--scratch", type=Path, default=Path("refusals"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--report", action="store_true", help="write the table of what is done, and do nothing more")
    given = parser.parse_args()
    if not given.report:
        if given.model is None:
            parser.error("--model is wanted, a folder of a chat model")
        run(given)
    refusals_report.report()


if __name__ == "__main__":
    main()
