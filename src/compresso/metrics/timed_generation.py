"""One turn of a model: a prompt read in one forward, then continued token by token with a key/value cache; timed by
whoever asks.

Prefill computes the logits of the last position only where the model can omit the others, as serving does.
Decoding is greedy and never stops early. A `Stopwatch` is the only thing that knows a clock, so that all else can be
tested without one.
"""

import inspect
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from compresso.errors import ArchError, DataError
from compresso.metrics.traffic import cache_bytes, mean_cache_read

Stopwatch = Callable[[Callable[[], None]], float]
"""Does a piece of work and returns the seconds it took, those of the device included."""
PROMPT_TOKENS, NEW_TOKENS = 256, 64
"""Tokens of a sequence where nobody asked for others."""


def lengths(contexts: Mapping[str, int | None], prompt_tokens: int | None, new_tokens: int | None) -> tuple[int, int]:
    """Prompt and new tokens that all models can read.

    Args:
        contexts: positions of each model, None for no limit.
        prompt_tokens, new_tokens: asked for; None for 256 and 64, or fewer where the shortest context holds no more.

    Raises:
        DataError: a number that is not positive, or more tokens than a context holds.
    """
    limits = {name: positions for name, positions in contexts.items() if positions}
    shortest = min(limits, key=limits.__getitem__, default=None)
    most = sys.maxsize if shortest is None else limits[shortest]
    new = new_tokens
    if new is None:
        new = max(1, min(NEW_TOKENS, most // 4 if prompt_tokens is None else most - prompt_tokens))
    prompt = max(1, min(PROMPT_TOKENS, most - new)) if prompt_tokens is None else prompt_tokens
    if min(prompt, new) < 1:
        raise DataError(f"--prompt-tokens {prompt}, --new-tokens {new}: both must be at least 1")
    if prompt + new > most:
        raise DataError(
            f"a prompt of {prompt} tokens and {new} new ones exceed the context of {shortest}, {most}; "
            "lower --prompt-tokens or --new-tokens"
        )
    return prompt, new


def prompts(batch: int, prompt_tokens: int, vocab_size: int, seed: int) -> Tensor:
    """Random token ids [batch, prompt_tokens]; those of a smaller batch are its first rows, whatever the vocabulary."""
    drawn = torch.stack(
        [
            torch.randint(2**31, (prompt_tokens,), generator=torch.Generator().manual_seed(seed + i))
            for i in range(batch)
        ]
    )
    return drawn % vocab_size


def keeps_last(model: PreTrainedModel) -> bool:
    """Whether the model can omit the logits of all positions but the last."""
    return "logits_to_keep" in inspect.signature(model.forward).parameters


@torch.inference_mode()
def prefill_and_decode(
    model: PreTrainedModel, ids: Tensor, new_tokens: int, clock: Stopwatch, look: Callable[[Any], None] = lambda _: None
) -> tuple[float, float, float]:
    """Read the prompts ids [batch, prompt_tokens] and continue each by `new_tokens`.

    look: is shown the cache in the end.

    Returns:
        Seconds of prefill, seconds of decode, and mean bytes of the batch's cache that a decoding step reads.

    Raises:
        ArchError: the model returns no key/value cache.
    """
    options = {"logits_to_keep": 1} if keeps_last(model) else {}
    output: Any = None

    def prefill() -> None:
        nonlocal output
        output = model(input_ids=ids, use_cache=True, **options)

    def decode() -> None:
        nonlocal output
        for _ in range(new_tokens):
            token = output.logits[:, -1:].argmax(-1)
            output = model(input_ids=token, past_key_values=output.past_key_values, use_cache=True)

    reading = clock(prefill)
    if not hasattr(getattr(output, "past_key_values", None), "layers"):
        raise ArchError(
            f"{model.config.model_type} returns no key/value cache; give a causal language model that keeps one"
        )
    before = cache_bytes(output.past_key_values)
    decoding = clock(decode)
    look(output.past_key_values)
    return reading, decoding, mean_cache_read(before, cache_bytes(output.past_key_values), new_tokens)


def stopwatch(device: torch.device) -> Stopwatch:
    """The clock of a device: `perf_counter` on the CPU, two events around the work on CUDA."""
    return partial(_cuda_seconds, device) if device.type == "cuda" else _cpu_seconds


def _cpu_seconds(work: Callable[[], None]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _cuda_seconds(device: torch.device, work: Callable[[], None]) -> float:
    """What was queued before is waited for first, and the work's end is waited for: launches alone take no time."""
    with torch.cuda.device(device):
        began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        began.record()
        work()
        ended.record()
        ended.synchronize()
    return began.elapsed_time(ended) / 1000
