"""What a model writes: greedy continuations of fixed prompts, and how many of them are broken.

Pruned models fail here first: a perplexity that doubled may still write, or may say one word without end. Nothing
judges the content; counted is what a program can see (`broken`), and the texts are there to be read, dense and pruned
side by side.
"""

import hashlib
import inspect
import math
import statistics
from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from compresso.data import world
from compresso.data.tokens import bare_ids
from compresso.errors import DataError, NumericError
from compresso.metrics.forward import check_ids, context_of
from compresso.metrics.prompts import OPENINGS
from compresso.metrics.record import Environment, Measurement, Sample, Setting

MAX_NEW_TOKENS = 64
TOGETHER = 8
"""Texts written side by side."""
GRAM = 4
"""Tokens of the runs whose return counts as repetition."""
MOST_REPETITION = 0.5
LOOP_TOKENS = 16
"""Least tokens at the end that must be a loop, and most tokens of one turn of it."""
LOOP_TURNS = 3
LEAST_SHARED = 16
"""Tokens that prompts must have in common to be read once."""


def world_prompts(n: int, seed: int = 0) -> tuple[str, ...]:
    """`n` beginnings of documents of the embedded world, four words each, for a model that knows nothing else."""
    return tuple(" ".join(text.split()[:4]) for text in world.documents(n, seed))


