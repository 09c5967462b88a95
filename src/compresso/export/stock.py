"""From our per-layer classes back to the stock classes: every other part of compresso works on stock models whose layers were shrunk.

The stock model is built on the meta device with the widest layer's numbers, brought to each layer's widths by the shape surgery that first
made them, and given the very tensors of the model it replaces. What it computes is the same, bit for bit.
"""

import copy
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from compresso.arch.base import LayerShape, arch_for
from compresso.core.plan import Plan
from compresso.edit.shrink import shrink_
from compresso.errors import ArchError
from compresso.export.native import CLASSES, family_of
from compresso.export.native.modeling_compresso import skipped

_OWN = ("model_type", "architectures", "auto_map", "per_layer_config", "head_norm_eps", "skip", "transformers_version", "_name_or_path")
_HEADS = {"num_attention_heads": 1, "num_key_value_heads": 1}


def stock_form(model: PreTrainedModel) -> PreTrainedModel:
    """The same model as the stock class of its family, sharing its tensors; a model that is stock already is returned as it is.

    Raises ArchError if layers differ in how many query heads share a key/value head.
    """
    family = family_of(model.config.model_type)
    if family is None or model.config.model_type not in {config.model_type for config, _, _ in CLASSES.values()}:
        return model
    shapes = native_shapes(model.config)
    config = _stock_config(model.config, family, shapes)
    with torch.device("meta"):
        stock: PreTrainedModel = AutoModelForCausalLM.from_config(config, attn_implementation=model.config._attn_implementation)
    axes = arch_for(stock.config).axes(stock)
    kept = {f"layers.{i}.heads": tuple(range(shape.kv_heads)) for i, shape in enumerate(shapes) if shape.kv_heads}
    kept |= {f"layers.{i}.channels": tuple(range(shape.channels)) for i, shape in enumerate(shapes) if shape.channels}
    kept["attention"] = tuple(i for i, shape in enumerate(shapes) if shape.kv_heads)
    kept["mlp"] = tuple(i for i, shape in enumerate(shapes) if shape.channels)
    shrink_(stock, axes, Plan(kept))
    stock.load_state_dict(model.state_dict(), strict=True, assign=True)
    if model.config.tie_word_embeddings:
        stock.tie_weights()
    native_decoder, decoder = model.get_submodule("model"), stock.get_submodule("model")
    decoder.rotary_emb = native_decoder.get_submodule("rotary_emb")  # its buffer is computed, not stored
    norms = {name: module for name, module in model.named_modules() if hasattr(module, "variance_epsilon")}
    for name, module in stock.named_modules():
        if name in norms:
            module.variance_epsilon = norms[name].variance_epsilon
    stock.generation_config = copy.deepcopy(model.generation_config)
    return stock.train(model.training)


def native_shapes(config: PreTrainedConfig) -> list[LayerShape]:
    """The widths that a per-layer config gives each layer."""
    shapes: list[LayerShape] = []
    for own in config.per_layer_config:
        attention, mlp = "attention" not in skipped(own), "mlp" not in skipped(own)
        heads = (own.num_attention_heads, own.num_key_value_heads) if attention else (0, 0)
        shapes.append(LayerShape(*heads, own.intermediate_size if mlp else 0))
    return shapes


def _stock_config(config: PreTrainedConfig, family: str, shapes: list[LayerShape]) -> PreTrainedConfig:
    """The stock config with the widest layer's numbers."""
    groups = {shape.query_heads // shape.kv_heads for shape in shapes if shape.kv_heads}
    if len(groups) > 1:
        raise ArchError(f"layers share a key/value head among {sorted(groups)} query heads; one number for all layers is wanted")
    fields: dict[str, Any] = {key: value for key, value in config.to_dict().items() if key not in _OWN} | _HEADS
    stock = CONFIG_MAPPING[family](**fields)
    # set afterwards, as the surgery does: the stock class insists that heads divide the hidden size, its arithmetic does not
    stock.num_key_value_heads = max((shape.kv_heads for shape in shapes), default=1) or 1
    stock.num_attention_heads = stock.num_key_value_heads * next(iter(groups), 1)
    stock.intermediate_size = max(1, *(shape.channels for shape in shapes))
    return stock
