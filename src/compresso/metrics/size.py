"""How large a model is: parameters by group, bytes on disk, multiply-accumulates and cache bytes a token.

All but the bytes on disk follow from the shapes alone, through the same `CostModel` that budgets are counted with. Of a
model whose architecture nobody described only the total is known; the other counts are then omitted, never zero.
"""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from compresso.arch.base import arch_for
from compresso.arch.context import macs_of
from compresso.checkpoint.folder import stored_tensors
from compresso.core.cost import CostModel
from compresso.edit.stock import as_stock
from compresso.errors import ArchError
from compresso.metrics.record import Environment, Measurement, Protocol
from compresso.native import stock_type

KV_BYTES = 2
"""Bytes of a key/value cache entry: bfloat16 or float16, as served."""
_TIED: Protocol = {"tied": "counted once"}
_MACS: Protocol = {"matrices": "all linears, and the head over the whole vocabulary", "attention_scores": "left out"}
_CACHE: Protocol = {"element_bytes": KV_BYTES}


def counts(cost: CostModel, masks: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Parameters, multiply-accumulates and cache bytes a token of the dense model or under 0/1 masks, as `compresso
    inspect` gives them; of a mixture of experts the parameters that a token meets, too.
    """
    counted = cost(masks)
    active = {"active_parameters_per_token": round(float(counted.active))} if cost.routes else {}
    return {
        "parameters": counted.parameters(),
        "macs_per_token": round(float(counted.macs)),
        "kv_bytes_per_token": round(float(counted.cached)) * KV_BYTES,
        **active,
    }


def weight_bytes(folder: Path) -> int:
    """Bytes of the weight files that loading a checkpoint reads.

    Raises:
        CheckpointError: there are none.
    """
    return sum((folder / name).stat().st_size for name in {tensor.file for tensor in stored_tensors(folder).values()})


def size_measurements(
    model: PreTrainedModel | Mapping[str, Any], folder: Path | None, environment: Environment
) -> tuple[Measurement, ...]:
    """What a model weighs.

    Args:
        model: a live model, or its counts as `counts` and `records.json` hold them.
        folder: its checkpoint; None leaves "bytes/disk" out.
        environment: where this is done.

    Returns:
        "parameters/total", "parameters/blocks", "parameters/embeddings", "parameters/norms" (parameters), "macs/token",
        "macs/picture" or "macs/patch" (macs), "kv_bytes/token" (bytes), all counted, and "bytes/disk" (bytes,
        measured). Without a described architecture only the total and the bytes on disk; the total's remark says so.

    Raises:
        ArchError: a described architecture, but modules that are not what its config says.
        CheckpointError: the folder holds no weights.
    """
    facts, remark = model, None
    if isinstance(facts, PreTrainedModel):
        facts, remark = _counted(facts)
    found = [
        Measurement(
            name=f"parameters/{group}",
            value=number,
            unit="parameters",
            how="counted",
            protocol=_TIED,
            environment=environment,
            remark=remark if group == "total" else None,
        )
        for group, number in facts["parameters"].items()
    ]
    for key, name, unit, protocol in (
        ("macs_per_token", f"macs/{facts.get('macs_of', 'token')}", "macs", _MACS),
        ("kv_bytes_per_token", "kv_bytes/token", "bytes", _CACHE),
    ):
        if key in facts:
            found.append(
                Measurement(
                    name=name, value=facts[key], unit=unit, how="counted", protocol=protocol, environment=environment
                )
            )
    if folder is not None:
        found.append(
            Measurement(
                name="bytes/disk",
                value=weight_bytes(folder),
                unit="bytes",
                how="measured",
                protocol={"files": "safetensors that loading reads"},
                environment=environment,
            )
        )
    return tuple(found)


def _counted(model: PreTrainedModel) -> tuple[Mapping[str, Any], str | None]:
    """The counts of a live model, which stays as it is, and what a reader must know about them."""
    stock = _shapes_as_stock(model)
    try:
        arch = arch_for(stock.config)
    except ArchError:  # nobody described it: the total needs no description
        remark = f"only the total is counted: no architecture describes model_type '{model.config.model_type}'"
        return {"parameters": {"total": sum(p.numel() for p in model.parameters())}}, remark
    return {**counts(CostModel(arch.axes(stock), arch.weights(stock))), **macs_of(stock)}, None


def _shapes_as_stock(model: PreTrainedModel) -> PreTrainedModel:
    """The model in its family's stock class; a per-layer model is built again without memory, because `as_stock` takes
    modules away.
    """
    if stock_type(model.config.model_type) == model.config.model_type:
        return model
    with torch.device("meta"):
        return as_stock(type(model)(copy.deepcopy(model.config)))
