"""The harness's model with the collaborative prompt before every request: Compresso (arXiv 2310.05015) evaluates what
it pruned like that.

The prompt's ids, beginning token included, come before the ids of a request's context, whose own beginning token goes.
What is scored stays the last tokens of the row. The prompt counts against the context limit: where prompt, context and
answer are too long together, the oldest tokens of the context are omitted, never the prompt. Without a prompt,
truncation is the harness's own, and only counted here.

Importing this module imports lm_eval.
"""

import sys
from collections.abc import Sequence
from typing import Any, cast

import torch
from lm_eval.models.huggingface import HFLM
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from compresso.data.batches import pad_id
from compresso.errors import DataError
from compresso.metrics.forward import check_ids

Request = tuple[tuple[str, str], list[int], list[int]]
"""Texts, and ids, of a context and what continues it."""


_Base: Any = HFLM  # its decorator hides its type


class PromptedLM(_Base):
    """A loaded model for the harness.

    Args:
        model, tokenizer: as loaded; the harness may give the tokenizer a padding token, so hand over a copy.
        opening: ids of the prompt with its beginning token; empty for none.
        batch_size: rows a forward.

    Attributes:
        cut: contexts (with the continuation, where one is scored) of which tokens were omitted.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        opening: Sequence[int] = (),
        batch_size: int = 8,
    ) -> None:
        if isinstance(tokenizer.pad_token_id, int) and tokenizer.pad_token_id >= int(model.config.vocab_size):
            tokenizer.pad_token_id = pad_id(
                tokenizer, int(model.config.vocab_size)
            )  # masked: any that has a row will do
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        self._max_length = self.max_length
        self.tokenizer.model_max_length = sys.maxsize  # longer texts are cut, and counted, here
        self.opening = list(opening)
        self.cut: set[str | tuple[str, str]] = set()
        if len(self.opening) >= self.max_length:
            raise DataError(
                f"the collaborative prompt has {len(self.opening)} tokens, the context {self.max_length}; evaluate with"
                " --prompt off"
            )

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Log-likelihoods of continuations, the prompt before their contexts; the last token is predicted, not read, so
        one more fits.
        """
        rows = [self._prompted(one) for one in requests]
        self.logits_cache = not _ambiguous(rows)
        return super()._loglikelihood_tokens(rows, disable_tqdm, override_bs)

    def _model_call(self, inps: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        """Logits; raises DataError for ids that the model does not have."""
        check_ids(self.model, inps.tolist())
        return super()._model_call(inps, *args, **options)

    def _model_generate(self, context: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        """Contexts with what continues them; raises DataError for ids that the model does not have."""
        check_ids(self.model, context.tolist())
        return super()._model_generate(context, *args, **options)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Greedy continuations.

        Raises:
            DataError: prompt and new tokens leave no room for a context.
        """
        for request in requests:
            self._room(self.new_tokens(request.args[1]))
        return super().generate_until(requests, disable_tqdm)

    def tok_batch_encode(
        self,
        strings: list[str],
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and mask of contexts to generate from, padded on the left, the prompt before each."""
        limit = left_truncate_len or self.max_length
        for text in strings:
            if self.length(text) > limit:
                self.cut.add(text)
        if not self.opening:
            return super().tok_batch_encode(strings, padding_side, left_truncate_len, truncation)
        room = limit - len(self.opening)
        rows = [self.opening + self._bare(self.tok_encode(text))[-room:] for text in strings]
        longest = max(map(len, rows))
        pad = cast(int, self.tokenizer.pad_token_id)
        ids = torch.tensor([[pad] * (longest - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
        return ids, mask

    def length(self, context: str) -> int:
        """Tokens of a context, with the prompt."""
        ids = self.tok_encode(context)
        return len(self.opening) + len(self._bare(ids)) if self.opening else len(ids)

    def new_tokens(self, settings: dict[str, Any]) -> int:
        """Most tokens that a request with these settings generates."""
        return int(settings.get("max_gen_toks", self.max_gen_toks))

    def _room(self, new: int) -> None:
        if (room := self.max_length - new - len(self.opening)) < 1:
            prompt = f" and the prompt's {len(self.opening)}" if self.opening else ""
            raise DataError(
                f"the model's context of {self.max_length} tokens leaves {room} for a question after {new} new"
                f" ones{prompt}; {'evaluate with --prompt off, or ' if self.opening else ''}leave generated tasks"
                " (bbh) out"
            )

    def _bare(self, ids: list[int]) -> list[int]:
        """Ids without the beginning token, which the prompt has brought."""
        return ids[1:] if ids and ids[0] == self.tokenizer.bos_token_id == self.opening[0] else ids

    def _prompted(self, request: Request) -> Request:
        texts, context, continuation = request
        room = self.max_length + 1 - len(self.opening) - len(continuation)
        if room < (0 if self.opening else 1):
            prompt = f"the prompt's {len(self.opening)} tokens and " if self.opening else ""
            raise DataError(
                f"{prompt}an answer of {len(continuation)} tokens do not fit into the model's context of"
                f" {self.max_length}; leave this task out: {texts[1][:60]!r}"
            )
        bare = self._bare(context) if self.opening else context
        if len(bare) > room:
            self.cut.add(texts)
            if self.opening:
                bare = bare[len(bare) - room :]
        return texts, self.opening + bare, continuation


def _ambiguous(rows: Sequence[Request]) -> bool:
    """Whether rows with the same tokens, but for the last, are split at different places.

    The harness reads such rows once, and then takes the first of the scored places, not the last ones, for the shorter
    continuation.
    """
    lengths: dict[
        int, int
    ] = {}  # by hash: the tokens of all rows would fill the memory, and a collision only costs time
    return any(lengths.setdefault(hash((*head, *tail[:-1])), len(tail)) != len(tail) for _, head, tail in rows)
