"""The main job on the embedded model, offline: prune, recover, reload, compare, report."""

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from compresso.checkpoint.atomic import check_output, new_folder
from compresso.checkpoint.overwrite import demo as demo_files
from compresso.checkpoint.overwrite import refuse_foreign
from compresso.checkpoint.source import open_source
from compresso.commands import verify
from compresso.commands.compare import compare
from compresso.data import nano, world
from compresso.door import public
from compresso.loading import Loaded, load
from compresso.metrics.choices import choice_accuracy
from compresso.metrics.latency import speed_measurements
from compresso.metrics.perplexity import every_token, perplexity
from compresso.metrics.record import Environment, Measurement, ModelResults, Report
from compresso.metrics.report_file import write_report_file
from compresso.metrics.size import size_measurements
from compresso.runner.final_evaluation import SPEED_NEW, SPEED_PROMPT
from compresso.runner.recipe import read
from compresso.runner.run import run

RECIPES = {"magnitude": "magnitude-structured/nano", "gate-taylor": "gate-taylor/nano", "compresso": "compresso/nano"}
"""Recipes compared, all with the same number of updates in all, by the folder each writes."""
ITEMS_PER_TASK = 60
DOCUMENTS = 200
FRESH = 7_000_000
"""Seed of the demo's items and documents: not the seed of training or of the model's own scores."""
RESULTS, REPORT = "report.json", "report.html"
_COLUMNS = {
    "parameters/total": "parameters",
    "bytes/disk": "MB on disk",
    "world/perplexity": "perplexity",
    "world/acc": "accuracy",
    "decode/batch1": "decode tokens/s",
}


@public
def demo(
    output: str | Path, *, keep: float = 0.7, overwrite: bool = False, allow_collapsed: bool = False, seed: int = 0
) -> Report:
    """Prune the nano model by three recipes, measure all of them against the dense model, print the table and write the
    report.

    Args:
        output: becomes a folder with one checkpoint a recipe, `report.json` and `report.html`.
        keep: share of block parameters that stays.
        overwrite: replace the output of an earlier demo; a folder with anything else in it is refused.
        allow_collapsed: write what the collapse guard refuses.
        seed: of the recipes.

    Returns:
        What report.json holds: all models, the dense one first, on items and documents that none was trained on.

    Raises:
        CompressoError: as `run` does.
    """
    console, output, threads = Console(), Path(output), torch.get_num_threads()
    check_output(output, nano.path(), overwrite, demo_files(tuple(RECIPES)))
    if overwrite:
        refuse_foreign(output, demo_files(tuple(RECIPES)))
    torch.set_num_threads(1)  # so small a model gains nothing by more, and where they are busy waits for all of them
    try:
        report = _made(console, output, keep, overwrite, allow_collapsed, seed)
    finally:
        torch.set_num_threads(threads)
    return report


def _made(console: Console, output: Path, keep: float, overwrite: bool, allow_collapsed: bool, seed: int) -> Report:
    """The three runs, the table and the report."""
    with new_folder(output, overwrite) as folder:
        folders = {"dense": nano.path()}
        for name, recipe in RECIPES.items():
            console.print(f"[bold]{name}[/bold]: recipe {recipe}, {keep:.0%} of the blocks stay")
            folders[name] = run(
                read(recipe),
                nano.path(),
                "world",
                output=folder / name,
                keep=keep,
                seed=seed,
                allow_collapsed=allow_collapsed,
            ).folder
        console.print("[bold]measuring[/bold] all of them on fresh items, and their speed in turn")
        report = measured(folders)
        write_report_file(folder / RESULTS, report)
        compare([*(folders[name] for name in RECIPES), folder / RESULTS], folder / REPORT)
    _print(console, report, keep)
    best = output / "compresso"
    console.print(f"\nThe report, to be opened in a browser: [bold]{output / REPORT}[/bold]")
    console.print(f"The pruned checkpoint: [bold]{best}[/bold]. Load it:\n")
    console.print("    import compresso")
    console.print(f'    model = compresso.load("{best}")')
    console.print('    print(model.generate("What does a thitem eat?"))\n')
    console.print(
        "or, after `import compresso`, with AutoModelForCausalLM.from_pretrained; without compresso, with"
        " trust_remote_code=True.\n"
    )
    console.print("[bold]opening[/bold] it in every engine of this machine, each in a process of its own")
    verify.show(verify.verify(best), as_json=False)
    return report


def measured(folders: Mapping[str, Path]) -> Report:
    """Size, perplexity, accuracy and speed of each checkpoint, the first being the dense one, on items that none was
    trained on.
    """
    items = [item for task in world.TASKS for item in world.items(task, ITEMS_PER_TASK, FRESH)]
    texts = list(world.documents(DOCUMENTS, FRESH))
    loaded = {name: load(folder, dtype=torch.float32) for name, folder in folders.items()}
    live = {name: one.model for name, one in loaded.items()}
    speeds = speed_measurements(live, batches=(1,), prompt_tokens=SPEED_PROMPT, new_tokens=SPEED_NEW)
    models: list[ModelResults] = []
    for name, one in loaded.items():
        identity = open_source(folders[name]).identity
        answers = (*_sized(one, folders[name]), *_answered(one, items, texts), *speeds[name])
        models.append(
            ModelResults(name=name, model=identity.name, fingerprint=identity.fingerprint, measurements=answers)
        )
    return Report(created=datetime.now(UTC).isoformat(timespec="seconds"), models=tuple(models))


def _sized(one: Loaded, folder: Path) -> tuple[Measurement, ...]:
    return size_measurements(one.model, folder, Environment.here())


def _answered(one: Loaded, items: list[world.Item], texts: list[str]) -> tuple[Measurement, ...]:
    """Accuracy and perplexity on the fresh items and documents."""
    assert one.tokenizer is not None  # the nano model has one, and runs carry it over
    here = Environment.here(one.model.device, one.model.dtype)
    choices = choice_accuracy(one.model, one.tokenizer, items)
    language = perplexity(one.model, one.tokenizer, texts, every_token("world", "fresh", 256), batch_size=16)
    return (*choices.measurements("world", here, FRESH, items_of="fresh draw"), *language.measurements(here))


def _print(console: Console, report: Report, keep: float) -> None:
    table = Table(
        title=f"nano on fresh items, {keep:.0%} of block parameters kept, equal training", title_justify="left"
    )
    table.add_column("", no_wrap=True)
    for column in _COLUMNS.values():
        table.add_column(column, justify="right")
    for results in report.models:
        found = {one.name: one for one in results.measurements}
        table.add_row(results.name, *(_cell(found[name]) for name in _COLUMNS))
    console.print(table)


def _cell(one: Measurement) -> str:
    match one.unit:
        case "parameters":
            return f"{one.value:,.0f}"
        case "bytes":
            return f"{one.value / 1e6:.2f}"
        case "tokens/s":
            return f"{one.value:.0f} ({one.low:.0f}-{one.high:.0f})"
        case "share":
            return f"{one.value:.3f} ± {one.stderr:.3f}"
        case _:
            return f"{one.value:.3f}"
