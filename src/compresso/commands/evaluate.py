"""What a model can do: perplexity and benchmark tasks, with and without the collaborative prompt, as a report of
measurements.

What can be wrong with the words of a command (names, data, output) is found before weights are read.
"""

from collections.abc import Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from compresso.checkpoint.source import Source, open_source
from compresso.checkpoint.tokenizer import load_tokenizer
from compresso.commands.evaluate_dimensions import trust_results
from compresso.commands.evaluate_refusal import refusal_results
from compresso.commands.trust_options import SUITES, TrustOptions, check_suite_words, refuse_options_of
from compresso.data.prompt import Prompt, collaborative_prompt
from compresso.door import public
from compresso.errors import CheckpointError, DataError, nearest
from compresso.loading import Loaded, load
from compresso.metrics.pruned_context import check_cache, check_rule, reading
from compresso.metrics.record import Environment, Measurement, ModelResults, Report
from compresso.metrics.report_file import report_path, write_report_file
from compresso.metrics.trust.strata import limit_of
from compresso.runner.evaluate_task import check_words, refuse_other_than_text, task_metric
from compresso.training.device import choose_device
from compresso.training.progress import Progress

if TYPE_CHECKING:
    from compresso.metrics.corpora import Corpus
    from compresso.metrics.protocol import PerplexityProtocol

PROMPTING = ("auto", "on", "off", "both")


