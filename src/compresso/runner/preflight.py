"""Everything that can be wrong with a run, found before weights are read and before anything is written."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from compresso.checkpoint.atomic import check_output
from compresso.checkpoint.overwrite import RUN, refuse_foreign
from compresso.checkpoint.source import Source, has_tokenizer, load_tokenizer, open_source
from compresso.checkpoint.workfolder import WorkFolder
from compresso.core.budget import InfeasibleBudget
from compresso.data.instructions import Encoded
from compresso.data.prompt import prompt_identity
from compresso.data.records import Chat, Instruction, Records
from compresso.data.registry import load_records
from compresso.errors import BudgetError, CheckpointError, DataError, RecipeError
from compresso.runner.dry_run import dry_run
from compresso.runner.options import AskedLayout, recipe_for
from compresso.runner.output import origin, versions
from compresso.runner.recipe import Recipe
from compresso.stage import ChecksData, Sweeps
from compresso.tasks.base import Reading
from compresso.training.device import choose_device


@dataclass(frozen=True)
class Prepared:
    """A run that nothing speaks against.

    Args:
        recipe, source: checked; weights not read yet.
        output: absolute.
        device: where it runs.
        tokenizer: None for a model without one, in a recipe without data.
        records, encoded: the data; None in a recipe without.
        prompt: identity of the collaborative prompt, if the recipe uses it.
        seed: of every random draw.
        layout: asked for.
    """

    recipe: Recipe
    source: Source
    output: Path
    device: torch.device
    tokenizer: PreTrainedTokenizerBase | None
    records: Records | None
    encoded: Encoded | None
    prompt: Mapping[str, str] | None
    seed: int
    layout: AskedLayout

    def identity(self) -> dict[str, Any]:
        """What a resume must agree on."""
        return {
            "recipe": self.recipe.to_dict(),
            "model": asdict(self.source.identity),
            "data": self.records.sha256 if self.records else None,
            "prompt": self.prompt,
            "layout": self.layout,
            "seed": self.seed,
            "versions": versions(),
        }

    def origin(self) -> dict[str, Any]:
        """What the records say of where the result comes from."""
        return origin(self.recipe, self.source, self.records, self.encoded, self.prompt, self.seed)


def prepare(
    raw: Mapping[str, Any],
    model: str,
    data: str | None,
    *,
    output: Path,
    layout: str,
    seed: int,
    device: str,
    overwrite: bool,
    skip_bad: bool,
    offload: bool = False,
) -> Prepared:
    """Check a run's arguments against each other and read its data.

    Raises:
        CompressoError: with the cure; nothing was written.
    """
    # a config is enough to check the recipe, and weights may be long in coming
    recipe = recipe_for(raw, layout, open_source(model, weights=False).config)
    source = open_source(model)
    if not source.tensors:
        raise CheckpointError(
            f"{model} has no weights; a run needs a folder of safetensors (a config.json is enough for `compresso"
            " plan`)"
        )
    if offload:
        check_offloaded(recipe, layout)
    output = output.resolve()
    check_output(output, source.folder, overwrite)
    check_output(WorkFolder.beside(output), source.folder, force=True)
    dry_run(recipe, source)
    where = choose_device(device)
    if data is not None and not recipe.needs("data"):
        raise RecipeError(f"recipe {recipe.name} uses no data, but --data {data} was given; leave it out")
    chosen = data or recipe.data.source
    _spare_data(chosen, output)
    if overwrite:
        refuse_foreign(output, RUN)
    tokenizer = load_tokenizer(source) if recipe.needs("data") or has_tokenizer(source) else None
    # a model reads no further than its context: longer examples would train positions that it does not have
    length = min(
        recipe.data.max_length, getattr(source.config, "max_position_embeddings", None) or recipe.data.max_length
    )
    recipe = replace(recipe, data=replace(recipe.data, max_length=length))
    records, encoded = _examples(recipe, chosen, tokenizer, source.config, skip_bad)
    if encoded is not None:
        recipe = _held_out(recipe, raw, len(encoded.rows), chosen)
    for name, stage in recipe.stages:
        if encoded is not None and isinstance(stage, ChecksData):
            packed = records is not None and records.kind == "text" and recipe.data.pack
            _checked_data(name, stage, encoded, tokenizer, source.config, length if packed else None)
    recipe = replace(recipe, data=replace(recipe.data, source=_without_folders(chosen)))
    prompted = records is not None and any(isinstance(record, Instruction | Chat) for record in records.rows)
    prompt = prompt_identity() if recipe.data.prompt and prompted else None
    return Prepared(recipe, source, output, where, tokenizer, records, encoded, prompt, seed, cast(AskedLayout, layout))


def check_offloaded(recipe: Recipe, layout: str) -> None:
    """Raise RecipeError for a recipe that needs the whole model in memory, or a layout other than the model's own."""
    if layout != "auto":
        raise RecipeError(
            f"--layout {layout}: an offloaded run writes its model in the layout it came in; leave --layout or"
            " --offload out"
        )
    stages = [name for name, _ in recipe.stages]
    if len(stages) != 1 or not isinstance(recipe.stages[0][1], Sweeps):
        raise RecipeError(
            f"recipe {recipe.name} ({', '.join(stages)}) cannot be offloaded: wanted one stage that sweeps over the"
            " blocks, such as wanda, sparsegpt, gptq or awq. Leave --offload out, or choose another recipe"
        )


