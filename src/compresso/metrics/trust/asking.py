"""How a model is asked: requests in its chat format, answers written or weighed.

Whatever has these two methods can be asked, so that scorers are tested on scripted answers.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from compresso.data.instructions import conversation_text, encode_conversation
from compresso.data.records import Message
from compresso.data.template import original_template, single_template
from compresso.data.tokens import bare_ids
from compresso.errors import DataError
from compresso.metrics.forward import check_ids, context_of, window_logits
from compresso.metrics.generation import broken, end_tokens, greedy, takes_positions

_PROBE = "where is the mill?"


@dataclass(frozen=True)
class Request:
    """A conversation that waits for an answer.

    Args:
        id: what a journal knows it by; unique among the requests of a suite.
        text: the last user turn.
        system: a system text; "" for none.
        shown: earlier turns, what was asked and what was answered.
        seed: of a drawn answer; None for the most likely one.
    """

    id: str
    text: str
    system: str = ""
    shown: tuple[tuple[str, str], ...] = ()
    seed: int | None = None

    def messages(self) -> list[Message]:
        """The conversation."""
        before = [Message("system", self.system)] if self.system else []
        for asked, answered in self.shown:
            before += [Message("user", asked), Message("assistant", answered)]
        return [*before, Message("user", self.text)]


@dataclass(frozen=True)
class Answer:
    """What a model wrote.

    Args:
        text: without special tokens.
        degenerate: whether it loops or is cut off in a loop; see `metrics.generation.broken`.
        fits: False where the request left no room for an answer, which is then empty.
    """

    text: str
    degenerate: bool = False
    fits: bool = True


class Respondent(Protocol):
    """What can be asked."""

    def write(self, requests: Sequence[Request], limits: "Limits") -> list[Answer]:
        """An answer to each request."""
        ...

    def weigh(self, requests: Sequence[Request], choices: Sequence[Sequence[str]]) -> list[list[float] | None]:
        """The log-probability of each choice as an answer, in nats; None where a request does not fit."""
        ...


@dataclass(frozen=True)
class Limits:
    """How long answers may be.

    Args:
        new_tokens: most tokens of one; None for as many as the whole allows.
        whole: most tokens of request and answer together; None for what the model's context holds.
    """

    new_tokens: int | None = None
    whole: int | None = None

    def room(self, request: int, context: int | None) -> int:
        """Tokens of an answer to a request of so many; 0 or less where there is none."""
        ends = [one for one in (self.whole, context) if one is not None]
        left = [min(ends) - request] if ends else []
        given = [] if self.new_tokens is None else [self.new_tokens]
        if not left and not given:
            raise DataError("nothing bounds an answer: the model's config names no context; give --new-tokens")
        return min(left + given)


class ModelRespondent:
    """A model that is asked through its chat template, or as an instruction where it has none.

    Args:
        model: live; its mode is restored after each call.
        tokenizer: its own.
        prompt_on: whether the collaborative prompt stands before every request.
        batch: requests side by side.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt_on: bool = False, batch: int = 8
    ) -> None:
        if batch < 1:
            raise DataError(f"--batch {batch}: wanted at least 1")
        self._model, self._tokenizer, self._prompt_on, self._batch = model, tokenizer, prompt_on, batch

    def write(self, requests: Sequence[Request], limits: Limits) -> list[Answer]:
        """An answer to each: the most likely tokens, or drawn at temperature 1 by the request's seed.

        Raises:
            DataError: a template that refuses a request, or ids that the model does not have.
            NumericError: the model gives NaN.
        """
        encoded = [self._ids(one) for one in requests]
        rooms = [limits.room(len(ids), context_of(self._model)) for ids in encoded]
        answers = [Answer("", fits=False) for _ in requests]
        order = [i for i, room in enumerate(rooms) if room > 0]
        check_ids(self._model, [encoded[i] for i in order])
        together = self._batch if takes_positions(self._model) else 1
        ends, was_training = end_tokens(self._model, self._tokenizer), self._model.training
        self._model.eval()
        try:
            for chosen in alike_batches(order, encoded, together):
                choose = _chooser([requests[i] for i in chosen])
                own = [rooms[i] for i in chosen]
                found = greedy(self._model, [encoded[i] for i in chosen], max(own), ends, choose, share=True, rooms=own)
                for i, (tokens, ended) in zip(chosen, found, strict=True):
                    text = str(self._tokenizer.decode(tokens, skip_special_tokens=True))
                    answers[i] = Answer(text, bool(text.strip()) and broken(text, tokens, ended))
        finally:
            self._model.train(was_training)
        return answers

    def weigh(self, requests: Sequence[Request], choices: Sequence[Sequence[str]]) -> list[list[float] | None]:
        """Sums of the log-probabilities of each choice's tokens. What choices share is read once.

        Raises:
            DataError: a choice without tokens, or as for `write`.
        """
        context = context_of(self._model)
        found: list[list[float] | None] = [[0.0] * len(mine) for mine in choices]
        wanted: dict[tuple[int, ...], list[tuple[int, int, int, list[int]]]] = {}
        for i, (request, mine) in enumerate(zip(requests, choices, strict=True)):
            ids, targets = self._ids(request), bare_ids(self._tokenizer, mine)
            if not all(targets):
                raise DataError(f"request {request.id}: a choice of {list(mine)} has no tokens; give it text")
            if context is not None and len(ids) + max(map(len, targets)) > context:
                found[i] = None
                continue
            for j, target in enumerate(targets):
                wanted.setdefault((*ids, *target[:-1]), []).append((i, j, len(ids), target))
        rows = list(wanted)
        check_ids(self._model, [target for places in wanted.values() for *_, target in places])
        for place, logits in window_logits(self._model, rows, self._batch):
            for i, j, start, target in wanted[rows[place]]:
                chances = logits[start - 1 : start - 1 + len(target)].float().log_softmax(-1)
                kept, mine = torch.tensor(target, device=chances.device), found[i]
                assert mine is not None
                mine[j] = float(chances.gather(-1, kept.unsqueeze(-1)).sum())
        return found

    def _ids(self, request: Request) -> list[int]:
        return encode_conversation(self._tokenizer, request.messages(), self._prompt_on)


