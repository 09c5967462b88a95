"""Reading a decoder's shape off its modules, and telling its config the truth after an edit.

The stock forward and `generate` of transformers take widths from the weights. What they read from the config while
running: `num_hidden_layers` (how many layers run, how many cache slots exist), `layer_types` and `sliding_window` (each
layer's mask, each slot's cache), `head_dim` (scaled RoPE variants recompute their frequencies), and head counts only
for a pre-allocated cache with chunked prefill. So where layers differ in width, `num_attention_heads`,
`num_key_value_heads` and `intermediate_size` hold the widest layer and break nothing; an export that needs each layer's
widths asks the architecture for its shapes.

RMSNorm's eps is one config field. After hidden dimensions were removed, it is the eps of the norms over the residual
stream; norms inside an attention (Qwen3) keep their own in the live model, and a model rebuilt from the config differs
there by the size of eps itself.
"""

from collections.abc import Sequence

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from compresso.arch.absent import is_absent
from compresso.arch.base import LayerShape
from compresso.errors import ArchError

PLAIN_LAYER_TYPES = ("full_attention", "sliding_attention")
"""Layer types that differ only in which positions they see."""

_SUB_LAYERS = {"self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"), "mlp": ("gate_proj", "up_proj", "down_proj")}


def checked_shapes(
    model: PreTrainedModel, head_norms: Sequence[str], *, against_config: bool = True
) -> list[LayerShape]:
    """The widths of each layer.

    Raises:
        ArchError: a module or a width is not what the architecture, or the config, says.
    """
    config = model.config
    layers = _layers(model)
    hidden = model.get_parameter("model.norm.weight").shape[0]
    shapes = [_shape(layer, f"layers.{i}", hidden, head_norms) for i, layer in enumerate(layers)]
    known = {"model.norm.weight", "model.embed_tokens.weight", "lm_head.weight"}
    for i, shape in enumerate(shapes):
        for sub_layer, present, norm in (
            ("self_attn", shape.kv_heads, "input"),
            ("mlp", shape.channels, "post_attention"),
        ):
            if present:
                known.add(f"model.layers.{i}.{norm}_layernorm.weight")
                known.update(
                    f"model.layers.{i}.{sub_layer}.{linear}.{t}"
                    for linear in _SUB_LAYERS[sub_layer]
                    for t in ("weight", "bias")
                )
        known.update(f"model.layers.{i}.self_attn.{norm}.weight" for norm in head_norms)
    for name, _ in model.named_parameters():
        if name not in known:
            raise ArchError(
                f"parameter '{name}' is not part of a plain {config.model_type}; merge adapters and pass the unwrapped"
                " model"
            )
    if against_config:
        _check_config(model, shapes, hidden)
    return shapes


