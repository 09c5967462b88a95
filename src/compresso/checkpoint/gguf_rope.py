"""The rotary embedding of a GGUF file as transformers' `rope_parameters`.

Theta, linear and yarn scaling are fields. Llama 3's scaling is not: the file holds the factors themselves, one a
frequency, and the parameters that give them are found again. Its original length and the two bounds may all be
multiplied by one number, so the lower bound is 1.
"""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from compresso.checkpoint.gguf_fields import Fields

_THETA = 10_000.0
_YARN = {"beta_fast": 32.0, "beta_slow": 1.0}
_LENGTHS = (8192, *(2**power for power in range(4, 21)))
_WITHIN = 1e-4
"""Relative: factors are stored in float32, and computed from frequencies in float32."""


def rope_parameters(fields: Fields, head_dim: int, factors: Tensor | None) -> dict[str, Any]:
    """`rope_parameters` of the layers that attend to all.

    Args:
        fields: of the file.
        head_dim: dimensions of a head.
        factors: what each plain frequency is divided by [head_dim / 2]; None if the file has none.

    Raises:
        CheckpointError: for a scaling that is not read.
    """
    turned = fields.integer("rope.dimension_count", head_dim)
    if turned != head_dim:
        raise fields.refuse(f"turns {turned} of the {head_dim} dimensions of a head, and files that turn all are read.")
    theta = fields.number("rope.freq_base", _THETA)
    kind = fields.text("rope.scaling.type", "linear" if fields.has("rope.scale_linear") else "none")
    factor = fields.number("rope.scaling.factor", fields.number("rope.scale_linear", 1.0))
    if theta <= 0 or factor <= 0:
        raise fields.refuse(f"has the rope base {theta:g} and factor {factor:g}; positive numbers are wanted.")
    if factors is not None:
        if kind not in ("none", "llama3") and factor != 1.0:
            raise fields.refuse(f"scales its rope twice, by rope_freqs.weight and by {kind}. Convert the model again.")
        return _llama3(fields, head_dim, theta, factors)
    if kind == "yarn":
        return _yarn(fields, theta, factor)
    if kind not in ("none", "linear"):
        raise fields.refuse(f"scales its rope by '{kind[:40]}'; none, linear, yarn and Llama 3's factors are read.")
    if kind == "none" or factor == 1.0:
        return {"rope_type": "default", "rope_theta": theta}
    return {"rope_type": "linear", "rope_theta": theta, "factor": factor}


def _yarn(fields: Fields, theta: float, factor: float) -> dict[str, Any]:
    """Yarn: llama.cpp multiplies its own attention factor by the file's."""
    found: dict[str, Any] = {"rope_type": "yarn", "rope_theta": theta, "factor": factor}
    found["original_max_position_embeddings"] = fields.integer("rope.scaling.original_context_length")
    for name, default in _YARN.items():
        if (given := fields.number(f"rope.scaling.yarn_{name}", default)) != default:
            found[name] = given
    if (given := fields.number("rope.scaling.attn_factor", 1.0)) != 1.0:
        found["attention_factor"] = given * (0.1 * math.log(factor) + 1.0)
    if fields.number("rope.scaling.yarn_log_multiplier", 0.0):
        raise fields.refuse("has rope.scaling.yarn_log_multiplier, which is not read.")
    return found


def _llama3(fields: Fields, head_dim: int, theta: float, factors: Tensor) -> dict[str, Any]:
    """Parameters of Llama 3's scaling that give these factors."""
    if tuple(factors.shape) != (head_dim // 2,) or not bool((torch.isfinite(factors) & (factors > 0)).all()):
        raise fields.refuse(
            f"has rope_freqs.weight {list(factors.shape)}; positive numbers [{head_dim // 2}] are wanted."
        )
    plain = {"rope_type": "default", "rope_theta": theta}
    if bool((factors == 1).all()):
        return plain
    context = fields.integer("rope.scaling.original_context_length", 0)
    for length, low, high in _candidates(head_dim, theta, factors, context):
        found = {
            **plain,
            "rope_type": "llama3",
            "factor": float(factors.max()),
            "low_freq_factor": low,
            "high_freq_factor": high,
            "original_max_position_embeddings": length,
        }
        if torch.allclose(_factors(found, head_dim), factors, rtol=_WITHIN, atol=0):
            return found
    raise fields.refuse("has rope_freqs.weight with factors that Llama 3's rope scaling does not give.")


def _candidates(head_dim: int, theta: float, factors: Tensor, context: int) -> Iterator[tuple[int, float, float]]:
    """Original length and bounds: the published ones first, then those that a straight line through the factors gives.

    Between the bounds, 1 / factor falls linearly with the wavelength's reciprocal.
    """
    for length in (*((context,) if context else ()), *_LENGTHS):
        yield length, 1.0, 4.0
    waves = 2 * math.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    most = float(factors.max())
    smooth = (most / factors.double().numpy() - 1) / (most - 1) if most > 1 else np.zeros(len(waves))
    inside = (smooth > 1e-4) & (smooth < 1 - 1e-4)
    if inside.sum() >= 2:
        slope, intercept = np.polyfit(1 / waves[inside], smooth[inside], 1)
        high = 1 - 1 / intercept if intercept < 0 else 0.0
        if high > 1:
            yield max(1, round(float(slope * (high - 1)))), 1.0, float(high)


def _factors(parameters: dict[str, Any], head_dim: int) -> Tensor:
    """What transformers divides each plain frequency by."""
    config = LlamaConfig(
        hidden_size=head_dim,
        head_dim=head_dim,
        num_attention_heads=1,
        num_key_value_heads=1,
        rope_parameters=dict(parameters),
        max_position_embeddings=2**27,
    )
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    return parameters["rope_theta"] ** -exponents / scaled
