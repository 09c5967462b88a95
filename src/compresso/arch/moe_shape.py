"""What the modules of a decoder with mixtures of experts say of its widths, and what families of them differ in; see
`arch/moe.py`.
"""

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from compresso.arch.absent import is_absent
from compresso.arch.base import LayerShape
from compresso.arch.mixture import Mixture, mixture_of
from compresso.errors import ArchError

LAYERS = "model.layers"
FFN = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, slots=True)
class MoeFamily:
    """What families of such decoders differ in.

    Args:
        name: the `model_type` described.
        width: field of the config that says how wide an expert is.
        read: linears of the attention that read the stream; a model may have some of them.
        inner: its other linears, but for `o_proj`.
        head_norms: norms over one head's entries, shared by all heads; a model may lack them.
        heads_stay: whether the attention stays whole.
        cached: linears whose outputs are what the cache holds.
        gives_scores: whether the stock FFN gives the router's scores, too.
    """

    name: str
    width: str = "moe_intermediate_size"
    read: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    inner: tuple[str, ...] = ()
    head_norms: tuple[str, ...] = ()
    heads_stay: bool = False
    cached: tuple[str, ...] = ("k_proj", "v_proj")
    gives_scores: bool = False


def layers_of(model: PreTrainedModel) -> nn.ModuleList:
    """`model.layers`.

    Raises:
        ArchError: the model has none, or no head.
    """
    modules = dict(model.named_modules())
    layers = modules.get(LAYERS)
    if not isinstance(layers, nn.ModuleList) or not len(layers) or "lm_head" not in modules:
        raise ArchError(f"{type(model).__name__} is not a causal language model with a decoder; load it with its head")
    return layers


def checked_shapes(family: MoeFamily, model: PreTrainedModel) -> tuple[list[LayerShape], dict[int, Mixture]]:
    """What is there. Raises ArchError where the config says something else."""
    shapes, mixtures = read_shapes(family, model)
    config, embedding = model.config, tuple(model.get_parameter("model.embed_tokens.weight").shape)
    facts = {
        "num_hidden_layers": (config.num_hidden_layers, len(shapes)),
        "vocab_size, hidden_size": ((config.vocab_size, config.hidden_size), embedding),
    }
    for field, (said, found) in facts.items():
        if said != found:
            raise ArchError(
                f"the config says {field}={said}, the modules say {found}; load the model and its config from one"
                " checkpoint"
            )
    return shapes, mixtures


def read_shapes(family: MoeFamily, model: PreTrainedModel) -> tuple[list[LayerShape], dict[int, Mixture]]:
    """The widths of each layer, and the mixtures by layer."""
    hidden = model.get_parameter("model.norm.weight").shape[0]
    shapes: list[LayerShape] = []
    mixtures: dict[int, Mixture] = {}
    known = {"model.norm.weight", "model.embed_tokens.weight", "lm_head.weight"}
    for i, layer in enumerate(layers_of(model)):
        where, heads, kv_heads, channels = f"{LAYERS}.{i}", 0, 0, 0
        if not is_absent(layer.get_submodule("self_attn")):
            heads, kv_heads = _heads(family, layer.get_submodule("self_attn"))
            known |= {f"{where}.{name}" for name, _ in _attention_parameters(layer, family)}
        if not is_absent(layer.get_submodule("mlp")):
            known.add(f"{where}.post_attention_layernorm.weight")
            if (mixture := mixture_of(model, f"{where}.mlp", hidden)) is not None:
                mixtures[i], channels = mixture, mixture.width
                known |= {f"{where}.mlp.{name}" for name in mixture.tensors}
            else:
                channels = layer.get_parameter("mlp.gate_proj.weight").shape[0]
                if not channels:
                    raise ArchError(f"{where}.mlp is an FFN of 0 channels; wanted at least 1 (intermediate_size)")
                known |= {f"{where}.mlp.{name}.{tensor}" for name in FFN for tensor in ("weight", "bias")}
        shapes.append(LayerShape(heads, kv_heads, channels, mixtures[i].experts if i in mixtures else 0))
    for name, _ in model.named_parameters():
        if name not in known:
            raise ArchError(
                f"parameter '{name}' is not part of a plain {family.name}; merge adapters and pass the unwrapped model"
            )
    return shapes, mixtures


def _heads(family: MoeFamily, attention: nn.Module) -> tuple[int, int]:
    """How many query heads and key/value heads an attention has."""
    if "q_proj" in family.read and "k_proj" in family.read:
        width = int(attention.head_dim)  # pyright: ignore[reportArgumentType]
        q, k = (attention.get_parameter(f"{name}.weight") for name in ("q_proj", "k_proj"))
        return q.shape[0] // width, k.shape[0] // width
    heads = int(attention.num_heads)  # pyright: ignore[reportArgumentType]
    return heads, heads


def _attention_parameters(layer: nn.Module, family: MoeFamily) -> list[tuple[str, nn.Parameter]]:
    """The parameters of a layer's attention that its family has, and of its norm."""
    linears = (*family.read, *family.inner, "o_proj")
    return [
        (name, parameter)
        for name, parameter in layer.named_parameters()
        if name.startswith("input_layernorm.")
        or (
            name.startswith("self_attn.")
            and (name.split(".")[1] in linears or "norm" in name or name.endswith("sinks"))
        )
    ]
