"""The axes of a SegFormer: units of its layers, feature maps of its stages, whole layers, and its head's channels;
`arch/segformer.py` says where masks lie, and why.
"""

from torch import nn
from transformers import PreTrainedModel

from compresso.arch.absent import is_absent
from compresso.arch.segformer_config import head_dim
from compresso.core.axis import Axis, Gate, Kind, Slice

HEAD = "decode_head"
"""Where the head for segmentation lies."""
_FC1, _EACH, _FC2 = "mlp.fc1", "mlp.dwconv.dwconv", "mlp.fc2"
_O = "attention.o_proj"


def unit_axes(model: PreTrainedModel, body: str, stage: int) -> list[Axis]:
    """Heads and FFN units of each layer of a stage that has them; one head alone stays.

    body: where the model without its head lies: "" or a prefix with its dot.
    """
    axes: list[Axis] = []
    for k, layer in enumerate(model.get_submodule(f"{body}stages.{stage}.blocks").children()):
        where, name = f"{body}stages.{stage}.blocks.{k}", f"stages.{stage}.layers.{k}"
        attention, mlp = layer.get_submodule("attention"), layer.get_submodule("mlp")
        width = 0 if is_absent(attention) else head_dim(attention)
        if width and attention.get_parameter("o_proj.weight").shape[1] > width:
            rows = [f"{where}.attention.{one}_proj" for one in ("q", "k", "v")]
            axes.append(_units(model, f"{name}.heads", Kind.HEAD, rows, f"{where}.{_O}", f"{where}.attention", width))
        if not is_absent(mlp):
            rows = [f"{where}.{part}" for part in (_FC1, _EACH)]
            axes.append(_units(model, f"{name}.channels", Kind.CHANNEL, rows, f"{where}.{_FC2}", f"{where}.mlp", 1))
    return axes


def features_axis(model: PreTrainedModel, body: str, stage: int) -> Axis | None:
    """Channels of a stage's feature maps; None of the last one of a bare model, which is what that gives."""
    where, slices, norms = f"{body}stages.{stage}", list[Slice](), list[str]()
    for name, _ in model.named_parameters():
        if not name.startswith(where + "."):
            continue
        module, _, tensor = name.rpartition(".")
        part = module.removeprefix(where + ".")
        norm = isinstance(model.get_submodule(module), nn.LayerNorm)
        reduced = part.endswith("sequence_reduction.sequence_reduction")
        if norm and module not in norms:
            norms.append(module)
        if norm or reduced or part == "patch_embeddings.proj" or part.endswith((_O, _FC2)):
            slices.append(Slice(name, 0))
        if tensor == "weight" and (reduced or part.endswith(("q_proj", "k_proj", "v_proj", _FC1))):
            slices.append(Slice(name, 1))
    named = dict(model.named_parameters())
    readers = [f"{body}stages.{stage + 1}.patch_embeddings.proj", f"{HEAD}.linear_projections.{stage}.proj"]
    last = f"{body}stages.{stage + 1}" not in dict(model.named_modules())
    readers += ["classifier"] if last else []
    read = [Slice(f"{reader}.weight", 1) for reader in readers if f"{reader}.weight" in named]
    if not read:
        return None
    gates = tuple(Gate(norm, "output") for norm in norms)
    size = int(named[f"{where}.patch_embeddings.proj.weight"].shape[0])
    name = f"stages.{stage}.features"
    return Axis(name, Kind.HIDDEN, size, (*slices, *read), gates, where, layer_norms=tuple(norms))


def layer_axes(model: PreTrainedModel, body: str, stage: int) -> list[Axis]:
    """Whole layers, attentions and FFNs of a stage."""
    where = f"{body}stages.{stage}.blocks"
    layers = list(model.get_submodule(where).children())
    there = {
        kind: [k for k, layer in enumerate(layers) if not is_absent(layer.get_submodule(part))]
        for kind, part in ((Kind.ATTENTION, "attention"), (Kind.MLP, "mlp"))
    }
    inside = {
        Kind.LAYER: ("",),
        Kind.ATTENTION: ("attention.", "layernorm_before."),
        Kind.MLP: ("mlp.", "layernorm_after."),
    }
    writer = {Kind.ATTENTION: _O, Kind.MLP: _FC2}
    axes: list[Axis] = []
    for kind, parts in inside.items():
        units = range(len(layers)) if kind == Kind.LAYER else there[kind]
        slices = tuple(
            Slice(name, 0, unit=k)
            for k in units
            for name, _ in layers[k].named_parameters(prefix=f"{where}.{k}")
            if name.removeprefix(f"{where}.{k}.").startswith(parts)
        )
        kinds = there if kind == Kind.LAYER else (kind,)
        gates = tuple(Gate(f"{where}.{k}.{writer[one]}", "output", unit=k) for one in kinds for k in there[one])
        name = f"stages.{stage}.{'layers' if kind == Kind.LAYER else kind}"
        axes.append(Axis(name, kind, len(layers), slices, gates, where))
    return axes


def head_axes(model: PreTrainedModel) -> list[Axis]:
    """`head.projected` and `head.fused`."""
    fuse, classifier = f"{HEAD}.linear_fuse", f"{HEAD}.classifier"
    rows, wide = (int(side) for side in model.get_submodule(fuse).get_parameter("weight").shape[:2])
    linears = [f"{HEAD}.linear_projections.{i}.proj" for i in range(len(_children(model, "linear_projections")))]
    size = wide // len(linears)
    starts = range(0, wide, size)
    read = [Slice(f"{fuse}.weight", 1, start=start) for start in starts]
    gates = tuple(Gate(fuse, "input", start=start, of=wide) for start in starts)
    written = [Slice(f"{linear}.{tensor}", 0) for linear in linears for tensor in ("weight", "bias")]
    fused = [Slice(f"{fuse}.weight", 0), *(Slice(f"{HEAD}.batch_norm.{tensor}", 0) for tensor in ("weight", "bias"))]
    fused.append(Slice(f"{classifier}.weight", 1))
    gate = (Gate(classifier, "input"),)
    return [
        Axis("head.projected", Kind.CHANNEL, size, (*written, *read), gates, HEAD, min_units=1),
        Axis("head.fused", Kind.CHANNEL, rows, tuple(fused), gate, HEAD, min_units=1),
    ]


def _units(
    model: PreTrainedModel, name: str, kind: Kind, writers: list[str], reader: str, container: str, width: int
) -> Axis:
    """Units that linears write and one reads, whose bias outlives them."""
    rows = tuple(Slice(f"{one}.{tensor}", 0, width) for one in writers for tensor in ("weight", "bias"))
    size = int(model.get_submodule(reader).get_parameter("weight").shape[1]) // width
    slices = (*rows, Slice(f"{reader}.weight", 1, width))
    return Axis(name, kind, size, slices, (Gate(reader, "input", width),), container, min_units=1)


def _children(model: PreTrainedModel, name: str) -> list[nn.Module]:
    return list(model.get_submodule(f"{HEAD}.{name}").children())
