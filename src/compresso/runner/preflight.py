"""Everything that can be wrong with a run, found before weights are read and before anything is written."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from compresso.checkpoint.atomic import check_output
from compresso.checkpoint.overwrite import FAMILY, RUN, refuse_foreign
from compresso.checkpoint.scratch import check_scratch
from compresso.checkpoint.source import Source, open_source
from compresso.checkpoint.workfolder import WorkFolder
from compresso.core.budget import InfeasibleBudget
from compresso.data.prompt import prompt_identity
from compresso.data.records import Chat, Instruction, Records
from compresso.data.shards import is_pattern
from compresso.data.survival import Encoded
from compresso.errors import BudgetError, CheckpointError, DataError, ExportError, RecipeError
from compresso.formats.sliced import is_cut
from compresso.native import has_unequal_form
from compresso.runner.acted import DryRun
from compresso.runner.dry_run import dry_run
from compresso.runner.examples import fewer_than_asked, read_examples, within_context
from compresso.runner.options import AskedLayout, recipe_for, with_options
from compresso.runner.output import origin, versions
from compresso.runner.recipe import Recipe
from compresso.runner.rounds import check_rounds, targets_of
from compresso.stage import ChecksData, ChecksLabels, Sweeps
from compresso.training.device import choose_device
from compresso.training.launch import is_main_process


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
        said: what a person should know of the data before it begins, a sentence each.
        allow_dropped: whether more of the data may be lost than a run may lose.
        lacking: stage -> which of its kinds the model has no units of, and what that does to its budget.
        own_zeros: stages that need zeros which the model has to bring.
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
    said: tuple[str, ...] = ()
    allow_dropped: bool = False
    lacking: Mapping[str, str] = field(default_factory=dict[str, str])
    own_zeros: Sequence[str] = ()

    def identity(self) -> dict[str, Any]:
        """What a resume must agree on."""
        data = self.records.sha256 if self.records else None
        return _known(self.recipe, self.source, self.layout, self.seed) | {"data": data, "prompt": self.prompt}

    def corpus(self) -> str:
        """What the examples are of, in a word."""
        return "none" if self.records is None else self.recipe.data.source or "data"

    def origin(self) -> dict[str, Any]:
        """What the records say of where the result comes from."""
        return origin(self.recipe, self.source, self.records, self.encoded, self.prompt, self.seed, self.said)


_READ = ("data", "prompt", "recipe.data.source")
"""Of a run's identity, what is known, or told together with what is known, once its data was read."""


