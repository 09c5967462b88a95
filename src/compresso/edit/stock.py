"""A per-layer model as its family's stock class, the form in which models are edited.

`shrink_` leaves a stock class with narrower modules. A model reopened from the native layout has the same modules under
our own class; here they are moved back, so that whatever can be done to a freshly shrunk model can be done to a
reopened one.
"""

import copy

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from compresso.arch.base import arch_for
from compresso.core.axis import Kind
from compresso.native import family_of, stock_type


def as_stock(model: PreTrainedModel) -> PreTrainedModel:
    """The same model as its family's stock class; a model that is stock already is returned as it is.

    Modules are moved, not copied: use the result in place of `model`. Works on the meta device.
    """
    family = stock_type(model.config.model_type)
    if family == model.config.model_type:
        return model
    given = copy.deepcopy(model.config).to_dict()
    for field in (
        "per_layer_config",
        "model_type",
        "auto_map",
        "architectures",
        "head_norm_eps",
        "transformers_version",
    ):
        given.pop(field, None)
    # widths are placeholders until sync_config_ reads the modules; one head of the real head_dim passes every family's
    # validation. Mixtures of experts have no such rule, and some of their attentions stay whole
    ones = {"num_attention_heads": 1, "num_key_value_heads": 1, "intermediate_size": 1} if family_of(family) else {}
    config = CONFIG_MAPPING[family](**{**given, **ones})
    config.dtype = model.config.dtype
    with torch.device("meta"):
        stock: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, attn_implementation=model.config._attn_implementation
        )
    arch = arch_for(config)
    inner, own = stock.get_submodule("model"), model.get_submodule("model")
    for name in ("embed_tokens", "norm", "rotary_emb"):
        setattr(inner, name, own.get_submodule(name))
    stock.lm_head = model.get_submodule("lm_head")
    for block, reopened in zip(arch.blocks(stock), own.layers, strict=True):  # type: ignore[arg-type]
        for part, norm, kind in (
            ("self_attn", "input_layernorm", Kind.ATTENTION),
            ("mlp", "post_attention_layernorm", Kind.MLP),
        ):
            if getattr(reopened, part) is None:
                arch.empty_(block, kind)
            else:
                setattr(block, part, getattr(reopened, part))
                setattr(block, norm, getattr(reopened, norm))
                for module in getattr(block, part).modules():
                    if hasattr(module, "config"):
                        module.config = config
    arch.sync_config_(stock)
    stock.generation_config = model.generation_config
    return stock.train(model.training)
