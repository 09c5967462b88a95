"""SliceGPT on whole models. The oracles: the model itself where nothing is deleted, a plain loop over whole models for
the bases, a planted subspace for losslessness, and the published sizes.
"""

import copy
import shutil
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    OPTConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from compresso.arch.base import arch_for
from compresso.arch.sliceable import sliceable, sliced_counts
from compresso.edit.patches import unpatch_
from compresso.edit.slice_stream import slice_stream_, slice_stream_patch
from compresso.errors import ArchError, RecipeError
from compresso.formats.own_class import own_config
from compresso.formats.sliced import sliced_tensors
from compresso.methods.slicegpt import SliceGPT
from compresso.native import SLICED_CLASSES, SLICED_FILE
from compresso.sweep.slicing import bases_of
from tests.methods.conftest import MakeJob

CONTRACT = {"only_if_smaller": False, "examples": 8, "batch": 4}
SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
ROTARY = {**SIZES, "num_key_value_heads": 2, "intermediate_size": 48}
FAMILIES: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": partial(LlamaConfig, **ROTARY, tie_word_embeddings=True),
    "mistral": partial(MistralConfig, **ROTARY),
    "qwen2": partial(Qwen2Config, **ROTARY, rms_norm_eps=1e-2),
    "qwen3": partial(Qwen3Config, **ROTARY, head_dim=8),
    "opt": partial(OPTConfig, **SIZES, ffn_dim=48, word_embed_proj_dim=32),
    "gpt2": partial(GPT2Config, vocab_size=64, n_embd=32, n_layer=2, n_head=4, layer_norm_epsilon=1e-2),
}
IDS = torch.randint(3, 64, (6, 20), generator=torch.Generator().manual_seed(0))
BATCHES = (IDS[:3], IDS[3:])
every_family = pytest.mark.parametrize("family", FAMILIES)


def tiny(family: str) -> PreTrainedModel:
    """A model whose norms have gains and shifts of their own, and whose linears have biases where there are any."""
    model = AutoModelForCausalLM.from_config(FAMILIES[family]()).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * (0.2 if parameter.dim() > 1 else 0.3))
    return model


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def narrower(model: PreTrainedModel, bases: Tensor, head: Tensor) -> PreTrainedModel:
    """The model of our class with the weights that the export writes."""
    config_class, language_model = SLICED_CLASSES[model.config.model_type]
    widths = {"stream_width": bases.shape[2], "head_width": head.shape[1], "tie_word_embeddings": False}
    made = language_model(own_config(model, config_class, language_model, SLICED_FILE, **widths)).eval()
    made.load_state_dict(sliced_tensors(model, slice_stream_patch(bases, head)))
    return made


@every_family
def test_nothing_deleted_is_the_dense_model_rotated(family: str) -> None:
    model = tiny(family)
    dense = logits(model)
    found = bases_of(model, arch_for(model.config), BATCHES, 32, 32, 0.01)
    rotated = narrower(model, found.bases, found.head)
    assert not torch.allclose(rotated.get_input_embeddings().weight, model.get_input_embeddings().weight, atol=0.1)
    torch.testing.assert_close(logits(rotated), dense, atol=1e-4, rtol=0)
    slice_stream_(model, found.bases, found.head)
    torch.testing.assert_close(logits(model), dense, atol=1e-4, rtol=0)


@every_family
def test_the_narrower_model_computes_what_the_patched_one_does_also_with_a_cache(family: str) -> None:
    model = tiny(family)
    dense = logits(model)
    found = bases_of(model, arch_for(model.config), BATCHES, 24, 24 if family == "gpt2" else 28, 0.01)
    small = narrower(model, found.bases, found.head)
    slice_stream_(model, found.bases, found.head)
    cut = logits(model)
    torch.testing.assert_close(logits(small), cut, atol=1e-4, rtol=0)
    assert (cut - dense).abs().max() > 0.1
    ask: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    cached, plain = (small.generate(IDS[:1, :5], use_cache=use, **ask) for use in (True, False))
    assert torch.equal(cached, plain) and torch.equal(cached, model.generate(IDS[:1, :5], **ask))
    unpatch_(model)
    torch.testing.assert_close(logits(model), dense, atol=0, rtol=0)
    parameters = sum(one.numel() for one in small.parameters())
    counts = sliced_counts(model, sliceable(model, arch_for(model.config)), 24, found.head.shape[1])
    assert counts.parameters == parameters
    assert counts.macs == sum(
        one.numel() for name, one in small.named_parameters() if one.dim() > 1 and not name.endswith(EMBEDDED)
    )


