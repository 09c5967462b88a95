"""Where a chat model looks while it reads a task in a template: at the task, or at what is wrapped around it.

Pruning for Protection (arXiv 2401.10862, analyze_attention_patterns.py of eval-safety at 00a28ec) compares attention to
the tokens of a task with attention to those of its jailbreak template, before and after pruning, and the entropy of
attention's rows. Of each row of attention, in every layer and head:

- entropy: that of the row, as a share of the most that so many visible tokens can have;
- share: what the task's tokens get of what task and template get together;
- rank: the share of pairs of a task's and a template's token of which the template's gets more, halves for equals. It
  is the published sum of ranks less its least, divided by its range, among the tokens of the request alone.

Share and rank are of three kinds of rows: those of the task's tokens, those of the template's behind the task, and the
last of all, from which the answer begins. Each is a mean over rows, heads and layers. Departures: the published sum
counts the tokens of the chat format, too, is taken of the last row alone, of templates that end with the task, and has
no chat format around it; here tokens are found by their characters, so that a task may stand anywhere.

Fused kernels compute no probabilities, so attention is computed step by step (eager). One prompt is read at a time, and
each layer's probabilities are gone before the next layer's are there.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from compresso.arch.base import arch_for
from compresso.data.instructions import conversation_text
from compresso.data.records import Message
from compresso.data.tokens import ids_and_ends
from compresso.edit.eager import eager
from compresso.errors import DataError, NumericError
from compresso.metrics.forward import check_ids, context_of
from compresso.metrics.trust.refusal_prompts import Prompt

ENTROPY = "entropy"
ROWS = ("task", "template", "last")
MEASURES = (ENTROPY, *(f"{rows}/{what}" for rows in ROWS for what in ("share", "rank")))


@dataclass(frozen=True)
class Places:
    """Where the parts of a request stand among its tokens.

    Args:
        ids: all tokens, with those of the chat format.
        task, template: places of the task's tokens, and of the rest of what the user says; ascending.
    """

    ids: tuple[int, ...]
    task: tuple[int, ...]
    template: tuple[int, ...]


def places(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, prompt_on: bool = False) -> Places:
    """The tokens of a prompt in its chat format. A token that holds a character of the task is the task's.

    Raises:
        DataError: the chat format does not show the prompt as it is, or the tokenizer does not say which characters a
            token stands for.
    """
    said = prompt.text.strip()
    text = conversation_text(tokenizer, [Message("user", said)], prompt_on)
    begin, inner = text.rfind(said), said.find(prompt.task.strip())
    if begin < 0 or inner < 0:
        raise DataError(
            f"prompt {prompt.id}: the chat template changes its text, so that its task is not found in it; leave"
            " --attention out"
        )
    first = begin + inner
    last = first + len(prompt.task.strip())
    ((ids, ends),) = ids_and_ends(tokenizer, [text])
    starts = [0, *ends[:-1]]
    spans = list(enumerate(zip(starts, ends, strict=True)))
    task = tuple(i for i, (a, b) in spans if a < last and b > first)
    template = tuple(i for i, (a, b) in spans if a < begin + len(said) and b > begin and i not in set(task))
    return Places(tuple(ids), task, template)


def measured(attention: Tensor, where: Places) -> dict[str, float]:
    """The measures of one layer, means over heads and rows; those of which there are no rows are left out.

    Args:
        attention: [heads, tokens, tokens], rows sum to 1 and see nothing behind themselves.
        where: the parts of the request.
    """
    rows = attention.float()
    n = rows.shape[-1]
    visible = torch.arange(2, n + 1, device=rows.device).log()
    found = {ENTROPY: float((torch.special.entr(rows[:, 1:]).sum(-1) / visible).mean())} if n > 1 else {}
    behind = [i for i in where.template if i > where.task[-1]]
    for name, mine in zip(ROWS, (where.task, behind, [n - 1]), strict=True):
        seen = [(i, [j for j in where.task if j <= i], [j for j in where.template if j <= i]) for i in mine]
        pairs = [_looks(rows[:, i], task, template) for i, task, template in seen if task and template]
        if pairs:
            for what, values in zip(("share", "rank"), zip(*pairs, strict=True), strict=True):
                found[f"{name}/{what}"] = float(torch.stack(values).mean())
    return found


def _looks(row: Tensor, task: Sequence[int], template: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Share and rank of one row, means over heads.

    Args:
        row: [heads, tokens].
        task, template: places that it sees, at least one of each.
    """
    mine, theirs = row[:, list(task)], row[:, list(template)]
    both = mine.sum(-1) + theirs.sum(-1)
    share = torch.where(both > 0, mine.sum(-1) / both.clamp(min=torch.finfo(row.dtype).tiny), 0.5)
    ordered = theirs.sort(-1).values.contiguous()
    # Of a task's token, how many of the template's get less, and how many at most as much.
    below, upto = (torch.searchsorted(ordered, mine.contiguous(), right=right) for right in (False, True))
    more = theirs.shape[-1] - (below + upto).float() / 2
    return share.mean(), (more / theirs.shape[-1]).mean()


@torch.inference_mode()
def looked_at(model: PreTrainedModel, where: Places) -> dict[str, float]:
    """The measures of one prompt, means over the layers that show attention.

    Args:
        model: live; how it computes attention is as before when this returns.
        where: the prompt.

    Raises:
        DataError: the prompt is beyond the model's context, or no layer shows probabilities of all its tokens.
        NumericError: probabilities are NaN.
    """
    context = context_of(model)
    if context is not None and len(where.ids) > context:
        raise DataError(f"a prompt of {len(where.ids):,} tokens is beyond the model's context of {context:,}")
    check_ids(model, [where.ids])
    layers: list[dict[str, float]] = []
    was_training = model.training
    model.eval()
    try:
        with eager(model), _read(model, where, layers):
            model(input_ids=torch.tensor([where.ids], device=model.device), use_cache=False)
    finally:
        model.train(was_training)
    if not layers:
        raise DataError(
            f"no layer of a {model.config.model_type} model shows the probabilities of its attention; leave --attention"
            " out"
        )
    means = {name: [one[name] for one in layers] for name in layers[0]}
    found = {name: sum(values) / len(values) for name, values in means.items()}
    if not all(map(math.isfinite, found.values())):
        raise NumericError("the model's attention is NaN; use float32 or bfloat16")
    return found


@contextmanager
def _read(model: PreTrainedModel, where: Places, layers: list[dict[str, float]]) -> Iterator[None]:
    """Within the context, each block's attention is measured as it is computed, once a block."""
    done = set[int]()

    def hook(block: int):
        def measure(module: nn.Module, given: tuple[object, ...], output: object) -> None:
            shown = output[1] if isinstance(output, tuple) and len(output) > 1 else None
            if block in done or not isinstance(shown, Tensor) or shown.dim() != 4:
                return
            if shown.shape[0] == 1 and shown.shape[-2:] == (len(where.ids), len(where.ids)):
                done.add(block)
                layers.append(measured(shown[0], where))

        return measure

    handles = [
        module.register_forward_hook(hook(number))
        for number, block in enumerate(arch_for(model.config).blocks(model))
        for module in block.modules()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
