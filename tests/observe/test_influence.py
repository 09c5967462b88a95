"""Influence, angles and losses without a part, against a reference on a trained model, definitions written out, and
removal itself.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import cosine_similarity
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from compresso.arch.base import arch_for
from compresso.core.axis import Axis, Kind
from compresso.core.loss import NEXT_TOKEN
from compresso.core.plan import Plan
from compresso.edit.shrink import shrink_
from compresso.errors import ArchError, NumericError
from compresso.observe.influence import angular_distances, block_influence
from compresso.observe.losses import losses_without

ORACLE = Path(os.environ.get("COMPRESSO_DATA", "")) / "oracles" / "mha"
KINDS = (Kind.LAYER, Kind.ATTENTION, Kind.MLP)
Batch = Mapping[str, torch.Tensor]


@pytest.fixture
def model() -> PreTrainedModel:
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 24,
    }
    made = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=50, pad_token_id=0)).eval()
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, parameter.shape[1] ** -0.5, generator=generator)
    return made


def batch(lengths: tuple[int, ...], left: int = 0, right: int = 0, seed: int = 0) -> dict[str, torch.Tensor]:
    """Examples of these lengths, the same for one seed, with at least that much padding on either side."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(1, 50, (length,), generator=generator) for length in lengths]
    width = left + max(lengths) + right
    ids, labels = torch.zeros(len(rows), width, dtype=torch.long), torch.full((len(rows), width), -100)
    for row, tokens in enumerate(rows):
        ids[row, left : left + len(tokens)] = labels[row, left : left + len(tokens)] = tokens
    return {"input_ids": ids, "attention_mask": (labels != -100).long(), "labels": labels}


def influence(
    model: PreTrainedModel, batches: list[dict[str, torch.Tensor]], kinds: tuple[Kind, ...] = KINDS
) -> dict[str, torch.Tensor]:
    arch = arch_for(model.config)
    return block_influence(model, arch.blocks(model), arch.axes(model), kinds, batches).scores


def angles(model: PreTrainedModel, batches: list[dict[str, torch.Tensor]]) -> torch.Tensor:
    return angular_distances(model, arch_for(model.config).blocks(model), batches)


def streams(model: PreTrainedModel, one: Batch) -> list[torch.Tensor]:
    """The stream before each layer and behind the last, by running the layers with the final norm cut out."""
    norm, model.model.norm = model.model.norm, torch.nn.Identity()
    with torch.no_grad():
        found = model(
            input_ids=one["input_ids"], attention_mask=one["attention_mask"], output_hidden_states=True
        ).hidden_states
    model.model.norm = norm
    return [state.double() for state in found]


@pytest.mark.skipif(not ORACLE.is_dir(), reason="COMPRESSO_DATA: no folder with reference outputs")
def test_block_influence_is_that_of_the_reference() -> None:
    expected = json.loads((ORACLE / "expected.json").read_text())
    trained = AutoModelForCausalLM.from_pretrained(ORACLE, dtype=torch.float32)
    ids = load_file(ORACLE / "tokens.safetensors")["calib_ids"].long()
    batches = [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids.split(3)]
    found = influence(trained, batches)["layers"]
    torch.testing.assert_close(
        found, torch.tensor(expected["shortgpt_block_influence"], dtype=torch.float64), rtol=0, atol=1e-6
    )
    assert abs(float(found[-1]) - expected["shortgpt_last_block_if_post_norm_hidden_states_are_used_WRONG"]) > 1e-5


def test_influence_is_one_minus_the_mean_cosine(model: PreTrainedModel) -> None:
    one, other = batch((7, 4)), batch((5,), seed=1)
    found = influence(model, [one, other])["layers"]
    for layer in range(4):
        cosines = []
        for part in (one, other):
            states = streams(model, part)
            cosines.append(cosine_similarity(states[layer], states[layer + 1], dim=-1)[part["attention_mask"].bool()])
        assert float(found[layer]) == pytest.approx(1 - float(torch.cat(cosines).mean()), abs=1e-6)


def test_a_sub_layer_is_judged_by_the_stream_around_it(model: PreTrainedModel) -> None:
    one = batch((6,))
    found = influence(model, [one])
    with torch.no_grad():
        for layer, before in enumerate(state.float() for state in streams(model, one)[:4]):
            block = model.model.layers[layer]
            rotary = model.model.rotary_emb(before, torch.arange(6)[None])
            between = (
                before
                + block.self_attn(block.input_layernorm(before), position_embeddings=rotary, attention_mask=None)[0]
            )
            after = between + block.mlp(block.post_attention_layernorm(between))
            for name, start, stop in (("attention", before, between), ("mlp", between, after)):
                assert float(found[name][layer]) == pytest.approx(
                    1 - float(cosine_similarity(start.double(), stop.double(), dim=-1).mean()), abs=1e-6
                )
    assert torch.equal(influence(model, [one], (Kind.MLP,))["mlp"], found["mlp"])


