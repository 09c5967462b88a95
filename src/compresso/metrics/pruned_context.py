"""What a cache that forgets does to a model's numbers: put on as `compresso.load` does, and texts read through it.

Learned gates give the same logits in one forward as token by token. A rule drops nothing in a forward without a cache,
so texts are read in chunks: a chunk sees all of itself and what the cache holds, then the cache is cut. A query
therefore sees up to a chunk more than the rule leaves; "seen" counts what queries could attend to of what came before.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from compresso.checkpoint.patched import patch_names, stored_patches
from compresso.checkpoint.source import Source
from compresso.edit.context_attention import keepers_of, refuse_foreign
from compresso.edit.context_cache import ContextCache
from compresso.edit.context_gates import PATCH as GATES
from compresso.edit.evict import evict_, parse
from compresso.edit.patches import patch_
from compresso.edit.prefill import PATCH as PREFILL
from compresso.errors import ArchError
from compresso.metrics.forward import check_ids
from compresso.metrics.record import Environment, Measurement, Setting

CHUNK = 16
"""Tokens that are read at a time."""

LESS = (GATES, PREFILL)
"""Patches under which a model computes less than its weights say."""


def has_gates(source: Source) -> bool:
    """Whether learned gates decide what a model's cache holds, by the records of a run that wrote it."""
    return GATES in patch_names(source)


def check_rule(cache: str) -> None:
    """Raise ArgumentError for a text that is no rule with how much it leaves."""
    parse(cache)


def check_cache(source: Source, cache: str | None) -> None:
    """Look at a rule and what it is for before weights are read.

    Raises:
        ArgumentError: the rule is unknown.
        ArchError: learned gates decide, or the model's attention is not one whose cache can forget.
    """
    if cache is None:
        return
    check_rule(cache)
    if has_gates(source):
        raise ArchError(
            f"--cache {cache!r}: learned gates decide what the cache of {source.name} holds; leave --cache out"
        )
    refuse_foreign(source.config)


def hold_context_(model: PreTrainedModel, source: Source, cache: str | None) -> None:
    """Put on a model what lets it compute less than its weights say, in place: a rule of its cache, or what its own
    records name of the kind, gates and layers that are skipped in prefill; neither leaves it as it is.

    Raises:
        ArgumentError, ArchError: as `check_cache`, or patches that do not fit the model.
        CheckpointError: the tensors of its gates are missing.
    """
    check_cache(source, cache)
    patch_(model, [patch for patch in stored_patches(source) if patch.name in LESS])
    if cache is not None:
        evict_(model, parse(cache))


def left_out(source: Source) -> list[str]:
    """What is measured without, a sentence: patches that compute with full numbers what an engine would with few bits,
    so that their time is no engine's; nothing for most models.
    """
    names = [name for name in patch_names(source) if name not in LESS]
    told = f"{source.name}: measured by its weights alone, without {', '.join(names)}, which compresso.load computes"
    return [f"{told} with full numbers"] if names else []


class ReadThrough:
    """A way to get logits of windows: through the cache of a model whose context is pruned. It counts what is held.

    Args:
        model: with keepers on its layers.
        cache: the rule that was asked for; None for learned gates.
    """

    def __init__(self, model: PreTrainedModel, cache: str | None) -> None:
        self.model, self.cache = model, cache
        self._windows = 0
        self._live, self._bytes, self._whole, self._seen, self._there = 0.0, 0.0, 0.0, 0.0, 0.0

    @property
    def settings(self) -> dict[str, Setting]:
        """What the protocol of a number has to say; nothing of gates, which are the model's own."""
        return {} if self.cache is None else {"cache": self.cache, "cache_chunk": CHUNK}

    def __call__(
        self, model: PreTrainedModel, windows: Sequence[Sequence[int]], batch_size: int
    ) -> Iterator[tuple[int, Tensor]]:
        """As `window_logits`: the place of each window and its logits [tokens, vocab]. Windows of one length share a
        batch, so that none is padded.
        """
        check_ids(model, windows)
        order = sorted((i for i, window in enumerate(windows) if len(window)), key=lambda i: -len(windows[i]))
        was_training = model.training
        model.eval()
        try:
            while order:
                n = len(windows[order[0]])
                chosen = [i for i in order[:batch_size] if len(windows[i]) == n]
                order = order[len(chosen) :]
                ids = torch.tensor([list(windows[i]) for i in chosen], device=model.device)
                logits = self._read(model, ids)
                yield from zip(chosen, logits, strict=True)
        finally:
            model.train(was_training)

    @torch.inference_mode()
    def _read(self, model: PreTrainedModel, ids: Tensor) -> Tensor:
        """Logits [batch, tokens, vocab] of ids [batch, tokens]."""
        held, logits = ContextCache(len(keepers_of(model))), torch.empty(0)
        for start in range(0, ids.shape[1], CHUNK):
            piece = ids[:, start : start + CHUNK]
            there, n = held.live_fraction() * start, piece.shape[1]
            found: Tensor = model(input_ids=piece, past_key_values=held).logits
            if start == 0:  # the only copy: logits of long windows are larger than most models
                logits = found.new_empty(*ids.shape, found.shape[-1])
            logits[:, start : start + n] = found
            self._seen += len(ids) * sum(there + i for i in range(n))
            self._there += len(ids) * sum(start + i for i in range(n))
        self._windows += len(ids)
        self._live += len(ids) * held.live_fraction()
        self._bytes += held.allocated_bytes()
        self._whole += whole_bytes(held)
        return logits

    def measurements(self, name: str, protocol: Mapping[str, Setting], environment: Environment) -> list[Measurement]:
        """What was held of what was read, mean over windows.

        Args:
            name: of the texts.
            protocol: of the perplexity on them.
            environment: where it was read.

        Returns:
            "cache_live/NAME" (share, of the tokens at the end of a window), "cache_bytes/NAME" (bytes allocated for a
            window at its end) and, of a rule, "cache_seen/NAME" (share, of earlier tokens that a query could attend to;
            gates also drop within a chunk, which is not counted here).
        """
        n = max(self._windows, 1)
        common: dict[str, Any] = {"how": "measured", "n": self._windows, "environment": environment}
        common["protocol"] = {**protocol, "cache": self.cache or "learned gates", "cache_chunk": CHUNK}
        remark = f"the whole cache of as many tokens takes {self._whole / n / 1e6:,.2f} MB"
        shares = {"cache_live": self._live / n}
        if self.cache is not None:
            shares["cache_seen"] = self._seen / max(self._there, 1)
        found = [Measurement(name=f"{what}/{name}", value=x, unit="share", **common) for what, x in shares.items()]
        found.append(
            Measurement(name=f"cache_bytes/{name}", value=self._bytes / n, unit="bytes", remark=remark, **common)
        )
        return found


def whole_bytes(held: ContextCache) -> int:
    """Bytes of keys and values that a cache which forgets nothing takes for the tokens that this one saw."""
    found = 0
    for layer in held.layers:
        if layer.real is not None:
            sizes = (layer.slots[name] for name in ("keys", "values"))
            found += int(layer.real.sum()) * sum(one.shape[1] * one.shape[3] * one.itemsize for one in sizes)
    return found


def reading(model: PreTrainedModel, cache: str | None) -> ReadThrough | None:
    """How texts are read: through the cache where the model's context is pruned; None where it holds everything."""
    return ReadThrough(model, cache) if keepers_of(model) else None


def held_share(cache: Any) -> float:
    """Tokens held of tokens seen; 1 of a cache that forgets nothing."""
    return cache.live_fraction() if isinstance(cache, ContextCache) else 1.0
