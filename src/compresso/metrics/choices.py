"""Accuracy on multiple-choice items by the likelihood of the choices: nothing is generated, so nothing has to be
parsed.

A choice scores the sum of the log-probabilities of its tokens after BOS + prompt + body(instruction, input). Sums are
not divided by length: the choices of an item should be about equally long. A tie, which a model without any knowledge
can produce, goes to the first.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from compresso.data.prompt import body
from compresso.errors import DataError
from compresso.metrics.forward import check_ids
from compresso.metrics.record import Environment, Measurement, Setting


class ChoiceItem(Protocol):
    """What an item must have; `compresso.data.world.Item` does."""

    @property
    def task(self) -> str: ...
    @property
    def instruction(self) -> str: ...
    @property
    def input(self) -> str: ...
    @property
    def choices(self) -> Sequence[str]: ...
    @property
    def answer(self) -> int: ...


@dataclass(frozen=True)
class ChoiceResult:
    """Accuracy over all items, its standard error, the number of items, and accuracy and number by task."""

    accuracy: float
    stderr: float
    n: int
    tasks: dict[str, float] = field(default_factory=dict)
    n_by_task: dict[str, int] = field(default_factory=dict)

    def measurements(
        self, suite: str, environment: Environment, seed: int | None = None, **settings: Setting
    ) -> tuple[Measurement, ...]:
        """The accuracy over all items, as "SUITE/acc".

        Args:
            suite: what the items are called.
            seed: that drew them.
            settings: what else was decided, for the protocol.
        """
        protocol: dict[str, Setting] = {
            "items": self.n,
            "tasks": len(self.tasks),
            "shots": 0,
            "scoring": "sum of the log-probabilities of a choice",
            **settings,
        }
        shared = {"unit": "share", "how": "measured", "stderr": self.stderr, "n": self.n, "seed": seed}
        return (
            Measurement(name=f"{suite}/acc", value=self.accuracy, protocol=protocol, environment=environment, **shared),
        )


def choice_accuracy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[ChoiceItem],
    prompt: str = "",
    batch_size: int = 64,
) -> ChoiceResult:
    """The share of items whose right choice has the highest likelihood; `batch_size` counts choices.

    Raises:
        DataError: no items, a choice without tokens, or ids that the model does not have.
    """
    if not items:
        raise DataError("no items to measure; give at least one")
    start = [] if tokenizer.bos_token_id is None else [cast(int, tokenizer.bos_token_id)]
    rows: list[tuple[list[int], int]] = []
    for item in items:
        context = start + _ids(tokenizer, prompt + body(item.instruction, item.input))
        for choice in item.choices:
            target = _ids(tokenizer, choice)
            if not target:
                raise DataError(
                    f"item '{item.instruction}' of task '{item.task}' has the empty choice {choice!r}; give it text"
                )
            rows.append((context + target, len(target)))
    check_ids(model, [ids for ids, _ in rows])
    scored = _log_likelihoods(model, rows, batch_size)
    right: dict[str, list[bool]] = {}
    done = 0
    for item in items:
        mine = scored[done : done + len(item.choices)]
        done += len(item.choices)
        right.setdefault(item.task, []).append(max(range(len(mine)), key=mine.__getitem__) == item.answer)
    n, hits = len(items), sum(map(sum, right.values()))
    accuracy = hits / n
    return ChoiceResult(
        accuracy=accuracy,
        stderr=math.sqrt(accuracy * (1 - accuracy) / n),
        n=n,
        tasks={task: sum(marks) / len(marks) for task, marks in right.items()},
        n_by_task={task: len(marks) for task, marks in right.items()},
    )


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False) if text else []


@torch.inference_mode()
def _log_likelihoods(model: PreTrainedModel, rows: list[tuple[list[int], int]], batch_size: int) -> list[float]:
    """Sum of log p of the last `n_target` tokens of each row; rows of like length share a batch, padded on the right.

    With causal attention nothing real looks at padding on the right, so the pad token may be any id.
    """
    device = model.device
    was_training = model.training
    model.eval()
    scored = [0.0] * len(rows)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]), reverse=True)
    try:
        for begin in range(0, len(order), batch_size):
            chosen = order[begin : begin + batch_size]
            longest = len(rows[chosen[0]][0])
            most = max(rows[i][1] for i in chosen)
            tokens = torch.zeros(len(chosen), longest, dtype=torch.long)
            mask = torch.zeros_like(tokens)
            places = torch.zeros(len(chosen), most, dtype=torch.long)
            targets = torch.zeros(len(chosen), most, dtype=torch.long)
            counted = torch.zeros(len(chosen), most)
            for row, i in enumerate(chosen):
                ids, n_target = rows[i]
                tokens[row, : len(ids)] = torch.tensor(ids)
                mask[row, : len(ids)] = 1
                places[row, :n_target] = torch.arange(len(ids) - n_target - 1, len(ids) - 1)
                targets[row, :n_target] = torch.tensor(ids[-n_target:])
                counted[row, :n_target] = 1
            logits: Tensor = model(input_ids=tokens.to(device), attention_mask=mask.to(device), use_cache=False).logits
            picked = logits.gather(1, places.to(device).unsqueeze(-1).expand(-1, -1, logits.shape[-1]))
            chances = picked.float().log_softmax(-1).gather(-1, targets.to(device).unsqueeze(-1)).squeeze(-1)
            for i, total in zip(chosen, (chances * counted.to(device)).sum(-1).tolist(), strict=True):
                scored[i] = total
    finally:
        model.train(was_training)
    return scored
