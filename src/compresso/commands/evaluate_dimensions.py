"""`compresso evaluate --suite trust`: eight dimensions of one model, alone or against the dense one.

On a CPU weights are read as float32. Logits in bfloat16 are so coarse that choices tie, and a tie is the first choice:
a lean, not noise. Most CPUs also compute bfloat16 at a quarter of the speed.
"""

import gc
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch

from compresso.checkpoint.source import Source
from compresso.checkpoint.tokenizer import load_tokenizer
from compresso.commands.trust_options import TrustOptions, journal_of, opened, place_of, refuse_answers, words_of
from compresso.commands.trust_scorer import opened_scorer
from compresso.loading import load
from compresso.metrics.record import Environment, ModelResults, Setting
from compresso.metrics.tasks.ready import data_folder
from compresso.metrics.trust.asking import ModelRespondent, check_asks
from compresso.metrics.trust.data import FOLDER, TrustData
from compresso.metrics.trust.dimension import Scoring
from compresso.metrics.trust.dimensions.toxicity import Scorer
from compresso.metrics.trust.journal import Journalled
from compresso.metrics.trust.questions import WRITTEN, Extent, TrustQuestions, questions_of
from compresso.metrics.trust.soundness import Heard, broken_alone, broken_by_texts, heard
from compresso.metrics.trust.strata import limit_of
from compresso.metrics.trust.suite import Outcome, answered, trust_changes, trust_measurements
from compresso.training.progress import Progress


@dataclass(frozen=True)
class Measured:
    """What one model was found to do, and its loss on plain sentences and on what the dense one wrote."""

    source: Source
    environment: Environment
    outcomes: list[Outcome]
    heard: Heard


def trust_results(
    source: Source, options: TrustOptions, *, data_root: str | Path | None, limit: str | int | None, prompt: str,
    device: torch.device, seed: int, batch_size: int,
) -> list[ModelResults]:  # fmt: skip
    """The dimensions of a model; with `against` first the dense one, then the model with what changed.

    Raises:
        CompressoError: with the cure.
    """
    part = limit_of(limit)
    written = min(part, WRITTEN) if isinstance(part, int) else WRITTEN
    extent = Extent(cast(Scoring, options.scoring), part, written, options.generations, seed)
    asked = questions_of(TrustData(data_folder(data_root, FOLDER)), extent, options.scorer is not None)
    sources = [source] if options.against is None else [opened(options.against, "--against"), source]
    for one in sources:
        check_asks(load_tokenizer(one), one.name)
    refuse_answers(options.answers)
    scorer = None if options.scorer is None else opened_scorer(options.scorer, options.scorer_label, device)
    found: list[Measured] = []
    for one in sources:
        dense = found[0].heard if found else None
        found.append(_measured(one, options, asked, prompt, device, batch_size, scorer, dense))
    results: list[ModelResults] = []
    for place, one in enumerate(found):
        dense = found[0]
        broken = broken_by_texts(dense.heard, one.heard) if place else broken_alone(one.heard)
        changes = trust_changes(dense.outcomes, one.outcomes, broken) if place else ()
        measurements, lacking = trust_measurements(one.outcomes, one.environment, extent, broken)
        results.append(
            ModelResults(
                name="dense" if len(found) > 1 and not place else one.source.identity.name,
                model=one.source.identity.name,
                fingerprint=one.source.identity.fingerprint,
                measurements=tuple(measurements),
                not_measured=lacking,
                changes=tuple(changes),
            )
        )
    return results


def _measured(
    source: Source, options: TrustOptions, questions: TrustQuestions, prompt: str, device: torch.device,
    batch_size: int, scorer: Scorer | None, dense: Heard | None,
) -> Measured:  # fmt: skip
    """What one model does, which is gone afterwards."""
    shown = Progress()
    with shown.working(f"reading the weights of {source.name}"):
        loaded = load(place_of(source), dtype=torch.float32 if device.type == "cpu" else None, device=device)
    assert loaded.tokenizer is not None  # a model without one was refused
    prompt_on = loaded.prompt is not None if prompt == "auto" else prompt == "on"
    environment = Environment.here(device, loaded.model.dtype)
    same: dict[str, Setting] = {
        "model": source.identity.fingerprint,
        "prompt": prompt_on,
        "dtype": environment.dtype,
        "suite": "trust",
    }
    same["words"] = words_of(loaded.tokenizer, prompt_on)
    model = ModelRespondent(loaded.model, loaded.tokenizer, prompt_on, batch_size)
    asked = Journalled(
        model, journal_of(options.answers, source, same), shown, f"answers of {source.name}", 4 * batch_size
    )
    outcomes = answered(asked, questions, scorer)
    losses = heard(loaded.model, loaded.tokenizer, dense=dense)
    del model, asked, loaded
    gc.collect()
    return Measured(source, environment, outcomes, losses)
