"""What asking a model would take: a respondent that counts tokens and answers nothing, so that what is counted is what
a suite would ask.
"""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from compresso.data.instructions import encode_conversation
from compresso.data.tokens import bare_ids
from compresso.metrics.generation import LEAST_SHARED
from compresso.metrics.trust.asking import Answer, Limits, Request, alike_batches, common_tokens


class Counting:
    """Counts what `ModelRespondent` would run through a model.

    Args:
        tokenizer: of the model.
        context: tokens that the model reads at most; None where its config does not say.
        prompt_on, batch: as for `ModelRespondent`.

    `requests` are those that fit; `read` the tokens of one forward each, what requests begin with counted as often as
    it is read; `written` the new tokens, where every answer is as long as it may be; `steps` the forwards that write
    them, as many answers at once as stand in a batch.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, context: int | None, prompt_on: bool = False, batch: int = 8
    ) -> None:
        self._tokenizer, self._context, self._prompt_on, self._batch = tokenizer, context, prompt_on, batch
        self.requests = self.read = self.written = self.steps = 0

    def write(self, requests: Sequence[Request], limits: Limits) -> list[Answer]:
        """Empty answers, and what they would take."""
        encoded = [self._ids(one) for one in requests]
        rooms = [limits.room(len(ids), self._context) for ids in encoded]
        fits = [i for i, room in enumerate(rooms) if room > 0]
        for chosen in alike_batches(fits, encoded, self._batch):
            rows = [encoded[i] for i in chosen]
            shared = min(common_tokens(min(rows), max(rows)), min(map(len, rows)) - 1)
            shared = shared if len(rows) > 1 and shared >= LEAST_SHARED else 0
            longest = max(rooms[i] for i in chosen)
            self.read += shared + len(rows) * (max(map(len, rows)) - shared)
            self.written += len(rows) * longest
            self.steps += longest
        self.requests += len(fits)
        return [Answer("", fits=room > 0) for room in rooms]

    def weigh(self, requests: Sequence[Request], choices: Sequence[Sequence[str]]) -> list[list[float] | None]:
        """Equal weights, and what real ones would take."""
        found, rows = list[list[float] | None](), set[tuple[int, ...]]()
        for request, mine in zip(requests, choices, strict=True):
            ids, targets = self._ids(request), bare_ids(self._tokenizer, mine)
            fits = self._context is None or len(ids) + max(map(len, targets)) <= self._context
            found.append([0.0] * len(mine) if fits else None)
            if fits:
                rows |= {(*ids, *target[:-1]) for target in targets}
                self.requests += 1
        self.read += sum(map(len, rows))
        return found

    def _ids(self, request: Request) -> list[int]:
        return encode_conversation(self._tokenizer, request.messages(), self._prompt_on)