def test_angles_are_those_of_the_last_real_token(model: PreTrainedModel) -> None:
    one = batch((7, 4))
    found, states = angles(model, [one]), streams(model, one)
    for i in range(5):
        for j in range(i + 1, 5):
            cosines = [
                cosine_similarity(states[i][row, last], states[j][row, last], dim=0) for row, last in ((0, 6), (1, 3))
            ]
            assert float(found[i, j]) == pytest.approx(float(torch.stack(cosines).arccos().mean()) / torch.pi, abs=1e-6)
    assert float(found.tril().abs().max()) == 0


@pytest.mark.parametrize(("left", "right"), [(0, 1), (0, 30), (9, 0), (5, 5)])
def test_padding_changes_no_score(model: PreTrainedModel, left: int, right: int) -> None:
    plain, padded = batch((7, 4)), batch((7, 4), left, right)
    for name, scores in influence(model, [plain]).items():
        torch.testing.assert_close(influence(model, [padded])[name], scores, rtol=0, atol=2e-7)
    torch.testing.assert_close(angles(model, [padded]), angles(model, [plain]), rtol=0, atol=2e-7)
    axes, layers = layer_axis(model)
    losses = losses_without(model, axes, layers, [plain])
    torch.testing.assert_close(losses_without(model, axes, layers, [padded]), losses, rtol=0, atol=2e-6)


def test_neither_order_nor_size_of_batches_matters(model: PreTrainedModel) -> None:
    parts = [batch((6,), seed=seed) for seed in range(4)]
    whole = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    for name, scores in influence(model, parts).items():
        torch.testing.assert_close(influence(model, parts[::-1])[name], scores, rtol=0, atol=1e-12)
        torch.testing.assert_close(influence(model, [whole])[name], scores, rtol=0, atol=1e-6)
    torch.testing.assert_close(angles(model, [whole]), angles(model, parts), rtol=0, atol=1e-6)


def layer_axis(model: PreTrainedModel) -> tuple[list[Axis], list[tuple[str, int]]]:
    axes = [axis for axis in arch_for(model.config).axes(model) if axis.kind == Kind.LAYER]
    return axes, [("layers", unit) for unit in range(axes[0].size)]


@pytest.mark.parametrize("name", ["layers", "attention", "mlp"])
def test_the_loss_without_a_part_is_that_of_the_smaller_model(model: PreTrainedModel, name: str) -> None:
    axes = arch_for(model.config).axes(model)
    part = [batch((7, 4)), batch((5, 5, 2), seed=1)]
    (found,) = losses_without(model, axes, [(name, 2)], part, gone=[(name, 0)])
    shrink_(model, axes, Plan({name: (1, 3)}))
    counts = [int((one["labels"][:, 1:] != -100).sum()) for one in part]
    with torch.no_grad():
        by_hand = sum(float(NEXT_TOKEN(model, one)) * count for one, count in zip(part, counts, strict=True)) / sum(
            counts
        )
    assert float(found) == pytest.approx(by_hand, rel=1e-6)


def test_a_sub_layer_that_is_gone_scores_nothing(model: PreTrainedModel) -> None:
    shrink_(model, arch_for(model.config).axes(model), Plan({"attention": (0, 2, 3)}))
    found = influence(model, [batch((7, 4))])
    assert float(found["attention"][1]) == 0 and (found["attention"][[0, 2, 3]] > 0).all()
    assert float(found["layers"][1]) == pytest.approx(float(found["mlp"][1]), abs=1e-6)


def test_tokens_without_a_direction_are_left_out_and_counted(model: PreTrainedModel) -> None:
    with torch.no_grad():
        model.model.embed_tokens.weight[7] = 0
    arch, one = arch_for(model.config), batch((6,))
    one["input_ids"][0, 0] = 7  # sees only itself, so its stream stays zero
    found = block_influence(model, arch.blocks(model), arch.axes(model), KINDS, [one])
    assert (found.tokens, found.left_out) == (6, 4 * 3)
    assert all(bool(scores.isfinite().all()) for scores in found.scores.values())
    one["input_ids"][:] = 7
    with pytest.raises(NumericError, match="no token of the calibration data has a direction"):
        influence(model, [one])
    with pytest.raises(NumericError, match="has a zero state"):
        angles(model, [one])


def test_an_overflowing_model_is_named(model: PreTrainedModel) -> None:
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight.fill_(float("inf"))
    with pytest.raises(NumericError, match="residual stream is not finite at layer 2"):
        influence(model, [batch((5,))])
    axes, layers = layer_axis(model)
    with pytest.raises(NumericError, match="the loss without unit 0 of layers is not finite"):
        losses_without(model, axes, layers, [batch((5,))])


def test_sub_layers_that_do_not_add_up_are_refused(model: PreTrainedModel) -> None:
    """A norm or scale behind a sub-layer's last linear would make its score wrong."""
    model.model.layers[1].mlp.register_forward_hook(lambda module, inputs, output: 0.5 * output)
    with pytest.raises(ArchError, match=r"layer 1: .* score whole layers"):
        influence(model, [batch((5,))])
    assert len(influence(model, [batch((5,))], (Kind.LAYER,))["layers"]) == 4


def test_no_hook_stays(model: PreTrainedModel) -> None:
    influence(model, [batch((5,))])
    angles(model, [batch((5,))])
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
