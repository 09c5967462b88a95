"""The residual stream of an encoder with LayerNorms behind its sums, as an axis.

    stream -> norm(stream + sub-layer(stream)) x layers -> head

Every norm writes the stream anew, so that a mask lies on the norms' outputs alone, and what a removed dimension holds
before one of them is left out of its mean and variance. Heads read the stream, or write a copy of it that is as wide
(a pooler, the transform of a masked language model): these copies keep the same dimensions, since one number in the
config says how wide they are.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from compresso.core.axis import Axis, Gate, Kind, Slice


@dataclass(frozen=True, slots=True)
class EncoderStream:
    """What touches the stream, by name: in a layer relative to it, outside by the ends of names.

    Args:
        norms: LayerNorms of a layer.
        tables: embeddings, whose rows are added up to the first stream.
        outer_norms: LayerNorms outside of layers.
        read: linears outside that read the stream, or a copy of it.
        copied: those of `read` that write a copy of it.
        gated: those of `copied` behind which no norm lies.
    """

    norms: tuple[str, ...]
    tables: tuple[str, ...]
    outer_norms: tuple[str, ...]
    read: tuple[str, ...]
    copied: tuple[str, ...]
    gated: tuple[str, ...]

    def axis(self, model: PreTrainedModel, where: str, written: Collection[str], read: Collection[str]) -> Axis | None:
        """The axis `hidden`; None for a model with a head that nobody described.

        Args:
            model: the encoder, with or without a head.
            where: the list of its layers.
            written: linears of layers that write to the stream.
            read: linears of layers that read it.
        """
        layers = where + "."
        slices: list[Slice] = []
        norms: list[str] = []
        gates: list[Gate] = []
        for name, parameter in model.named_parameters():
            module, _, tensor = name.rpartition(".")
            matrix, inside = tensor == "weight" and parameter.dim() == 2, module.startswith(layers)
            is_norm = _ends(module, self.norms if inside else self.outer_norms)
            copied = not inside and _ends(module, self.copied)
            if is_norm or module in written or copied:
                slices.append(Slice(name, 0))
            if matrix and (module in read if inside else _ends(module, (*self.read, *self.tables))):
                slices.append(Slice(name, 1))
            elif matrix and not inside:
                return None
            if is_norm and module not in norms:
                norms.append(module)
            if (is_norm or (copied and _ends(module, self.gated))) and tensor == "weight":
                gates.append(Gate(module, "output"))
        embedding = model.get_input_embeddings()
        assert isinstance(embedding, nn.Module)
        return Axis(
            name="hidden",
            kind=Kind.HIDDEN,
            size=embedding.get_parameter("weight").shape[1],
            slices=tuple(slices),
            gates=tuple(gates),
            container=where.rpartition(".")[0],
            layer_norms=tuple(norms),
        )


def _ends(module: str, names: Sequence[str]) -> bool:
    """Whether a qualified name ends with one of these."""
    return any(module == name or module.endswith("." + name) for name in names)