EMBEDDED = ("embed_tokens.weight", "embed_positions.weight", "wte.weight", "wpe.weight")


def test_bases_are_those_of_a_plain_loop_over_whole_models() -> None:
    """Every stream is taken anew from a model whose sub-layers up to there are called by hand, in float64."""
    model = tiny("llama").double()
    found = bases_of(model, arch_for(model.config), BATCHES, 24, 24, 0.01)
    embedded = model.model.embed_tokens(IDS)
    rotary = model.model.rotary_emb(embedded, torch.arange(IDS.shape[1]).unsqueeze(0))
    mask = torch.full((20, 20), float("-inf"), dtype=torch.float64).triu(1)[None, None]

    def top(states: Tensor) -> Tensor:
        rows = states.detach().reshape(-1, 32).numpy()
        _, _, vh = torch.linalg.svd(torch.tensor(rows), full_matrices=False)
        return vh[:24].T @ vh[:24]

    states, spans = embedded, []
    with torch.no_grad():
        for layer in model.model.layers:
            for part in ("self_attn", "mlp"):
                spans.append(top(states))
                states = states @ spans[-1]
                if part == "mlp":
                    states = states + layer.mlp(layer.post_attention_layernorm(states))
                else:
                    read = layer.input_layernorm(states)
                    written, _ = layer.self_attn(read, position_embeddings=rotary, attention_mask=mask)
                    states = states + written
        spans.append(top(states))
    for basis, span in zip([*found.bases, found.head], spans, strict=True):
        torch.testing.assert_close((basis @ basis.T).double(), span, atol=1e-4, rtol=0)


def test_a_stream_that_lies_in_a_subspace_is_sliced_without_loss() -> None:
    """All that writes to the stream is put into 24 of 32 dimensions, rotated."""
    model = tiny("llama")
    generator = torch.Generator().manual_seed(5)
    span = torch.linalg.qr(torch.randn(32, 24, generator=generator))[0]
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(model.model.embed_tokens.weight @ span @ span.T)
        for layer in model.model.layers:
            for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
                linear.weight.copy_(span @ span.T @ linear.weight)
    found = bases_of(model, arch_for(model.config), BATCHES, 24, 24, 0.01)
    assert max(found.lost) < 1e-9
    torch.testing.assert_close(logits(narrower(model, found.bases, found.head)), logits(model), atol=1e-4, rtol=0)
    less = bases_of(model, arch_for(model.config), BATCHES, 16, 16, 0.01)
    assert (logits(narrower(model, less.bases, less.head)) - logits(model)).abs().max() > 0.1


def meta(**sizes: Any) -> PreTrainedModel:
    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(**sizes))


SMOLLM2 = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}


def test_published_sizes_and_the_model_that_grows() -> None:
    """Shares of all parameters that the paper's widths leave, by hand: two shortcuts a layer, a head of its own."""
    llama = meta()  # LLaMA-2-7B but for the context
    for model, percents in ((llama, (102.7, 90.1, 84.0, 77.7)), (meta(**SMOLLM2), (119.3, 105.1, 99.1, 91.2))):
        arch = arch_for(model.config)
        dense = sum(one.numel() for one in model.parameters())
        for keep, percent in zip((0.9, 0.8, 0.75, 0.7), percents, strict=True):
            stage = SliceGPT(keep=keep)
            counts = SliceGPT(keep=keep, only_if_smaller=False).check(model, arch)
            assert 100 * counts.parameters / dense == pytest.approx(percent, abs=0.06)
            said = stage.remarks(model, arch)[0]
            assert f"{counts.parameters:,} parameters" in said
            assert ("GROWS" in said) == (percent > 100) and ("untied" in said) == (model is not llama)
            if percent < 100:
                assert stage.check(model, arch) == counts
            else:
                cure = "0.76" if model is not llama else "0.87"
                with pytest.raises(
                    RecipeError, match=rf"a head of its own; keep={cure} or less is smaller, or set only"
                ):
                    stage.check(model, arch)
    with torch.device("meta"):
        model = meta(**SMOLLM2)
        config_class, language_model = SLICED_CLASSES["llama"]
        config = own_config(
            model,
            config_class,
            language_model,
            SLICED_FILE,
            stream_width=512,
            head_width=512,
            tie_word_embeddings=False,
        )
        grown = sum(one.numel() for one in language_model(config).parameters())
    assert grown == SliceGPT(keep=0.9, only_if_smaller=False).check(model, arch_for(model.config)).parameters
    assert grown > sum(one.numel() for one in model.parameters())


