"""Methods of other packages, as selectors for `repair.py` and `flagship.py`; nothing here is needed to use compresso.

Torch-Pruning (`pip install torch-pruning==1.6.1 --no-deps`): its dependency graph and its first-order Taylor importance
(`GroupTaylorImportance`), used as its own example for language models does: hidden dimensions and FFN channels by one
share, the same in every layer; or FFN channels alone. Heads stay: its pruner takes whole query heads, which key/value
heads shared by three of them do not survive. The share is found by halving until so many block parameters stay.
"""

import copy
import importlib
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

HALVINGS = 6
BATCHES, BATCH = 8, 4


def torch_pruning(
    model: PreTrainedModel, rows: Sequence[dict[str, Any]], keep: float, *, hidden: bool
) -> tuple[PreTrainedModel, float]:
    """The model with about `keep` of its block parameters, and the share that it really kept.

    Raises ModuleNotFoundError without the package.
    """
    graph = importlib.import_module("torch_pruning")
    dense = _blocks(model)
    gradients = _gradients(model, rows)
    low, high = 0.0, 1.0 if not hidden else 1 - keep
    best: tuple[PreTrainedModel, float] | None = None
    for _ in range(HALVINGS):
        share = (low + high) / 2
        smaller = copy.deepcopy(model).requires_grad_(True)
        smaller.config.use_cache = False
        for name, parameter in smaller.named_parameters():
            parameter.grad = gradients[name].clone()
        stays = ("q_proj", "k_proj", "v_proj") if hidden else ("q_proj", "k_proj", "v_proj", "o_proj", "down_proj")
        ignored = [module for name, module in smaller.named_modules() if name.endswith(stays)]
        if not hidden:
            ignored.append(smaller.get_input_embeddings())
        pruner = graph.pruner.BasePruner(
            smaller,
            torch.tensor([rows[0]["input_ids"][:16]], device=model.device),
            graph.importance.GroupTaylorImportance(),
            pruning_ratio=share,
            ignored_layers=[smaller.get_output_embeddings(), *ignored],
            round_to=8,
        )
        pruner.step()
        smaller.zero_grad(set_to_none=True)
        kept = _blocks(smaller) / dense
        if best is None or abs(kept - keep) < abs(best[1] - keep):
            best = smaller, kept
        low, high = (share, high) if kept > keep else (low, share)
    assert best is not None
    return best


def _gradients(model: PreTrainedModel, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """The mean gradient of the next-token loss over the calibration rows."""
    own = copy.deepcopy(model).requires_grad_(True)
    used = rows[: BATCHES * BATCH]
    for row in used:
        ids = torch.tensor([row["input_ids"]], device=own.device)
        (own(input_ids=ids, labels=ids).loss / len(used)).backward()
    return {name: p.grad if p.grad is not None else torch.zeros_like(p) for name, p in own.named_parameters()}


def _blocks(model: PreTrainedModel) -> int:
    return sum(p.numel() for name, p in model.named_parameters() if ".layers." in name)
