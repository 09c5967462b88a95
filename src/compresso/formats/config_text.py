"""The text of a config.json that readers of two generations understand alike.

transformers 5 keeps the rotary embedding in one field, `rope_parameters`, and the precision in `dtype`. transformers
4.57, and the converters and servers of its time, know neither: they look for `rope_theta`, `rope_scaling` and, before
4.56, `torch_dtype`, and compute with 10000 and no scaling where these are absent, unsaid. Both spellings are written.
A reader of the new one finds the same in it, because what version 5 makes of the old one is what the new one says.
"""

import json
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig

_OLD_NAMES = {"gpt_neox": ("rotary_emb_base", "rotary_pct")}
"""What families call theta and the rotated share of a head; the others: rope_theta, partial_rotary_factor."""
_LOCAL_THETA = {
    "gemma3_text": ("rope_theta", "rope_local_base_freq"),
    "gemma3n_text": ("rope_theta", "rope_local_base_freq"),
    "modernbert": ("global_rope_theta", "local_rope_theta"),
    "modernbert-decoder": ("global_rope_theta", "local_rope_theta"),
}
"""Families of two thetas: the names of that of full attention and that of sliding attention."""
_KINDS = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")
_THREE_FIELDS = ("phi3",)
"""Families whose older class accepts a scaling of type, short_factor and long_factor, and no other field."""


def config_text(config: PreTrainedConfig | Mapping[str, Any]) -> str:
    """config.json of a config, or of what such a file holds."""
    given = json.loads(config.to_json_string()) if isinstance(config, PreTrainedConfig) else config
    return json.dumps(for_both(given), indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def for_both(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json with the older spelling of what has a newer one, in configs inside it too.

    >>> both = for_both({"dtype": "bfloat16", "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}})
    >>> both["torch_dtype"], both["rope_theta"], both["rope_scaling"]
    ('bfloat16', 500000.0, None)
    """
    both = {
        key: for_both(value) if isinstance(value, Mapping) and "model_type" in value else value
        for key, value in config.items()
    }
    if isinstance(config.get("dtype"), str):
        both["torch_dtype"] = config["dtype"]
    if isinstance(rope := config.get("rope_parameters"), Mapping):
        both |= _older_rope(config, rope) or {}
    return both


def older_obstacle(config: Mapping[str, Any]) -> str | None:
    """What a reader of transformers 4 would compute otherwise or not at all; None if nothing is known to.

    Args:
        config: what a config.json holds.
    """
    if "per_layer_config" in config or str(config.get("model_type", "")).startswith("compresso_"):
        return "layers of different widths need what transformers 5 has for them"
    rope = config.get("rope_parameters")
    if isinstance(rope, Mapping) and _older_rope(config, rope) is None:
        return "no field of transformers 4 holds its rotary embedding"
    return None


def readers(config: Mapping[str, Any]) -> str:
    """A sentence on the versions of transformers that open a folder with this config.json."""
    if (obstacle := older_obstacle(config)) is not None:
        return f"transformers 5 opens it; older versions do not, or compute something else: {obstacle}."
    kind = config.get("model_type")
    return f"transformers 5 opens it, and 4.57 where it knows model_type {kind}: the config has both spellings."


def _older_rope(config: Mapping[str, Any], rope: Mapping[str, Any]) -> dict[str, Any] | None:
    """The older fields for a rotary embedding; None where they cannot say it."""
    kind = str(config.get("model_type", "")).removeprefix("compresso_")
    nested = {name: part for name, part in rope.items() if isinstance(part, Mapping)}
    if not all(_known(config, part) for part in nested.values() or [rope]):
        return None
    if not nested:
        theta, share = _OLD_NAMES.get(kind, ("rope_theta", "partial_rotary_factor"))
        return _flat(kind, config, rope, theta, share)
    full, sliding = nested.get("full_attention"), nested.get("sliding_attention")
    if full is None or sliding is None or len(nested) != 2 or _scaling(kind, sliding) is not None:
        return None
    if kind in _LOCAL_THETA:
        of_full, of_sliding = _LOCAL_THETA[kind]
        return {**_flat(kind, config, full, of_full, ""), of_sliding: sliding.get("rope_theta")}
    if kind == "olmo3" and full.get("rope_theta") == sliding.get("rope_theta"):  # its older class scales the full alone
        return _flat(kind, config, full, "rope_theta", "")
    return None


def _known(config: Mapping[str, Any], rope: Mapping[str, Any]) -> bool:
    """Whether transformers 4 has this kind of scaling, and computes the same by it."""
    if rope.get("rope_type", "default") not in _KINDS:
        return False
    original, longest = rope.get("original_max_position_embeddings"), config.get("max_position_embeddings")
    if rope.get("rope_type") != "longrope" or rope.get("attention_factor") or not original or not longest:
        return True
    return rope.get("factor") in (None, longest / original)  # it takes the ratio of the lengths for the factor


def _flat(kind: str, config: Mapping[str, Any], rope: Mapping[str, Any], theta: str, share: str) -> dict[str, Any]:
    """One rotary embedding in older fields.

    Args:
        kind: the family.
        config: that it belongs to.
        rope: as version 5 says it.
        theta, share: names of the fields for the base and for the rotated share of a head.
    """
    older = {theta: rope.get("rope_theta"), "rope_scaling": _scaling(kind, rope)}
    if share and "partial_rotary_factor" in rope:
        older[share] = rope["partial_rotary_factor"]
    original = rope.get("original_max_position_embeddings")
    if rope.get("rope_type") == "longrope" and original is not None:  # read from beside the scaling
        older["original_max_position_embeddings"] = config.get("original_max_position_embeddings") or original
    return older


def _scaling(kind: str, rope: Mapping[str, Any]) -> dict[str, Any] | None:
    """The field `rope_scaling`; None where nothing is scaled."""
    if rope.get("rope_type", "default") == "default":
        return None
    if kind in _THREE_FIELDS:
        return {"type": rope["rope_type"], "short_factor": rope["short_factor"], "long_factor": rope["long_factor"]}
    return {key: value for key, value in rope.items() if key not in ("rope_theta", "partial_rotary_factor")}
