"""Mini-GPTs as published: weights that a domain's text does not use become 0 by absolute thresholds, the rest is tuned
(arXiv 2312.12682).

Means of absolute activations are taken in one pass over the dense model, for all linear layers. Then
linear      a column whose input, and a row whose output (or output without the bias) lies at or below a threshold,
            becomes 0
activation  so does a row and its bias whose activation function gives no more than a threshold
embedding   so do the embedding and head rows of tokens whose share of the text is at or below a threshold
tuning      all weights learn the domain's text with AdamW; gradients of zeroed weights are masked, so that they stay 0

Nothing gets smaller: `contextual` and `cut_vocab` remove for good.

Departures, most of them bugs of the public code (tval2/contextual-pruning) that are not repeated: Calibration reads
    whole batches (there: the first example of each for activations) and training examples only; perplexity is measured
    on held-out ones (there: on the 40 calibration windows). Activation functions of any kind are found by the tensor
    they are given (there: ReLU and one GELU, by the names of Phi-1.5). Layers without a bias are pruned too (there: a
    crash), a threshold of 0 takes what is exactly 0 (there: the rule is skipped), and null turns a rule off (there: -1,
    for embeddings alone). Tuning sees all training examples for a number of updates (there: one sequence of 512 tokens,
    up to 200 epochs or until the perplexity is that of the dense model). Norm weights that are 0 are not masked. A head
    tied to the embedding is left out of the linear rule, which would zero the embedding with it. The share of zeros is
    recorded as what it is, not as a size.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, cast

import torch
from annotated_types import Ge
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from compresso.arch.base import Arch
from compresso.core.context import Uses, used
from compresso.core.row import Row
from compresso.data.windows import check_window
from compresso.edit.precision import cast_
from compresso.edit.token_ids import token_ids
from compresso.job import Job
from compresso.observe.linear_uses import linear_uses
from compresso.solve.tokens import shares
from compresso.stage import AdamW, Effects, Knobs, Learning, Passes, Trains, stage
from compresso.stage.tuning import group_of, tune
from compresso.training.history import curve
from compresso.training.objectives import LossObjective

Masks = dict[str, Tensor]
"""Parameter name -> entries that stay, bool."""


@stage(
    "contextual_thresholds",
    title="zeroes weights that the text of a domain does not use, then tunes the rest",
    paper="2312.12682",
    effects=Effects.WEIGHTS,
    needs=("data", "gradients", "training"),
    when=(
        "To repeat the paper, or to see how little of a model a domain uses. Zeros are stored dense: no size and no"
        " speed is gained."
    ),
    failures=(
        "One threshold means another thing in every layer, since activations grow with depth; too high a one silences"
        " early layers."
    ),
)
class ContextualThresholds:
    """Knobs of the published procedure.

    Args:
        linear: threshold on mean absolute inputs and outputs of linear layers; null for none.
        activation: threshold on the mean absolute output of activation functions; null for none.
        embedding: threshold on a token's share of the text; null for none.
        windows: training examples that are read to decide, the first ones.
        trains, adamw: see `Trains` and `AdamW`.
        weight_decay: AdamW's; zeroed weights stay 0.
    """

    linear: Annotated[float, Ge(0)] | None = 1e-3
    activation: Annotated[float, Ge(0)] | None = 1e-3
    embedding: Annotated[float, Ge(0)] | None = None
    windows: Annotated[int, Ge(1)] = 40
    trains: Annotated[Trains, Knobs(without=("checkpointing", "save_adapter"))] = Trains(steps=200, micro_batch=4)
    adamw: Annotated[AdamW, Knobs(without=("lr_at_hidden",))] = AdamW(lr=5e-5, clip=None)
    weight_decay: Annotated[float, Ge(0)] = 0.01

    def check_data(
        self,
        rows: Sequence[Row],
        tokenizer: PreTrainedTokenizerBase | None,
        config: PreTrainedConfig,
        window: int | None,
    ) -> None:
        """Raises DataError for plain text of less than a window."""
        check_window(rows, window)

    def learning(self) -> Learning:
        """All weights."""
        return Learning(self.trains, [self.trains.steps], None)

    def work(self, model: PreTrainedModel, arch: Arch) -> Sequence[Passes]:
        """One pass over the windows, then the tuning."""
        return [Passes("calibration", self.windows), *self.learning().passes()]

    def __call__(self, job: Job) -> Job:
        """Read the text, zero, tune."""
        (total,) = self.trains.updates(len(job.rows))
        rows, at_once = job.rows[: self.windows], self.trains.micro_batch
        parts = [rows[start : start + at_once] for start in range(0, len(rows), at_once)]
        stored = job.model.dtype
        how = job.observing("uses", job.same("contextual_thresholds", self))
        uses = linear_uses(job.model, map(job.collated, parts), how)
        masks = linear_masks(job.model, uses, self.linear, self.activation)
        if self.embedding is not None:
            special = set(job.tokenizer.all_special_ids if job.tokenizer else ()) | token_ids(job.model) | {job.pad_id}
            share = shares((row["input_ids"] for row in rows), int(job.model.config.vocab_size))
            masks = with_tokens_zeroed(
                job.model, masks, (share > self.embedding).index_fill(0, torch.tensor(sorted(special)), True)
            )
        model = cast(PreTrainedModel, cast_(cast(nn.Module, job.model), torch.float32)).requires_grad_(True)
        zero_(model, masks)
        named = dict(model.named_parameters())
        handles = [named[name].register_hook(_masked(stays.to(job.device))) for name, stays in masks.items()]
        learning = group_of("all", model, self.adamw, model.config.hidden_size, total, self.weight_decay)
        try:
            history = tune(
                job, "contextual_thresholds", self.trains, LossObjective(model, job.task.loss), [learning], total
            )
        finally:
            for handle in handles:
                handle.remove()
        model = cast(PreTrainedModel, cast_(cast(nn.Module, model), stored)).requires_grad_(False)
        zeroed = {name: int((~stays).sum()) for name, stays in masks.items() if not bool(stays.all())}
        n = sum(parameter.numel() for parameter in model.parameters())
        facts = {
            "updates": total,
            "lr": learning.lr,
            "zeroed": sum(zeroed.values()) / n,
            "zeroed_tensors": zeroed,
            "curve": curve(history),
        }
        return replace(job, model=model).note("contextual_thresholds", **facts)


def linear_masks(
    model: PreTrainedModel, uses: Mapping[str, Uses], linear: float | None, activation: float | None
) -> Masks:
    """What the linear and the activation rule leave of every linear layer's weight and bias."""
    masks: Masks = {}
    embedding = model.get_input_embeddings()
    for name, shown in uses.items():
        module = model.get_submodule(name)
        if module.weight is embedding.weight:
            continue
        stays = used(shown, linear, activation)
        masks[f"{name}.weight"] = stays.weight()
        if module.bias is not None:
            masks[f"{name}.bias"] = stays.bias
    return masks


def with_tokens_zeroed(model: PreTrainedModel, masks: Masks, stays: Tensor) -> Masks:
    """The masks with the embedding and head rows of tokens that do not stay; stays: [vocab], bool."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    found = dict(masks)
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        weight = cast(nn.Embedding | nn.Linear, module).weight
        name = names[weight]
        found[name] = found.get(name, torch.ones(weight.shape, dtype=torch.bool)) & stays.unsqueeze(1)
    return found


@torch.no_grad()
def zero_(model: PreTrainedModel, masks: Mapping[str, Tensor]) -> None:
    """Set the entries that do not stay to 0."""
    for name, stays in masks.items():
        parameter = model.get_parameter(name)
        parameter *= stays.to(parameter.device)


def _masked(stays: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda gradient: gradient * stays
