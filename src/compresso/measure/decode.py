"""Decode speed of several models, measured in turn in one process, so that a machine that slows down slows them all."""

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel


@dataclass(frozen=True)
class DecodeSpeed:
    """Greedy generation with a key/value cache, batch 1.

    Args:
        tokens_per_second: median over rounds.
        lowest, highest: over rounds.
        rounds, prompt_tokens, new_tokens: the settings.
        bytes_per_token: weights read for one token: every matrix once, the embedding's one row left out.
    """

    tokens_per_second: float
    lowest: float
    highest: float
    rounds: int
    prompt_tokens: int
    new_tokens: int
    bytes_per_token: int


def decode_speeds(
    models: Mapping[str, PreTrainedModel], *, prompt_tokens: int = 32, new_tokens: int = 48, rounds: int = 5
) -> dict[str, DecodeSpeed]:
    """Time greedy decoding of each model, one after the other in every round, after one warm-up round.

    The speed-up of a smaller model is bounded by the ratio of `bytes_per_token`: small batches read weights and do little else.
    """
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for round_number in range(rounds + 1):
        for name, model in models.items():
            taken = _decode_seconds(model, prompt_tokens, new_tokens)
            if round_number:
                seconds[name].append(taken)
    result: dict[str, DecodeSpeed] = {}
    for name, model in models.items():
        rates = sorted(new_tokens / taken for taken in seconds[name])
        result[name] = DecodeSpeed(statistics.median(rates), rates[0], rates[-1], rounds, prompt_tokens, new_tokens, bytes_per_token(model))
    return result


def bytes_per_token(model: PreTrainedModel) -> int:
    """Bytes of weights that one decoded token reads: all parameters, tied ones once, an untied input embedding left out."""
    lookup = model.get_input_embeddings().weight
    head = model.get_output_embeddings()
    tied = head is not None and head.weight is lookup
    return sum(p.numel() * p.element_size() for p in model.parameters() if tied or p is not lookup)


@torch.inference_mode()
def _decode_seconds(model: PreTrainedModel, prompt_tokens: int, new_tokens: int) -> float:
    """Wall seconds for `new_tokens` single-token steps after the prompt was read."""
    model.eval()
    ids = torch.arange(prompt_tokens, device=model.device).remainder(model.config.vocab_size).unsqueeze(0)
    output = model(input_ids=ids, use_cache=True)
    cache, token = output.past_key_values, output.logits[:, -1:].argmax(-1)
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(new_tokens):
        output = model(input_ids=token, past_key_values=cache, use_cache=True)
        token = output.logits[:, -1:].argmax(-1)
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started
