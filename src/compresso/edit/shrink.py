"""Removes units for good: the only code that changes a tensor's shape.

Everything follows from the axes, so there is nothing here about any one architecture:

    fold    a soft mask at a linear's input scales the weight's columns, at its output the rows and the bias, at an
            embedding's output the columns. Heads therefore fold into `o_proj` (the same as scaling rows of v, and LoRA
            on q and v is left alone), channels into gate and up before the activation, hidden dimensions into
            everything that writes to the residual stream.
    slice   the entries of kept units.
            A batch norm's statistics are sliced with its weight; a convolution of each channel by itself stays one.
    norms   masked training divides by the original width d, a stock RMSNorm by the kept width d':
            x / sqrt(S/d + eps) = sqrt(d/d') x / sqrt(S/d' + eps d/d'), hence weight *= sqrt(d/d'), eps *= d/d'.
            A LayerNorm computes over kept entries under a mask, too, and stays as it is.
    roots   masked training divides scores by the root of a head's original width: queries *= sqrt(d'/d).

A head tied to the embedding would see the folded hidden mask a second time. The norm that only the head reads is
divided by it instead: exact, without untying and without one parameter more.

The stock model class keeps running afterwards: emptied sub-layers become modules that add nothing, remaining layers are
renumbered without holes in the key/value cache, and the config says what is there. Optimisers built before hold the old
parameters; build new ones.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from compresso.arch.base import Arch, arch_for
from compresso.arch.head_channels import NarrowsHeads
from compresso.core.axis import Axis, Gate, Kind
from compresso.core.plan import Plan
from compresso.edit.token_ids import renumber_
from compresso.errors import ArchError, NumericError

_Factors = dict[tuple[str, int], Tensor]
"""(parameter, dim) -> float64 factors along that dimension, before slicing; [1] where all entries share one."""


@torch.no_grad()
def shrink_(model: PreTrainedModel, axes: Sequence[Axis], plan: Plan, soft: Mapping[str, Tensor] | None = None) -> None:
    """Keep what the plan keeps, with soft masks folded into the weights.

    Afterwards the model computes what `gated` computed with masks that are `soft` (or 1) on kept units and 0 elsewhere.

    Args:
        model: changed in place; on any device, meta included. Parameters that change are new ones of the same dtype and
            device.
        axes: `Arch.axes(model)`; others are not touched.
        plan: kept units. Keeping everything without soft masks changes nothing, bit for bit.
        soft: axis name -> [size], finite and not negative. Values of removed units are ignored.

    Raises:
        ArchError: plan, soft masks or axes do not fit the model, before anything is changed.
        NumericError: folding overflows.
    """
    soft = dict(soft or {})
    _check(model, axes, plan, soft)
    if plan.is_noop(axes) and not soft:
        return
    arch, kept = arch_for(model.config), _losing(axes, plan)
    if not isinstance(arch, NarrowsHeads) and any(a.kind == Kind.HEAD_CHANNEL and a.name in kept for a in axes):
        raise ArchError(f"{arch.name} has no heads that get narrower; leave head_channel out of `kinds`")
    leaving = _leaving(axes, kept)
    selections = _selections(model, axes, kept)
    factors = _factors(model, axes, kept, soft)
    _empty_sub_layers_(model, arch, axes, kept)

    owners: dict[nn.Parameter, list[tuple[nn.Module, str]]] = defaultdict(list)
    for module in model.modules():
        for key, parameter in module.named_parameters(recurse=False):
            owners[parameter].append((module, key))  # a tied parameter has several owners and stays tied
    for name, parameter in list(model.named_parameters()):
        if name in leaving:
            continue
        by_dim = [(selections.get((name, dim)), factors.get((name, dim))) for dim in range(parameter.dim())]
        if any(selection is not None or factor is not None for selection, factor in by_dim):
            new = nn.Parameter(_edited(name, parameter, by_dim), requires_grad=parameter.requires_grad)
            for module, key in owners[parameter]:
                setattr(module, key, new)
                set_features_(module)
                if isinstance(module, nn.BatchNorm2d) and (staying := selections.get((name, 0))) is not None:
                    _keep_statistics_(module, staying)
    buffers = dict(model.named_buffers())
    for axis in axes:
        for name in axis.buffers if axis.name in kept else ():
            if name in buffers:  # and not of a sub-layer that left
                owner, _, own = name.rpartition(".")
                left = buffers[name].index_select(0, torch.tensor(kept[axis.name], device=buffers[name].device))
                model.get_submodule(owner)._buffers[own] = left
    for axis in axes:
        if axis.name in kept:
            for norm in (model.get_submodule(norm) for norm in axis.norms if f"{norm}.weight" not in leaving):
                norm.variance_epsilon = float(norm.variance_epsilon) * axis.size / len(kept[axis.name])  # pyright: ignore
    if isinstance(arch, NarrowsHeads):
        for axis in axes:
            if axis.kind == Kind.HEAD_CHANNEL and axis.name in kept and axis.layer is not None:
                arch.narrow_heads_(arch.blocks(model)[axis.layer], len(kept[axis.name]))
    _drop_layers_(model, axes, kept)
    for axis in axes:
        if axis.kind == Kind.VOCAB and axis.name in kept:
            renumber_(model, axis.size, kept[axis.name])
    arch.sync_config_(model)


def kept_entries(model: nn.Module, axes: Sequence[Axis], plan: Plan) -> dict[tuple[str, int], Tensor]:
    """What `shrink_` keeps of tensors that it cuts: (parameter, dim) -> indices of entries [n_kept], ascending."""
    return _selections(model, axes, _losing(axes, plan))


def set_features_(module: nn.Module) -> None:
    """Bring a module's own counts of its weight's shape up to date."""
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, Conv1D):
        module.nx, module.nf = module.weight.shape
    elif isinstance(module, nn.Embedding):
        module.num_embeddings, module.embedding_dim = module.weight.shape
    elif isinstance(module, nn.LayerNorm):
        module.normalized_shape = tuple(module.weight.shape)
    elif isinstance(module, nn.BatchNorm2d):
        module.num_features = len(module.weight)
    elif isinstance(module, nn.Conv2d):
        by_channel = module.groups == module.in_channels > 1
        module.groups = module.weight.shape[0] if by_channel else module.groups
        module.out_channels, module.in_channels = module.weight.shape[0], module.weight.shape[1] * module.groups


def _keep_statistics_(norm: nn.BatchNorm2d, staying: Tensor) -> None:
    """Slice what a batch norm knows of its channels, which are buffers and no parameters."""
    for name in ("running_mean", "running_var"):
        known = getattr(norm, name)
        if isinstance(known, Tensor) and len(known) != len(staying):
            setattr(norm, name, known.index_select(0, staying.to(known.device)))


def _losing(axes: Sequence[Axis], plan: Plan) -> dict[str, list[int]]:
    """The units that stay of the axes that lose some."""
    return {
        axis.name: list(plan.kept[axis.name])
        for axis in axes
        if len(plan.kept.get(axis.name, range(axis.size))) < axis.size
    }


def _check(model: PreTrainedModel, axes: Sequence[Axis], plan: Plan, soft: Mapping[str, Tensor]) -> None:
    """Raise ArchError unless plan and soft masks fit the axes and the axes fit the model."""
    try:
        plan.check(axes)
    except ValueError as error:
        raise ArchError(str(error)) from error
    by_name = {axis.name: axis for axis in axes}
    for name, mask in soft.items():
        if name not in by_name or list(mask.shape) != [by_name[name].size]:
            raise ArchError(
                f"soft mask '{name}' {list(mask.shape)} fits no axis; wanted the name and [size] of one of the model's"
                " axes"
            )
        if not bool((torch.isfinite(mask) & (mask >= 0)).all()):
            raise ArchError(f"soft mask '{name}' has values that are negative or not finite; wanted values in [0, 1]")
        skipping = any(gate.side == "skip" for gate in by_name[name].gates)
        if (by_name[name].kind == Kind.VOCAB or skipping) and not bool(((mask == 0) | (mask == 1)).all()):
            what = "layers" if skipping else "tokens"
            raise ArchError(f"soft mask '{name}' keeps {what} by halves, which no weight can hold; wanted 0 or 1")
    parameters = dict(model.named_parameters())
    for axis in axes:
        tilings = axis.tilings()
        for name in dict.fromkeys(piece.param for piece in axis.slices):
            shape = None if (parameter := parameters.get(name)) is None else list(parameter.shape)
            if shape is None or any(
                not axis.tiles(pieces, shape[dim]) for (param, dim), pieces in tilings.items() if param == name
            ):
                raise ArchError(
                    f"axis {axis.name} does not fit {name} {shape}; take the axes from the model as it is now, without"
                    " adapters"
                )


def _leaving(axes: Sequence[Axis], kept: Mapping[str, list[int]]) -> set[str]:
    """Names of the parameters that leave whole."""
    names: set[str] = set()
    for axis in axes:
        if axis.name in kept:
            staying = set(kept[axis.name])
            names.update(piece.param for piece in axis.slices if piece.unit is not None and piece.unit not in staying)
            if not staying:
                names.update((*(piece.param for piece in axis.slices), *axis.with_last_unit))
    return names


def _selections(model: nn.Module, axes: Sequence[Axis], kept: Mapping[str, list[int]]) -> dict[tuple[str, int], Tensor]:
    """(parameter, dim) -> indices of the kept entries [n_kept], ascending: those that every axis keeps."""
    entries: dict[tuple[str, int], Tensor] = {}
    for axis in axes:
        if axis.name in kept:
            staying = torch.zeros(axis.size, dtype=torch.bool)
            staying[kept[axis.name]] = True
            for (name, dim), pieces in axis.tilings().items():
                length = model.get_parameter(name).shape[dim]
                here = entries.setdefault((name, dim), torch.ones(length, dtype=torch.bool, device="cpu"))
                for piece in pieces:
                    here.narrow(0, piece.start, axis.size * piece.width).logical_and_(
                        staying.repeat_interleave(piece.width)
                    )
    return {key: here.nonzero().flatten() for key, here in entries.items()}


def _factors(
    model: nn.Module, axes: Sequence[Axis], kept: Mapping[str, list[int]], soft: Mapping[str, Tensor]
) -> _Factors:
    """Everything that weights are multiplied by: soft masks, and the norms' correction for their smaller width."""
    factors: _Factors = {}

    def multiply(parameter: str, dim: int, values: Tensor) -> None:
        """Collect a factor; several axes may meet at one parameter."""
        factors[parameter, dim] = factors[parameter, dim] * values if (parameter, dim) in factors else values

    for axis in axes:
        if axis.name in soft:
            mask = soft[axis.name].detach().to("cpu", torch.float64)
            for gate in axis.gates:
                for parameter, dim in _read_or_written(model, gate):
                    multiply(parameter, dim, gate.spread(mask))
            if axis.head_norm is not None:
                # where the mask is 0 the stream is 0 and the norm's entry is never seen
                multiply(f"{axis.head_norm}.weight", 0, 1 / torch.where(mask > 0, mask, 1.0))
        if axis.name in kept:
            for norm in axis.norms:
                multiply(
                    f"{norm}.weight",
                    0,
                    torch.tensor([math.sqrt(axis.size / len(kept[axis.name]))], dtype=torch.float64),
                )
            for piece in axis.rooted:
                entries = torch.ones(model.get_parameter(piece.param).shape[piece.dim], dtype=torch.float64)
                entries.narrow(0, piece.start, axis.size * piece.width).fill_(
                    math.sqrt(len(kept[axis.name]) / axis.size)
                )
                multiply(piece.param, piece.dim, entries)
    return factors


