"""The residual stream of a model with RMSNorms as an axis: every linear, embedding and norm that touches it."""

from collections.abc import Collection

from torch import nn
from transformers import PreTrainedModel

from compresso.core.axis import Axis, Gate, Kind, Slice


def hidden_axis(
    model: PreTrainedModel, written: Collection[str], read: Collection[str], norms: Collection[str], final: str
) -> Axis:
    """The axis `hidden`: one unit a dimension of the stream.

    Args:
        model: with `nn.Linear`s and RMSNorms only.
        written: linears that write to the stream, in order.
        read: linears that read it, besides the head.
        norms: RMSNorms over it inside the layers.
        final: the norm that only the head reads.
    """
    embedding, head = (
        _name_of(model, module) for module in (model.get_input_embeddings(), model.get_output_embeddings())
    )
    slices: list[Slice] = []
    folded: list[str] = []
    for name, _ in model.named_parameters():
        module, _, tensor = name.rpartition(".")
        if module in written:
            slices.append(Slice(name, 0))
        elif module in (embedding, head) or (module in read and tensor == "weight"):
            slices.append(Slice(name, 1))
        elif module in norms or module == final:
            slices.append(Slice(name, 0))
            folded.append(module)
    tied = head is not None and model.get_parameter(f"{head}.weight") is model.get_parameter(f"{embedding}.weight")
    return Axis(
        name="hidden",
        kind=Kind.HIDDEN,
        size=model.get_parameter(f"{final}.weight").shape[0],
        slices=tuple(slices),
        gates=tuple(Gate(module, "output") for module in (embedding, *written) if module is not None),
        container=final.rpartition(".")[0],
        norms=tuple(folded),
        head_norm=final if tied else None,
    )


def is_norm(module: str) -> bool:
    """Whether a module's qualified name is that of a norm."""
    last = module.rpartition(".")[2].lower()
    return "norm" in last or last.startswith("ln_")


def _name_of(model: PreTrainedModel, wanted: object) -> str | None:
    """The qualified name of a module; None if there is none."""
    return next(
        (name for name, module in model.named_modules() if isinstance(wanted, nn.Module) and module is wanted), None
    )