def _checked_data(
    name: str,
    stage: ChecksData,
    encoded: Encoded,
    tokenizer: PreTrainedTokenizerBase | None,
    config: PreTrainedConfig,
    window: int | None,
) -> None:
    """Let a stage look at the data before weights are read; `window` is the length that plain text was cut to."""
    try:
        stage.check_data(encoded.rows, tokenizer, config, window)
    except InfeasibleBudget as error:
        raise BudgetError(f"stage '{name}': {error}") from error
    except CheckpointError as error:
        raise CheckpointError(f"stage '{name}': {error}") from error


def _without_folders(data: str | None) -> str | None:
    """What a person wrote after --data, with files named without the folders of this machine."""
    if data is None:
        return None
    parts = [part.strip() for part in data.split(",")]
    return ",".join(Path(part).name if Path(part).expanduser().is_file() else part for part in parts)


def _spare_data(data: str | None, output: Path) -> None:
    """Refuse data files that lie in a folder the run would replace."""
    for part in filter(None, map(str.strip, (data or "").split(","))):
        path = Path(part).expanduser()
        for folder in (output, WorkFolder.beside(output)):
            if path.is_file() and path.resolve().is_relative_to(folder):
                raise DataError(
                    f"data {path} lies in {folder}, which the run replaces. Move it, or choose another output"
                )


def _examples(
    recipe: Recipe,
    data: str | None,
    tokenizer: PreTrainedTokenizerBase | None,
    config: PreTrainedConfig,
    skip_bad: bool,
) -> tuple[Records | None, Encoded | None]:
    """Read and tokenise the training data, if the recipe needs any."""
    if not recipe.needs("data"):
        return None, None
    if data is None:
        raise DataError(
            f"recipe {recipe.name} needs data; give --data with a registered name or a local file, such as --data"
            " alpaca-gpt4"
        )
    assert tokenizer is not None  # the caller loads one for a recipe that needs data
    records = load_records(data, skip_bad=skip_bad, form=recipe.task.form)
    knobs = recipe.data
    reading = Reading(knobs.max_length, knobs.prompt, knobs.pack, knobs.limit)
    return records, recipe.task.encode(records, tokenizer, reading, config)


def _held_out(recipe: Recipe, raw: Mapping[str, Any], n_rows: int, data: str | None) -> Recipe:
    """The recipe with the number of examples that are held out: its own, else as many as its task wants. Raises
    DataError if none would be left.
    """
    held = recipe.data.held if "held" in (raw.get("data") or {}) else recipe.task.held_out(n_rows)
    if n_rows <= held:
        raise DataError(f"{data} gives {n_rows} examples, of which {held} are held out; give more, or lower data.held")
    return replace(recipe, data=replace(recipe.data, held=held))