def _read_or_written(model: nn.Module, gate: Gate) -> list[tuple[str, int]]:
    """(parameter, dim) of the entries that a gate's activation is multiplied with, or made of."""
    if gate.folds:
        return list(gate.folds)
    module = model.get_submodule(gate.module)
    transposed = isinstance(module, Conv1D)  # its weight is [in, out]
    if isinstance(module, nn.Embedding) or gate.side == "input":
        return [(f"{gate.module}.weight", 0 if transposed else 1)]
    return [
        (f"{gate.module}.{name}", int(transposed and name == "weight"))
        for name, _ in module.named_parameters(recurse=False)
    ]


def _edited(name: str, parameter: Tensor, by_dim: Sequence[tuple[Tensor | None, Tensor | None]]) -> Tensor:
    """A parameter sliced and scaled; by_dim: for each dimension the kept entries, and factors along it before
    slicing.
    """
    result = parameter.detach()
    for dim, (selection, _) in enumerate(by_dim):
        if selection is not None:
            result = result.index_select(dim, selection.to(parameter.device))
    scaled = [(dim, selection, factor) for dim, (selection, factor) in enumerate(by_dim) if factor is not None]
    if not scaled:
        return result
    work = result.to(torch.promote_types(parameter.dtype, torch.float32), copy=True)
    for dim, selection, factor in scaled:
        values = factor[selection] if selection is not None and len(factor) > 1 else factor
        work *= values.to(work.device, work.dtype).reshape([-1 if d == dim else 1 for d in range(work.dim())])
    folded = work.to(parameter.dtype)
    if not folded.is_meta and not bool(torch.isfinite(folded).all()) and bool(torch.isfinite(parameter).all()):
        raise NumericError(f"folding masks into {name} overflows {parameter.dtype}; shrink in bfloat16 or float32")
    return folded


