"""How far candidates of a search are from the dense model: KL on calibration tokens, from the first changed block on.

A candidate is a level of each item, and an item lies in a block. Candidates of a search share most of their levels with
the parent they come from, so what the parent's blocks read is kept at block borders, and a candidate runs from the last
border before its first change. Embeddings, masks and positions are the model's own and are computed again; the blocks
before the border hand on what they are given. The result is bit for bit that of the whole model.

Memory is bounded. Half of it keeps the dense model's log-probabilities, at evenly spaced tokens where there is no room
for all, and only there do heads run; half of it keeps borders, every second, third, ... one where there is no room for
all. Padding is neither predicted from nor looked at.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from compresso.core.rows_at_once import rows_at_once
from compresso.errors import DataError, NumericError
from compresso.solve.level_choice import Levels

MAX_BYTES = 2**30
"""Most bytes of log-probabilities and borders together."""


class Install(Protocol):
    """Puts a block at levels, whatever it was at before."""

    def __call__(self, block: int, levels: Levels, /) -> None:
        """levels: of the items that lie in the block, in the order of items."""
        ...


@dataclass(frozen=True)
class _Batch:
    """What the model reads, and where it is compared.

    Args:
        given: arguments of the model, among them the ids [rows, seq]; on its device.
        rows, columns: of the compared tokens [n].
    """

    given: Mapping[str, Tensor]
    rows: Tensor
    columns: Tensor


class CandidateDivergence:
    """The fitness of candidates; made by `candidate_divergence`, while whose context lasts the model is its own.

    Args:
        model: in evaluation mode, dense.
        blocks: of the model.
        at: the block of each item, ascending.
        install: see `Install`.
        dense: the levels that the model is at.
        batches: what the model reads, an attention mask [rows, seq] among it.
        stages: how many of the batches each stage takes, the first ones.
        max_bytes: of what is kept.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        blocks: nn.ModuleList,
        at: Sequence[int],
        install: Install,
        dense: Levels,
        batches: Sequence[Mapping[str, Tensor]],
        stages: Sequence[int],
        max_bytes: int = MAX_BYTES,
    ) -> None:
        if not batches or not all(1 <= n <= len(batches) for n in stages):
            raise DataError(f"stages of {list(stages)} batches, and there are {len(batches)}; give more data")
        self._model, self._blocks, self._install, self._stages = model, blocks, install, stages
        self._places = [[i for i, block in enumerate(at) if block == here] for here in range(len(blocks))]
        self._tuples = [False] * len(blocks)
        self._at = self._parent = self._wanted = dense
        self._batches = _placed(model, batches, max_bytes // 2)
        size = model.dtype.itemsize * int(model.config.hidden_size)
        border = sum(batch.given["attention_mask"].numel() for batch in self._batches) * size
        apart = -(-len(blocks) * border // (max_bytes // 2)) if max_bytes > 1 else len(blocks)
        self.borders = tuple(range(max(apart, 1), len(blocks), max(apart, 1)))
        self._states: list[dict[int, Tensor]] = [{} for _ in self._batches]
        self._log_probs = [self._run(i, 0, keep=True) for i in range(len(self._batches))]
        if any(bool(one.isnan().any()) for one in self._log_probs):
            raise NumericError("the dense model's predictions are NaN on the calibration data; use float32 or bfloat16")

    @property
    def facts(self) -> dict[str, int]:
        """What is compared and kept, for the records."""
        states = sum(one.numel() * one.element_size() for kept in self._states for one in kept.values())
        return {
            "tokens": sum(int(batch.given["attention_mask"].sum()) for batch in self._batches),
            "compared": sum(len(batch.rows) for batch in self._batches),
            "borders": len(self.borders),
            "bytes": states + sum(one.numel() * one.element_size() for one in self._log_probs),
        }

    def adopt(self, levels: Levels) -> None:
        """Make a candidate the parent of those to come; nothing is computed before one of them is asked for."""
        self._wanted = levels

    @torch.inference_mode()
    def __call__(self, levels: Levels, stage: int, /) -> float:
        """Mean KL(dense || candidate) in nats a token on the batches of a stage; NaN where the candidate gives NaN."""
        self._follow()
        self.set(levels)
        border = self._border(levels)
        total, n = 0.0, 0
        for i in range(self._stages[stage]):
            found = self._run(i, border, keep=False)
            total += float(_divergence(self._log_probs[i], found))
            n += len(found)
        return max(total / n, 0.0) if math.isfinite(total) else math.nan

    def set(self, levels: Levels) -> None:
        """Put the model at these levels."""
        for block, places in enumerate(self._places):
            here = tuple(levels[i] for i in places)
            if here != tuple(self._at[i] for i in places):
                self._install(block, here)
        self._at = levels

    def _follow(self) -> None:
        """Keep what the blocks of the wanted parent read."""
        if self._wanted == self._parent:
            return
        self.set(self._wanted)
        border = self._border(self._wanted)
        for i in range(len(self._batches) if self.borders else 0):
            self._run(i, border, keep=True, head=False)
        self._parent = self._wanted

    def _border(self, levels: Levels) -> int:
        """The last border up to which a candidate reads what the parent reads; 0 for none."""
        first = len(self._blocks)
        for block, places in enumerate(self._places):
            if any(levels[i] != self._parent[i] for i in places):
                first = block
                break
        return max((border for border in self.borders if border <= first), default=0)

    @torch.inference_mode()
    def _run(self, i: int, border: int, *, keep: bool, head: bool = True) -> Tensor:
        """Log-probabilities [n, vocab], float32, of a batch, whose blocks run from a border on; the states at later
        borders are kept if asked for.
        """
        batch = self._batches[i]
        with self._from(border, self._states[i], keep):
            if not head:
                self._model.base_model(**batch.given, use_cache=False)
                return torch.empty(0)
            with _head_at(self._model, batch):
                logits: Tensor = self._model(**batch.given, use_cache=False).logits
        read = logits[0] if logits.dim() == 3 and logits.shape[0] == 1 else logits
        return read.float().log_softmax(-1)

    @contextmanager
    def _from(self, border: int, states: dict[int, Tensor], keep: bool) -> Iterator[None]:
        """Within the context blocks before the border hand on what they are given, and the last of them the state that
        was kept there.
        """

        def handing_on(layer: int) -> Callable[..., Any]:
            def forward(*arguments: Any, **named: Any) -> Any:
                given: Tensor = states[border] if layer == border - 1 else _hidden(arguments, named)
                return (given,) if self._tuples[layer] else given

            return forward

        def reading(layer: int) -> Callable[..., None]:
            def hook(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
                states[layer] = _hidden(arguments, named)

            return hook

        def written(layer: int) -> Callable[..., None]:
            def hook(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
                self._tuples[layer] = isinstance(output, tuple)

            return hook

        handles: list[torch.utils.hooks.RemovableHandle] = []
        try:
            for layer, block in enumerate(self._blocks):
                if layer < border:
                    block.forward = handing_on(layer)  # on the instance, before the class's own
                elif keep:
                    handles.append(block.register_forward_hook(written(layer)))
                    if layer > border and layer in self.borders:
                        handles.append(block.register_forward_pre_hook(reading(layer), with_kwargs=True))
            yield
        finally:
            for handle in handles:
                handle.remove()
            for block in self._blocks[:border]:
                block.__dict__.pop("forward", None)


@contextmanager
def candidate_divergence(
    model: PreTrainedModel,
    blocks: nn.ModuleList,
    at: Sequence[int],
    install: Install,
    dense: Levels,
    batches: Sequence[Mapping[str, Tensor]],
    stages: Sequence[int],
    max_bytes: int = MAX_BYTES,
) -> Iterator[CandidateDivergence]:
    """A `CandidateDivergence`; at the end of the context the model is dense again, and in its mode.

    Raises:
        DataError: a stage wants more batches than there are, or `max_bytes` has no room for one token of each.
        NumericError: the dense model's predictions are NaN.
    """
    was_training = model.training
    model.eval()
    fitness = CandidateDivergence(model, blocks, at, install, dense, batches, stages, max_bytes)
    try:
        yield fitness
    finally:
        fitness.set(dense)
        model.train(was_training)


def _hidden(arguments: tuple[Any, ...], named: Mapping[str, Any]) -> Tensor:
    """The states that a block is called with."""
    return arguments[0] if arguments else named["hidden_states"]


def _placed(model: PreTrainedModel, batches: Sequence[Mapping[str, Tensor]], max_bytes: int) -> list[_Batch]:
    """Batches on the model's device, with the tokens that are compared: as many as log-probabilities fit, evenly
    spaced.
    """
    real = [batch["attention_mask"].nonzero() for batch in batches]
    wide = 4 * int(model.config.vocab_size)
    share = min(1.0, max_bytes / wide / sum(map(len, real)))
    placed: list[_Batch] = []
    for batch, there in zip(batches, real, strict=True):
        n = int(len(there) * share)
        if not n:
            raise DataError(
                f"max_bytes={2 * max_bytes} holds no token of a batch of {len(there)} with a vocabulary of"
                f" {model.config.vocab_size}; give more room, or fewer and larger batches"
            )
        chosen = there[torch.arange(n) * len(there) // n]
        given = {name: value.to(model.device) for name, value in batch.items() if name != "labels"}
        placed.append(_Batch(given, chosen[:, 0].to(model.device), chosen[:, 1].to(model.device)))
    return placed


@contextmanager
def _head_at(model: PreTrainedModel, batch: _Batch) -> Iterator[None]:
    """Within the context the head reads the compared tokens alone, as one row; models without one are left alone."""
    head = model.get_output_embeddings()
    if head is None:
        yield
        return

    def gather(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return (inputs[0][batch.rows, batch.columns].unsqueeze(0), *inputs[1:])

    handle = head.register_forward_pre_hook(gather)
    try:
        yield
    finally:
        handle.remove()


def _divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Sum over rows of KL(P || Q) [], float64, from log-probabilities [n, vocab], float32."""
    total = torch.zeros((), dtype=torch.float64, device=log_q.device)
    size = rows_at_once(log_q.shape[1])
    for p, q in zip(log_p.split(size), log_q.split(size), strict=True):
        total += functional.kl_div(q, p, log_target=True, reduction="none").sum(-1, dtype=torch.float64).sum()
    return total
