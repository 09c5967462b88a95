"""The training steps that `training.py` times, at the shapes it times them at, and the arithmetic each has to do.

LoRA is peft alone, as its documentation writes it; everything else is our loop (`training/fit.py`) with the objective
of the stage that is meant. A run of hundreds of updates begins once, so what `fit` does before its first update is not
timed: the clock starts behind it.
"""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from compresso.core.buckets import strongest
from compresso.core.loss import NEXT_TOKEN, TrainingLoss
from compresso.edit.lora import attach_
from compresso.training.cached_objective import LOG_PROBS, OUTCOMES, CachedObjective
from compresso.training.distill_objective import DistillObjective
from compresso.training.fit import fit
from compresso.training.groups import Group
from compresso.training.halves import Network, next_tokens
from compresso.training.logit_losses import logit_losses
from compresso.training.objectives import LossObjective
from compresso.training.progress import Progress
from steps import RANK, TARGETS, OneBatch, batch, masked_steps, plain_step

Timed = Callable[[int], float]
"""So many steps, behind one that is not timed -> the mean seconds of one; with none, warms up."""
KEPT_OUTCOMES = 64
CHUNK = 512
"""Tokens whose logits exist at a time in the fused loss, as the stages have it."""


@dataclass(frozen=True)
class Shape:
    """A LLaMA's sizes; the heads have hidden / heads dimensions."""

    layers: int
    hidden: int
    heads: int
    kv: int
    ffn: int
    vocab: int
    tied: bool

    def model(self, device: torch.device, dtype: torch.dtype) -> LlamaForCausalLM:
        """One with random weights."""
        config = LlamaConfig(
            hidden_size=self.hidden,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv,
            intermediate_size=self.ffn,
            vocab_size=self.vocab,
            tie_word_embeddings=self.tied,
            max_position_embeddings=4096,
        )
        torch.manual_seed(0)
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with torch.device(device):
                return LlamaForCausalLM(config).eval()
        finally:
            torch.set_default_dtype(before)

    def matrices(self) -> int:
        """Entries of all matrices that a token is multiplied by, the head included and the embedding not."""
        return self.layers * (self._reads() + self.hidden * self.hidden + 3 * self.hidden * self.ffn) + (
            self.hidden * self.vocab
        )

    def _reads(self) -> int:
        """Entries of q, k and v of one layer."""
        return self.hidden * (self.hidden + 2 * self.kv * self.hidden // self.heads)

    def flops(self, kind: str, length: int) -> float:
        """Floating-point operations that a step of a kind owes each token, recomputation not counted.

        A matrix of N entries takes 2 N forward and 2 N for the gradient of its input; of its weight, 2 N more, which
        only adapters have here. q, k and v of the first layer read what nothing learns before, unless hidden
        dimensions have gates, and owe no gradient of their input. Attention is causal: scores and their product with
        the values are 2 x 2 x width for each of (length + 1) / 2 keys on average, and twice that backward. A teacher
        in memory owes its forward. Norms, masks, rotations and the optimizer are not counted.
        """
        forward = 2.0 * self.matrices() + self.layers * 2.0 * (length + 1) * self.hidden
        backward = 2.0 * self.matrices() + 2 * self.layers * 2.0 * (length + 1) * self.hidden
        if kind != "mask":
            backward -= 2.0 * self._reads()
        outputs = {"q_proj": self.hidden, "v_proj": self.kv * self.hidden // self.heads}
        adapters = self.layers * sum(RANK * (self.hidden + outputs[name]) for name in TARGETS)
        return forward + backward + 6.0 * adapters + (forward if kind == "distil, live" else 0.0)


SHAPES = {
    "7B": Shape(layers=32, hidden=4096, heads=32, kv=32, ffn=11008, vocab=32000, tied=False),
    "135M": Shape(layers=30, hidden=576, heads=9, kv=3, ffn=1536, vocab=49152, tied=True),
}


def synchronize(device: torch.device) -> None:
    """Wait for what a device was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def clock(device: torch.device) -> float:
    """Seconds, the device's work included; of a CPU this process' own, since others share it."""
    synchronize(device)
    return time.perf_counter() if device.type == "cuda" else time.process_time()


def matrix_rate(device: torch.device) -> dict[str, object]:
    """The best rate of a product of two square matrices of random numbers, in operations a second."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    best, at = 0.0, 0
    for size in (4096, 8192) if device.type == "cuda" else (1024, 2048):
        a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        times = 10 if device.type == "cuda" else 2
        for attempt in range(4):
            started = clock(device)
            for _ in range(times):
                a @ b
            rate = 2 * size**3 * times / (clock(device) - started)
            if attempt and rate > best:  # the first warms up
                best, at = rate, size
    return {"flops": best, "dtype": str(dtype).removeprefix("torch."), "size": at}


class FusedLoss:
    """The loss of next tokens, whose logits exist for CHUNK tokens at a time."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._halves = Network(model)

    def __call__(self, model: Callable[..., object], batch: Mapping[str, Tensor], /) -> Tensor:
        """The loss [] of the model that was given first, which lies in what is called here."""
        at = next_tokens(batch, "labelled")
        last, _ = self._halves.read(batch)
        targets = at.targets[at.places]
        return logit_losses(self._halves, None, last[at.places], None, targets, hard=1.0, kl=0.0, chunk=CHUNK)[0]


class _Everything:
    """One batch with what a teacher said of it, which does not go by examples."""

    def __init__(self, rows: dict[str, Tensor]) -> None:
        self._rows = rows
        self.global_batch = len(rows["input_ids"])

    def at(self, update: int, rows: range) -> dict[str, Tensor]:
        """All of it."""
        return dict(self._rows)


class Bench:
    """Models of one shape, and the steps that train them; a model is built where it is first needed, and stays."""

    def __init__(self, shape: Shape, rows: int, length: int, device: torch.device) -> None:
        """rows, length: of the batch."""
        self.shape, self.device, self.bf16 = shape, device, device.type == "cuda"
        self.rows = batch(rows, length, vocab=shape.vocab)  # on the CPU, where batches come from
        self._models: dict[str, LlamaForCausalLM] = {}
        self._adapted: PeftModel | None = None

    def model(self, name: str) -> LlamaForCausalLM:
        """The model of this name; adapters and hooks are its own."""
        if name not in self._models:
            self._models[name] = self.shape.model(self.device, torch.bfloat16 if self.bf16 else torch.float32)
        return self._models[name]

    def trained(self, kind: str) -> LlamaForCausalLM:
        """The model that a kind of step trains; those of our loop without masks share one, and its adapters."""
        return self.model(kind if kind in ("LoRA", "mask") else "student")

    def lora(self) -> Timed:
        """peft alone."""
        model = self.model("LoRA")
        there = {name: value.to(self.device) for name, value in self.rows.items()}
        one = plain_step(model, there, bf16=self.bf16)

        def timed(n: int) -> float:
            one()
            started = clock(self.device)
            for _ in range(n):
                one()
            return (clock(self.device) - started) / max(n, 1)

        return timed

    def mask(self) -> Timed:
        """Gates on heads, channels and hidden dimensions, noise for each example, projection after each update."""
        model = self.model("mask")
        watch = _Watch(self.device)
        run = masked_steps(model, self.rows, bf16=self.bf16, each=watch)
        return watch.timing(run)

    def looped(self, kind: str) -> Timed:
        """Adapters alone in our loop: "LoRA, our loop", "LoRA, fused loss", "distil, live" or "distil, cached"."""
        model = self.trained(kind)
        if self._adapted is None:
            self._adapted = attach_(model, RANK, float(RANK), TARGETS)
        adapted = self._adapted
        student, rows = Network(model), dict(self.rows)
        objective: nn.Module
        if kind == "distil, live":
            teacher = self.model("teacher").requires_grad_(False)
            objective = DistillObjective(adapted, student, Network(teacher))
        elif kind == "distil, cached":
            rows |= self._taught(self.model("teacher"))
            objective = CachedObjective(adapted, student)
        else:
            loss: TrainingLoss = FusedLoss(model) if kind == "LoRA, fused loss" else NEXT_TOKEN
            objective = LossObjective(adapted, loss)
        groups = [Group("lora", [p for p in adapted.parameters() if p.requires_grad], 5e-5)]
        batches = _Everything(rows) if kind == "distil, cached" else OneBatch(rows)
        watch = _Watch(self.device)

        def run(updates: int) -> None:
            fit(
                objective,
                groups,
                batches,
                updates,
                seed=0,
                precision="bf16" if self.bf16 else "no",
                device=self.device,
                after_update=watch,
                progress=Progress("silent"),
            )

        return watch.timing(run)

    @torch.no_grad()
    def _taught(self, model: PreTrainedModel) -> dict[str, Tensor]:
        """What a model says of the batch, as a store of a teacher holds it."""
        halves = Network(model)
        there = {name: value.to(self.device) for name, value in self.rows.items()}
        places = next_tokens(there, "labelled").places
        pieces: Iterable[Tensor] = halves.read(there)[0][places].split(CHUNK)
        found = [strongest(halves.logits(piece).float(), KEPT_OUTCOMES) for piece in pieces]
        outcomes, log_probs = (torch.cat([pair[i] for pair in found]).cpu() for i in (0, 1))
        return {OUTCOMES: outcomes.to(torch.int32), LOG_PROBS: log_probs}


class _Watch:
    """Called after each update: starts the clock behind the first, and reads it behind the last."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._last = device, 0
        self._begin = self._end = 0.0

    def __call__(self, update: int) -> dict[str, float]:
        """Nothing to log."""
        if update == 0:
            self._begin = clock(self._device)
        if update == self._last:
            self._end = clock(self._device)
        return {}

    def timing(self, run: Callable[[int], None]) -> Timed:
        """One update to begin with, and the mean seconds of those behind it."""

        def timed(n: int) -> float:
            self._last = n
            run(n + 1)
            return (self._end - self._begin) / max(n, 1)

        return timed


def fuse_norms_(model: nn.Module, on: bool) -> None:
    """Have every RMSNorm of a model computed by torch's own kernel, which rounds once where the eager one rounds
    twice; or no longer.
    """
    for module in model.modules():
        if type(module).__name__ == "LlamaRMSNorm":
            if on:
                module.forward = _fused(module)
            else:
                vars(module).pop("forward", None)


def _fused(norm: nn.Module) -> Callable[[Tensor], Tensor]:
    weight, eps = norm.get_parameter("weight"), float(getattr(norm, "variance_epsilon"))  # noqa: B009

    def normed(x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):  # which may widen what it is given
            return functional.rms_norm(x, (x.shape[-1],), weight, eps)

    return normed


def compile_blocks_(model: LlamaForCausalLM, on: bool) -> None:
    """Have every block compiled where it is called next, or called as it is."""
    for block in model.model.layers:
        if on:
            block.compile()
        else:
            block._compiled_call_impl = None