def repetition(tokens: Sequence[int]) -> float:
    """The share of 4-grams that occurred before in the sequence, 0..1; 0 for fewer than five tokens.

    >>> repetition([1, 2, 3, 4, 5, 6]), repetition([7] * 5)
    (0.0, 0.5)
    """
    grams = [tuple(tokens[i : i + GRAM]) for i in range(len(tokens) - GRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def ends_in_loop(tokens: Sequence[int]) -> bool:
    """Whether the end is one cycle said over and over: 16 tokens or more, of at least three whole turns of at most 16
    tokens each.
    """
    for turn in range(1, LOOP_TOKENS + 1):
        needed = max(LOOP_TOKENS, LOOP_TURNS * turn)
        end = tokens[-needed:]
        if len(end) == needed and all(a == b for a, b in zip(end, end[turn:], strict=False)):
            return True
    return False


def broken(text: str, tokens: Sequence[int], ended: bool) -> bool:
    """Whether a continuation counts as degenerate.

    It does if nothing but white space was written; if more than half of its 4-grams occurred before in it; or if it was
    cut off at the limit (`ended` is False) while it was in a loop. To stop early is no fault.
    """
    return not text.strip() or repetition(tokens) > MOST_REPETITION or (not ended and ends_in_loop(tokens))


def samples(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str] = OPENINGS,
    max_new_tokens: int = MAX_NEW_TOKENS,
    encode: Callable[[str], list[int]] | None = None,
    advance: Callable[[int, int], None] = lambda texts, tokens: None,
) -> tuple[Sample, ...]:
    """The greedy continuation of each prompt, up to the end token or `max_new_tokens`.

    Args:
        encode: ids of a prompt, for a model that expects a format of its own; None: BOS, where the tokenizer has one,
            and the bare text.
        advance: called with the number of texts that are done and of the tokens since the last call.

    Greedy means the most likely token, the lowest of equals; a generation config with sampling or penalties is not
    looked at, except for its end tokens.

    Raises:
        DataError: no prompts, a prompt without tokens, or prompt and continuation beyond the model's context.
        NumericError: the model gives NaN.
    """
    if not prompts or max_new_tokens < 1:
        raise DataError(f"{len(prompts)} prompts and max_new_tokens={max_new_tokens}; wanted at least one of each")
    context = context_of(model)
    ends = end_tokens(model, tokenizer)
    encoded = [(encode or (lambda text: with_bos(tokenizer, text)))(prompt) for prompt in prompts]
    check_ids(model, encoded)
    for prompt, ids in zip(prompts, encoded, strict=True):
        if not ids:
            raise DataError(f"prompt {prompt!r} has no tokens; give it text")
        if context is not None and len(ids) + max_new_tokens > context:
            raise DataError(
                f"a prompt of {len(ids)} tokens and {max_new_tokens} new ones are beyond the model's context of"
                f" {context}; give shorter prompts or a smaller max_new_tokens"
            )
    was_training = model.training
    model.eval()
    written: list[Sample] = []
    together = TOGETHER if takes_positions(model) else 1
    try:
        for begin in range(0, len(encoded), together):
            chosen = encoded[begin : begin + together]
            for place, (tokens, ended) in enumerate(greedy(model, chosen, max_new_tokens, ends), begin):
                text = str(tokenizer.decode(tokens, skip_special_tokens=True))
                facts = {"tokens": len(tokens), "repetition": repetition(tokens)}
                marked = broken(text, tokens, ended)
                written.append(Sample(prompt=prompts[place], text=text, degenerate=marked, **facts))
            advance(len(written), sum(one.tokens for one in written[begin:]))
    finally:
        model.train(was_training)
    return tuple(written)


def generation_measurements(
    samples: Sequence[Sample], environment: Environment, *, max_new_tokens: int, **settings: Setting
) -> tuple[Measurement, ...]:
    """Mean share of repeated 4-grams ("repetition"), and share of prompts whose text is broken ("degenerate").

    Args:
        max_new_tokens: as given to `samples`.
        settings: what else was decided, such as `prompt_format="instruction"`.

    Raises:
        DataError: no samples.
    """
    if not samples:
        raise DataError("no samples to measure; write at least one")
    n = len(samples)
    rates, marks = [one.repetition for one in samples], [float(one.degenerate) for one in samples]
    shared = {
        "unit": "share",
        "how": "measured",
        "n": n,
        "protocol": {
            "prompts": n,
            "prompts_sha256": hashlib.sha256(repr([one.prompt for one in samples]).encode()).hexdigest()[:16],
            "decoding": "greedy",
            "max_new_tokens": max_new_tokens,
            "gram": GRAM,
            "most_repetition": MOST_REPETITION,
            **settings,
        },
        "environment": environment,
    }
    spread = statistics.stdev(rates) / math.sqrt(n) if n > 1 else None
    share = statistics.fmean(marks)
    return (
        Measurement(name="repetition", value=statistics.fmean(rates), stderr=spread, **shared),
        Measurement(name="degenerate", value=share, stderr=math.sqrt(share * (1 - share) / n), **shared),
    )


def with_bos(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The ids of a bare text, after the beginning token where the tokenizer has one."""
    bos = [] if tokenizer.bos_token_id is None else [cast(int, tokenizer.bos_token_id)]
    return bos + bare_ids(tokenizer, [text])[0]


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Every token that ends a text, by the tokenizer or by the model's generation config."""
    configured = getattr(model.generation_config, "eos_token_id", None)
    found = [tokenizer.eos_token_id, *(configured if isinstance(configured, list) else [configured])]
    return {one for one in found if isinstance(one, int)}


def takes_positions(model: PreTrainedModel) -> bool:
    """Whether a model can be told where each token stands, so that texts of different lengths share a batch."""
    return "position_ids" in inspect.signature(model.forward).parameters


def _shared(model: PreTrainedModel, prompts: Sequence[Sequence[int]]) -> tuple[Cache | None, int]:
    """A cache of what all prompts begin with, once for each, and how many tokens that is; None and 0 where it saves
    nothing, or where the cache is of a kind that cannot be copied, or forgets.
    """
    rows = [list(ids) for ids in prompts]
    first, last = min(rows), max(rows)
    most = min(map(len, prompts)) - 1
    n = next((i for i in range(most) if first[i] != last[i]), max(most, 0))
    if len(prompts) < 2 or n < LEAST_SHARED or not takes_positions(model):
        return None, 0
    cache = model(input_ids=torch.tensor([first[:n]], device=model.device), use_cache=True).past_key_values
    if type(cache) is not DynamicCache or any(type(layer) is not DynamicLayer for layer in cache.layers):
        return None, 0
    cache.batch_repeat_interleave(len(prompts))
    return cache, n


@torch.inference_mode()
def greedy(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    ends: set[int],
    choose: Callable[[Tensor], Tensor] = lambda logits: logits.argmax(-1),
    share: bool = False,
    rooms: Sequence[int] | None = None,
) -> list[tuple[list[int], bool]]:
    """New tokens of each prompt without the end token, and whether there was one.

    Args:
        choose: the next token of each prompt [n], from its logits [n, vocab]; the most likely one.
        share: whether the tokens that all prompts begin with are read once, where the model's cache can be copied.
        rooms: most new tokens of each prompt, at most `max_new_tokens`; None for so many of all. What a prompt that is
            done still computes stands at a position that the model has.

    Prompts stand at the right, after padding that no token looks at, where their lengths differ.
    """
    cache, n = _shared(model, prompts) if share else (None, 0)
    longest = max(map(len, prompts))
    given = torch.tensor([[0] * (longest - len(ids)) + list(ids[n:]) for ids in prompts], device=model.device)
    there = torch.tensor(
        [[1] * n + [0] * (longest - len(ids)) + [1] * (len(ids) - n) for ids in prompts], device=model.device
    )
    positions, padded = (there.cumsum(-1) - 1).clamp(min=0)[:, n:], not bool(there.all())
    last_alone = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    texts: list[list[int]] = [[] for _ in prompts]
    ended, open_ = [False] * len(prompts), set(range(len(prompts)))
    for step in range(max_new_tokens):
        placed = {"attention_mask": there, "position_ids": positions} if padded else {}
        output = model(input_ids=given, past_key_values=cache, use_cache=True, **placed, **last_alone)
        last = output.logits[:, -1]
        if last[sorted(open_)].isnan().any():
            raise NumericError(f"the model gives NaN after {step} new tokens; use float32 or bfloat16")
        chosen = choose(last)
        tokens = chosen.tolist()  # one wait for the device, not one a row
        for row in sorted(open_):
            if tokens[row] in ends:
                ended[row] = True
            else:
                texts[row].append(tokens[row])
        open_ = {row for row in open_ if not ended[row] and (rooms is None or len(texts[row]) < rooms[row])}
        if not open_:
            break
        given, cache = chosen.unsqueeze(-1), output.past_key_values
        there, positions = torch.cat((there, torch.ones_like(there[:, :1])), -1), positions[:, -1:] + 1
        positions[[row for row in range(len(prompts)) if row not in open_]] = 0
    return list(zip(texts, ended, strict=True))