def _empty_sub_layers_(model: PreTrainedModel, arch: Arch, axes: Sequence[Axis], kept: Mapping[str, list[int]]) -> None:
    """Replace attentions and FFNs that lose their last unit, or are dropped as units themselves."""
    blocks = arch.blocks(model)
    sub_layer = {Kind.HEAD: Kind.ATTENTION, Kind.CHANNEL: Kind.MLP}
    for axis in axes:
        if axis.name not in kept:
            continue
        if axis.kind in sub_layer and not kept[axis.name] and axis.layer is not None:
            arch.empty_(blocks[axis.layer], sub_layer[axis.kind])
        elif axis.kind in (Kind.ATTENTION, Kind.MLP):
            layers = _layers(model, axis)
            for layer in sorted(set(range(axis.size)) - set(kept[axis.name])):
                arch.empty_(layers[layer], axis.kind)


def _layers(model: PreTrainedModel, axis: Axis) -> nn.ModuleList:
    """The list of layers that the units of an axis of layers or sub-layers lie in."""
    layers = model.get_submodule(axis.container)
    assert isinstance(layers, nn.ModuleList)
    return layers


def _drop_layers_(model: PreTrainedModel, axes: Sequence[Axis], kept: Mapping[str, list[int]]) -> None:
    """Take whole layers out of their lists; those behind them move up."""
    for axis in axes:
        if axis.kind == Kind.LAYER and axis.name in kept:
            layers = _layers(model, axis)
            for layer in sorted(set(range(axis.size)) - set(kept[axis.name]), reverse=True):
                del layers[layer]
