"""A live shrunk model as it is: what a layout needs to know, read off its modules and tensors.

All widths come from the shapes, the tensors and the live norms, never from the model's config: that may be from before
pruning.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from compresso.arch.base import LayerShape
from compresso.errors import ExportError
from compresso.native import CLASSES, family_of


@dataclass(frozen=True)
class Shrunk:
    """Family, config, tensors (a tied head once), true widths and epsilons of a model.

    Args:
        eps: of the norms over the hidden size; pruning that changes it.
        head_eps: of the q and k norms (Qwen3), which keep theirs; None where there are none.
        kinds: attention kind per layer ("full_attention", "sliding_attention"), where the family has them.
    """

    family: str
    config: PreTrainedConfig
    tensors: Mapping[str, Tensor]
    shapes: tuple[LayerShape, ...]
    head_dim: int
    eps: float
    head_eps: float | None
    tied: bool
    kinds: tuple[str, ...] | None


def describe(model: PreTrainedModel, shapes: Sequence[LayerShape]) -> Shrunk:
    """Read a live model of a known family. Raises ExportError if shapes and modules disagree, or norms have different
    epsilons.
    """
    family = family_of(model.config.model_type)
    if family is None:
        raise ExportError(f"cannot write model_type '{model.config.model_type}'; known: {', '.join(CLASSES)}.")
    n_layers = len(list(model.get_decoder().layers))  # pyright: ignore[reportArgumentType]
    if n_layers != len(shapes):
        raise ExportError(
            f"{len(shapes)} layer shapes were given for a model of {n_layers} layers. Describe the model after"
            " shrinking it."
        )
    tensors = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    tied = head is not None and head.weight is embedding.weight
    if tied:
        tensors = {name: tensor for name, tensor in tensors.items() if name != "lm_head.weight"}
    eps, head_eps = norm_epsilons(model, tensors)
    described = Shrunk(
        family=family,
        config=model.config,
        tensors=tensors,
        shapes=tuple(shapes),
        head_dim=_head_dim(model.config, tensors, shapes),
        eps=eps,
        head_eps=head_eps,
        tied=tied,
        kinds=_kinds(model.config, shapes),
    )
    check_against_tensors(described)
    return described


def norm_epsilons(model: PreTrainedModel, tensors: Collection[str]) -> tuple[float, float | None]:
    """Of the norms over the stream, and of those inside attentions, None without; of norms whose weights are among some
    tensors. Raises ExportError where they differ among themselves.
    """
    found: dict[bool, dict[float, str]] = {False: {}, True: {}}
    for name, module in model.named_modules():
        if (eps := getattr(module, "variance_epsilon", None)) is not None and f"{name}.weight" in tensors:
            found[name.endswith((".q_norm", ".k_norm"))].setdefault(float(eps), name)
    for epsilons in found.values():
        if len(epsilons) > 1:
            told = ", ".join(f"{name} {eps:g}" for eps, name in epsilons.items())
            raise ExportError(
                f"norms have different epsilons ({told}), and no layout holds more than one. Prune the hidden size in"
                " all of them."
            )
    return next(iter(found[False]), model.config.rms_norm_eps), next(iter(found[True]), None)


def _head_dim(config: PreTrainedConfig, tensors: Mapping[str, Tensor], shapes: Sequence[LayerShape]) -> int:
    """The config's head_dim; where the family has no such field (Qwen2), from the first attention there is."""
    if getattr(config, "head_dim", None):
        return int(config.head_dim)
    for index, shape in enumerate(shapes):
        weight = tensors.get(f"model.layers.{index}.self_attn.q_proj.weight")
        if shape.query_heads and weight is not None:
            return weight.shape[0] // shape.query_heads
    raise ExportError(
        "neither the config nor an attention layer tells the head_dim. Merge adapters, or set config.head_dim."
    )


def _kinds(config: PreTrainedConfig, shapes: Sequence[LayerShape]) -> tuple[str, ...] | None:
    """Attention kinds per layer. Raises ExportError if they differ and their number is not that of the layers."""
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        return None
    if len(set(kinds)) == 1:
        return tuple(kinds[:1]) * len(shapes)
    if len(kinds) != len(shapes):
        raise ExportError(
            f"config.layer_types lists {len(kinds)} layers, the model has {len(shapes)}. Remove the entries of removed"
            " layers."
        )
    return tuple(kinds)


def check_against_tensors(model: Shrunk) -> None:
    """Raise ExportError naming the first projection whose size is not what the shapes say."""
    for index, shape in enumerate(model.shapes):
        if bool(shape.query_heads) != bool(shape.kv_heads) or (shape.kv_heads and shape.query_heads % shape.kv_heads):
            raise ExportError(
                f"layers.{index}: {shape.query_heads} query heads cannot share {shape.kv_heads} key/value heads evenly."
            )
        for part, rows in (
            ("self_attn.q_proj", shape.query_heads * model.head_dim),
            ("self_attn.k_proj", shape.kv_heads * model.head_dim),
            ("mlp.gate_proj", shape.channels),
        ):
            tensor = model.tensors.get(f"model.layers.{index}.{part}.weight")
            if (found := 0 if tensor is None else tensor.shape[0]) != rows:
                raise ExportError(
                    f"layers.{index}.{part} has {found} rows, its shape says {rows}. Describe the model after"
                    " shrinking it."
                )
