"""AWQ on stacked experts.

Oracles: a scale that moves without rounding changes nothing; a planted outlier costs less than rounding to the nearest;
the router's rows times the norm in front are what they were; errors summed over experts by hand.
"""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DeepseekV2Config, DeepseekV3Config, GptOssConfig, Qwen2MoeConfig

from compresso.core.rounding import fit
from compresso.core.scales import best_common_scale, best_scale
from compresso.job import Job
from compresso.methods.awq import Awq
from compresso.methods.rtn import Rtn
from compresso.sweep.calibration import Calibration
from compresso.sweep.targets import Where
from tests.methods.conftest import MakeJob
from tests.methods.test_drop_experts import logits, prepared, small

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "pad_token_id": 0,
}
FINE = {**SIZES, "intermediate_size": 48, "moe_intermediate_size": 16, "num_experts_per_tok": 2}
FAMILIES: dict[str, Any] = {
    "mixtral": lambda: small(),
    "qwen2_moe": lambda: Qwen2MoeConfig(**FINE, num_experts=4, shared_expert_intermediate_size=32),
    "deepseek_v3": lambda: DeepseekV3Config(
        **{**FINE, "num_key_value_heads": 4},
        n_routed_experts=8,
        n_group=2,
        topk_group=1,
        n_shared_experts=1,
        first_k_dense_replace=1,
        kv_lora_rank=16,
        q_lora_rank=None,
        qk_rope_head_dim=4,
        qk_nope_head_dim=4,
        v_head_dim=8,
    ),
    "deepseek_v2": lambda: DeepseekV2Config(
        **{**FINE, "num_key_value_heads": 4},
        n_routed_experts=8,
        n_group=4,
        topk_group=2,
        topk_method="group_limited_greedy",
        n_shared_experts=1,
        first_k_dense_replace=1,
        kv_lora_rank=16,
        q_lora_rank=8,
        qk_rope_head_dim=4,
        qk_nope_head_dim=4,
        v_head_dim=8,
    ),
    "gpt_oss": lambda: GptOssConfig(
        **SIZES, intermediate_size=32, num_local_experts=4, num_experts_per_tok=2, head_dim=8, sliding_window=8
    ),
}


def outlying(job: Job) -> Job:
    """The job with two dimensions of what its mixtures read 60 times as large as the others."""
    where, fed = torch.tensor([3, 17]), ("gate_up_proj", "gate_proj.weight", "up_proj.weight", "gate.weight")
    with torch.no_grad():
        for layer in job.model.model.layers:
            layer.post_attention_layernorm.weight[where] *= 60
            turned = getattr(getattr(layer.mlp, "experts", None), "is_transposed", False)
            for name, parameter in layer.mlp.named_parameters():
                if name.endswith((*fed, "router.weight")):
                    dim = 1 if turned and parameter.dim() == 3 else -1
                    parameter.index_copy_(dim, where, parameter.index_select(dim, where) / 12)
    return job


def products(model: Any) -> list[Tensor]:
    """Each router's weights times the norm in front."""
    routers = [getattr(layer.mlp, "gate", None) or getattr(layer.mlp, "router", None) for layer in model.model.layers]
    norms = [layer.post_attention_layernorm.weight for layer in model.model.layers]
    return [router.weight * norm for router, norm in zip(routers, norms, strict=True) if router is not None]


@pytest.mark.parametrize("name", FAMILIES)
def test_without_rounding_the_mixture_computes_what_it_did(
    make_job: MakeJob, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Awq, "_round", lambda self, name, weight, seen, scale: weight)
    job = outlying(prepared(make_job(), FAMILIES[name]()))
    before, norm, routed = (
        logits(job.model),
        job.model.model.layers[1].post_attention_layernorm.weight.clone(),
        products(job.model),
    )
    done = Awq(group=8, calibration=Calibration(batch=4))(job)
    torch.testing.assert_close(logits(done.model), before, atol=3e-4, rtol=1e-3)
    assert not torch.allclose(done.model.model.layers[1].post_attention_layernorm.weight, norm)
    for now, then in zip(products(done.model), routed, strict=True):
        torch.testing.assert_close(now, then, atol=1e-5, rtol=1e-4)
    facts = done.records["awq"]
    scaled = set(facts["exponents"])
    assert "model.layers.1.mlp.experts.gate_up_proj.0" in scaled
    assert len({facts["exponents"][f"model.layers.1.mlp.experts.gate_up_proj.{e}"] for e in range(4)}) == 1
    downs = [one for one in scaled if ".experts.down_proj." in one]
    assert bool(downs) == (name != "gpt_oss")  # whose up is clamped and shifted


def lost(dense: Job, other: Job) -> float:
    ids = torch.tensor([row["input_ids"] for row in dense.rows])
    with torch.no_grad():
        p, q = (torch.log_softmax(job.model(input_ids=ids).logits, dim=-1) for job in (dense, other))
    return float(torch.nn.functional.kl_div(q, p, log_target=True, reduction="sum") / ids.numel())


