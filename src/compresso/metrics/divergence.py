"""How far a model's predictions have moved from the dense model's: perplexity and multiple choice hide damage that this
shows.

At each position of held text the dense model P and the other Q give a distribution of the next token. Measured are the
mean of KL(P || Q) = sum_v P(v) (log P(v) - log Q(v)) in nats, and how often both have the same most likely token. Where
the other model has only some of the tokens, P is taken over these, normalised anew, and the share of P that lay on the
others is measured beside it.

Both models need not be in memory at once: `reference` keeps the dense model's log-probabilities, `divergence` compares
another model with them. The whole distribution is kept, since the tail is where pruned models drift, so positions are
few where the vocabulary is large.
"""

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from transformers import PreTrainedModel

from compresso.checkpoint.atomic import write_bytes
from compresso.core.rows_at_once import rows_at_once
from compresso.errors import DataError, NumericError
from compresso.metrics.forward import context_of, window_logits
from compresso.metrics.record import Environment, Measurement

MAX_BYTES = 2**28
"""Most bytes of log-probabilities kept: 65,536 positions of a vocabulary of 1024, 523 of one of 128,256."""
_FORMAT = "compresso dense reference 1"


@dataclass(frozen=True)
class DenseReference:
    """What the dense model predicted.

    Args:
        corpus: where the windows came from, in a word.
        windows: ids of each window.
        places: [n, 2], int64: window and position in it, after whose token the next one is predicted; sorted.
        log_probs: [n, vocab], float32, on the CPU.
        n_candidates: positions that have a next token, of which n were taken.
        batch_size: windows read together, for the model that is compared as well: then equal models give equal numbers.
    """

    corpus: str
    windows: tuple[tuple[int, ...], ...]
    places: Tensor
    log_probs: Tensor
    n_candidates: int
    batch_size: int

    def save(self, path: Path) -> None:
        """Write as safetensors, whole or not at all.

        Raises:
            ResourceError: the disk is full.
        """
        tensors = {
            "log_probs": self.log_probs,
            "places": self.places,
            "ids": torch.tensor([i for window in self.windows for i in window]),
            "lengths": torch.tensor([len(window) for window in self.windows]),
        }
        facts = {"n_candidates": str(self.n_candidates), "batch_size": str(self.batch_size)}
        write_bytes(path, save(tensors, {"format": _FORMAT, "corpus": self.corpus, **facts}))

    @classmethod
    def load(cls, path: Path) -> "DenseReference":
        """Read what `save` wrote.

        Raises:
            DataError: the file is missing or something else.
        """
        try:
            with safe_open(str(path), framework="pt") as file:
                facts: Mapping[str, str] = file.metadata() or {}
                if facts.get("format") != _FORMAT:
                    raise DataError(f"{path}: not a dense reference of this version; measure the dense model again")
                tensors = {name: file.get_tensor(name) for name in ("log_probs", "places", "ids", "lengths")}
        except (OSError, SafetensorError) as error:
            raise DataError(f"{path}: no readable dense reference ({error}); measure the dense model again") from error
        windows = tuple(tuple(part.tolist()) for part in tensors["ids"].split(tensors["lengths"].tolist()))
        counts = int(facts["n_candidates"]), int(facts["batch_size"])
        return cls(facts["corpus"], windows, tensors["places"], tensors["log_probs"], *counts)