@public
def evaluate(
    model: str | Path,
    *,
    suite: str | None = None,
    tasks: Sequence[str] | None = None,
    corpus: str | None = None,
    protocol: str | None = None,
    prompt: str = "auto",
    limit: int | str | None = None,
    data_root: str | Path | None = None,
    batch_size: int = 8,
    device: str = "auto",
    seed: int = 0,
    output: str | Path | None = None,
    task: str | None = None,
    data: str | None = None,
    skip_bad: bool = False,
    prompts: str | Path | None = None,
    benign: str | Path | None = None,
    judge: str | Path | None = None,
    judge_labels: str | Path | None = None,
    against: str | Path | None = None,
    answers: str | Path | None = None,
    new_tokens: int | None = None,
    scoring: str = "likelihood",
    generations: int = 25,
    cache: str | None = None,
    scorer: str | Path | None = None,
    scorer_label: str | None = None,
    attention: bool = False,
) -> Report:
    """Perplexity and task scores of a model; with neither corpus, suite nor tasks, its perplexity on wikitext2.

    Args:
        model: folder of safetensors, GGUF file or hub id.
        suite: commonsense, reading, mmlu, bbh or world; refusal, how often a chat model refuses; trust, eight
            dimensions of trust.
        tasks: single tasks, in place of a suite.
        corpus: wikitext2, c4 or a local file.
        protocol: sparsegpt, llm-pruner or compresso; None: sparsegpt, or llm-pruner if the model's context is shorter
            than its windows.
        prompt: the collaborative prompt before the requests of tasks; "auto": on if the model was pruned with it.
        limit: most items of each task, the first ones; of refusal and trust a number of items or a share such as "5%",
            drawn by the seed, with its part of every kind.
        data_root: folder with local files; None: that of COMPRESSO_DATA, if set, else the hub.
        batch_size: rows a forward.
        device: auto, cpu, cuda or cuda:N.
        seed: of shots that are drawn.
        output: file to which the report is written as JSON; a report that lies there is replaced.
        task, data: in place of all that is for text, a task such as "classification", and examples to score on.
        skip_bad: of a task's data, leave bad lines out (counted, with a warning) instead of raising.
        prompts: of suite refusal, the file of harmful tasks in templates.
        benign: of suite refusal, the file of everyday tasks in the same templates.
        judge, judge_labels: of suite refusal, a chat model that tells harmful answers, and labelled answers to hold it
            against.
        against: of suites refusal and trust, the dense model, asked the same; the report then says what changed.
        answers: of suites refusal and trust, a folder that keeps each answer, from which a stopped call goes on.
        new_tokens: of suite refusal, most tokens of an answer; None: as many as 1000 with the request leave.
        scoring: of suite trust, "likelihood" of the choices, or texts "sampled" as published.
        generations: of suite trust, texts drawn for each request where scoring is sampled.
        cache: of a perplexity, a rule by which the cache forgets, as `compresso.load` takes it, such as "keydiff:0.5";
            texts are then read through it. A model with learned gates is read through its own.
        scorer: of suite trust, sampled, a text classifier that says how toxic texts are; None: toxicity is not
            measured.
        scorer_label: its label that means toxic; None: the one called toxic or toxicity.
        attention: of suite refusal, whether it is also measured how much of the attention goes to tasks and to the
            templates around them; attention is then computed step by step, a prompt at a time.

    Raises:
        CompressoError: with the cure; nothing was written.
    """
    check_words(task, data, tasks, suite, corpus, protocol)
    if skip_bad and task is None:
        raise DataError("--skip-bad is for the rows of --data, and --task names what they are scored on; give both")
    trust = TrustOptions(
        prompts, benign, judge, judge_labels, against, answers, new_tokens, scoring, generations, scorer, scorer_label,
        attention,
    )  # fmt: skip
    if suite in SUITES:
        check_suite_words(suite, trust, corpus, protocol)
    else:
        refuse_options_of(suite, trust)
        limit = _whole(limit)
    if suite is not None and tasks is not None:
        raise DataError("--suite and --tasks are both given; give one")
    if prompt not in PROMPTING:
        raise DataError(_unknown_prompt(prompt))
    if suite in SUITES and prompt == "both":
        raise DataError(f"--prompt both does not go with --suite {suite}; give on or off")
    if suite == "refusal" and data_root is not None:
        raise DataError(
            f"--data-root {data_root} is not read by --suite refusal, whose files are --prompts and --benign; leave it"
            " out"
        )
    names = [suite] if suite else list(tasks or ())
    if tasks is not None and not names:
        raise DataError("--tasks names nothing; give at least one")
    if suite in SUITES:
        _check_numbers(None, batch_size)
        limit_of(limit)
    elif names:
        _check_numbers(_whole(limit), batch_size)
    elif prompt != "auto" or (limit is not None and task is None):
        raise DataError("--prompt and --limit belong to tasks, and none was asked for; give --suite or --tasks")
    if cache is not None:
        _check_cached(cache, names, task)
    where = choose_device(device)
    source = open_source(model, packed=True)
    check_cache(source, cache)
    target = None if output is None else report_path(output, [source.folder])
    if not source.tensors:
        raise CheckpointError(f"{model} has no weights to evaluate; give a folder of safetensors or a GGUF file")
    if task is not None and data is not None:
        return _reported(source, task_metric(source, task, data, where, _whole(limit), skip_bad), target)
    refuse_other_than_text(source)
    load_tokenizer(source)
    if suite in SUITES:
        asked = {"limit": limit, "prompt": prompt, "device": where, "seed": seed, "batch_size": batch_size}
        if suite == "trust":
            return _written(trust_results(source, trust, data_root=data_root, **asked), target)
        return _written(refusal_results(source, trust, **asked), target)
    limit = _whole(limit)
    language = _language(source, corpus or "wikitext2", protocol, data_root) if corpus or not names else None
    if language is None and protocol is not None:
        raise DataError(
            f"--protocol '{protocol}' belongs to a corpus, and none was asked for; give one, such as --corpus wikitext2"
        )
    ready = None
    if names:
        from compresso.metrics.tasks import prepare
        from compresso.metrics.tasks.suites import check_suite

        if suite is not None:
            check_suite(suite, SUITES)
        ready = prepare(names, data_root=data_root, seed=seed)
    shown = Progress()
    with shown.working("reading the weights"):
        loaded = load(model, device=where, cache=cache)
    assert loaded.tokenizer is not None
    measurements: list[Measurement] = []
    if language:
        from compresso.metrics.perplexity import perplexity

        texts, how = language
        environment, held = Environment.here(where, loaded.model.dtype), reading(loaded.model, cache)
        through = {} if held is None else {"logits_of": held}
        result = perplexity(
            loaded.model, loaded.tokenizer, texts.texts, how, batch_size=batch_size, progress=shown, **through
        )
        found = result.measurements(environment, texts.remark)
        if held is not None:
            found = [one.model_copy(update={"protocol": one.protocol | held.settings}) for one in found]
            found += held.measurements(how.corpus, found[0].protocol, environment)
        measurements += found
    if ready:
        from compresso.metrics.tasks import task_measurements

        score = partial(
            task_measurements,
            loaded.model,
            loaded.tokenizer,
            ready,
            limit=limit,
            batch_size=batch_size,
            seed=seed,
            progress=shown,
        )
        for one in _collaborative(loaded, prompt):
            measurements += score(prompt=one)
    return _reported(source, measurements, target)


