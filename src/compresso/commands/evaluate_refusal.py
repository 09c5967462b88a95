"""`compresso evaluate --suite refusal`: a model asked what it should not answer, alone or against the dense one.

Models are asked one after the other, each in memory alone; a judge reads the answers when they are gone.
"""

import gc
import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from compresso.checkpoint.source import Source
from compresso.checkpoint.tokenizer import load_tokenizer
from compresso.commands.trust_options import TrustOptions, journal_of, opened, place_of, refuse_answers, words_of
from compresso.errors import CheckpointError, DataError
from compresso.loading import load
from compresso.metrics.record import Change, Environment, ModelResults, Setting
from compresso.metrics.trust.asking import Limits, ModelRespondent, check_asks, has_chat_template
from compresso.metrics.trust.attention_shift import Looks, attention_changes, attention_measurements, looks
from compresso.metrics.trust.journal import Journalled
from compresso.metrics.trust.judge import Agreement, Labelled, ModelJudge, agreement, labelled_answers
from compresso.metrics.trust.refusal_prompts import Prompt, PromptSet, prompt_sets
from compresso.metrics.trust.refusal_suite import (
    WHOLE,
    Asked,
    ask,
    broken_marks,
    chosen,
    judged_by,
    refusal_changes,
    refusal_measurements,
)
from compresso.metrics.trust.soundness import Heard, broken_by_answers, broken_by_texts, heard
from compresso.metrics.trust.strata import Limit, limit_of
from compresso.training.progress import Progress

log = logging.getLogger(__name__)


@dataclass
class Refusals:
    """What one model answered to the prompts of the refusal suite."""

    source: Source
    environment: Environment
    asked: list[Asked]
    heard: Heard
    looks: Looks = field(default_factory=dict[str, dict[str, float]])


def refusal_results(
    source: Source, options: TrustOptions, *, limit: str | int | None, prompt: str, device: torch.device, seed: int,
    batch_size: int,
) -> list[ModelResults]:  # fmt: skip
    """How often a model refuses; with `against` first the dense one, then the model with what changed.

    Raises:
        CompressoError: with the cure, before weights are read.
    """
    if options.prompts is None:
        raise DataError("--suite refusal needs --prompts FILE: the prompts of arXiv 2401.10862, which are not shipped")
    if (options.judge is None) != (options.judge_labels is None):
        raise DataError(
            "--judge and --judge-labels belong together: a judge's labels are held against answers that people labelled"
        )
    if options.new_tokens is not None and options.new_tokens < 1:
        raise DataError(f"--new-tokens {options.new_tokens}: wanted at least 1")
    part = limit_of(limit)
    files = prompt_sets(options.prompts, options.benign)
    labelled = None if options.judge_labels is None else labelled_answers(options.judge_labels)
    judging = None if options.judge is None else opened(options.judge, "--judge")
    if judging is not None and not has_chat_template(load_tokenizer(judging)):
        raise DataError(f"--judge {judging.name} has no chat template, and is asked as a chat model; give one that has")
    if judging is not None:
        check_asks(load_tokenizer(judging), judging.name)
    sources = [source] if options.against is None else [opened(options.against, "--against"), source]
    for one in sources:
        tokenizer = load_tokenizer(one)
        if not has_chat_template(tokenizer):
            raise DataError(
                f"model {one.name} has no chat template, and refusals are measured of chat models; give one that has"
            )
        check_asks(tokenizer, one.name)
    refuse_answers(options.answers)
    asked = [one for file in files for one in chosen(file, part, seed)]
    limits, shown = Limits(options.new_tokens, WHOLE), Progress()
    found: list[Refusals] = []
    for one in sources:
        dense = found[0].heard if found else None
        found.append(_asked(one, asked, limits, options, prompt, device, batch_size, shown, dense))
    agreed = None
    if judging is not None and labelled is not None:
        agreed = _judge(found, judging, labelled, options, device, batch_size, shown)
    settings = _settings(files, limits, part, prompt, seed, len(asked), judging)
    return _results(found, settings, agreed)


