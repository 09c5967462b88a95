"""Dropping experts: scores against numbers worked out by hand (REAP's 1.75, 2.0, .5; routed probabilities by both
rules), choices as laws on a mixture with six layers of eight experts.
"""

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DeepseekV2Config,
    DeepseekV3Config,
    MixtralConfig,
    PreTrainedConfig,
)

import compresso
from compresso.arch.base import arch_for
from compresso.core.axis import Kind
from compresso.core.cost import CostModel
from compresso.core.expert_scores import lost_rows, probability_rows, reap_rows
from compresso.core.routing import Routing, chosen
from compresso.data import nano
from compresso.edit.gate import gated
from compresso.errors import ArchError, CompressoError
from compresso.formats.hf import save_checkpoint
from compresso.job import Job
from compresso.methods.drop_experts import DropExperts
from compresso.observe.experts import alone
from tests.methods.conftest import MakeJob

LOOKS: dict[str, Any] = {"batches": 2, "batch": 8, "micro_batch": 4}
TOKENS = {"vocab_size": 1024, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}


def small(layers: int = 2, **fields: Any) -> MixtralConfig:
    sizes = {"hidden_size": 32, "num_hidden_layers": layers, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"intermediate_size": 24, "vocab_size": 64, "pad_token_id": 0, "num_local_experts": 8}
    return MixtralConfig(**{**sizes, "num_experts_per_tok": 2, **fields})


def prepared(job: Job, config: PreTrainedConfig | None = None) -> Job:
    """The job with a mixture of experts for its model."""
    config = copy.deepcopy(config or small())
    model = AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 1.5 * parameter.shape[-1] ** -0.5, generator=generator)
    return replace(job, model=model, arch=arch_for(config))


CONTRACT: dict[str, Any] = {"keep": 0.5, "score": "reap"}


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(1, 41).reshape(2, 20)).logits


def kept(job: Job) -> list[tuple[int, ...]]:
    return [job.plan.kept[axis] for axis in sorted(job.plan.kept)]


def test_the_published_scores_of_two_tokens() -> None:
    """REAP's example: top 2 of 3, shares .75, .25 of norms 2, 8, then .5, .5 of norms 4, 1. Routed probabilities of
    (.7, .2, .1), (.1, .6, .3): .8, .8, .4, and .7, .8, .3 where only the chosen count.
    """
    weights, numbers = torch.tensor([[0.75, 0.25], [0.5, 0.5]]), torch.tensor([[0, 1], [0, 2]])
    norms = torch.tensor([[2.0, 8.0, 0.0], [4.0, 0.0, 1.0]])
    often = torch.bincount(numbers.flatten(), minlength=3)
    total = reap_rows(weights, numbers, norms).sum(0)
    assert (total / often).tolist() == [1.75, 2.0, 0.5] and often.tolist() == [2, 1, 1]
    assert torch.equal(reap_rows(weights / 4, numbers, norms).sum(0), total)  # shares, not weights

    probabilities = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.6, 0.3]])
    two = Routing(2, normalised=False)
    of_softmax = probability_rows(probabilities.log(), *chosen(probabilities.log(), two), two)
    assert torch.allclose(of_softmax.sum(0), torch.tensor([0.8, 0.8, 0.4]))
    chosen_only = replace(two, counts_chosen=True)  # softmax routers of DeepSeek's families
    given = chosen(probabilities.log(), chosen_only)
    of_chosen = probability_rows(probabilities.log(), *given, chosen_only).sum(0)
    assert torch.allclose(of_chosen, torch.tensor([0.7, 0.8, 0.3]))
    sigmoid = replace(two, sigmoid=True)
    given = chosen(probabilities.logit(), sigmoid)
    assert torch.allclose(
        probability_rows(probabilities.logit(), *given, sigmoid).sum(0), torch.tensor([0.7, 0.8, 0.3])
    )


