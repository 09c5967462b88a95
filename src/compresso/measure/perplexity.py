"""Perplexity, together with the protocol that makes the number mean something.

All texts are joined into one stream, `BOS text EOS BOS text EOS ...`, which is cut into blocks of `seq_len` tokens that do not
overlap. In each block every token but the first is predicted from those before it in the block. The last block may be shorter.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from compresso.errors import DataError

PROTOCOL = "texts joined with BOS and EOS, cut into blocks without overlap, first token of each block not predicted"


@dataclass(frozen=True)
class PerplexityResult:
    """Perplexity by token, how many tokens were predicted, the block length and the protocol in words."""

    value: float
    n_tokens: int
    seq_len: int
    n_texts: int
    protocol: str = PROTOCOL


@torch.inference_mode()
def perplexity(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], seq_len: int, batch_size: int
) -> PerplexityResult:
    """exp of the mean -log p of the predicted tokens of `texts`; logarithms in float32, their sum in float64.

    Raises:
        DataError: `seq_len` below 2, or texts too short to predict a token.
    """
    if seq_len < 2:
        raise DataError(f"seq_len={seq_len} leaves no token to predict; give 2 or more")
    start = [] if tokenizer.bos_token_id is None else [cast(int, tokenizer.bos_token_id)]
    end = [] if tokenizer.eos_token_id is None else [cast(int, tokenizer.eos_token_id)]
    stream: list[int] = []
    n_texts = 0
    for text in texts:
        stream += start + (tokenizer.encode(text, add_special_tokens=False) if text else []) + end
        n_texts += 1
    if len(stream) < 2:
        raise DataError(f"{n_texts} texts make {len(stream)} tokens, too few to predict one; give more text")
    n_full = len(stream) // seq_len
    full = torch.tensor(stream[: n_full * seq_len], dtype=torch.long).view(n_full, seq_len)
    blocks = list(full.split(batch_size)) if n_full else []
    if len(rest := stream[n_full * seq_len :]) >= 2:
        blocks.append(torch.tensor([rest]))
    was_training = model.training
    model.eval()
    total, n_tokens = 0.0, 0
    try:
        for tokens in blocks:
            tokens = tokens.to(model.device)
            logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]
            losses = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
            total += losses.double().sum().item()
            n_tokens += losses.numel()
    finally:
        model.train(was_training)
    return PerplexityResult(value=math.exp(total / n_tokens), n_tokens=n_tokens, seq_len=seq_len, n_texts=n_texts)