def _reported(source: Source, measurements: Sequence[Measurement], target: Path | None) -> Report:
    """The report of one model, also written if a file is named."""
    results = ModelResults(
        name=source.identity.name,
        model=source.identity.name,
        fingerprint=source.identity.fingerprint,
        measurements=tuple(measurements),
    )
    return _written([results], target)


def _written(models: Sequence[ModelResults], target: Path | None) -> Report:
    """The report of models, the dense one first; also written if a file is named."""
    report = Report(created=datetime.now(UTC).isoformat(timespec="seconds"), models=tuple(models))
    if target:
        write_report_file(target, report)
    return report


def prompts(loaded: Loaded, prompt: str) -> tuple[Prompt | None, ...]:
    """The prompts to measure with, None for none; of both, first the one that the model was pruned with.

    Raises:
        DataError: `prompt` is not auto, on, off or both.
    """
    on = loaded.prompt or collaborative_prompt(with_input=False)
    match prompt:
        case "auto":
            return (loaded.prompt,)
        case "on":
            return (on,)
        case "off":
            return (None,)
        case "both":
            return (on, None) if loaded.prompt else (None, on)
        case _:
            raise DataError(_unknown_prompt(prompt))


_collaborative = prompts
"""The same where an argument has that name."""


def _language(
    source: Source, corpus: str, protocol: str | None, data_root: str | Path | None
) -> "tuple[Corpus, PerplexityProtocol]":
    """Texts and protocol of a perplexity, checked against the model's context."""
    from compresso.metrics.corpora import corpus as read_corpus
    from compresso.metrics.protocol import check_context, preset

    context = getattr(source.config, "max_position_embeddings", None)
    chosen = protocol or (
        "llm-pruner" if isinstance(context, int) and context < preset("sparsegpt").seq_len else "sparsegpt"
    )
    preset(chosen)
    texts = read_corpus(corpus, data_root=data_root)
    how = preset(chosen, texts.name, texts.split)
    check_context(how, context)
    return texts, how


def _check_cached(cache: str, names: Sequence[str], task: str | None) -> None:
    """Raise ArgumentError or DataError for a rule that is none, or beside what is scored without a cache."""
    check_rule(cache)
    if names or task is not None:
        raise DataError(
            f"--cache {cache!r}: tasks and suites are scored in forwards without a cache, where a rule drops nothing;"
            " leave --cache out, or ask for a perplexity alone (--corpus)"
        )


def _unknown_prompt(prompt: str) -> str:
    return f"--prompt '{prompt}' is unknown; {nearest(prompt, PROMPTING)}"


def _whole(limit: int | str | None) -> int | None:
    """A number of items. Raises DataError for a share, which the first items of a task are not."""
    found = limit_of(limit)
    if isinstance(found, float):
        raise DataError(f"--limit {limit}: a share is for --suite refusal and trust; give a number of items")
    return found


def _check_numbers(limit: int | None, batch_size: int) -> None:
    for name, number in (("--limit", limit), ("--batch", batch_size)):
        if number is not None and number < 1:
            raise DataError(f"{name} {number}: wanted at least 1")