def test_what_a_layer_loses_without_an_expert(make_job: MakeJob) -> None:
    """Against the model's own layer under a mask: its output without each expert."""
    job = prepared(make_job())
    model, axes = job.model, job.arch.axes(job.model)
    mlp, experts = model.get_submodule("model.layers.1.mlp"), model.get_submodule("model.layers.1.mlp.experts")
    states = torch.randn(1, 7, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        written = torch.stack([alone(experts, states[0], e) for e in range(8)])
        found = lost_rows(mlp.gate(states[0])[0], Routing(2), written)
        whole = mlp(states)[0]
        for expert in (0, 5):
            mask = torch.ones(8)
            mask[expert] = 0
            with gated(model, axes, {"layers.1.experts": mask}):
                error = (mlp(states)[0] - whole).square().sum(-1) / whole.square().sum(-1)
            assert torch.allclose(found[:, expert].float(), error, atol=1e-5)


@pytest.mark.parametrize("score", ["probability", "frequency", "reap", "reconstruction"])
def test_experts_that_nothing_is_routed_to_leave_and_nothing_changes(make_job: MakeJob, score: str) -> None:
    """The routers' rows of experts 5 and 6 point away from a direction that all inputs share."""
    job = prepared(make_job(), small(layers=6))
    with torch.no_grad():
        for layer in job.model.model.layers:  # every token has a large first entry, which these two experts loathe
            layer.post_attention_layernorm.weight[0] = 8
            layer.mlp.gate.weight[:, 0] = 0
            layer.mlp.gate.weight[5:7, 0] = -40
        job.model.model.embed_tokens.weight[:, 0] = 9
        for name, parameter in job.model.named_parameters():
            if name.endswith("o_proj.weight"):
                parameter[0] = 0
            elif name.endswith("experts.down_proj"):
                parameter[:, 0] = 0
    before = logits(job.model)
    done = DropExperts(score=score, keep=0.75, **LOOKS)(job)  # pyright: ignore[reportArgumentType]
    assert kept(done) == [(0, 1, 2, 3, 4, 7)] * 6
    assert (logits(done.model) - before).abs().max() < 1e-3
    records = done.records["drop_experts"]
    assert records["damage_rate"] == 0 and records["experts"]["layers.0.experts"]["starved"] >= 2
    assert done.model.config.num_local_experts == 6 and done.model.config.num_experts_per_tok == 2


def test_scores_are_those_of_the_stock_forward(make_job: MakeJob) -> None:
    """REAP recomputed token by token from the modules' own outputs; the damage rate by counting."""
    job = prepared(make_job())
    batches = list(DropExperts(**LOOKS).calibrates.read(job.batches(8, "drop_experts")))
    sums, often, lose = torch.zeros(8, dtype=torch.float64), torch.zeros(8), [0, 0]
    done = DropExperts(score="reap", keep=0.5, **LOOKS)(prepared(make_job(folder="other")))
    stays = set(done.plan.kept["layers.1.experts"])
    mlp = job.model.model.layers[1].mlp
    seen: list[Tensor] = []
    handle = mlp.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        for batch in batches:
            job.model(**{k: batch[k] for k in ("input_ids", "attention_mask")})
        handle.remove()
        for state in torch.cat([one.flatten(0, 1) for one in seen]):
            probability = (mlp.gate.weight @ state).softmax(0)
            best = probability.topk(2)[1].tolist()
            lose[0] += not stays.issuperset(best)
            lose[1] += 1
            for expert in best:
                gate, up = (mlp.experts.gate_up_proj[expert] @ state).chunk(2)
                norm = (mlp.experts.down_proj[expert] @ (nn.functional.silu(gate) * up)).norm()
                sums[expert] += probability[expert] / probability[best].sum() * norm
                often[expert] += 1
    facts = done.records["drop_experts"]["experts"]["layers.1.experts"]
    assert torch.tensor(facts["scores"]["frequency"]).tolist() == often.tolist()
    assert torch.allclose(torch.tensor(facts["scores"]["reap"]).double(), sums / often.clamp(min=1), rtol=1e-4)
    assert facts["tokens_that_lose_one"] == pytest.approx(lose[0] / lose[1])
    assert stays == set(sums.div(often.clamp(min=1)).topk(4)[1].tolist())


def test_counts_are_of_the_examples_that_there_are(make_job: MakeJob) -> None:
    """Not of the sixteen that are asked for; probabilities are means over them."""
    job = prepared(make_job())
    few = replace(job, rows=job.rows[:3])
    tokens = sum(len(row["input_ids"]) for row in few.rows)
    records = DropExperts(score="probability", **LOOKS)(few).records["drop_experts"]
    assert records["calibration_tokens"] == tokens
    for one in records["experts"].values():
        assert sum(one["scores"]["frequency"]) == 2 * tokens
        assert sum(one["scores"]["probability"]) == pytest.approx(tokens / 3)


def test_active_parameters_stay(make_job: MakeJob) -> None:
    job = prepared(make_job())
    arch = job.arch
    before = CostModel(arch.axes(job.model), arch.weights(job.model))()
    done = DropExperts(keep=0.5, **LOOKS)(job)
    after = CostModel(arch.axes(done.model), arch.weights(done.model))()
    rows = 2 * 4 * 32  # of the routers: 4 rows of 32 in each of two layers
    assert int(before.active - after.active) == rows == int(before.macs - after.macs)
    assert int(before.total - after.total) == 2 * 4 * 3 * 24 * 32 + rows


def test_one_pool_for_all_layers(make_job: MakeJob, tmp_path: Path) -> None:
    job = prepared(make_job(), small(layers=6))
    with torch.no_grad():
        job.model.model.layers[2].mlp.experts.down_proj.mul_(0.01)
    done = DropExperts(score="reap", keep=0.75, pool="global", **LOOKS)(job)
    counts = [len(done.plan.kept[f"layers.{i}.experts"]) for i in range(6)]
    assert sum(counts) == 36 and counts[2] == 2 and max(counts) > 6
    folder = tmp_path / "out"
    assert save_checkpoint(done.model, done.arch.shapes(done.model), folder) == "native"
    opened = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert [len(layer.mlp.experts.down_proj) for layer in opened.model.layers] == counts
    torch.testing.assert_close(logits(opened), logits(done.model), rtol=0, atol=1e-5)
    left = DropExperts(keep=0.75, pool="global").dry_run_plan(job.arch.axes(prepared(job, small(6)).model), job.cost())
    assert [len(left.kept[f"layers.{i}.experts"]) for i in range(6)] == [2, 2, 8, 8, 8, 8]  # as unequal as it may be


@pytest.mark.parametrize("family", [DeepseekV3Config, DeepseekV2Config])
def test_groups_keep_as_many_each(make_job: MakeJob, family: type[PreTrainedConfig]) -> None:
    sizes: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 64}
    latent = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
    experts: dict[str, Any] = {"n_routed_experts": 16, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 2}
    if family is DeepseekV2Config:
        experts["topk_method"] = "group_limited_greedy"
    config = family(
        **sizes, **latent, **experts, moe_intermediate_size=16, intermediate_size=48, first_k_dense_replace=1
    )
    job = prepared(make_job(), config)
    done = DropExperts(score="reap", keep=0.7, **LOOKS)(job)  # 4 of 16 leave, one of each group
    for layer in (1, 2):
        left = done.plan.kept[f"layers.{layer}.experts"]
        assert [sum(unit // 4 == group for unit in left) for group in range(4)] == [3, 3, 3, 3]
    assert "layers.0.experts" not in done.plan.kept and done.model.config.n_routed_experts == 12
    told = DropExperts(score="reap", keep=0.65, **LOOKS)(prepared(make_job(folder="b"), config)).records["drop_experts"]
    assert told["experts_a_layer_for_equal_groups"]["layers.1.experts"] == {"asked": 11, "kept": 12}
    with pytest.raises(
        ValueError,
        match=r"layers.1.experts with 0 of 16 experts in 4 groups, .* at least [48], so keep 0\.(25|5) or more",
    ):
        DropExperts(keep=0.1).dry_run_plan(
            arch_for(config).axes(prepared(make_job(folder="c"), config).model), job.cost()
        )


@pytest.mark.parametrize(
    ("config", "knobs", "message"),
    [
        (small(num_experts_per_tok=3), {"keep": 0.25}, r"keep=0.25 leaves layers.0.experts with 2 of 8 .* least 3"),
        (small(num_local_experts=20), {"score": "reconstruction"}, r"layers.0.experts has 20, more than 16"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_runs(
    make_job: MakeJob, config: PreTrainedConfig, knobs: dict[str, Any], message: str
) -> None:
    job = prepared(make_job(), config)
    stage = DropExperts(**knobs)
    with pytest.raises((ValueError, ArchError), match=message):
        stage.check(job.model, job.arch)
        stage.dry_run_plan(job.arch.axes(job.model), job.cost())


def test_a_model_without_experts_is_refused(make_job: MakeJob) -> None:
    job = make_job()
    with pytest.raises(ArchError, match="llama has no experts that could leave"):
        DropExperts().check(job.model, job.arch)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    config = small(layers=3, **TOKENS)
    prepared_model = AutoModelForCausalLM.from_config(config)
    prepared_model.save_pretrained(tmp_path / "moe")
    AutoTokenizer.from_pretrained(nano.path()).save_pretrained(tmp_path / "moe")
    return tmp_path / "moe"


@pytest.mark.slow
@pytest.mark.usefixtures("quick_reopening")
def test_a_run_writes_a_stock_checkpoint_and_the_list(folder: Path, instructions: Path, tmp_path: Path) -> None:
    """Opened by transformers alone, it computes the same, cached and not; plan says the same sizes beforehand."""
    data = {"max_length": 32, "held": 4, "prompt": False, "pack": False, "limit": 16}
    raw = {"name": "cell", "data": data, "stages": [{"drop_experts": {"keep": 0.75, "score": "reap", **LOOKS}}]}
    how: dict[str, Any] = {"measure": "none", "allow_collapsed": True, "quiet": True}
    result = compresso.run(raw, folder, instructions, output=tmp_path / "out", **how)
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    assert opened.config.num_local_experts == 6 and opened.config.num_experts_per_tok == 2
    assert (logits(opened) - logits(result.model.eval())).abs().max() < 1e-4
    rows = json.loads((tmp_path / "out" / "kept_experts.json").read_text())
    assert rows == [list(result.plan.kept[f"layers.{i}.experts"]) for i in range(3)] and len(rows[0]) == 6
    assert {axis.kind for axis in arch_for(opened.config).axes(opened)} >= {Kind.EXPERT}
    compresso.run(raw, folder, instructions, output=tmp_path / "out", overwrite=True, **how)
    with pytest.raises(CompressoError, match=r"leaves layers.0.experts with 1 of 8"):
        low = {**raw, "stages": [{"drop_experts": {"keep": 0.125, **LOOKS}}]}
        compresso.run(low, folder, instructions, output=tmp_path / "low", **how)
