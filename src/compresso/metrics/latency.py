"""Prefill and decode speed of several models, timed in turn in one process, so that a machine that slows down slows
them all.

In every round each model has its turn: A, B, A, B. A speed-up is taken within each round and then over rounds, so that
drift cancels.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from typing import Any

from transformers import PreTrainedModel

from compresso.edit.context_attention import keepers_of
from compresso.errors import DataError
from compresso.metrics.forward import context_of
from compresso.metrics.pruned_context import held_share
from compresso.metrics.record import Environment, Measurement, Setting
from compresso.metrics.timed_generation import (
    NEW_TOKENS,
    PROMPT_TOKENS,
    Stopwatch,
    keeps_last,
    lengths,
    prefill_and_decode,
    prompts,
    stopwatch,
)
from compresso.metrics.traffic import Weights, bytes_bound, cache_bytes, paired, verdict

GATED = "learned gates read random tokens here, and may hold another share of texts; compresso evaluate tells it"

ALL = "weights once a step, and the cache of every sequence"
ROUTED = (
    "weights once a step, of experts those that the batch is expected to choose, each as likely; and the cache of every"
    " sequence"
)
"""What the bytes of a bound are, with and without experts among the models."""


@dataclass
class Rounds:
    """One model at one batch size: seconds of prefill and decode, one a round, mean bytes of cache that a decoding
    step reads, bytes of the cache after the last step, and the share of tokens that it holds.
    """

    prefill: list[float] = field(default_factory=list[float])
    decode: list[float] = field(default_factory=list[float])
    cache_read: float = 0.0
    cache_bytes: int = 0
    live: float = 1.0

    def look(self, cache: Any) -> None:
        """Note what a cache holds in the end."""
        self.cache_bytes, self.live = cache_bytes(cache), held_share(cache)


def speed_measurements(
    models: Mapping[str, PreTrainedModel],
    batches: Sequence[int] = (1, 8),
    prompt_tokens: int = PROMPT_TOKENS,
    new_tokens: int = NEW_TOKENS,
    rounds: int = 5,
    *,
    warmup: int = 1,
    seed: int = 0,
    clock: Stopwatch | None = None,
    advance: Callable[[str], None] = lambda _: None,
    caches: Mapping[str, str] | None = None,
) -> dict[str, tuple[Measurement, ...]]:
    """Speed of each model, and its speed-up against the first, the dense one: medians over rounds, `low` and `high` the
    extremes.

    Args:
        models: name -> model; all on one device, which is where they are timed.
        batches: batch sizes.
        prompt_tokens, new_tokens: of each sequence.
        rounds: that count, after `warmup` that do not.
        seed: of the random prompts, which are the same for all models.
        clock: None for that of the device.
        advance: called with a description before each turn.
        caches: name -> the rule by which that model's cache forgets; its numbers' protocols hold it.

    Returns:
        By name, for each batch B "prefill/batchB" and "decode/batchB" (tokens/s, of the whole batch); of all but the
        first also "prefill_speedup/batchB" and "decode_speedup/batchB" (measured, 1) and "decode_bound/batchB"
        (estimated, 1: what reading fewer bytes allows). A speed-up that is none, or that bytes do not explain, says so
        in `remark`. Where the context of one of them is pruned, of all of them "cache_live/batchB" (share of tokens
        held after the last one) and "cache_bytes/batchB" (bytes allocated for the batch).

    Raises:
        DataError: a number that is not positive, or more tokens than a context holds.
        ArchError: a model without a key/value cache.
    """
    if not models or not batches or min(rounds, *batches) < 1 or warmup < 0:
        raise DataError(
            f"{len(models)} models, batches={list(batches)}, rounds={rounds}, warmup={warmup}: at least 1 wanted, of"
            " warmup 0"
        )
    lengths({name: context_of(model) for name, model in models.items()}, prompt_tokens, new_tokens)
    first, device = next(iter(models)), next(iter(models.values())).device
    clock = clock or stopwatch(device)
    weights = {name: Weights.of(model) for name, model in models.items()}
    found: dict[str, list[Measurement]] = {name: [] for name in models}
    with _evaluating(models.values()):
        for batch in batches:
            timed = {name: Rounds() for name in models}
            for number in range(1 - warmup, rounds + 1):
                for name, model in models.items():
                    advance(f"{name}, batch {batch}, " + ("warm-up" if number < 1 else f"round {number} of {rounds}"))
                    ids = prompts(batch, prompt_tokens, model.config.vocab_size, seed).to(device)
                    mine = timed[name]
                    reading, decoding, mine.cache_read = prefill_and_decode(model, ids, new_tokens, clock, mine.look)
                    if number >= 1:
                        timed[name].prefill.append(reading)
                        timed[name].decode.append(decoding)
            sizes: dict[str, Setting] = {"batch": batch, "prompt_tokens": prompt_tokens, "new_tokens": new_tokens}
            for name, model in models.items():
                environment = Environment.here(device, model.dtype)
                protocol = (
                    sizes
                    | {
                        "rounds": rounds,
                        "warmup": warmup,
                        "interleaved": len(models) > 1,
                        "prefill_logits": "last position" if keeps_last(model) else "all positions",
                        "decoding": "greedy, one token a forward, key/value cache",
                    }
                    | ({"cache": caches[name]} if caches and name in caches else {})
                )
                measured = partial(_over_rounds, protocol=protocol, seed=seed, environment=environment)
                mine, dense = timed[name], timed[first]
                for what, tokens in (("prefill", prompt_tokens), ("decode", new_tokens)):
                    rates = [batch * tokens / seconds for seconds in getattr(mine, what)]
                    found[name].append(measured(f"{what}/batch{batch}", rates, "tokens/s"))
                if any(keepers_of(one) for one in models.values()):
                    remark = GATED if keepers_of(model) and "cache" not in protocol else None
                    found[name] += [
                        measured(f"cache_live/batch{batch}", [mine.live], "share", remark),
                        measured(f"cache_bytes/batch{batch}", [mine.cache_bytes], "bytes"),
                    ]
                if name == first:
                    continue
                bound = bytes_bound(
                    weights[first].read(batch), dense.cache_read, weights[name].read(batch), mine.cache_read
                )
                for what, limit in (("prefill", None), ("decode", bound)):
                    ratios, noise = paired(getattr(dense, what), getattr(mine, what))
                    forgets = bool(keepers_of(model) or keepers_of(models[first]))
                    remark = verdict(ratios, noise, weights[name], weights[first], limit, forgets)
                    found[name].append(measured(f"{what}_speedup/batch{batch}", ratios, "1", remark))
                reads = sizes | {"bytes": ROUTED if any(one.mixtures for one in weights.values()) else ALL}
                estimate = {
                    "value": bound,
                    "unit": "1",
                    "how": "estimated",
                    "protocol": reads,
                    "environment": environment,
                }
                found[name].append(Measurement(name=f"decode_bound/batch{batch}", **estimate))
    return {name: tuple(measurements) for name, measurements in found.items()}


def _over_rounds(
    name: str,
    values: Sequence[float],
    unit: str,
    remark: str | None = None,
    *,
    protocol: dict[str, Setting],
    seed: int,
    environment: Environment,
) -> Measurement:
    """The median over rounds, with the extremes."""
    return Measurement(
        name=name,
        value=median(values),
        unit=unit,
        how="measured",
        low=min(values),
        high=max(values),
        n=len(values),
        protocol=protocol,
        seed=seed,
        environment=environment,
        remark=remark,
    )


@contextmanager
def _evaluating(models: Iterable[PreTrainedModel]) -> Iterator[None]:
    """All models in evaluation mode; as before on leaving."""
    before = [(model, model.training) for model in models]
    try:
        for model, _ in before:
            model.eval()
        yield
    finally:
        for model, training in before:
            model.train(training)