def sync_groups_(model: PreTrainedModel) -> None:
    """Set how many query heads share a key/value head, in every attention, to what its linears are."""
    for layer in _layers(model):
        attention = layer.get_submodule("self_attn")
        if not is_absent(attention):
            q, k = (attention.get_parameter(f"{name}.weight") for name in ("q_proj", "k_proj"))
            _set_fields_(attention, num_key_value_groups=q.shape[0] // k.shape[0])


def sync_config_(model: PreTrainedModel, shapes: Sequence[LayerShape]) -> None:
    """Set the config and the modules' shape fields to what the parameters are,
    and give each attention its cache slot.
    """
    config, layers = model.config, _layers(model)
    attentions = [layer.get_submodule("self_attn") for layer in layers]
    present = [attention for attention, shape in zip(attentions, shapes, strict=True) if shape.kv_heads]
    norm = model.get_submodule("model.norm")
    config.hidden_size = model.get_parameter("model.norm.weight").shape[0]
    config.rms_norm_eps = norm.variance_epsilon
    config.num_hidden_layers = len(layers)
    if present:
        config.head_dim = present[0].head_dim
        config.num_attention_heads = max(shape.query_heads for shape in shapes)
        config.num_key_value_heads = max(shape.kv_heads for shape in shapes)
    if any(shape.channels for shape in shapes):
        config.intermediate_size = max(shape.channels for shape in shapes)

    kinds = [
        getattr(attention, "layer_type", None) or "" if shape.kv_heads else None
        for attention, shape in zip(attentions, shapes, strict=True)
    ]
    labels, slots = cache_slots(kinds)
    for attention, slot in zip(attentions, slots, strict=True):
        if slot is not None:
            _set_fields_(attention, layer_idx=slot)
    if getattr(config, "layer_types", None) is not None:
        config.layer_types = [label or "full_attention" for label in labels]
        _set_fields_(model.get_submodule("model"), has_sliding_layers="sliding_attention" in config.layer_types)
    for layer, shape in zip(layers, shapes, strict=True):
        _set_fields_(layer, hidden_size=config.hidden_size)
        if shape.channels:
            _set_fields_(layer.get_submodule("mlp"), hidden_size=config.hidden_size, intermediate_size=shape.channels)


def cache_slots(kinds: Sequence[str | None]) -> tuple[list[str], list[int | None]]:
    """For each layer its type and the key/value cache slot of its attention.

    kinds: the layer types, None where a layer has no attention. transformers asks slot 0 for the past length and the
    first slot of a type for that type's mask, so these must be filled; slots get their type from `config.layer_types`,
    which is also where the forward looks up a layer's mask. Hence the k-th attention of a type takes the k-th slot of
    that type, and layers without attention, whose type nobody reads, lend their slot to the type of the first
    attention. With one type: slot = number of attentions before.
    """
    first = next((kind for kind in kinds if kind is not None), "")
    labels = [first if kind is None else kind for kind in kinds]
    free = {label: iter([i for i, other in enumerate(labels) if other == label]) for label in labels}
    return labels, [None if kind is None else next(free[kind]) for kind in kinds]


def _layers(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder layers. Raises ArchError if the model is not a causal language model of this form."""
    try:
        layers = model.get_submodule("model.layers")
        for name in ("model.embed_tokens", "model.norm", "lm_head"):
            model.get_parameter(f"{name}.weight")
    except AttributeError as error:
        raise ArchError(
            f"{type(model).__name__} is not a causal language model with a decoder: {error}; load it with its head"
        ) from error
    if not isinstance(layers, nn.ModuleList) or len(layers) == 0:
        raise ArchError(
            f"model.layers is a {type(layers).__name__} of no use here; wanted a ModuleList of at least one decoder"
            " layer"
        )
    return layers


def _shape(layer: nn.Module, where: str, hidden: int, head_norms: Sequence[str]) -> LayerShape:
    """The widths of one layer, read off its linears; `where` names it in messages."""
    attention, mlp = layer.get_submodule("self_attn"), layer.get_submodule("mlp")
    query_heads = kv_heads = channels = 0
    if not is_absent(attention):
        q, k, v, o = _linears(attention, _SUB_LAYERS["self_attn"], f"{where}.self_attn")
        head_dim, group = int(getattr(attention, "head_dim", 0)), int(getattr(attention, "num_key_value_groups", 0))
        missing = [norm for norm in head_norms if not hasattr(attention, norm)]
        if head_dim < 1 or group < 1 or missing:
            raise ArchError(
                f"{where}.self_attn lacks {missing or 'head_dim or num_key_value_groups'}; wanted the stock attention"
            )
        query_heads, kv_heads = q.out_features // head_dim, k.out_features // head_dim
        want = (
            (hidden, kv_heads * group * head_dim),
            (hidden, kv_heads * head_dim),
            (hidden, kv_heads * head_dim),
            (kv_heads * group * head_dim, hidden),
        )
        _check_widths((q, k, v, o), want, f"{where}.self_attn")
    if not is_absent(mlp):
        gate, up, down = _linears(mlp, _SUB_LAYERS["mlp"], f"{where}.mlp")
        channels = gate.out_features
        _check_widths((gate, up, down), ((hidden, channels), (hidden, channels), (channels, hidden)), f"{where}.mlp")
    return LayerShape(query_heads, kv_heads, channels)


def _linears(module: nn.Module, names: Sequence[str], where: str) -> list[nn.Linear]:
    """The named children. Raises ArchError if one is not a plain linear."""
    found: list[nn.Linear] = []
    for name in names:
        child = getattr(module, name, None)
        if type(child) is not nn.Linear:
            raise ArchError(
                f"{where}.{name} is {type(child).__name__}, wanted Linear; merge adapters or load unquantised weights"
            )
        found.append(child)
    return found


def _check_widths(linears: Sequence[nn.Linear], want: Sequence[tuple[int, int]], where: str) -> None:
    """Raise ArchError unless each linear's (in, out) is as wanted, in its fields and in its weight."""
    for linear, (width_in, width_out) in zip(linears, want, strict=True):
        if (linear.in_features, linear.out_features) != (width_in, width_out) or linear.weight.shape != (
            width_out,
            width_in,
        ):
            raise ArchError(
                f"{where} has a linear {tuple(linear.weight.shape)} where its neighbours want {(width_out, width_in)}"
            )


def _check_config(model: PreTrainedModel, shapes: Sequence[LayerShape], hidden: int) -> None:
    """Raise ArchError if the config contradicts the modules."""
    config: PreTrainedConfig = model.config
    embedding, head = model.get_parameter("model.embed_tokens.weight"), model.get_parameter("lm_head.weight")
    facts: dict[str, tuple[object, object]] = {
        "hidden_size": (config.hidden_size, hidden),
        "hidden_size and vocab_size": ((config.vocab_size, config.hidden_size), tuple(embedding.shape)),
        "hidden_size and vocab_size of the head": ((config.vocab_size, config.hidden_size), tuple(head.shape)),
        "num_hidden_layers": (config.num_hidden_layers, len(shapes)),
        "tie_word_embeddings": (config.tie_word_embeddings, head is embedding),
    }
    for field, (said, found) in facts.items():
        if said != found:
            raise ArchError(
                f"the config says {field}={said}, the modules say {found}; load the model and its config from one"
                " checkpoint"
            )
    types = getattr(config, "layer_types", None)
    if types is None:
        return
    other = sorted(set(types) - set(PLAIN_LAYER_TYPES))
    untyped = [
        i for i, shape in enumerate(shapes) if shape.kv_heads and not hasattr(_layers(model)[i].self_attn, "layer_type")
    ]
    if other or untyped or len(types) != len(shapes):
        raise ArchError(
            f"layer_types {other or types[:4]} are not those of a plain {config.model_type}; wanted"
            f" {' or '.join(PLAIN_LAYER_TYPES)}"
        )


def _set_fields_(module: nn.Module, **fields: int) -> None:
    """Set those fields that the module has."""
    for name, value in fields.items():
        if hasattr(module, name):
            setattr(module, name, value)
