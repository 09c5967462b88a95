"""The per-layer classes as models: generation with every cache, padding, attention kernels, gradients; opened without
compresso.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel

import compresso  # noqa: F401  # registers the classes
from compresso.formats.hf import save_checkpoint
from compresso.native import CLASSES, MODELING_FILE, family_of, register
from tests.formats.narrow import FAMILIES, NO_FIRST_ATTENTION, SHAPES, narrow_model, some_ids

ALONE = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoModel, AutoConfig
folder, ids, logits = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
assert "compresso" not in sys.modules and type(model).__module__.startswith("transformers_modules")
with torch.no_grad():
    found = model(torch.load(ids)).logits
assert (found - torch.load(logits)).abs().max() <= 1e-6
assert AutoConfig.from_pretrained(folder, trust_remote_code=True).model_type == "compresso_qwen2"
assert type(AutoModel.from_pretrained(folder, trust_remote_code=True)).__name__ == "CompressoQwen2Model"
"""


def native(family: str, name: str, folder: Path) -> PreTrainedModel:
    save_checkpoint(narrow_model(family, SHAPES[name]), SHAPES[name], folder, "native")
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["no middle attention", "no first attention", "no FFN"])
def test_generation(family: str, name: str, tmp_path: Path) -> None:
    model = native(family, name, tmp_path)
    ids = some_ids(2, 6)
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    slow = model.generate(ids, use_cache=False, **options)
    assert slow.shape == (2, 11)
    assert torch.equal(slow, model.generate(ids, **options))
    assert torch.equal(slow, model.generate(ids, cache_implementation="static", disable_compile=True, **options))
    assert torch.equal(slow[:, :8], model.generate(slow[:, :7], **options | {"max_new_tokens": 1}))

    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), ids[:1, :6]], dim=1)  # left-padded beside a longer one
    longer = some_ids(2, 9)[1:]
    batch = torch.cat([padded, longer])
    mask = torch.ones_like(batch)
    mask[0, :3] = 0
    together = model.generate(batch, attention_mask=mask, **options)
    assert torch.equal(together[:1, 3:], slow[:1])
    assert torch.equal(together[1:], model.generate(longer, **options))


def test_beam_search(tmp_path: Path) -> None:
    model = native("llama", "no first attention", tmp_path)
    options = {"max_new_tokens": 4, "do_sample": False, "num_beams": 3}
    assert torch.equal(model.generate(some_ids(), **options), model.generate(some_ids(), use_cache=False, **options))


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_kernels_agree(family: str, tmp_path: Path) -> None:
    model = native(family, "uneven", tmp_path)
    with torch.no_grad():
        outputs = {}
        for kernel in ("sdpa", "eager"):
            model.set_attn_implementation(kernel)
            assert {layer.self_attn.config._attn_implementation for layer in model.model.layers} == {kernel}
            outputs[kernel] = model(some_ids()).logits
    assert torch.allclose(outputs["sdpa"], outputs["eager"], atol=1e-5)
    recorded = model(some_ids(), output_attentions=True, output_hidden_states=True)
    assert [attention.shape[1] for attention in recorded.attentions] == [4, 6, 2, 4]
    assert len(recorded.hidden_states) == 5


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing_gives_the_same_gradients(family: str, tmp_path: Path) -> None:
    model = native(family, "no FFN", tmp_path).train()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.activation_checkpointing_enable()
            assert all(layer.gradient_checkpointing for layer in model.model.layers)
        model.zero_grad()
        model(some_ids(), labels=some_ids(), use_cache=False).loss.backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))
    assert all(float(one.abs().max()) > 0 for one in gradients[0])


@pytest.mark.slow
def test_opens_without_compresso_by_trust_remote_code(tmp_path: Path) -> None:
    live = narrow_model("qwen2", NO_FIRST_ATTENTION)
    save_checkpoint(live, NO_FIRST_ATTENTION, tmp_path / "out", "native")
    with torch.no_grad():
        torch.save(live(some_ids()).logits, tmp_path / "logits")
    torch.save(some_ids(), tmp_path / "ids")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {
        "HF_HOME": str(tmp_path / "hf")
    }
    done = subprocess.run(
        [sys.executable, "-P", "-c", ALONE, tmp_path / "out", tmp_path / "ids", tmp_path / "logits"],
        env=environment | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    for line in MODELING_FILE.read_text().splitlines():
        if line.startswith(("import ", "from ")):
            assert line.split()[1].split(".")[0] in ("torch", "transformers", "huggingface_hub")


def test_registration_is_idempotent() -> None:
    register()
    register()
    for family, (config, decoder, language_model) in CLASSES.items():
        assert family_of(family) == family_of(config.model_type) == family
        made = AutoConfig.for_model(
            config.model_type, head_dim=8, num_hidden_layers=1, hidden_size=16, intermediate_size=8, vocab_size=9
        )
        assert type(made) is config
        with torch.device("meta"):
            assert type(AutoModel.from_config(made)) is decoder
            assert type(AutoModelForCausalLM.from_config(made)) is language_model
    assert family_of("gpt2") is None


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({0: {"num_key_value_heads": 4}}, "Layer 0 has 6 attention heads for 4 key/value heads"),
        ({1: {"skip": ["norm"]}}, r"Layer 1 skips \['norm'\]"),
        ({1: {"intermediate_size": 0}}, "Layer 1 has intermediate_size 0"),
    ],
)
def test_impossible_layers_are_named(layers: dict[int, dict[str, object]], message: str) -> None:
    fields = {
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "head_dim": 8,
        "hidden_size": 40,
    }
    with pytest.raises(StrictDataclassError, match=message):
        CLASSES["llama"][0](**fields, per_layer_config=layers)
    CLASSES["llama"][0](**fields)  # 6 heads do not divide 40, and need not


@pytest.mark.parametrize("family", FAMILIES)
def test_a_config_of_defaults_can_be_built(family: str) -> None:
    """Older versions of transformers build one to see which fields differ from it; Qwen2 has no head_dim of its own."""
    made = AutoConfig.for_model(f"compresso_{family}")
    assert made.model_type == f"compresso_{family}"


def test_heads_that_do_not_say_their_width_are_refused() -> None:
    with pytest.raises(StrictDataclassError, match="`head_dim` must be given"):
        AutoConfig.for_model(
            "compresso_qwen2",
            num_hidden_layers=2,
            per_layer_config={0: {"num_attention_heads": 16, "num_key_value_heads": 16}},
        )
