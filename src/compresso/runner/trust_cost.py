"""What it would take to ask both models of a run what tells of trust, for `compresso plan`: the same questions, counted
and not asked.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compresso.checkpoint.source import Source
from compresso.checkpoint.tokenizer import load_tokenizer
from compresso.errors import CheckpointError, DataError
from compresso.metrics.forward import context_of
from compresso.metrics.trust.asking import Limits, Request, check_asks, has_chat_template
from compresso.metrics.trust.counting import Counting
from compresso.metrics.trust.journal import Journalled
from compresso.metrics.trust.questions import TrustQuestions
from compresso.metrics.trust.refusal_prompts import PromptSet, prompt_sets
from compresso.metrics.trust.refusal_suite import WHOLE
from compresso.metrics.trust.suite import answered
from compresso.runner.devices import REACHED, Planned
from compresso.runner.trust_check import Trust, refuse_trust, trust_questions
from compresso.tasks.base import Task

SIDE_BY_SIDE = 8
"""Answers that are written at once, as `evaluate` does unasked."""


@dataclass(frozen=True)
class TrustFiles:
    """What is counted, read.

    Args:
        trust: as for a run.
        questions: of the dimensions; None where none is asked for.
        prompts: of the refusal suite; () for none.
    """

    trust: Trust = "none"
    questions: TrustQuestions | None = None
    prompts: tuple[PromptSet, ...] = ()


def trust_files(task: Task, trust: Trust, prompts: str | Path | None, benign: str | Path | None) -> TrustFiles:
    """All files of both suites.

    Args:
        task: of the recipe.
        trust: as for a run.
        prompts, benign: files of the refusal suite; None for none.

    Raises:
        DataError: a file of another form, a benign one alone, or models that write no text.
    """
    if prompts is None and benign is not None:
        raise DataError("--benign is read beside --prompts, and none were given; give both")
    refuse_trust(trust, task, True, False)
    if prompts is not None and not task.writes_text:
        raise DataError(
            f"--prompts is for models that write text, and those of task '{task.name}' write none; leave it out"
        )
    files = () if prompts is None else prompt_sets(prompts, benign)
    return TrustFiles(trust, trust_questions(trust), files)


def trust_costs(source: Source, files: TrustFiles) -> list[dict[str, Any]]:
    """Of each suite that is asked for, how many requests and tokens it takes of one model.

    Args:
        source: of the dense model.
        files: what is asked.

    Returns:
        Of each: {"what", "requests", "read", "written_at_most", "steps_at_most", "not_measured"}; tokens of one model.

    Raises:
        DataError: no tokenizer, or no chat template where one is needed.
    """
    trust, questions = files.trust, files.questions
    if questions is None and not files.prompts:
        return []
    try:
        tokenizer = load_tokenizer(source)
    except CheckpointError as error:
        raise DataError(
            f"what trust takes is counted in tokens, and {source.name} has no tokenizer: {error}"
        ) from error
    check_asks(tokenizer, source.name)
    found: list[dict[str, Any]] = []
    context = context_of(source.config)
    if questions is not None:
        counting = Counting(tokenizer, context)
        outcomes = answered(Journalled(counting), questions)
        lacking = {one.name: one.missing for one in outcomes if one.missing}
        found.append(_row(f"--trust {trust}", counting, lacking))
    if files.prompts:
        if not has_chat_template(tokenizer):
            raise DataError(
                f"model {source.name} has no chat template, and refusals are measured of chat models; leave --prompts"
                " out"
            )
        counting = Counting(tokenizer, context)
        asked = [Request(one.id, one.text) for file in files.prompts for one in file.prompts]
        Journalled(counting, together=4 * SIDE_BY_SIDE).write(asked, Limits(whole=WHOLE))
        found.append(_row("evaluate --suite refusal", counting, {}))
    return found


def timed(row: Mapping[str, Any], models: Mapping[str, tuple[int, int]], rate: float, where: Planned) -> dict[str, Any]:
    """A row with the FLOPs and the time of all models that are asked.

    Args:
        row: of `trust_costs`.
        models: of each, multiply-accumulates a token and bytes of weights.
        rate: FLOPs a second.
        where: the device. Of one that is not here, memory bounds each step that writes, too: it reads all weights.
    """
    flops = seconds = 0.0
    for macs, size in models.values():
        read, written = 2 * macs * row["read"], 2 * macs * row["written_at_most"]
        writing = written / rate
        if where.known is not None:
            writing = max(writing, row["steps_at_most"] * size / (where.known.bandwidth * REACHED))
        flops += read + written
        seconds += read / rate + writing
    return {**row, "models": len(models), "flops_at_most": round(flops), "seconds_estimated": round(seconds, 1)}


def _row(what: str, counting: Counting, lacking: Mapping[str, str]) -> dict[str, Any]:
    return {
        "what": what,
        "requests": counting.requests,
        "read": counting.read,
        "written_at_most": counting.written,
        "steps_at_most": counting.steps,
        "not_measured": dict(lacking),
    }
