"""A tiny LLaMA with LoRA and hard-concrete gates on its FFN channels, as a training objective; run as a script, one
training process.

The gates' mathematics is written out here (Louizos et al., arXiv 1712.01312), so that these tests depend on the loop
alone. Updates before GATES_FROM train LoRA only.
"""

import argparse
import contextlib
import copy
import os
import signal
import sys
import warnings
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from accelerate.utils import patch_environment
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM

from compresso.errors import Interrupted
from compresso.training import launch
from compresso.training.checkpoint import TrainingCheckpoints
from compresso.training.fit import fit
from compresso.training.groups import Group
from compresso.training.history import History
from compresso.training.noise import gate_noise
from compresso.training.order import Micro, ShuffledBatches
from compresso.training.progress import Progress
from compresso.training.shards import Shards
from compresso.training.state import trained

LAYERS, CHANNELS, GATES_FROM, SEED = 2, 24, 2, 7


class Gated(nn.Module):
    def __init__(self, noise: str = "batch", dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=CHANNELS,
            num_hidden_layers=LAYERS,
            num_attention_heads=2,
            max_position_embeddings=32,
        )
        lora = LoraConfig(r=2, lora_alpha=2, target_modules=["q_proj", "v_proj"], lora_dropout=dropout)
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning
            )  # PEFT's call
            self.model = get_peft_model(LlamaForCausalLM(config), lora)
        self.log_alpha = nn.Parameter(torch.full((LAYERS, CHANNELS), 2.0))
        self.lambdas = nn.Parameter(torch.zeros(2))
        self.noise = noise

    def forward(self, batch: dict[str, Tensor], micro: Micro) -> dict[str, Tensor]:
        gating = micro.update >= GATES_FROM
        with contextlib.ExitStack() as hooks:
            if gating:
                rows = micro.rows if self.noise == "example" else None
                u = gate_noise(SEED, micro.update, LAYERS * CHANNELS, rows, self.log_alpha.device).reshape(
                    -1, LAYERS, CHANNELS
                )
                z = (torch.sigmoid((u.logit() + self.log_alpha) * 1.5) * 1.2 - 0.1).clamp(0, 1)
                for i, layer in enumerate(self.model.get_base_model().model.layers):
                    hook = layer.mlp.down_proj.register_forward_pre_hook(lambda m, x, z=z[:, i, None]: (x[0] * z,))
                    hooks.callback(hook.remove)
            loss = self.model(input_ids=batch["input_ids"], labels=batch["labels"]).loss
        sparsity = 1 - torch.sigmoid(self.log_alpha + 1.598597).mean()
        if gating:
            off = sparsity - 0.3
            loss = loss + self.lambdas[0] * off + self.lambdas[1] * off.square()
        return {"loss": loss, "sparsity": sparsity}

    def groups(self) -> list[Group]:
        lora = [p for name, p in self.model.named_parameters() if p.requires_grad]
        return [
            Group("lora", lora, lr=1e-2, schedule=lambda update: 1 - update / 20, clip=1.0),
            Group("gates", [self.log_alpha], lr=0.1),
            Group("lambdas", [self.lambdas], lr=0.1, ascend=True),
        ]

    def shards(self) -> Shards:
        return Shards(self.model, list(self.model.get_base_model().model.layers))

    @torch.no_grad()
    def clamp_(self) -> None:
        self.log_alpha.clamp_(-4.60517, 4.60517)


def batches(global_batch: int = 4) -> ShuffledBatches:
    ids = torch.randint(32, (11, 8), generator=torch.Generator().manual_seed(3))

    def collate(rows: list[Tensor]) -> dict[str, Tensor]:
        return {"input_ids": torch.stack(rows), "labels": torch.stack(rows)}

    return ShuffledBatches(list(ids), global_batch, collate, SEED)


def train(
    objective: Gated,
    steps: int,
    *,
    accumulation: int = 1,
    folder: Path | None = None,
    save_every: int = 2,
    event: str = "",
    at: int = -1,
    **how: object,
) -> History:
    """Train; at update `at`, after its step: raise, kill this process, or send it SIGTERM."""

    def after_update(update: int) -> dict[str, float]:
        objective.clamp_()
        if "shards" in how:
            learning, alone = objective.model.parameters(), objective.log_alpha
            assert all(isinstance(one, DTensor) for one in learning) and not isinstance(alone, DTensor)
        if update == at and event == "raise":
            raise RuntimeError("stopped by the test")
        if update == at and event:
            os.kill(os.getpid(), {"kill": signal.SIGKILL, "term": signal.SIGTERM, "int": signal.SIGINT}[event])
        return {"kept": float(update)}

    checkpoints = TrainingCheckpoints(folder, {"model": "tiny"}) if folder else None
    settings = {"seed": SEED, "accumulation": accumulation, "save_every": save_every, "device": "cpu"} | how
    return fit(
        objective, objective.groups(), batches(), steps, after_update=after_update, checkpoints=checkpoints, **settings
    )


def sharded() -> AbstractContextManager[None]:
    """The environment of `accelerate launch --use_fsdp --fsdp_version 2`."""
    return patch_environment(ACCELERATE_USE_FSDP="true", FSDP_VERSION="2")


def main() -> None:
    """Train once for each run asked and write what was learned to <out>.<run>.safetensors.

    Runs: "batch" and "example" (noise); "sharded", which is stopped by a SIGTERM and continued with a new model, and
    comes last.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("runs", nargs="+", choices=["batch", "example", "sharded"])
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--do", default="")
    parser.add_argument("--at", type=int, default=-1)
    asked = parser.parse_args()
    for run in asked.runs:
        folder = Path(str(asked.folder).format(run=run)) if asked.folder else None
        objective = Gated("example" if run == "example" else "batch", asked.dropout)
        before = {name: id(one) for name, one in objective.named_parameters()}
        with sharded() if run == "sharded" else contextlib.nullcontext():
            how = {"shards": objective.shards()} if run == "sharded" else {}
            if run == "sharded":
                try:
                    train(objective, 8, folder=folder, event="term", at=4, **how)
                except Interrupted as stop:
                    print(stop, file=sys.stderr)
                stopped = {name: id(one) for name, one in objective.named_parameters()}
                assert stopped == before and not any(one.numel() == 0 for one in objective.parameters())
                train(objective, 2, **how)  # what was spread can be spread again
                objective = Gated("batch", asked.dropout)
                before = {name: id(one) for name, one in objective.named_parameters()}
                how = {"shards": objective.shards()}
            show = Progress("lines", 0.0)
            history = train(objective, 8, folder=folder, event=asked.do, at=asked.at, progress=show, **how)
        assert before == {name: id(one) for name, one in objective.named_parameters()}
        assert not any(isinstance(one, DTensor | FSDPModule) for one in [*objective.parameters(), *objective.modules()])
        copy.deepcopy(objective)  # which FSDP forbids
        tensors = trained(objective)
        if int(os.environ.get("RANK", "0")) == 0:
            save_file(tensors | history.to_tensors(), f"{asked.out}.{run}.safetensors")
    if launch.processes() > 1:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
