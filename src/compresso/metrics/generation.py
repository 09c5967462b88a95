"""What a model writes: greedy continuations of a fixed list of prompts, and how many of them are broken.

Pruned models fail here first: a perplexity that doubled may still write, or may say one word without end. Nothing
judges the content; counted is what a program can see (`broken`), and the texts are there to be read, dense and pruned
side by side.
"""

import hashlib
import math
import statistics
from collections.abc import Callable, Sequence
from typing import cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from compresso.data import world
from compresso.data.tokens import bare_ids
from compresso.errors import DataError, NumericError
from compresso.metrics.forward import check_ids, context_of
from compresso.metrics.record import Environment, Measurement, Sample, Setting

PROMPTS = (
    "Once upon a time, a little fox lived at the edge of a quiet forest. One morning",
    "Ben and his sister found an old box under the stairs. When they opened it,",
    "Water turns into ice when",
    "The moon looks bright at night because",
    "To make a cup of tea, first",
    "The three most useful things to take on a long walk are",
    "Dear neighbour, thank you for looking after our garden while we were away. When we came home,",
    "Question: Why do many trees lose their leaves in autumn?\nAnswer:",
)
"""Openings that a base model can go on with: stories, facts, instructions, a letter, a question."""
MAX_NEW_TOKENS = 64
GRAM = 4
"""Tokens of the runs whose return counts as repetition."""
MOST_REPETITION = 0.5
LOOP_TOKENS = 16
"""Least tokens at the end that must be a loop, and most tokens of one turn of it."""
LOOP_TURNS = 3


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
    prompts: Sequence[str] = PROMPTS,
    max_new_tokens: int = MAX_NEW_TOKENS,
    encode: Callable[[str], list[int]] | None = None,
) -> tuple[Sample, ...]:
    """The greedy continuation of each prompt, up to the end token or `max_new_tokens`.

    Args:
        encode: ids of a prompt, for a model that expects a format of its own; None: BOS, where the tokenizer has one,
            and the bare text.

    Greedy means the most likely token, the lowest of equals; a generation config with sampling or penalties is not
    looked at, except for its end tokens.

    Raises:
        DataError: no prompts, a prompt without tokens, or prompt and continuation beyond the model's context.
        NumericError: the model gives NaN.
    """
    if not prompts or max_new_tokens < 1:
        raise DataError(f"{len(prompts)} prompts and max_new_tokens={max_new_tokens}; wanted at least one of each")
    context = context_of(model)
    ends = _ends(model, tokenizer)
    encoded = [(encode or (lambda text: _with_bos(tokenizer, text)))(prompt) for prompt in prompts]
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
    try:
        for prompt, ids in zip(prompts, encoded, strict=True):
            tokens, ended = _greedy(model, ids, max_new_tokens, ends)
            text = str(tokenizer.decode(tokens, skip_special_tokens=True))
            degenerate = broken(text, tokens, ended)
            written.append(
                Sample(
                    prompt=prompt, text=text, tokens=len(tokens), repetition=repetition(tokens), degenerate=degenerate
                )
            )
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


def _with_bos(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    bos = [] if tokenizer.bos_token_id is None else [cast(int, tokenizer.bos_token_id)]
    return bos + bare_ids(tokenizer, [text])[0]


def _ends(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Every token that ends a text, by the tokenizer or by the model's generation config."""
    configured = getattr(model.generation_config, "eos_token_id", None)
    found = [tokenizer.eos_token_id, *(configured if isinstance(configured, list) else [configured])]
    return {one for one in found if isinstance(one, int)}


@torch.inference_mode()
def _greedy(model: PreTrainedModel, ids: Sequence[int], max_new_tokens: int, ends: set[int]) -> tuple[list[int], bool]:
    """New tokens without the end token, and whether there was one."""
    given, cache = torch.tensor([list(ids)], device=model.device), None
    tokens: list[int] = []
    while len(tokens) < max_new_tokens:
        output = model(input_ids=given, past_key_values=cache, use_cache=True)
        last = output.logits[0, -1]
        if last.isnan().any():
            raise NumericError(f"the model gives NaN after {len(tokens)} new tokens; use float32 or bfloat16")
        token = int(last.argmax())
        if token in ends:
            return tokens, True
        tokens.append(token)
        given, cache = torch.tensor([[token]], device=model.device), output.past_key_values
    return tokens, False
