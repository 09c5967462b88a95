"""From tasks to measurements: each score with its standard error and everything that was decided to get it; means of
suites.

Scores are the harness's: `acc` compares sums of log-probabilities, `acc_norm` divides them by the characters of a
choice, `exact_match` compares a generated text. A suite has a mean of `acc` (Compresso's) and one of `acc_norm`, with
`acc` where a task has no other (LLM-Pruner's).
"""

import copy
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from compresso.core.counted import counted
from compresso.data.instructions import opening_ids
from compresso.data.prompt import Prompt, collaborative_prompt
from compresso.errors import DataError
from compresso.metrics.record import Environment, Measurement, Setting
from compresso.metrics.tasks.bars import bars_shown_by
from compresso.metrics.tasks.quiet import quiet
from compresso.metrics.tasks.ready import Ready, ReadySuite, prepare
from compresso.metrics.tasks.scores import METRICS, Score, mean_score, scores_of
from compresso.training.progress import Progress

TOO_LONG = "whole shots dropped from the end, then the oldest tokens of the context"


def task_measurements(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: str | Sequence[str] | Sequence[ReadySuite],
    *,
    prompt: Prompt | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    batch_size: int = 8,
    data_root: str | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
    progress: Progress | None = None,
) -> tuple[Measurement, ...]:
    """Scores of a model on suites or tasks: of each suite first its mean, then its tasks.

    Args:
        model: in any mode, which is restored.
        tasks: names, or what `prepare` made of them (then `num_fewshot`, `data_root` and `seed` were given there).
        prompt: the collaborative prompt to put before every request, or None.
        limit: most items of a task, the first ones.
        num_fewshot: shots instead of each task's own.
        batch_size: rows a forward.
        data_root: folder with local files; None: that of COMPRESSO_DATA, if set.
        seed: of shots that are drawn.
        device: moves the model there first.
        progress: what shows the requests; None shows nothing.

    Raises:
        DataError: as `prepare`; or a limit below 1, a prompt this version does not know, or requests that the context
            cannot hold.
        ResourceError: lm_eval is not installed.
    """
    if limit is not None and limit < 1:
        raise DataError(f"limit={limit}: wanted at least 1 item")
    if batch_size < 1:
        raise DataError(f"batch_size={batch_size}: wanted at least 1 row")
    if prompt is not None and prompt != collaborative_prompt(with_input=False):
        raise DataError(
            f"prompt {prompt.version} ({prompt.sha256[:12]}) is unknown here; give"
            " collaborative_prompt(with_input=False)"
        )
    suites = _prepared(tasks, data_root, num_fewshot, seed)
    if device is not None:
        model.to(device)  # pyright: ignore[reportArgumentType]
    was_training = model.training
    try:
        with quiet(), bars_shown_by(progress or Progress("silent")):
            return _run(model, tokenizer, suites, prompt, limit, batch_size, seed)
    finally:
        model.train(was_training)


def _prepared(
    tasks: str | Sequence[str] | Sequence[ReadySuite], data_root: str | None, num_fewshot: int | None, seed: int
) -> tuple[ReadySuite, ...]:
    ready = [] if isinstance(tasks, str) else [one for one in tasks if isinstance(one, ReadySuite)]
    if ready:
        return tuple(ready)
    names = tasks if isinstance(tasks, str) else [str(one) for one in tasks]
    return prepare(names, data_root=data_root, num_fewshot=num_fewshot, seed=seed)


