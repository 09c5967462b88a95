"""A config.json is read alike in both spellings: version 5 finds in the older one what the newer one says, and the
older fields hold what transformers 4.57 computes by.
"""

import json
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, LlamaConfig

from compresso.formats.config_text import config_text, for_both, older_obstacle, readers

SMALL = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
THETA = 5e5
SCALED: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 20.0},
    "longrope": {
        "short_factor": [1.0] * 8,
        "long_factor": [2.0] * 8,
        "factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
}
LAYERS = ["sliding_attention", "full_attention", "sliding_attention"]
TWO_KINDS = {"head_dim": 16, "sliding_window": 8, "layer_types": LAYERS}


def rope(kind: str, **more: Any) -> dict[str, Any]:
    return {"rope_type": kind, "rope_theta": THETA, **SCALED[kind], **more}


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{f"llama {kind}": ("llama", {"rope_parameters": rope(kind)}) for kind in SCALED},
    "qwen2 yarn": ("qwen2", {"rope_parameters": rope("yarn")}),
    "qwen3 default": ("qwen3", {"rope_parameters": rope("default"), "head_dim": 16}),
    "mistral": ("mistral", {"rope_parameters": rope("default")}),
    "gemma2": ("gemma2", {"rope_parameters": rope("default"), "head_dim": 16}),
    "phi": ("phi", {"rope_parameters": rope("default", partial_rotary_factor=0.5)}),
    "gpt_neox": ("gpt_neox", {"rope_parameters": rope("linear", partial_rotary_factor=0.5)}),
    "phi3 longrope": (
        "phi3",
        {
            "rope_parameters": rope("longrope") | {"factor": None},
            "original_max_position_embeddings": 16,
        },
    ),
    "gemma3": (
        "gemma3_text",
        {
            "rope_parameters": {
                "full_attention": rope("linear"),
                "sliding_attention": rope("default") | {"rope_theta": 3e4},
            },
            **TWO_KINDS,
        },
    ),
    "olmo3": (
        "olmo3",
        {"rope_parameters": {"full_attention": rope("yarn"), "sliding_attention": rope("default")}, **TWO_KINDS},
    ),
    "gpt2": ("gpt2", {"n_embd": 64, "n_layer": 3, "n_head": 4}),
    "opt": ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 64}),
}


def made(case: str) -> Any:
    family, fields = CASES[case]
    if family == "phi3":
        fields["rope_parameters"].pop("factor", None)
    config = CONFIG_MAPPING[family](**(SMALL | fields))
    config.dtype = torch.bfloat16
    return config


def said(rotary: Any) -> Any:
    """A rotary embedding without the name that its kind had before."""
    if not isinstance(rotary, dict):
        return rotary
    return {key: said(value) for key, value in rotary.items() if key != "type"}


@pytest.mark.parametrize("case", CASES)
def test_version_5_reads_the_same_in_both_spellings(case: str) -> None:
    config = made(case)
    written = json.loads(config_text(config))
    assert older_obstacle(written) is None and "and 4.57" in readers(written)
    older = {key: value for key, value in written.items() if key not in ("rope_parameters", "dtype")}
    for text in (written, older):
        again = CONFIG_MAPPING[CASES[case][0]].from_dict(text)
        assert said(getattr(again, "rope_parameters", None)) == said(getattr(config, "rope_parameters", None))
        assert again.dtype == torch.bfloat16
        given, found = config.to_dict(), again.to_dict()
        other = {key for key in given.keys() & found.keys() if said(given[key]) != said(found[key])}
        assert other == set()


@pytest.mark.parametrize("case", ["llama llama3", "phi3 longrope", "gemma3", "gpt_neox"])
def test_a_model_of_either_spelling_computes_the_same(case: str) -> None:
    config = made(case)
    written = json.loads(config_text(config))
    older = {key: value for key, value in written.items() if key not in ("rope_parameters", "dtype")}
    ids, logits = torch.arange(40).unsqueeze(0), []
    for text in (json.loads(config.to_json_string()), written, older):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[CASES[case][0]].from_dict(text)).float().eval()
        with torch.no_grad():
            logits.append(model(ids).logits)
    assert torch.equal(logits[0], logits[1]) and torch.equal(logits[0], logits[2])


def test_older_fields_hold_what_older_readers_look_for() -> None:
    def older(case: str) -> dict[str, Any]:
        return json.loads(config_text(made(case)))

    llama = older("llama llama3")
    assert (llama["torch_dtype"], llama["rope_theta"]) == ("bfloat16", THETA)
    assert llama["rope_scaling"] == {"rope_type": "llama3", **SCALED["llama3"]}
    assert older("llama default")["rope_scaling"] is None
    assert older("llama longrope")["original_max_position_embeddings"] == 16
    phi3 = older("phi3 longrope")["rope_scaling"]  # the older class refuses a fourth field
    assert phi3 == {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    neox = older("gpt_neox")
    assert (neox["rotary_emb_base"], neox["rotary_pct"], neox["rope_scaling"]["factor"]) == (THETA, 0.5, 4.0)
    assert older("phi")["partial_rotary_factor"] == 0.5
    gemma = older("gemma3")
    assert (gemma["rope_theta"], gemma["rope_local_base_freq"]) == (THETA, 3e4)
    assert gemma["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}


def test_configs_inside_a_config_are_spelled_twice_too() -> None:
    inner = {"model_type": "llama", "dtype": "float16", "rope_parameters": rope("default")}
    found = for_both({"model_type": "llava", "text_config": inner})["text_config"]
    assert (found["torch_dtype"], found["rope_theta"]) == ("float16", THETA)


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "compresso_llama", "rope_parameters": rope("default")},
        {
            "model_type": "gemma3_text",
            "rope_parameters": {"full_attention": rope("default"), "chunked": rope("linear")},
        },
        {
            "model_type": "olmo3",
            "rope_parameters": {
                "full_attention": rope("default"),
                "sliding_attention": rope("default") | {"rope_theta": 1},
            },
        },
        {"model_type": "llama", "rope_parameters": {"rope_type": "proportional", "rope_theta": THETA}},
        {"model_type": "llama", "max_position_embeddings": 128, "rope_parameters": rope("longrope")},
    ],
    ids=["widths", "kinds", "two thetas", "unknown kind", "factor that is not the ratio"],
)
def test_what_older_readers_cannot_compute_is_said(config: dict[str, Any]) -> None:
    assert older_obstacle(config) is not None
    assert "older versions do not" in readers(config)


def test_no_field_is_invented_for_a_model_without_rotary_embedding() -> None:
    config = json.loads(CONFIG_MAPPING["gpt2"]().to_json_string())
    assert for_both(config) == config
    assert "rope_parameters" in json.loads(LlamaConfig().to_json_string())