def _known(recipe: Recipe, source: Source, layout: str, seed: int) -> dict[str, Any]:
    """What a resume must agree on, but for the data."""
    return {
        "recipe": recipe.to_dict(),
        "model": asdict(source.identity),
        "layout": layout,
        "seed": seed,
        "versions": versions(),
    }


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
    allow_dropped: bool = False,
    offload: bool = False,
    quiet: bool = False,
    resume: bool = False,
) -> Prepared:
    """Check a run's arguments against each other and against an interrupted run, and read its data.

    Raises:
        CompressoError: with the cure; nothing was written.
    """
    # a config is enough to check the recipe, and weights may be long in coming
    recipe = recipe_for(raw, layout, open_source(model, weights=False).config)
    source = open_source(model)
    if not source.tensors:
        raise CheckpointError(
            f"{model} has no weights; a run needs a folder of safetensors or a GGUF file (a config.json is enough for"
            " `compresso plan`)"
        )
    if is_cut(source.folder):
        raise CheckpointError(
            f"{model}: its stream is cut by a forward patch of slicegpt, which a run would lose. Put slicegpt and what"
            " follows it into one recipe, and give the model that it was run on"
        )
    if offload:
        check_offloaded(recipe, layout)
    output = output.resolve()
    replaced = FAMILY if targets_of(recipe.acts) else RUN
    check_output(output, source.folder, overwrite, replaced)
    check_output(WorkFolder.beside(output), source.folder, force=True)
    check_scratch()
    acted = dry_run(recipe, source)
    refuse_layout(acted, layout, source)
    where = choose_device(device)
    if data is not None and not recipe.needs("data"):
        raise RecipeError(f"recipe {recipe.name} uses no data, but --data {data} was given; leave it out")
    chosen = data or recipe.data.source
    _spare_data(chosen, output)
    if overwrite:
        refuse_foreign(output, replaced)
    if is_main_process():
        known = _known(within_context(recipe, source.config), source, layout, seed)
        own = () if "held" in (raw.get("data") or {}) else ("recipe.data.held",)
        WorkFolder.check(output, known, resume=resume, force=overwrite, unknown=(*_READ, *own))
    read = read_examples(recipe, raw, chosen, source, skip_bad=skip_bad, allow_dropped=allow_dropped, quiet=quiet)
    recipe, tokenizer, records, encoded = read.recipe, read.tokenizer, read.records, read.encoded
    said = (*filter(None, (acted.lost, acted.dense)), *read.said)
    if encoded is not None:
        said = (*said, *fewer_than_asked(acted.stages, len(encoded.rows) - recipe.data.held))
    if encoded is not None:
        check_rounds(recipe.acts, recipe.name, len(encoded.rows) - recipe.data.held)
    for name, stage in recipe.stages:
        if encoded is not None and isinstance(stage, ChecksData):
            packed = records is not None and records.kind == "text" and recipe.data.pack
            window = recipe.data.max_length if packed else None
            _checked_data(name, stage, encoded, tokenizer, source.config, window)
        if encoded is not None and encoded.labels and isinstance(stage, ChecksLabels):
            stage.check_labels(encoded.labels)
    recipe = replace(recipe, data=replace(recipe.data, source=without_folders(chosen)))
    prompted = records is not None and any(isinstance(record, Instruction | Chat) for record in records.rows)
    prompt = prompt_identity() if recipe.data.prompt and prompted else None
    return Prepared(
        recipe,
        source,
        output,
        where,
        tokenizer,
        records,
        encoded,
        prompt,
        seed,
        cast(AskedLayout, layout),
        said,
        allow_dropped,
        acted.lacking,
        tuple(acted.own_zeros),
    )


def check_shapes(recipe: str | Path | Mapping[str, Any], model: str, layout: str, options: Mapping[str, Any]) -> None:
    """Act a recipe out on a model's shapes alone. options: as `with_options` takes them.

    Raises CompressoError: for what `prepare` would refuse of budgets and shapes.
    """
    raw, source = with_options(recipe, model=model, **options), open_source(model, weights=False)
    refuse_layout(dry_run(recipe_for(raw, layout, source.config), source), layout, source)


def refuse_layout(shown: DryRun, layout: str, source: Source) -> None:
    """Raise ExportError for a layout that does not hold what a recipe leaves of a mixture of experts, whose numbers of
    experts are known before weights are read, or of a SegFormer.
    """
    obstacle = shown.layouts.get(layout)
    if obstacle is not None and has_unequal_form(source.config.model_type):
        raise ExportError(
            f"layout {layout} cannot hold what this recipe leaves of a {source.config.model_type}: {obstacle}. Give"
            " --layout native, or leave --layout out"
        )


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


def without_folders(data: str | None) -> str | None:
    """What a person wrote after --data, with files, folders and patterns named without the folders of this machine."""
    if data is None:
        return None
    parts = [part.strip() for part in data.split(",")]
    return ",".join(Path(part).name if is_pattern(part) or Path(part).expanduser().exists() else part for part in parts)


def _spare_data(data: str | None, output: Path) -> None:
    """Refuse data files that lie in a folder the run would replace."""
    for part in filter(None, map(str.strip, (data or "").split(","))):
        path = Path(part).expanduser()
        path = path.parent if is_pattern(part) else path
        for folder in (output, WorkFolder.beside(output)):
            if path.exists() and path.resolve().is_relative_to(folder):
                raise DataError(
                    f"data {path} lies in {folder}, which the run replaces. Move it, or choose another output"
                )