def _run(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    suites: Sequence[ReadySuite],
    prompt: Prompt | None,
    limit: int | None,
    batch_size: int,
    seed: int,
) -> tuple[Measurement, ...]:
    from lm_eval.evaluator import evaluate

    from compresso.metrics.tasks.prompted import PromptedLM
    from compresso.metrics.tasks.shots import dropping

    lm = PromptedLM(model, copy.deepcopy(tokenizer), opening_ids(tokenizer) if prompt else (), batch_size)
    every = [ready for suite in suites for ready in suite.tasks]
    dropped = {ready.bench.name: dropping(ready.task, lm) for ready in every if ready.shots}
    found = evaluate(
        lm=lm,
        task_dict={"tasks": {ready.bench.name: ready.task for ready in every}},
        limit=limit,
        bootstrap_iters=0,
        log_samples=True,
    )
    assert found is not None and "samples" in found  # absent in other processes of a group, and with log_samples=False
    environment = Environment.here(model.device, model.dtype, lm_eval="lm_eval", datasets="datasets")
    common: dict[str, Setting] = {
        "harness": f"lm_eval {version('lm_eval')}",
        "batch_size": batch_size,
        "max_length": lm.max_length,
        "too_long": TOO_LONG,
        "bos": _has_bos(lm),
        "prompt": f"collaborative {prompt.version} {prompt.sha256[:12]}" if prompt else None,
        "prompt_tokens": len(lm.opening) if prompt else None,
        "limit": limit,
    }
    measurements: list[Measurement] = []
    for suite in suites:
        scores = {ready.bench.name: scores_of(found["samples"][ready.bench.name]) for ready in suite.tasks}
        if suite.name:
            measurements += _means(suite, scores, common, environment)
        for ready in suite.tasks:
            protocol = common | _protocol(ready)
            remark = _remark(ready, lm.cut, dropped.get(ready.bench.name, []))
            drawn = seed if ready.shots and ready.task.fewshot_cfg.sampler != "first_n" else _items_seed(ready)
            measurements += [
                _measurement(ready.bench.name, metric, score, protocol, environment, drawn, remark)
                for metric, score in scores[ready.bench.name].items()
            ]
    return tuple(measurements)


def _means(
    suite: ReadySuite, scores: dict[str, dict[str, Score]], common: dict[str, Setting], environment: Environment
) -> list[Measurement]:
    """A suite's means: of every metric that some task has, with `acc` where a task lacks `acc_norm`."""
    assert suite.name is not None
    shots = sorted({ready.shots for ready in suite.tasks})
    made: list[Measurement] = []
    for metric in METRICS:
        if not any(metric in of_task for of_task in scores.values()):
            continue
        chosen = [of_task.get(metric) or of_task["acc"] for of_task in scores.values()]
        protocol = common | {
            "metric": metric if metric != "acc_norm" else "acc_norm, acc where a task has no acc_norm",
            "tasks": " ".join(scores),
            "mean_over": suite.weights,
            "shots": shots[0] if len(shots) == 1 else " ".join(map(str, shots)),
        }
        made.append(
            _measurement(suite.name, metric, mean_score(chosen, suite.weights), protocol, environment, None, None)
        )
    return made


def _protocol(ready: Ready) -> dict[str, Setting]:
    """What was decided for one task; the harness's name for it is in its YAML."""
    config = ready.task.config
    split = config.test_split or config.validation_split
    stated = (config.metadata or {}).get("version")
    return {
        "task": str(config.task),
        "task_version": None if stated is None else str(stated),
        "split": str(split),
        "shots": ready.shots,
        "items": len(ready.task.eval_docs),
        "answer": "whitespace around it removed" if ready.bench.changes else None,
        **ready.data,
    }


def _items_seed(ready: Ready) -> int | None:
    """The seed of generated items."""
    return None if ready.bench.copy else (ready.task.config.dataset_kwargs or {}).get("seed")


def _remark(ready: Ready, cut: set[str | tuple[str, str]], dropped: Sequence[int]) -> str | None:
    """What a reader must see beside the score: items that did not fit."""
    generated = ready.task.OUTPUT_TYPE == "generate_until"
    lost = {one.doc_id for one in ready.task.instances if (one.args[0] if generated else one.args) in cut}
    parts = [f"{counted(len(dropped), 'item')} lost {counted(sum(dropped), 'shot')} to fit"] if dropped else []
    parts += [f"{counted(len(lost), 'item')} lost the oldest tokens of their context"] if lost else []
    return "; ".join(parts) or None


def _has_bos(lm: Any) -> bool:
    """Whether rows begin with the tokenizer's beginning token."""
    ids = lm.opening or lm.tok_encode("a")
    return bool(ids) and lm.tokenizer.bos_token_id is not None and ids[0] == lm.tokenizer.bos_token_id


def _measurement(
    name: str,
    metric: str,
    score: Score,
    protocol: dict[str, Setting],
    environment: Environment,
    seed: int | None,
    remark: str | None,
) -> Measurement:
    return Measurement(
        name=f"{name}/{metric}",
        value=score.value,
        unit="share",
        how="measured",
        stderr=score.stderr,
        n=score.n,
        protocol={"metric": metric, **protocol},
        seed=seed,
        environment=environment,
        remark=remark,
    )