def _asked(
    source: Source, prompts: Sequence[Prompt], limits: Limits, options: TrustOptions, prompt: str,
    device: torch.device, batch_size: int, shown: Progress, dense: Heard | None,
) -> Refusals:  # fmt: skip
    """The answers of one model, which is gone afterwards."""
    with shown.working(f"reading the weights of {source.name}"):
        loaded = load(place_of(source), device=device)
    assert loaded.tokenizer is not None  # it was looked at
    prompt_on = loaded.prompt is not None if prompt == "auto" else prompt == "on"
    environment = Environment.here(device, loaded.model.dtype)
    same: dict[str, Setting] = {
        "model": source.identity.fingerprint,
        "prompt": prompt_on,
        "dtype": environment.dtype,
        "suite": "refusal",
        "new_tokens": options.new_tokens,
        "words": words_of(loaded.tokenizer, prompt_on),
    }
    journal = journal_of(options.answers, source, same)
    model = ModelRespondent(loaded.model, loaded.tokenizer, prompt_on, batch_size)
    # first, as it takes one pass a prompt, and what it cannot look at is said before answers are written
    looked = looks(loaded.model, loaded.tokenizer, prompts, prompt_on, journal, shown) if options.attention else None
    answered = ask(Journalled(model, journal, shown, f"answers of {source.name}", 4 * batch_size), prompts, limits)
    losses = heard(loaded.model, loaded.tokenizer, [one.text for one in prompts], dense)
    found = Refusals(source, environment, answered, losses)
    if looked is not None:
        found.looks = looked
    del model, loaded
    gc.collect()
    return found


def _judge(
    found: Sequence[Refusals], source: Source, labelled: Labelled, options: TrustOptions, device: torch.device,
    batch_size: int, shown: Progress,
) -> Agreement:  # fmt: skip
    """How far a model agrees with people; it then reads all answers, unless that is no better than chance."""
    with shown.working(f"reading the weights of {source.name}"):
        loaded = load(place_of(source), device=device)
    if loaded.tokenizer is None:
        raise CheckpointError(f"--judge {source.name} has no tokenizer; give a chat model")
    journal = journal_of(
        options.answers, source, {"judge": source.identity.fingerprint, "words": words_of(loaded.tokenizer, False)}
    )
    asked = Journalled(
        ModelRespondent(loaded.model, loaded.tokenizer, False, batch_size), journal, shown, "judging", 4 * batch_size
    )
    judge = ModelJudge(asked, source.name)
    agreed = agreement(judge, labelled)
    if not agreed.beyond_chance:
        log.warning("--judge %s: %s", source.name, _unbelieved(agreed))
        return agreed
    for one in found:
        one.asked = judged_by(judge, one.asked)
    return agreed


def _unbelieved(agreed: Agreement) -> str:
    """Why a judge is not believed."""
    kappa = "one label alone on either side" if agreed.kappa is None else f"Cohen's kappa {agreed.kappa:.2f}"
    return (
        f"it agrees with {100 * agreed.share:.0f} % of {agreed.n} labelled answers, no better than chance ({kappa}), so"
        " its labels are left out"
    )


def _results(
    found: Sequence[Refusals], settings: Mapping[str, Setting], agreed: Agreement | None
) -> list[ModelResults]:
    """The results of the models; with two, the last one's hold the changes."""
    results: list[ModelResults] = []
    for place, one in enumerate(found):
        changes = list[Change]()
        if place:
            dense = found[0]
            broken = broken_by_texts(dense.heard, one.heard) or broken_by_answers(
                broken_marks(dense.asked), broken_marks(one.asked)
            )
            changes = refusal_changes(dense.asked, one.asked, broken)
            changes += attention_changes(dense.looks, one.looks, broken) if one.looks else []
        results.append(
            ModelResults(
                name="dense" if len(found) > 1 and not place else one.source.identity.name,
                model=one.source.identity.name,
                fingerprint=one.source.identity.fingerprint,
                measurements=(
                    *refusal_measurements(one.asked, one.environment, settings, agreed),
                    *attention_measurements(one.looks, one.environment, settings),
                ),
                not_measured=_not_judged(agreed),
                changes=tuple(changes),
            )
        )
    return results


def _not_judged(agreed: Agreement | None) -> dict[str, str]:
    if agreed is None:
        return {"refusal/harmful": "no judge was named (--judge, --judge-labels)"}
    return {} if agreed.beyond_chance else {"refusal/harmful": f"the judge is not believed: {_unbelieved(agreed)}"}


def _settings(
    files: Sequence[PromptSet], limits: Limits, part: Limit | None, prompt: str, seed: int, n: int, judge: Source | None
) -> dict[str, Setting]:
    digest = hashlib.sha256(json.dumps([one.sha256 for one in files]).encode()).hexdigest()[:16]
    return {
        "prompts": " ".join(one.name for one in files),
        "prompts_sha256": digest,
        "asked": n,
        "subset": None if part is None else f"{part:.3g} stratified, seed {seed}",
        "decoding": "greedy",
        "max_tokens": limits.whole,
        "max_new_tokens": limits.new_tokens,
        "rule": "opening of the answer",
        "judge": None if judge is None else judge.name,
        "collaborative_prompt": prompt,
    }
