"""Dynamic knowledge recovery: LoRA on text like that of pretraining, then on instructions, most where most was lost
(LoRAShear, arXiv 2310.18356, section on recovery).

Stage 1 trains on plain texts, stage 2 on instructions and conversations. Sources are what `data` joins by commas, each
split by these two kinds. Every `every` updates the loss on some examples of each source, which are not trained on, is
compared with the dense model's, and the rows of the next updates are drawn from the sources of the running stage in
proportion to the rise.

Published is this outline alone. Our choices, none of them the authors': The measure of what was lost (loss, not
    perplexity), examples per source (`probed`), how often, and that shares are proportional to it (to the numbers of
    rows where nothing was lost). Subsets are drawn row by row with replacement instead of being assembled ahead. Both
    stages run their full length and share one adapter and one learning-rate schedule. The paper stops a stage early
    when it no longer helps; recipes are compared at equal updates, so here it does not. Data without rows of one kind
    has one stage, which takes all updates; the records say so. A row without any unlabelled token counts as plain text.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated

import torch
from annotated_types import Ge
from torch import Tensor
from transformers import PreTrainedModel

from compresso.arch.base import Arch
from compresso.core.row import Row
from compresso.data.batches import IGNORED
from compresso.errors import CheckpointError, DataError
from compresso.job import Job
from compresso.metrics.held import held_loss
from compresso.stage import AdamW, Effects, Knobs, Learning, Passes, Trains, TunesLora, stage
from compresso.stage.tuning import attached, group_of, merged, tune
from compresso.training.duration import Duration, shortened, updates
from compresso.training.history import curve
from compresso.training.mixture import MixedBatches, MixedObjective, logged, shares
from compresso.training.noise import mixed_seed


@stage(
    "recover_knowledge",
    title="LoRA recovery on texts, then on instructions, drawn most from the sources where most was lost",
    paper="2310.18356",
    effects=Effects.WEIGHTS,
    needs=("data", "gradients", "training"),
    when=(
        "After any removal, with data of several sources: `--data c4,wikitext2,alpaca-gpt4`. With one source of one"
        " kind use recover."
    ),
    failures="Repeats a small source that has lost much until it is learned by heart: watch its held-out loss.",
)
class RecoverKnowledge:
    """Knobs of two-stage dynamic recovery.

    Args:
        text_steps, instruction_steps: updates or epochs of the two stages.
        every: updates between two measurements of what was lost.
        probed: examples of each source to measure on; at most half of it.
        trains, lora, adamw: see `Trains`, `TunesLora` and `AdamW`.
    """

    text_steps: Duration = 100
    instruction_steps: Duration = 200
    every: Annotated[int, Ge(1)] = 50
    probed: Annotated[int, Ge(1)] = 32
    trains: Annotated[Trains, Knobs(without=("steps", "checkpointing", "save_adapter"))] = Trains()
    lora: TunesLora = TunesLora()
    adamw: AdamW = AdamW()

    def learning(self) -> Learning:
        """Adapters."""
        return Learning(self.trains, [self.text_steps, self.instruction_steps], self.lora)

    def work(self, model: PreTrainedModel, arch: Arch) -> Sequence[Passes]:
        """The training, and what is measured of a source: before it, and every so many updates."""
        phases, known = self.learning().phases, self.learning().updates is not None
        texts, instructions = self.trains.updates(1, phases)
        total = texts + instructions
        times = {*range(self.every, total + 1, self.every), texts, total} - {0}
        measured = Passes("measuring", self.probed if known else None, forwards=1 + len(times))
        return [measured, Passes("dense loss", self.probed, dense=True), *self.learning().passes()]

    def __call__(self, job: Job) -> Job:
        """Measure what each source has lost, train on both kinds in turn, merge."""
        probes, training = split(sources_of(job.rows), self.probed)
        texts = torch.tensor([plain for _, plain in training])
        n_rows = torch.tensor([len(rows) for rows in training.values()])
        texts_end, total = self._phases([int(n_rows[texts].sum()), int(n_rows[~texts].sum())])
        dense = self._dense_losses(job, probes)

        def lost() -> Tensor:
            """The rise of each source's loss over the dense model's [sources]."""
            return _losses(job, probes) - dense

        before = lost()
        lora = attached(job, self.lora)
        objective = MixedObjective(lora, job.task.loss, before).to(job.device)

        def shares_at(update: int) -> Tensor:
            return shares(objective.lost.cpu(), texts if update < texts_end else ~texts, n_rows)

        def after_update(update: int) -> Mapping[str, float]:
            """Measure again where it is time, or where the other stage begins."""
            seen = logged(shares_at(update), objective.lost)
            if (update + 1) % self.every == 0 or update + 1 in (texts_end, total):
                objective.lost.copy_(lost())
            return seen

        adapters = group_of("lora", lora, self.adamw, job.model.config.hidden_size, total)
        seed = mixed_seed("recover_knowledge", job.seed)
        history = tune(
            job,
            "recover_knowledge",
            self.trains,
            objective,
            [adapters],
            total,
            batches=MixedBatches(list(training.values()), self.trains.batch, job.collated, seed, shares_at),
            after_update=after_update,
            phase=lambda update: "texts" if update < texts_end else "instructions",
        )
        facts = {
            "updates": {"texts": texts_end, "instructions": total - texts_end},
            "sources": [
                {
                    "source": name,
                    "kind": "text" if plain else "instruction",
                    "rows": len(rows),
                    "lost_before": a,
                    "lost_after": b,
                }
                for ((name, plain), rows), a, b in zip(
                    training.items(), before.tolist(), objective.lost.tolist(), strict=True
                )
            ],
            "trainable": adapters.numbers,
            "lr": adapters.lr,
            "curve": curve(history),
        }
        return merged(job, lora, "recover_knowledge", self.trains).note("recover_knowledge", **facts)

    def _phases(self, examples: Sequence[int]) -> tuple[int, int]:
        """Updates of the first stage and of both; a kind without examples gives its updates to the other."""
        asked = [
            updates(one, n or 1, self.trains.batch)
            for one, n in zip((self.text_steps, self.instruction_steps), examples, strict=True)
        ]
        if not all(examples):
            asked = [sum(asked) if n else 0 for n in examples]
        texts, instructions = shortened(asked, self.trains.max_steps)
        return texts, texts + instructions

    def _dense_losses(self, job: Job, probes: Mapping[tuple[str, bool], Sequence[Row]]) -> Tensor:
        """Losses of the model that the run started from [sources]. Raises CheckpointError if the job does not know
        where from.
        """
        if job.original is None:
            raise CheckpointError(
                "recover_knowledge compares with the dense model, and this job names none; set Job.original"
            )
        return _losses(replace(job, model=job.original(job.model.dtype, job.device)), probes)


def sources_of(rows: Sequence[Row]) -> dict[tuple[str, bool], list[Row]]:
    """Rows by (source, whether they are plain text), in the order they appear."""
    found: dict[tuple[str, bool], list[Row]] = {}
    for row in rows:
        found.setdefault((row.get("source", "data"), IGNORED not in row["labels"]), []).append(row)
    return found


def split(
    sources: Mapping[tuple[str, bool], Sequence[Row]], probed: int
) -> tuple[dict[tuple[str, bool], list[Row]], dict[tuple[str, bool], list[Row]]]:
    """Examples to measure on, evenly spaced, and those to train on, by source. Raises DataError for a source of a
    single row.
    """
    probes: dict[tuple[str, bool], list[Row]] = {}
    training: dict[tuple[str, bool], list[Row]] = {}
    for key, rows in sources.items():
        n = min(probed, len(rows) // 2)
        if not n:
            raise DataError(
                f"source {key[0]!r} has {len(rows)} row of its kind; recover_knowledge needs 2, one of them to"
                " measure on"
            )
        chosen = {i * len(rows) // n for i in range(n)}
        probes[key] = [row for i, row in enumerate(rows) if i in chosen]
        training[key] = [row for i, row in enumerate(rows) if i not in chosen]
    return probes, training


def _losses(job: Job, probes: Mapping[tuple[str, bool], Sequence[Row]]) -> Tensor:
    """Mean loss on each source's probes [sources], float64, in evaluation mode; every module's mode is put back."""
    modes = {module: module.training for module in job.model.modules()}
    job.model.eval()
    losses = [held_loss(job.model, rows).mean for rows in probes.values()]
    for module, mode in modes.items():
        module.training = mode
    return torch.tensor(losses, dtype=torch.float64)