@pytest.mark.parametrize("knobs", [{}, {"by_weight": True}, {"symmetric": True}, {"clip": False}])
def test_an_outlier_costs_less_than_rounding_to_nearest(make_job: MakeJob, knobs: dict[str, Any]) -> None:
    where = Where(modules=("*.experts.*",))
    dense = outlying(prepared(make_job()))
    plain = Rtn(bits=4, group=8, symmetric=knobs.get("symmetric", False), where=where)(outlying(prepared(make_job())))
    job = Awq(bits=4, group=8, where=where, **knobs)(outlying(prepared(make_job(folder="awq"))))
    assert lost(dense, job) < 0.8 * lost(dense, plain)
    facts = job.records["awq"]
    assert all(share <= 1 for share in facts["error_of_unscaled"].values()) and not facts["not_scaled"]
    for name, weight in job.model.named_parameters():
        if ".experts." in name:
            assert all(len(group.unique()) <= 16 for group in weight.detach().reshape(-1, 8))


def test_experts_count_by_their_tokens() -> None:
    """The error of one scale is the sum of each expert's; of equal weights that is one weight's with both moments."""
    generator = torch.Generator().manual_seed(0)
    weight, other = (torch.randn(6, 8, generator=generator) for _ in range(2))
    inputs = [torch.randn(n, 8, generator=generator) * torch.tensor([9.0, *[1] * 7]) for n in (40, 10)]
    moments = [x.T @ x for x in inputs]
    tried = [(r, torch.tensor([3.0 * r + 1, *[1.0] * 7])) for r in (0.25, 0.5, 1.0)]

    def near(one: Tensor) -> Tensor:
        return fit(one, 3).round(one)

    same = best_common_scale([(weight, m) for m in moments], iter(tried), near)
    assert same[2:] == pytest.approx(best_scale(weight, sum(moments), iter(tried), near)[2:], rel=1e-5)
    both = best_common_scale(list(zip((weight, other), moments, strict=True)), iter(tried), near)
    outputs = [
        sum(float(((near(w * s) / s - w) @ x.T).square().sum()) for w, x in zip((weight, other), inputs, strict=True))
        for _, s in tried
    ]
    assert both[2] == pytest.approx(min(outputs), rel=1e-4)


def test_without_its_shared_expert_a_norm_stays(make_job: MakeJob) -> None:
    """What is left out does not change, so that nothing that it reads may."""
    job = prepared(make_job(), FAMILIES["qwen2_moe"]())
    before = {name: tensor.clone() for name, tensor in job.model.state_dict().items()}
    done = Awq(group=8, where=Where(ignore=("*.shared_expert.*",)))(job)
    after = done.model.state_dict()
    for name in (
        "post_attention_layernorm.weight",
        "mlp.gate.weight",
        "mlp.shared_expert.up_proj.weight",
        "mlp.shared_expert_gate.weight",
    ):
        assert torch.equal(after[f"model.layers.1.{name}"], before[f"model.layers.1.{name}"])
    assert "model.layers.1.mlp.experts.gate_up_proj.3" in done.records["awq"]["not_scaled"]
    assert "model.layers.1.mlp.experts.down_proj.3" in done.records["awq"]["exponents"]


def test_a_killed_sweep_goes_on_with_router_and_norm(make_job: MakeJob) -> None:
    stage = Awq(group=8)
    whole = copy.deepcopy(stage(outlying(prepared(make_job()))).model.state_dict())
    again = outlying(prepared(make_job()))
    entries = sorted(again.out.parent.rglob("step-*"))
    (entries[1] / "weights.safetensors").write_bytes(b"torn")
    resumed = stage(replace(again)).model.state_dict()
    assert all(torch.equal(tensor, whole[name]) for name, tensor in resumed.items())


def test_an_expert_that_no_token_chose_is_rounded_to_the_nearest(
    make_job: MakeJob, caplog: pytest.LogCaptureFixture
) -> None:
    """Its first matrix behind the scale that the others chose."""
    job = prepared(make_job())
    with torch.no_grad():
        job.model.model.embed_tokens.weight[:, 0] = 0.5
        job.model.model.layers[0].self_attn.o_proj.weight[0] = 0
        job.model.model.layers[0].mlp.gate.weight[:, 0] = 0
        job.model.model.layers[0].mlp.gate.weight[[3, 6], 0] = -40
    first = job.model.model.layers[0]
    before = {name: tensor.clone() for name, tensor in first.named_parameters()}
    with caplog.at_level("WARNING"):
        done = Awq(group=8, where=Where(modules=("*.experts.*",)))(job)
    scale = before["post_attention_layernorm.weight"] / first.post_attention_layernorm.weight
    for name, wide in (("gate_up_proj", scale), ("down_proj", torch.ones(24))):
        weight = before[f"mlp.experts.{name}"][3] * wide
        torch.testing.assert_close(getattr(first.mlp.experts, name)[3], fit(weight, 4, group=8).round(weight))
    assert done.records["awq"]["expert_tokens"]["starved"] == {"model.layers.0.mlp.experts": [3, 6]}
    assert "model.layers.0.mlp.experts.down_proj.3" in done.records["awq"]["not_scaled"]
    assert "no calibration token chose some experts (2)" in caplog.text