def reference(
    model: PreTrainedModel,
    windows: Sequence[Sequence[int]],
    *,
    corpus: str,
    max_bytes: int = MAX_BYTES,
    batch_size: int = 8,
) -> DenseReference:
    """What the dense model predicts on held windows, each a list of ids; windows of one token have no position to look
    at.

    Where all positions would take more than `max_bytes`, evenly spaced ones are taken.

    Raises:
        DataError: no position with a next token, a window beyond the model's context, or room for not even one
            position.
        NumericError: a log-probability is NaN.
    """
    context = context_of(model)
    longest = max((len(window) for window in windows), default=0)
    if context is not None and longest > context:
        raise DataError(
            f"a window of {longest} tokens is beyond the model's context of {context}; cut windows to at most that"
        )
    candidates = [(i, j) for i, window in enumerate(windows) for j in range(len(window) - 1)]
    if not candidates:
        raise DataError(
            f"{len(windows)} windows of '{corpus}' have no token with a next one; give windows of two tokens or more"
        )
    vocabulary = _vocabulary(model)
    if max_bytes < 4 * vocabulary:
        raise DataError(
            f"max_bytes={max_bytes} holds no position of a vocabulary of {vocabulary}; wanted at least {4 * vocabulary}"
        )
    n = min(len(candidates), max_bytes // (4 * vocabulary))
    places = torch.tensor([candidates[i * len(candidates) // n] for i in range(n)])
    log_probs = torch.empty(n, vocabulary)
    given = tuple(tuple(window) for window in windows)
    for rows, found in _log_probs(model, given, places, batch_size):
        log_probs[rows] = found.cpu()
    if log_probs.isnan().any():
        raise NumericError(f"the dense model's predictions on '{corpus}' are NaN; use float32 or bfloat16")
    return DenseReference(corpus, given, places, log_probs, len(candidates), batch_size)


def divergence(
    model: PreTrainedModel,
    reference: DenseReference,
    environment: Environment | None = None,
    kept: Sequence[int] | None = None,
) -> tuple[Measurement, ...]:
    """Mean KL(dense || model) in nats a token ("kl"), and the share of positions with the same top token
    ("top1_agreement").

    The model that made the reference gives exactly 0 and 1. Standard errors take positions as independent; neighbours
    are not quite.

    Args:
        kept: the dense model's ids, ascending, of the tokens that the model has, where it has not all; the windows may
            hold only these. Then the mean probability that the dense model gave to the others ("removed_mass") is
            measured too, and a top token among them agrees with nothing.

    Raises:
        DataError: another vocabulary, or a window with a token that the model does not have.
        NumericError: a divergence is not finite.
    """
    n, vocabulary = reference.log_probs.shape
    tokens = torch.arange(vocabulary) if kept is None else torch.tensor(kept)
    if _vocabulary(model) != len(tokens):
        raise DataError(
            f"the model has a vocabulary of {_vocabulary(model)}, the dense reference one of {len(tokens)}; wanted the"
            " same"
        )
    new = {old: i for i, old in enumerate(tokens.tolist())}
    if any(i not in new for window in reference.windows for i in window):
        raise DataError(
            f"windows of '{reference.corpus}' hold tokens that the model does not have; give windows of tokens that"
            " both have"
        )
    windows = (
        reference.windows if kept is None else tuple(tuple(new[i] for i in window) for window in reference.windows)
    )
    kl = torch.empty(n, dtype=torch.float64)
    same = torch.empty(n, dtype=torch.float64)
    removed = torch.zeros(n, dtype=torch.float64)
    for rows, found in _log_probs(model, windows, reference.places, reference.batch_size):
        dense, there = reference.log_probs[rows].to(found.device), tokens.to(found.device)
        kl[rows] = divergences(dense if kept is None else dense[:, there], found).cpu()
        same[rows] = (dense.argmax(-1) == there[found.argmax(-1)]).double().cpu()
        if kept is not None:
            removed[rows] = (1 - dense[:, there].double().exp().sum(-1)).clamp(min=0).cpu()
    if not torch.isfinite(kl).all():
        raise NumericError(f"the divergence from dense on '{reference.corpus}' is not finite; use float32 or bfloat16")
    agreement = float(same.mean())
    shared = {
        "how": "measured",
        "n": n,
        "protocol": {
            "corpus": reference.corpus,
            "windows": len(reference.windows),
            "positions": n,
            "of_positions": reference.n_candidates,
            "chosen": "all" if n == reference.n_candidates else "evenly spaced",
            "direction": "dense || model",
            **(
                {}
                if kept is None
                else {"tokens": f"{len(tokens)} of {vocabulary}, the dense model normalised over these"}
            ),
            "windows_sha256": hashlib.sha256(repr(reference.windows).encode()).hexdigest()[:16],
        },
        "environment": environment or Environment.here(model.device, model.dtype),
    }
    spread = float(kl.std() / math.sqrt(n)) if n > 1 else None
    binomial = math.sqrt(agreement * (1 - agreement) / n)
    found = (
        Measurement(name="kl", value=max(0.0, float(kl.mean())), unit="nats/token", stderr=spread, **shared),
        Measurement(name="top1_agreement", value=agreement, unit="share", stderr=binomial, **shared),
    )
    return (
        found
        if kept is None
        else (*found, Measurement(name="removed_mass", value=float(removed.mean()), unit="share", **shared))
    )


def divergences(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(P || Q) of each row in nats [n], float64, from log-probabilities [n, vocab].

    Both are normalised once more in float64: what float32 rounds away would show as a small negative divergence.
    """
    log_p, log_q = log_p.double().log_softmax(-1), log_q.double().log_softmax(-1)
    p = log_p.exp()
    return torch.where(p == 0, 0.0, p * (log_p - log_q)).sum(-1)


def _vocabulary(model: PreTrainedModel) -> int:
    return int(model.config.vocab_size)


def _log_probs(
    model: PreTrainedModel, windows: Sequence[Sequence[int]], places: Tensor, batch_size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Pieces of (rows of `places`, log-probabilities there [rows, vocab], float32); windows without a place are not
    read.
    """
    wanted = places[:, 0].unique().tolist()
    size = rows_at_once(2 * _vocabulary(model))
    for i, logits in window_logits(model, [windows[i] for i in wanted], batch_size):
        rows = (places[:, 0] == wanted[i]).nonzero().squeeze(-1)
        for some in rows.split(size):
            yield some, logits[places[some, 1].to(logits.device)].float().log_softmax(-1)
