"""The two training steps that are compared: a plain LoRA step as peft's documentation writes it, and a mask-training
step of ours.
"""

from collections.abc import Callable

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import PreTrainedModel

from compresso.arch.base import arch_for
from compresso.core.cost import CostModel
from compresso.core.gates import Gates
from compresso.core.loss import NEXT_TOKEN
from compresso.edit.lora import attach_
from compresso.edit.recompute import recompute_
from compresso.solve.constraint import ShareOfModel
from compresso.training.fit import fit
from compresso.training.groups import Group
from compresso.training.objectives import GatedObjective
from compresso.training.progress import Progress

Step = Callable[[], None]
RANK, TARGETS = 8, ["q_proj", "v_proj"]


def batch(rows: int, length: int, device: torch.device | str = "cpu", vocab: int = 32000) -> dict[str, Tensor]:
    """The one batch of both: input_ids, attention_mask and labels [rows, length]."""
    ids = torch.randint(1, vocab, (rows, length), generator=torch.Generator().manual_seed(0)).to(device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def plain_step(
    model: PreTrainedModel, rows: dict[str, Tensor], *, bf16: bool = False, checkpointing: bool = False
) -> Step:
    """LoRA by peft alone: the model's own loss and AdamW, under autocast where `bf16`."""
    lora = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=RANK, target_modules=TARGETS, task_type="CAUSAL_LM"))
    if checkpointing:
        recompute_(model, on=True)
    model.train()
    optimizer = torch.optim.AdamW([p for p in lora.parameters() if p.requires_grad], lr=5e-5)

    def step() -> None:
        with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
            loss = lora(**rows, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


class OneBatch:
    """The same batch at every update."""

    def __init__(self, rows: dict[str, Tensor]) -> None:
        """rows: name -> [rows, length]."""
        self._rows = rows
        self.global_batch = len(rows["input_ids"])

    def at(self, update: int, rows: range) -> dict[str, Tensor]:
        """The rows asked for, whatever the update."""
        return {name: value[rows.start : rows.stop] for name, value in self._rows.items()}


def masked_steps(
    model: PreTrainedModel,
    rows: dict[str, Tensor],
    *,
    bf16: bool = False,
    checkpointing: bool = False,
    each: Callable[[int], object] = lambda update: None,
) -> Callable[[int], None]:
    """So many updates of mask training: gates on heads, channels and hidden dimensions, noise per example, projection
    after each, and then `each` with its index. The batch comes from the CPU, as it does in a run.
    """
    arch = arch_for(model.config)
    axes = arch.axes(model)
    cost = CostModel(axes, arch.weights(model))
    chosen = [axis for axis in axes if axis.kind in ("head", "channel", "hidden")]
    gates = Gates(chosen, {axis.name: torch.linspace(-1, 3, axis.size) for axis in chosen}).to(model.device)
    lora = attach_(model, RANK, float(RANK), TARGETS)
    if checkpointing:
        recompute_(model, on=True)
    objective = GatedObjective(
        lora,
        gates,
        ShareOfModel(cost, 0.7),
        loss=NEXT_TOKEN,
        starts=0,
        progress=lambda k: 1.0,
        use_lagrangian=False,
        noise="example",
        seed=0,
    )
    groups = [
        Group("lora", [p for p in lora.parameters() if p.requires_grad], 5e-5),
        Group("gates", objective.gate_parameters(), 0.02),
    ]
    precision = "bf16" if bf16 else "no"
    batches = OneBatch({name: value.cpu() for name, value in rows.items()})

    def after(update: int) -> dict[str, float]:
        objective.clamp_()
        objective.project_(update)
        each(update)
        return {}

    def steps(updates: int) -> None:
        with objective.attached():
            fit(
                objective,
                groups,
                batches,
                updates,
                seed=0,
                precision=precision,
                device=model.device,
                after_update=after,
                progress=Progress("silent"),
            )

    return steps
