"""Writing a shrunk LLaMA or Mistral as a DeciLM, the per-layer form that vLLM has a class of its own for
(`nemotron_nas.py`).

FFNs keep the width of their layer. Query heads are one number for the whole model there, so that narrower attentions
are filled with zeros to the widest, which computes the same; an absent attention or FFN is a `no_op`, but for the first
attention, which that class cannot do without: it is written as zeros. Run in vLLM 0.32 on CPU: the same greedy
tokens as transformers.
"""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import save_torch_state_dict
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from compresso.arch.base import LayerShape
from compresso.checkpoint.atomic import new_folder
from compresso.checkpoint.code import Shipped
from compresso.errors import ExportError
from compresso.formats.beside import write_beside
from compresso.formats.layout import widest
from compresso.formats.pad import pad_tensors
from compresso.formats.shrunk import Shrunk, describe

CONFIGURATION = Path(__file__).with_name("configuration_decilm.py")
DECI_CLASS = (Shipped(CONFIGURATION, frozenset({"DeciLMConfig"})),)
_KEPT = (
    "vocab_size",
    "max_position_embeddings",
    "rope_parameters",
    "hidden_act",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)


def save_vllm_deci(
    model: PreTrainedModel,
    shapes: Sequence[LayerShape],
    folder: Path | str,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    force: bool = False,
    check: Callable[[Path], None] | None = None,
    source: Path | None = None,
) -> None:
    """Write weights, config with its class, and tokenizer; `folder` is complete or untouched.

    Args:
        model: live, of a stock class.
        shapes: widths of each layer; 0 for an absent sub-layer.
        tokenizer: written beside it.
        force: replace a folder that is not empty.
        check: looks at the written folder before it takes its name; what it raises leaves nothing behind.
        source: the folder that the model came from; what it holds beside weights and config is carried over.

    Raises ExportError naming what a DeciLM does not hold, CheckpointError if `folder` may not be written.
    """
    described = describe(model, shapes)
    _check(described)
    config, tensors = deci_config(described, model), deci_tensors(described)
    with new_folder(folder, force) as temporary:
        stored = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
        save_torch_state_dict(stored, temporary, metadata={"format": "pt"})
        shutil.copyfile(CONFIGURATION, temporary / CONFIGURATION.name)
        write_beside(temporary, config, model, tokenizer, source)
        if check is not None:
            check(temporary)


def deci_shapes(model: Shrunk) -> list[LayerShape]:
    """The widths that are written: one number of heads in every attention, each FFN's own channels."""
    wide = widest(model)
    there = [bool(shape.kv_heads) or index == 0 for index, shape in enumerate(model.shapes)]
    return [
        LayerShape(wide.query_heads, wide.kv_heads, shape.channels) if attends else LayerShape(0, 0, shape.channels)
        for attends, shape in zip(there, model.shapes, strict=True)
    ]


def deci_config(model: Shrunk, live: PreTrainedModel) -> dict[str, Any]:
    """config.json."""
    wide, given = widest(model), live.config.to_dict()
    blocks = [
        {
            "attention": {
                "no_op": not shape.kv_heads,
                "n_heads_in_group": wide.query_heads // wide.kv_heads if shape.kv_heads else None,
            },
            "ffn": {"no_op": not shape.channels, "intermediate_size": shape.channels or None},
        }
        for shape in deci_shapes(model)
    ]
    hidden = model.tensors["model.embed_tokens.weight"].shape[1]
    return {
        "architectures": ["DeciLMForCausalLM"],
        "model_type": "nemotron-nas",
        "auto_map": {"AutoConfig": f"{CONFIGURATION.stem}.DeciLMConfig"},
        **{key: given[key] for key in _KEPT if key in given},
        "hidden_size": hidden,
        "num_hidden_layers": len(model.shapes),
        "num_attention_heads": wide.query_heads,
        "num_key_value_heads": wide.kv_heads,
        "head_dim": model.head_dim,
        "intermediate_size": wide.channels,
        "rms_norm_eps": model.eps,
        "tie_word_embeddings": model.tied,
        "attention_bias": False,
        "mlp_bias": False,
        "dtype": str(live.dtype).removeprefix("torch."),
        "block_configs": blocks,
    }


def deci_tensors(model: Shrunk) -> dict[str, Tensor]:
    """The tensors, heads filled with zeros to the widest."""
    dim, expected = model.head_dim, dict[str, tuple[int, ...]]()
    hidden = model.tensors["model.embed_tokens.weight"].shape[1]
    for index, shape in enumerate(deci_shapes(model)):
        layer = f"model.layers.{index}"
        if shape.kv_heads:
            q, kv = shape.query_heads * dim, shape.kv_heads * dim
            expected[f"{layer}.input_layernorm.weight"] = (hidden,)
            sizes = {"q_proj": (q, hidden), "k_proj": (kv, hidden), "v_proj": (kv, hidden), "o_proj": (hidden, q)}
            expected |= {f"{layer}.self_attn.{part}.weight": size for part, size in sizes.items()}
        if shape.channels:
            expected[f"{layer}.post_attention_layernorm.weight"] = (hidden,)
            sizes = {
                "gate_proj": (shape.channels, hidden),
                "up_proj": (shape.channels, hidden),
                "down_proj": (hidden, shape.channels),
            }
            expected |= {f"{layer}.mlp.{part}.weight": size for part, size in sizes.items()}
    outside = {
        name: tuple(tensor.shape) for name, tensor in model.tensors.items() if not name.startswith("model.layers.")
    }
    return pad_tensors(model.tensors, {**outside, **expected}, model.shapes, widest(model), dim)


def _check(model: Shrunk) -> None:
    """Raise ExportError naming what a DeciLM does not hold."""
    cure = "Keep the native folder, which vLLM reads through transformers."
    if model.family not in ("llama", "mistral"):
        raise ExportError(f"vllm-deci is written for llama and mistral, not for model_type '{model.family}'. {cure}")
    if biased := sorted(name for name in model.tensors if name.endswith(".bias")):
        raise ExportError(f"{biased[0]} is a bias, and none is written to vllm-deci. {cure}")
    window = getattr(model.config, "sliding_window", None)
    if model.family == "mistral" and window is not None and window < model.config.max_position_embeddings:
        raise ExportError(f"config.sliding_window is {window}, and DeciLM attends to all. Set it to null. {cure}")
    if not any(shape.kv_heads for shape in model.shapes):
        raise ExportError(f"no layer has an attention, and DeciLM wants one. {cure}")
