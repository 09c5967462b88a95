"""Fewer shots where they do not fit: whole examples are dropped from the end, as in the paper, before the harness cuts
into a text.

The harness itself would omit the oldest tokens, the task's description and half of an example first.
"""

from collections.abc import Callable
from typing import Any

from lm_eval.api.task import ConfigurableTask

from compresso.metrics.tasks.prompted import PromptedLM

Contexts = str | list[str]


def dropping(task: ConfigurableTask, lm: PromptedLM) -> list[int]:
    """Make `task` omit whole shots until prompt, context and answer fit into the context of `lm`.

    Returns:
        A list that gets the number of dropped shots of each item that lost some, as requests are built.
    """
    build: Callable[..., Contexts] = type(task).fewshot_context.__get__(task)
    dropped: list[int] = []

    def fitted(doc: dict[str, Any], num_fewshot: int, **settings: Any) -> Contexts:
        limit = lm.max_length - _answer_tokens(task, lm, doc)
        shots = num_fewshot
        made = build(doc, num_fewshot=shots, **settings)
        while shots and any(lm.length(text) > limit for text in ([made] if isinstance(made, str) else made)):
            shots -= 1
            made = build(doc, num_fewshot=shots, **settings)
        if shots < num_fewshot:
            dropped.append(num_fewshot - shots)
        return made

    task.fewshot_context = fitted  # pyright: ignore[reportAttributeAccessIssue]  # the harness passes the rest by name
    return dropped


def _answer_tokens(task: ConfigurableTask, lm: PromptedLM, doc: dict[str, Any]) -> int:
    """Room that an answer needs: what may be generated, or the longest choice with the space before it."""
    if task.OUTPUT_TYPE == "generate_until":
        return lm.new_tokens(task.config.generation_kwargs or {})
    choices = task.doc_to_choice(doc)
    return max(
        len(lm.tok_encode(task.config.target_delimiter + choice, add_special_tokens=False)) for choice in choices
    )
