"""Config and shape fields of a decoder with mixtures of experts, set to what its parameters are; see `arch/moe.py`."""

from torch import nn
from transformers import PreTrainedModel

from compresso.arch.decoder_shape import cache_slots
from compresso.arch.mixture import EXPERTS, Mixture
from compresso.arch.moe_shape import MoeFamily, layers_of, read_shapes

COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
"""What configs call the number of experts; some have one field under two names."""
PER_TOKEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "top_k_experts", "moe_k", "moe_top_k")
"""What configs call the number of experts that a token takes."""


def sync_moe_(family: MoeFamily, model: PreTrainedModel) -> None:
    """Set config and shape fields to what the parameters are, and give each attention its cache slot."""
    config, layers = model.config, layers_of(model)
    shapes, mixtures = read_shapes(family, model)
    norm = model.get_submodule("model.norm")
    config.hidden_size, config.rms_norm_eps = len(norm.get_parameter("weight")), norm.variance_epsilon
    config.num_hidden_layers = len(layers)
    if not family.heads_stay and (present := [i for i, shape in enumerate(shapes) if shape.kv_heads]):
        config.head_dim = int(layers[present[0]].get_submodule("self_attn").head_dim)  # pyright: ignore[reportArgumentType]
        config.num_attention_heads = max(shape.query_heads for shape in shapes)
        config.num_key_value_heads = max(shape.kv_heads for shape in shapes)
    dense = [i for i, shape in enumerate(shapes) if shape.channels and not shape.experts]
    if mixtures:
        count = max(mixture.experts for mixture in mixtures.values())
        for field in COUNTS:
            if hasattr(config, field):
                setattr(config, field, count)
            if hasattr(model, field):
                setattr(model, field, count)
        setattr(config, family.width, max(mixture.width for mixture in mixtures.values()))
        if not all(fits_grouped(mixture, model) for mixture in mixtures.values()):
            config._experts_implementation = "eager"
    if dense and family.width != "intermediate_size":
        config.intermediate_size = max(shapes[i].channels for i in dense)
    if hasattr(config, "mlp_only_layers"):
        config.mlp_only_layers, config.decoder_sparse_step = dense, 1
    if hasattr(config, "first_k_dense_replace"):
        config.first_k_dense_replace = next((i for i, shape in enumerate(shapes) if shape.experts), len(shapes))
    kinds = [
        getattr(layer.self_attn, "layer_type", None) or "" if shape.kv_heads else None
        for layer, shape in zip(layers, shapes, strict=True)
    ]
    labels, slots = cache_slots(kinds)
    if getattr(config, "layer_types", None) is not None:
        config.layer_types = [label or "full_attention" for label in labels]
    for i, (layer, shape, slot) in enumerate(zip(layers, shapes, slots, strict=True)):
        if slot is not None:
            groups = {} if family.heads_stay else {"num_key_value_groups": shape.query_heads // shape.kv_heads}
            _set_fields_(layer.get_submodule("self_attn"), {"layer_idx": slot} | groups)
        fields = {"hidden_size": config.hidden_size, "hidden_dim": config.hidden_size}
        _set_fields_(layer, fields)
        if i in mixtures:
            mixture = mixtures[i]
            fields |= {"num_experts": mixture.experts, "intermediate_dim": mixture.width}
            for part in ("mlp", f"mlp.{mixture.router}", f"mlp.{EXPERTS}"):
                _set_fields_(layer.get_submodule(part), fields | {"intermediate_size": mixture.width})
            if mixture.shared:
                shared = layer.get_submodule(f"mlp.{mixture.shared}")
                _set_fields_(shared, {"hidden_size": config.hidden_size})
        elif shape.channels:
            _set_fields_(layer.get_submodule("mlp"), fields | {"intermediate_size": shape.channels})


def fits_grouped(mixture: Mixture, model: PreTrainedModel) -> bool:
    """Whether the product that transformers takes by default for stacked experts takes these: rows of 16 bytes."""
    itemsize = model.get_parameter(mixture.down).element_size()
    return not any(width * itemsize % 16 for width in (mixture.width, mixture.hidden))


def _set_fields_(module: nn.Module, fields: dict[str, int]) -> None:
    """Set those fields that the module has."""
    for name, value in fields.items():
        if hasattr(module, name):
            setattr(module, name, value)
