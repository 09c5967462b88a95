"""A reopened per-layer model turned back into its stock class: the same function, and as editable as a freshly shrunk
model.
"""

import copy
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, PreTrainedModel, Qwen2Config, Qwen3Config

import compresso  # noqa: F401 - registers the per-layer classes
from compresso.arch.base import arch_for
from compresso.core.plan import Plan
from compresso.edit.shrink import shrink_
from compresso.edit.stock import as_stock
from compresso.formats.hf import save_checkpoint

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 24,
    "vocab_size": 60,
    "eos_token_id": None,
}
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES),
}
CUT = Plan(
    {
        "layers.0.heads": (),  # the first layer has no attention: cache slots must not shift
        "layers.1.heads": (1,),
        "layers.1.channels": tuple(range(0, 24, 3)),
        "layers.2.channels": (),
        "layers.3.channels": (0, 5, 7),
        "hidden": tuple(range(4, 32)),
    }
)
IDS = torch.arange(1, 17).reshape(2, 8)


def cut(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[name])).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.5 if parameter.dim() == 1 else 0, 0.3)
    shrink_(model, arch_for(model.config).axes(model), CUT)
    return model


@pytest.mark.parametrize("name", CONFIGS)
def test_a_reopened_model_is_as_editable_as_the_one_that_was_saved(name: str, tmp_path: Path) -> None:
    live = cut(name)
    arch = arch_for(live.config)
    assert save_checkpoint(live, arch.shapes(live), tmp_path / "saved") == "native"
    reopened = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    before = reopened(IDS).logits
    stock = as_stock(reopened)
    assert type(stock) is type(live)
    assert arch.shapes(stock) == arch.shapes(live)
    assert arch.axes(stock) == arch.axes(live)
    torch.testing.assert_close(stock(IDS).logits, before, atol=0, rtol=0)
    torch.testing.assert_close(stock(IDS).logits, live(IDS).logits, atol=1e-5, rtol=0)
    kwargs = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(stock.generate(IDS, **kwargs), live.generate(IDS, **kwargs))
    further = Plan({"layers.1.channels": (0, 2, 3), "hidden": tuple(range(20)), "layers": (0, 1, 3)})
    for model in (stock, live):
        shrink_(model, arch.axes(model), further)
    torch.testing.assert_close(stock(IDS).logits, live(IDS).logits, atol=1e-5, rtol=0)
    assert save_checkpoint(stock, arch.shapes(stock), tmp_path / "again") == "native"


def test_a_stock_model_is_returned_as_it_is() -> None:
    model = AutoModelForCausalLM.from_config(CONFIGS["llama"])
    assert as_stock(model) is model


def test_it_works_without_memory(tmp_path: Path) -> None:
    from compresso.checkpoint.load import meta_model
    from compresso.checkpoint.source import open_source

    live = cut("qwen2")
    arch = arch_for(live.config)
    save_checkpoint(live, arch.shapes(live), tmp_path / "saved")
    meta = meta_model(open_source(tmp_path / "saved"))
    assert {p.device.type for p in meta.parameters()} == {"meta"}
    assert arch_for(meta.config).shapes(meta) == arch.shapes(live)