def has_chat_template(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a model came with a chat template of its own."""
    return original_template(single_template(tokenizer)) is not None


def check_asks(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Raise DataError for a model whose chat template leaves out what it is asked, before its weights are read."""
    if _PROBE not in conversation_text(tokenizer, [Message("user", _PROBE)]).lower():
        raise DataError(
            f"model {name}: its chat template leaves out what the user says, so that every request would be the same;"
            " repair chat_template in its tokenizer files"
        )


def alike_batches(places: Sequence[int], encoded: Sequence[list[int]], together: int) -> Iterator[list[int]]:
    """At most so many places at a time, of requests that begin alike: those of a template share most of their tokens,
    which are then read once. What begins like few others stands beside what is as long.
    """
    alike, few = list[list[int]](), list[int]()
    for place in sorted(places, key=lambda i: encoded[i]):
        if alike and len(alike[-1]) < together:
            first, mine = encoded[alike[-1][0]], encoded[place]
            if 2 * common_tokens(first, mine) >= max(len(first), len(mine)):
                alike[-1].append(place)
                continue
        alike.append([place])
    for batch in alike:
        if 4 * len(batch) >= together:
            yield batch
        else:
            few += batch
    few.sort(key=lambda i: len(encoded[i]))
    yield from (few[begin : begin + together] for begin in range(0, len(few), together))


def common_tokens(first: Sequence[int], second: Sequence[int]) -> int:
    """Tokens that two requests have in common from their beginning on."""
    return next(
        (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )


def _chooser(requests: Sequence[Request]) -> Callable[[Tensor], Tensor]:
    """The most likely token of each request, or one drawn with the random numbers of its seed alone: what it shares a
    batch with changes nothing.
    """
    drawn = {i: torch.Generator().manual_seed(one.seed) for i, one in enumerate(requests) if one.seed is not None}

    def choose(logits: Tensor) -> Tensor:
        tokens = logits.argmax(-1)
        for i, generator in drawn.items():
            chances = logits[i].float().softmax(-1).cpu()
            tokens[i] = torch.multinomial(chances, 1, generator=generator).item()
        return tokens

    return choose
