"""One forward of a model, again and again under the same conditions: a token after a context, or the context itself.

Models take turns, so that a machine that slows down slows them all, and each is timed forward by forward: what a
neighbour disturbs is one forward, which a median passes over.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

from compresso.core.latency_table import Conditions
from compresso.errors import ArchError, DataError
from compresso.metrics.forward import context_of
from compresso.metrics.timed_generation import Stopwatch, keeps_last, prompts, stopwatch

TOKENS = 4
"""Forwards of decoding in one turn; of a prefill, which reads the whole context, one."""


class Forwards:
    """A model in the middle of its work: calling it does one forward of it.

    A decoding model reads its context once, at the first turn, and goes on from there, so that the context of its later
    forwards is longer by the earlier ones. It begins with fewer tokens, that the mean is what was asked for.
    """

    def __init__(self, model: PreTrainedModel, conditions: Conditions, forwards: int, seed: int = 0) -> None:
        """Nothing is run yet.

        Args:
            model: live, in evaluation mode.
            conditions: engine and dtype are the model's own.
            forwards: how many will be done.
            seed: of the random tokens.

        Raises:
            DataError: a context that the model does not hold.
        """
        self.model, self.conditions = model, conditions
        length = conditions.context
        if conditions.phase == "decode":
            length = max(1, length - forwards // 2)
        limit = context_of(model)
        most = length + (forwards if conditions.phase == "decode" else 0)
        if limit is not None and most > limit:
            raise DataError(
                f"--context {conditions.context}: the model reads {limit} tokens, and {most} are needed to time"
                f" {conditions.phase}; give at most {limit - (most - conditions.context)}"
            )
        self._ids = prompts(conditions.batch, length, model.config.vocab_size, seed).to(model.device)
        self._options = {"logits_to_keep": 1} if keeps_last(model) else {}
        self._cache: Any = None

    @torch.inference_mode()
    def read(self) -> None:
        """Read the context of a model that decodes; of others nothing.

        Raises:
            ArchError: the model returns no key/value cache.
        """
        if self.conditions.phase == "decode":
            self._cache = getattr(self._forward(self._ids), "past_key_values", None)
            if not hasattr(self._cache, "layers"):
                raise ArchError(
                    f"{self.model.config.model_type} returns no key/value cache, so that it decodes nothing; give"
                    " --phase prefill"
                )

    @torch.inference_mode()
    def __call__(self) -> None:
        """One forward."""
        decoding = self.conditions.phase == "decode"
        found = self._forward(self._ids[:, -1:] if decoding else self._ids)
        if decoding:
            self._cache = found.past_key_values

    def _forward(self, ids: torch.Tensor) -> Any:
        return self.model(input_ids=ids, past_key_values=self._cache, use_cache=True, **self._options)


def timed_forwards(
    models: Mapping[str, PreTrainedModel],
    conditions: Conditions,
    rounds: int,
    *,
    clock: Stopwatch | None = None,
    advance: Callable[[str], None] = lambda _: None,
) -> dict[str, list[float]]:
    """Milliseconds of each forward of each model, the models in turn, after a turn that does not count.

    Args:
        models: name -> model, all on one device.
        conditions: what a forward is.
        rounds: turns that count.
        clock: None for that of the device.
        advance: called before each turn.

    Raises as `Forwards`.
    """
    each = 1 if conditions.phase == "prefill" else TOKENS
    works = {name: Forwards(model.eval(), conditions, each * (rounds + 1)) for name, model in models.items()}
    clock = clock or stopwatch(next(iter(models.values())).device)
    found: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(rounds + 1):
        for name, work in works.items():
            advance(f"{name}, {f'round {turn} of {rounds}' if turn else 'warm-up'}")
            if turn == 0:
                work.read()
            seconds = [clock(work) for _ in range(each)]
            found[name] += [1000 * one for one in seconds] if turn else []
    return found
