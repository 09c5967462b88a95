"""Mixtures of experts whose layers differ: an attention without its mixture, a mixture without its attention, layers
with unequal numbers of experts. The config of our own classes says them; the tensors lie under the names, and in the
pieces, of the family's published checkpoints.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from compresso.arch.base import LayerShape
from compresso.checkpoint.reasons import reason_of
from compresso.errors import ExportError
from compresso.formats.layout import REBUILT
from compresso.formats.packed_experts import as_written
from compresso.formats.plain import ungrouped
from compresso.formats.shrunk import norm_epsilons
from compresso.native import MOE_CLASSES, mixture_family_of, per_layer_auto_map

_HEADS = {"query_heads": "num_attention_heads", "kv_heads": "num_key_value_heads"}


def mixture_config(model: PreTrainedModel, shapes: Sequence[LayerShape]) -> PreTrainedConfig:
    """Our config class for a live model of a family that has one: the widest layer's numbers globally, what differs and
    what is absent in `per_layer_config`.

    Args:
        model: of the family's stock class, with a config that `sync_config_` has brought in line.
        shapes: of its layers.

    Raises:
        ExportError: naming what neither the classes nor transformers' product of stacked experts takes.
    """
    family = mixture_family_of(model.config.model_type)
    assert family is not None, "callers ask mixture_family_of first"
    if (odd := ungrouped(model, shapes)) is not None:
        raise ExportError(f"layout native cannot hold this {family}: {odd}.")
    config_class, _, language_model = MOE_CLASSES[family]
    eps, head_eps = norm_epsilons(model, model.state_dict())
    fields = {key: value for key, value in model.config.to_dict().items() if key not in REBUILT}
    fields |= {"rms_norm_eps": eps, "head_dim": _head_dim(model, shapes)}
    fields["tie_word_embeddings"] = _tied(model)
    if head_eps not in (None, eps):
        fields["head_norm_eps"] = head_eps
    each = [_numbers(shape, config_class) for shape in shapes]
    fields |= {name: max(own[name] for own in each if name in own) for name in {name for own in each for name in own}}
    layers: dict[int, dict[str, Any]] = {}
    for index, (shape, own) in enumerate(zip(shapes, each, strict=True)):
        skip = [part for part, absent in (("attention", not shape.kv_heads), ("mlp", not shape.channels)) if absent]
        differs = {name: value for name, value in own.items() if value != fields[name]}
        if differs or skip:
            layers[index] = differs | ({"skip": skip} if skip else {})
    try:
        config = config_class(**fields, **({"per_layer_config": layers} if layers else {}))
    except (ValueError, StrictDataclassError) as error:
        raise ExportError(f"layout native cannot hold this {family}: {reason_of(error)}") from error
    config.architectures = [language_model.__name__]
    config.auto_map = per_layer_auto_map(config.model_type)
    config.dtype = model.dtype
    _check_complete(model, config)
    return config


def mixture_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """Its tensors as they are stored, a tied head once."""
    return as_written(model, _state(model))


def _tied(model: PreTrainedModel) -> bool:
    """Whether head and embedding are one parameter."""
    return model.get_parameter("lm_head.weight") is model.get_parameter("model.embed_tokens.weight")


def _state(model: PreTrainedModel) -> dict[str, Tensor]:
    tied = _tied(model)
    named = ((name, tensor.detach()) for name, tensor in model.state_dict().items())
    return {name: tensor for name, tensor in named if not (tied and name == "lm_head.weight")}


def _numbers(shape: LayerShape, config_class: Any) -> dict[str, int]:
    """What a layer's entry may say, of what is there."""
    own = {name: getattr(shape, field) for field, name in _HEADS.items()} if shape.kv_heads else {}
    if shape.experts:
        own |= {config_class.experts_field: shape.experts, config_class.width_field: shape.channels}
    elif shape.channels:
        own["intermediate_size"] = shape.channels
    return own


def _head_dim(model: PreTrainedModel, shapes: Sequence[LayerShape]) -> int:
    """Of the first attention; that of the config, where no layer has one."""
    layers: Any = model.get_submodule("model.layers")
    for layer, shape in zip(layers, shapes, strict=True):
        if shape.kv_heads:
            return int(layer.self_attn.head_dim)
    return int(getattr(model.config, "head_dim", None) or model.config.hidden_size // model.config.num_attention_heads)


def _check_complete(model: PreTrainedModel, config: PreTrainedConfig) -> None:
    """Raise ExportError if a reader of the config would miss a tensor, find one too many or of another shape."""
    with torch.device("meta"):
        reader = AutoModelForCausalLM.from_config(copy.deepcopy(config), trust_remote_code=False)
    expected, have = ({name: tuple(one.shape) for name, one in _state(of).items()} for of in (reader, model))
    if odd := sorted(name for name in expected.keys() | have.keys() if expected.get(name) != have.get(name)):
        told = ", ".join(
            f"{name} is {have.get(name, 'absent')}, wanted {expected.get(name, 'none')}" for name in odd[:4]
        )
        raise ExportError(
            f"the model does not have its architecture's tensors: {told}. Merge adapters, and shrink by a plan."
        )