def test_the_stage_patches_and_leaves_the_weights(make_job: MakeJob) -> None:
    job = make_job()
    dense = copy.deepcopy(job.model)
    done = SliceGPT(keep=0.5, **CONTRACT)(job)
    facts = done.records["slicegpt"]
    assert (facts["stream_width"], facts["head_width"], facts["dense_width"]) == (16, 16, 32)
    assert facts["untied"] and len(facts["lost"]) == 2 * 3 + 1 and all(0 < share < 1 for share in facts["lost"])
    assert all(torch.equal(one, dense.get_parameter(name)) for name, one in done.model.named_parameters())
    ids = torch.arange(1, 13).unsqueeze(0)
    with torch.no_grad():
        cut, whole = (model(input_ids=ids).logits for model in (done.model, dense))
        assert (cut - whole).abs().max() > 0.05
        done.patches[-1].apply_(dense)
        torch.testing.assert_close(dense(input_ids=ids).logits, cut, atol=1e-5, rtol=0)


def test_gradients_pass_the_cut_and_dropout_changes_no_loss_of_the_stream() -> None:
    model = tiny("opt")
    found = bases_of(model, arch_for(model.config), BATCHES, 24, 24, 0.01)
    slice_stream_(model, found.bases, found.head)
    for one in model.model.decoder.layers:
        one.dropout = 0.9999999  # nothing of a sub-layer comes through, so the stream only loses
    model.train()
    model.model.decoder.dropout = 0.0
    seen: list[Tensor] = []
    last = model.model.decoder.final_layer_norm
    last.register_forward_pre_hook(lambda _, given: seen.append(given[0].detach()), prepend=True)
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert model.model.decoder.embed_tokens.weight.grad.abs().sum() > 0
    inside = found.bases[-1]
    assert (seen[0] @ found.bases[0] @ found.bases[0].T - seen[0]).abs().max() > 1e-2
    torch.testing.assert_close(seen[0] @ inside @ inside.T, seen[0], atol=1e-4, rtol=1e-4)


def test_stopped_after_any_block_it_goes_on_to_the_same_bases(make_job: MakeJob) -> None:
    whole = SliceGPT(**CONTRACT)(make_job(folder="whole"))
    steps = sorted(path.name for path in whole.out.iterdir())
    assert steps == [f"step-{layer:06d}" for layer in range(4)]
    for done in (1, 3):
        stopped = make_job(folder=f"stopped after {done}")
        shutil.copytree(whole.out, stopped.out)
        for name in steps[done:]:
            shutil.rmtree(stopped.out / name)
        resumed = SliceGPT(**CONTRACT)(stopped)
        assert resumed.records == whole.records
        for name, tensor in resumed.patches[-1].tensors.items():
            assert torch.equal(tensor, whole.patches[-1].tensors[name])


def test_what_cannot_be_sliced_is_refused_by_shapes(make_job: MakeJob) -> None:
    job = make_job()
    with pytest.raises(RecipeError, match=r"keep=0.2 of 32 dimensions leaves no multiple of 8; keep more, or give"):
        SliceGPT(keep=0.2).check(job.model, job.arch)
    behind = AutoModelForCausalLM.from_config(
        OPTConfig(**SIZES, ffn_dim=48, word_embed_proj_dim=32, do_layer_norm_before=False)
    )
    with pytest.raises(ArchError, match="stream of this opt cannot be sliced: its norms lie behind the sums"):
        SliceGPT().check(behind, arch_for(behind.config))
    other = tiny("gpt2")
    with pytest.raises(
        RecipeError, match="the body of a gpt2 hands the head a stream as wide as its layers'; set slice"
    ):
        SliceGPT(slice_head=False).check(other, arch_for(other.config))
    found = bases_of(other, arch_for(other.config), BATCHES, 24, 24, 0.01)
    with pytest.raises(ArchError, match="cut the stream of another model than this one of 3 layers"):
        slice_stream_(job.model, found.bases, found.head)
