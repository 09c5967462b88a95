"""Perplexity, together with the protocol that makes the number mean something.

By token: exp of the mean -log p of the predicted tokens. By byte: exp of all their nats over the UTF-8 bytes of their
text, which compares models with different tokenizers (`windows.py` says which bytes a token has). Logarithms in
float32, sums in float64.
"""

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from compresso.core.rows_at_once import rows_at_once
from compresso.errors import DataError, NumericError
from compresso.metrics.forward import context_of, window_logits
from compresso.metrics.protocol import PRESETS, PerplexityProtocol, check_context, every_token, preset
from compresso.metrics.record import Environment, Measurement
from compresso.metrics.windows import Window, streams, text_windows
from compresso.training.progress import PATIENCE, Progress

__all__ = ["PRESETS", "PerplexityProtocol", "PerplexityResult", "check_context", "every_token", "perplexity", "preset"]


@dataclass(frozen=True)
class PerplexityResult:
    """What was measured and how; there is none without its protocol.

    Args:
        protocol: the decisions.
        loss: mean nats a token, averaged as the protocol says.
        stderr: standard error of `loss` over windows, taken as independent; None for a single one.
        nats: over all predicted tokens.
        n_tokens: predicted tokens.
        n_bytes: UTF-8 bytes of their text; None if the tokenizer does not report the characters of its tokens.
        n_texts, n_windows: what they came from.
        has_bos: whether the tokenizer has a BOS to put where the protocol wants one.
        texts_sha256, tokens_sha256: of the texts, and of the windows with what is predicted in each.
    """

    protocol: PerplexityProtocol
    loss: float
    stderr: float | None
    nats: float
    n_tokens: int
    n_bytes: int | None
    n_texts: int
    n_windows: int
    has_bos: bool
    texts_sha256: str
    tokens_sha256: str

    @property
    def value(self) -> float:
        """Perplexity by token."""
        return _exp(self.loss)

    @property
    def by_byte(self) -> float | None:
        """Perplexity by byte; None without known bytes."""
        return _exp(self.nats / self.n_bytes) if self.n_bytes else None

    def measurements(self, environment: Environment, remark: str | None = None) -> tuple[Measurement, ...]:
        """The perplexity by token and, where the bytes are known, by byte; `remark` is a sentence about the texts.

        Only equal tokens make equal protocols by token; by byte, the same texts do.
        """
        name = self.protocol.corpus
        texts = {**self.protocol.settings(), "documents": self.n_texts, "texts_sha256": self.texts_sha256}
        tokens = {
            "tokens": self.n_tokens,
            "windows": self.n_windows,
            "has_bos": self.has_bos,
            "tokens_sha256": self.tokens_sha256,
        }
        by_token = Measurement(
            name=f"{name}/perplexity",
            value=self.value,
            unit="1",
            how="measured",
            stderr=None if self.stderr is None else self.value * self.stderr,
            n=self.n_tokens,
            protocol={**texts, **tokens},
            environment=environment,
            remark=remark,
        )
        if self.by_byte is None:
            unknown = "No value by byte: the tokenizer does not report which text its tokens stand for."
            return (by_token.model_copy(update={"remark": f"{remark} {unknown}" if remark else unknown}),)
        per_byte = by_token.model_copy(
            update={
                "name": f"{name}/byte_perplexity",
                "value": self.by_byte,
                "stderr": (
                    None if self.stderr is None else self.by_byte * self.stderr * self.n_tokens / (self.n_bytes or 1)
                ),
                "n": self.n_bytes,
                "protocol": {**texts, "averaging": "bytes"},
            }
        )
        return by_token, per_byte


def perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[str],
    protocol: PerplexityProtocol,
    *,
    batch_size: int = 1,
    progress: Progress | None = None,
    logits_of: Callable[[PreTrainedModel, Sequence[Sequence[int]], int], Iterator[tuple[int, Tensor]]] = window_logits,
) -> PerplexityResult:
    """Perplexity of `texts`; `batch_size` windows are read together, which changes the time and nothing else.

    progress: display of the windows; None shows nothing.
    logits_of: how windows are read; through a cache that forgets, `metrics/pruned_context.py`.

    Raises:
        DataError: windows longer than the model's context, or texts too short for one window.
        NumericError: the loss is not finite.
    """
    check_context(protocol, context_of(model))
    chosen = list(islice(texts, protocol.documents))
    windows = text_windows(tokenizer, chosen, protocol)
    if not windows:
        longest = max((len(stream.ids) for stream in streams(tokenizer, chosen, protocol)), default=0)
        wanted = f"{protocol.seq_len} for a full window" if protocol.remainder == "dropped" else "2"
        raise DataError(
            f"corpus '{protocol.corpus}': {len(chosen)} texts make {longest} tokens in a row, too few to predict one;"
            f" wanted {wanted}. Give more text, or a smaller seq_len."
        )
    nats, shown = [0.0] * len(windows), progress or Progress("silent")
    read, phase = 0, f"perplexity of {protocol.corpus}"
    with shown.running(len(windows), 0, phase, PATIENCE):
        for i, logits in logits_of(model, [window.ids for window in windows], batch_size):
            first = windows[i].first
            nats[i] = _nats(logits[first - 1 : -1], torch.tensor(windows[i].ids[first:], device=logits.device))
            read += 1
            shown.step(read, phase, {}, len(windows[i].ids))
    total, n_tokens = math.fsum(nats), sum(window.n_scored for window in windows)
    loss = total / n_tokens
    if protocol.averaging == "windows":
        loss = math.fsum(one / window.n_scored for one, window in zip(nats, windows, strict=True)) / len(windows)
    if not math.isfinite(loss):
        raise NumericError(
            f"the loss on corpus '{protocol.corpus}' is {loss}; the model overflows on it, use float32 or bfloat16"
        )
    n_bytes = [window.n_bytes for window in windows if window.n_bytes is not None]
    return PerplexityResult(
        protocol=protocol,
        loss=loss,
        stderr=_stderr(nats, windows, total / n_tokens),
        nats=total,
        n_tokens=n_tokens,
        n_bytes=sum(n_bytes) if len(n_bytes) == len(windows) else None,
        n_texts=len(chosen),
        n_windows=len(windows),
        has_bos=tokenizer.bos_token_id is not None,
        texts_sha256=_digest(text.encode() for text in chosen),
        tokens_sha256=_digest(repr((window.ids, window.first)).encode() for window in windows),
    )


def _nats(logits: Tensor, targets: Tensor) -> float:
    """Sum of -log p of the targets [tokens] under logits [tokens, vocab]."""
    size = rows_at_once(logits.shape[-1])
    parts = zip(logits.split(size), targets.split(size), strict=True)
    return sum(
        torch.nn.functional.cross_entropy(a.float(), b, reduction="none").double().sum().item() for a, b in parts
    )


def _stderr(nats: Sequence[float], windows: Sequence[Window], mean: float) -> float | None:
    """Standard error of a ratio of sums over windows (linearised): windows with more tokens weigh more."""
    n = len(windows)
    if n < 2:
        return None
    squares = math.fsum((one - mean * window.n_scored) ** 2 for one, window in zip(nats, windows, strict=True))
    return math.sqrt(squares * n / (n - 1)) / sum(window.n_scored for window in windows)


def _digest(parts: Iterable[bytes]) -> str:
    """sha256 over the parts and their borders, 16 digits."""
    total = hashlib.sha256()
    for part in parts:
        total.update(len(part).to_bytes(8, "big") + part)
    return total.hexdigest()[:16]


def _exp(loss: float) -> float:
    """Raises NumericError where the result has no float."""
    try:
        return math.exp(loss)
    except OverflowError as error:
        raise NumericError(
            f"a loss of {loss:.0f} nats a token has no perplexity in float64; the model is broken"
        ) from error
