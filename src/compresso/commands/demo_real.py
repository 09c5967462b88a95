"""The main job on a real chat model: it answers requests itself, loses a fifth of its blocks to two methods, learns its
own answers again, and is asked before and after.

Nothing but the model is needed. The few updates that a processor makes in minutes show the way and not what a method
can do; `compresso run` with its own recipe and data does that.
"""

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from compresso.checkpoint.atomic import check_output, new_folder
from compresso.checkpoint.overwrite import demo_real as demo_files
from compresso.checkpoint.overwrite import refuse_foreign
from compresso.checkpoint.source import open_source
from compresso.checkpoint.writes_text import refuse_textless
from compresso.commands.compare import compare
from compresso.commands.export import export
from compresso.core.counted import counted
from compresso.data.instructions import encode_prompt
from compresso.data.requests import requests
from compresso.data.template import original_template, single_template
from compresso.errors import CheckpointError
from compresso.loading import Loaded, load
from compresso.metrics.generation import samples
from compresso.metrics.prompts import REQUESTS
from compresso.metrics.record import Sample
from compresso.runner.run import Result, run
from compresso.training.progress import Progress

RECIPES = ("gate-taylor", "compresso")
ASKED = REQUESTS[:4]
"""What is shown; none of it is trained on."""
ANSWERS, REPORT = "answers.jsonl", "report.html"
_TOKENS, _LENGTH, _HELD = 48, 112, 12
_BATCH = ("batch=4", "micro_batch=4")
_STAGES = {
    "gate-taylor": {"gate_taylor": ("batches=12", "batch=4"), "recover": _BATCH},
    "compresso": {"learn_gates": _BATCH, "recover": _BATCH},
}
"""What is smaller than in the recipes, for a processor."""


def demo_real(
    model: str | Path,
    output: str | Path,
    *,
    keep: float = 0.8,
    steps: int = 30,
    overwrite: bool = False,
    seed: int = 0,
) -> dict[str, Result]:
    """Prune a chat model by gate-Taylor and Compresso, show its answers before and after, and write a GGUF.

    Args:
        model: hub id, folder of safetensors or GGUF file, with a chat template.
        output: becomes a folder with `answers.jsonl`, a checkpoint a recipe, `report.html` and a GGUF.
        keep: share of block parameters that stays.
        steps: updates of each training stage.
        overwrite: replace the output of an earlier demonstration; a folder with anything else in it is refused.
        seed: of the recipes.

    Returns:
        The result of each recipe.

    Raises:
        CompressoError: as `run` does; ArchError for a model that writes no text, CheckpointError for one without a chat
            template.
    """
    console, output = Console(), Path(output)
    source = open_source(model)
    refuse_textless(source, "it answers no request; give a chat model")
    check_output(output, source.folder, overwrite, demo_files(RECIPES))
    if overwrite:
        refuse_foreign(output, demo_files(RECIPES))
    dense = load(model, dtype=torch.float32)
    if dense.tokenizer is None or original_template(single_template(dense.tokenizer)) is None:
        raise CheckpointError(f"model {source.name} has no chat template, so it cannot be asked; give a chat model")
    with new_folder(output, overwrite) as folder:
        console.print(f"[bold]{source.name}[/bold] answers {len(requests())} requests: it will learn from itself")
        answered = _asked(dense, requests(), "answers")
        _write(folder / ANSWERS, answered)
        shown = {"dense": _asked(dense, ASKED, "before")}
        del dense
        results: dict[str, Result] = {}
        for recipe in RECIPES:
            console.print(f"[bold]{recipe}[/bold]: {keep:.0%} of the blocks stay, {counted(steps, 'update')} a stage")
            results[recipe] = run(
                recipe,
                model,
                folder / ANSWERS,
                output=folder / recipe,
                keep=keep,
                max_steps=steps,
                sets=_sets(recipe),
                layout="uniform",
                seed=seed,
                measure="quick",
                allow_collapsed=True,  # so few updates may not save it: it is shown in any case, with the verdict
            )
            shown[recipe] = _asked(load(folder / recipe, dtype=torch.float32), ASKED, "after")
        compare([folder / recipe for recipe in RECIPES], folder / REPORT)
        gguf = folder / f"{RECIPES[-1]}.gguf"
        export(folder / RECIPES[-1], gguf, format="gguf", dtype="f16")
    _print(console, shown, results)
    console.print(f"\nThe report, to be opened in a browser: [bold]{output / REPORT}[/bold]", soft_wrap=True)
    console.print(f"For llama.cpp and what stands on it: [bold]{output / gguf.name}[/bold]", soft_wrap=True)
    return results


def _sets(recipe: str) -> list[str]:
    stages = [f"stages.{stage}.{knob}" for stage, knobs in _STAGES[recipe].items() for knob in knobs]
    return [f"data.max_length={_LENGTH}", f"data.held={_HELD}", "data.prompt=false", *stages]


def _asked(loaded: Loaded, prompts: Sequence[str], phase: str) -> tuple[Sample, ...]:
    """What a model answers, through its chat template, greedily."""
    tokenizer = loaded.tokenizer
    assert tokenizer is not None
    encode, progress = partial(encode_prompt, tokenizer, prompt_on=False), Progress()
    with progress.running(len(prompts), 0, phase):
        advance = lambda texts, tokens: progress.step(texts, phase, {}, tokens)  # noqa: E731
        return samples(loaded.model, tokenizer, prompts, _TOKENS, encode, advance)


def _write(path: Path, answered: Sequence[Sample]) -> None:
    """Requests and answers as a data file; an answer that was cut off ends with its last whole sentence."""
    rows = [(one.prompt, _whole(one.text.strip())) for one in answered]
    lines = [json.dumps({"instruction": asked, "output": said}) for asked, said in rows if said]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _whole(text: str) -> str:
    """The text up to its last full stop; all of it where there is none."""
    return text[: text.rfind(".") + 1] or text


def _print(console: Console, shown: Mapping[str, Sequence[Sample]], results: Mapping[str, Result]) -> None:
    for place, asked in enumerate(ASKED):
        console.print(f"\n[bold]{asked}[/bold]", soft_wrap=True)
        table = Table(show_header=False)
        for name, texts in shown.items():
            table.add_row(name, " ".join(texts[place].text.split()))
        console.print(table)
    for recipe, result in results.items():
        before, after = (result.records[when] for when in ("before", "after"))
        console.print(
            f"{recipe}: {before['parameters']['total']:,} -> {after['parameters']['total']:,} parameters, held loss"
            f" {before['held_loss']:.3f} -> {after['held_loss']:.3f}; guard: {result.records['guard']['verdict']}",
            soft_wrap=True,
        )
