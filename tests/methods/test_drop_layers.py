"""Depth pruning: parts that do nothing go first, as much goes as was asked, and what is left still generates with its
cache.
"""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from compresso.arch.base import arch_for
from compresso.core.plan import Plan
from compresso.data import nano
from compresso.errors import BudgetError, RecipeError
from compresso.formats.hf import save_checkpoint
from compresso.job import Job
from compresso.methods.drop_layers import DropLayers
from compresso.observe.losses import losses_without
from compresso.runner.plan import plan as dry_run
from compresso.runner.recipe import build, read
from tests.methods.conftest import MakeJob
from tests.methods.test_drop_experts import logits, prepared

QUICK: dict[str, Any] = {"batches": 2, "batch": 4, "micro_batch": 4}
SCORES = ("influence", "angular", "perplexity", "reverse", "random")
KINDS = (("layer",), ("attention",), ("mlp",), ("attention", "mlp"))


def dropping(**knobs: Any) -> DropLayers:
    return DropLayers(**{**QUICK, **knobs})


def gone(job: Job, axis: str = "layers", size: int = 3) -> list[int]:
    return sorted(set(range(size)) - set(job.plan.kept[axis]))


def job_of(model: PreTrainedModel, rows: list[list[int]], out: Path) -> Job:
    examples = [{"input_ids": row, "labels": row} for row in rows]
    arch = arch_for(model.config)
    return Job(model, arch, None, examples[2:], examples[:2], Plan(), {}, {}, seed=0, out=out, quiet=True)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def planted() -> tuple[PreTrainedModel, list[list[int]]]:
    """The embedded model with two layers that do nothing put in as layers 3 and 4 of 8, and texts that it wrote."""
    trained = AutoModelForCausalLM.from_pretrained(nano.path(), dtype=torch.float32).eval()
    config = copy.deepcopy(trained.config)
    config.num_hidden_layers = 8
    model = LlamaForCausalLM(config).eval()
    theirs = trained.state_dict()
    with torch.no_grad():
        for layer, source in enumerate((0, 1, 2, 2, 3, 3, 4, 5)):
            for name, tensor in model.model.layers[layer].state_dict().items():
                tensor.copy_(theirs[f"model.layers.{source}.{name}"])
        for layer in (3, 4):
            model.model.layers[layer].self_attn.o_proj.weight.zero_()
            model.model.layers[layer].mlp.down_proj.weight.zero_()
        for name in ("embed_tokens", "norm"):
            model.get_parameter(f"model.{name}.weight").copy_(theirs[f"model.{name}.weight"])
        generator = torch.Generator().manual_seed(0)
        written = torch.full((10, 1), config.bos_token_id)
        for _ in range(24):
            chances = trained(input_ids=written).logits[:, -1].softmax(dim=-1)
            written = torch.cat([written, torch.multinomial(chances, 1, generator=generator)], dim=1)
    return model, written.tolist()


@pytest.mark.slow
@pytest.mark.parametrize(
    "knobs",
    [{"score": "influence"}, {"score": "angular"}, {"score": "perplexity"}, {"score": "perplexity", "iterative": True}],
)
@pytest.mark.parametrize("size", [{"drop": 2}, {"keep": 0.75}])
def test_layers_that_do_nothing_go_first(
    planted: tuple[PreTrainedModel, list[list[int]]], knobs: dict[str, Any], size: dict[str, Any], tmp_path: Path
) -> None:
    model, rows = planted
    ids = torch.tensor(rows)
    with torch.no_grad():
        before = model(input_ids=ids).logits
        job = dropping(**knobs, **size)(job_of(copy.deepcopy(model), rows, tmp_path))
        assert gone(job, size=8) == [3, 4]
        torch.testing.assert_close(job.model(input_ids=ids).logits, before, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["attention", "mlp"])
def test_sub_layers_that_do_nothing_go_first(
    planted: tuple[PreTrainedModel, list[list[int]]], kind: str, tmp_path: Path
) -> None:
    model, rows = planted
    for score in ("influence", "perplexity"):
        job = dropping(score=score, kinds=(kind,), drop=2)(job_of(copy.deepcopy(model), rows, tmp_path))
        assert gone(job, kind, 8) == [3, 4]


def test_what_was_found_is_recorded(planted: tuple[PreTrainedModel, list[list[int]]], tmp_path: Path) -> None:
    model, rows = planted
    records = dropping(drop=2)(job_of(copy.deepcopy(model), rows, tmp_path)).records["drop_layers"]
    assert records["scores"]["layers"][3:5] == [0.0, 0.0] and min(records["scores"]["layers"][:3]) > 1e-3
    assert records["calibration_tokens"] == 2 * 4 * 25
    distances = dropping(score="angular", drop=2)(job_of(copy.deepcopy(model), rows, tmp_path)).records["drop_layers"][
        "distances"
    ]
    assert distances[3][5] == 0.0 and distances[2][5] > 1e-3


@pytest.mark.parametrize(
    ("score", "kinds"), [(s, k) for s in SCORES for k in KINDS if s != "angular" or k == ("layer",)]
)
def test_drop_is_how_many_leave(make_job: MakeJob, score: str, kinds: tuple[str, ...]) -> None:
    job = dropping(score=score, kinds=kinds, drop=2)(make_job())
    assert sum(len(gone(job, axis)) for axis in job.plan.kept) == 2


@pytest.mark.parametrize("kinds", KINDS)
@pytest.mark.parametrize("keep", [1.0, 0.8, 0.6])
def test_the_result_is_never_above_its_budget_and_nothing_needless_leaves(
    make_job: MakeJob, kinds: tuple[str, ...], keep: float
) -> None:
    dense = make_job().cost()
    job = dropping(kinds=kinds, keep=keep)(make_job())
    kept = job.cost()().parameters()["blocks"]
    limit = keep * dense().parameters()["blocks"]
    assert kept <= limit
    for axis in (axis for axis in dense.axes if axis.name in job.plan.kept):
        for unit in gone(job, axis.name):  # any part that came back would break the budget
            more = {**job.plan.kept, axis.name: tuple(sorted({*job.plan.kept[axis.name], unit}))}
            assert float(dense.of(Plan(more)).blocks) > limit


def test_reverse_takes_the_last_and_random_follows_the_seed(make_job: MakeJob) -> None:
    bare = {"rows": [], "held": []}
    assert gone(dropping(score="reverse", drop=2)(replace(make_job(), **bare))) == [1, 2]
    both = dropping(score="reverse", kinds=("attention", "mlp"), drop=3)(replace(make_job(), **bare))
    assert (gone(both, "attention"), gone(both, "mlp")) == ([1, 2], [2])
    drawn = [gone(dropping(score="random", drop=1)(replace(make_job(seed=seed), **bare))) for seed in range(12)]
    assert {part for one in drawn for part in one} == {0, 1, 2}
    assert drawn[:3] == [
        gone(dropping(score="random", drop=1)(replace(make_job(seed=seed), **bare))) for seed in range(3)
    ]


def test_an_angular_run_is_contiguous(make_job: MakeJob) -> None:
    assert gone(dropping(score="angular", drop=2)(make_job())) in ([0, 1], [1, 2])


def test_iterative_scoring_sees_what_has_left(make_job: MakeJob) -> None:
    """Each choice is the best given the ones before, which the one-shot ranking need not be."""
    job = make_job()
    axes = [axis for axis in job.arch.axes(job.model) if axis.name == "layers"]
    source = job.batches(4, "drop_layers")
    batches = [source.at(update, range(4)) for update in range(2)]
    left, chosen = [("layers", unit) for unit in range(3)], list[tuple[str, int]]()
    for _ in range(2):
        chosen.append(left.pop(int(losses_without(job.model, axes, left, batches, chosen).argmin())))
    done = dropping(score="perplexity", iterative=True, drop=2)(job)
    assert gone(done) == sorted(unit for _, unit in chosen)
    turns = done.records["drop_layers"]["scores"]["layers"]
    assert [turns[unit] for _, unit in [*chosen, *left]] == [0, 1, 2]


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
@pytest.mark.parametrize(("kind", "drop"), [("layer", 1), ("layer", 3), ("attention", 2), ("mlp", 2)])
@pytest.mark.parametrize("score", ["reverse", "influence", "random"])
def test_what_is_left_generates_with_its_cache(
    architecture: str, kind: str, drop: int, score: str, tmp_path: Path
) -> None:
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 5,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 48,
    }
    common = {**sizes, "head_dim": 8, "vocab_size": 64, "pad_token_id": 0, "eos_token_id": None}
    types = ["full_attention", "sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
    model: PreTrainedModel
    if architecture == "llama":
        model = LlamaForCausalLM(LlamaConfig(**common))
    else:
        model = Qwen3ForCausalLM(
            Qwen3Config(**common, use_sliding_window=True, sliding_window=4, layer_types=list(types))
        )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, parameter.shape[1] ** -0.5, generator=generator)
    rows = torch.randint(1, 64, (10, 12), generator=generator).tolist()
    job = dropping(score=score, kinds=(kind,), drop=drop)(job_of(model.eval(), rows, tmp_path))
    ids = torch.tensor(rows[:1])
    cached = job.model.generate(ids, max_new_tokens=12, do_sample=False, use_cache=True)
    assert torch.equal(cached, job.model.generate(ids, max_new_tokens=12, do_sample=False, use_cache=False))
    config = job.model.config
    if kind == "layer":
        kept = job.plan.kept["layers"]
        assert config.num_hidden_layers == len(job.model.model.layers) == 5 - drop
        assert [layer.self_attn.layer_idx for layer in job.model.model.layers] == list(range(5 - drop))
        if architecture == "qwen3":
            assert config.layer_types == [types[layer] for layer in kept]
    job.model.save_pretrained(tmp_path / "saved")
    if kind == "layer":
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
        with torch.no_grad():
            assert torch.equal(again(input_ids=ids).logits, job.model(input_ids=ids).logits)


@pytest.mark.parametrize(
    ("knobs", "said"),
    [
        ({"keep": 0.5, "drop": 1}, "keep=0.5 and drop=1 are two budgets; give one"),
        ({"kinds": ["layer", "mlp"]}, "do not go together"),
        ({"kinds": ["head"]}, r"kinds=\['head'\] do not go together"),
        ({"kinds": []}, "do not go together"),
        ({"score": "angular", "kinds": ["mlp"]}, "score=angular measures runs of whole layers"),
        ({"iterative": True}, "which score=influence does not"),
    ],
)
def test_knobs_that_contradict_each_other_are_refused(knobs: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError):
        DropLayers(**knobs)
    with pytest.raises(RecipeError, match=said) as error:
        build({"stages": [{"drop_layers": knobs}]})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("score", ["influence", "angular"])
def test_a_dry_run_shows_what_would_stay_and_refuses_what_cannot(tiny_folder: Path, score: str) -> None:
    def tried(**knobs: Any) -> dict[str, Any]:
        return dry_run({"name": "x", "stages": [{"drop_layers": {"score": score, **knobs}}]}, str(tiny_folder))

    assert tried(drop=2)["shapes"] == {"layers": [1, 3]}
    assert tried(keep=0.7)["shapes"] == {"layers": [2, 3]}
    assert tried(drop=2)["notes"] == ["drop_layers: about 0.3333 of blocks stay"]
    with pytest.raises(
        BudgetError, match="drop=3: the model has 3 layers, of which at most 2 may leave; lower drop to 2"
    ):
        tried(drop=3)
    with pytest.raises(BudgetError, match=r"Raise keep to 0\.333"):
        tried(keep=0.2)


def test_nine_layers_are_the_published_share_of_llama_2_7b(tmp_path: Path) -> None:
    """27.03 % of the parameters; arXiv 2403.03853 gives 27.1."""
    LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, vocab_size=32000
    ).save_pretrained(tmp_path)
    shown = dry_run({"name": "x", "stages": [{"drop_layers": {"drop": 9}}]}, str(tmp_path))
    before, after = (shown[when]["parameters"]["total"] for when in ("before", "after"))
    assert (before, before - after) == (6_738_415_616, 9 * 202_383_360)


@pytest.mark.parametrize("kinds", KINDS)
def test_half_precision_models_are_scored(
    planted: tuple[PreTrainedModel, list[list[int]]], kinds: tuple[str, ...], tmp_path: Path
) -> None:
    model, rows = planted
    drop = 2 * len(kinds)
    job = dropping(kinds=kinds, drop=drop)(job_of(copy.deepcopy(model).bfloat16(), rows, tmp_path))
    assert all(gone(job, axis, 8) == [3, 4] for axis in job.plan.kept)


def test_mixtures_leave_and_no_dense_ffn(make_job: MakeJob, tmp_path: Path) -> None:
    """Layer Drop: of a Qwen2-MoE with a dense layer that does nothing, a mixture that does next to nothing leaves; its
    attention stays, and so does the dense FFN, however similar what it leaves.
    """
    sizes: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 64}
    sizes |= {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "intermediate_size": 32}
    config = Qwen2MoeConfig(**sizes, num_key_value_heads=2, num_experts=4, num_experts_per_tok=2, mlp_only_layers=[1])
    job = prepared(make_job(), config)
    with torch.no_grad():
        job.model.model.layers[1].mlp.down_proj.weight.zero_()
        job.model.model.layers[2].mlp.experts.down_proj.zero_()
        job.model.model.layers[2].mlp.shared_expert.down_proj.weight.zero_()
    before = logits(job.model)
    done = dropping(kinds=["mlp"], mixtures=True, drop=1)(job)
    assert gone(done, "mlp", 4) == [2] and float(done.records["drop_layers"]["scores"]["mlp"][2]) < 1e-12
    torch.testing.assert_close(logits(done.model), before, rtol=0, atol=1e-5)
    shapes = done.arch.shapes(done.model)
    assert [(shape.kv_heads, shape.experts) for shape in shapes] == [(2, 4), (2, 0), (2, 0), (2, 4)]
    assert save_checkpoint(done.model, shapes, tmp_path / "out") == "native"

    axes, cost = job.arch.axes(done.model), done.cost()
    assert dropping(kinds=["mlp"], mixtures=True, drop=2).dry_run_plan(axes, cost).kept["mlp"] == (1, 2)
    with pytest.raises(ValueError, match="drop=3: the model has 2 mixtures of experts; lower drop to 2"):
        dropping(kinds=["mlp"], mixtures=True, drop=3).dry_run_plan(axes, cost)
    with pytest.raises(ValueError, match=r"keep=0.45 of blocks asks for more than all 2 mixtures of experts; raise"):
        dropping(kinds=["mlp"], mixtures=True, keep=0.45).dry_run_plan(axes, cost)
    by_share = dropping(kinds=["mlp"], mixtures=True, keep=0.76).dry_run_plan(axes, cost)
    assert by_share.kept["mlp"] in ((1, 2, 3), (0, 1, 2))
    plain = make_job(folder="plain")
    with pytest.raises(ValueError, match="mixtures=true: no layer of the model has a mixture of experts"):
        dropping(kinds=["mlp"], mixtures=True, drop=1).dry_run_plan(plain.arch.axes(plain.model), plain.cost())
    with pytest.raises(ValidationError, match=r"mixtures=true is about FFNs"):
        dropping(mixtures=True)


def test_the_published_drop_of_eight_mixtures(tmp_path: Path) -> None:
    """Mixtral-8x7B: 46,702,792,704 parameters less 8 x (8 experts of 3 x 4,096 x 14,336, router, norm)."""
    MixtralConfig(architectures=["MixtralForCausalLM"]).save_pretrained(tmp_path)
    for name in ("moe/layer-drop", "moe/layer-drop-int4"):
        facts = dry_run(read(name), str(tmp_path))
        each = 8 * 3 * 4096 * 14336 + 8 * 4096 + 4096
        assert facts["after"]["parameters"]["total"] == 46_702_792_704 - 8 * each == 35_428_208_640
        assert facts["layouts"]["native"] is None and "layers.0 has no channels" in facts["layouts"]["uniform"]
        assert facts["after"]["kv_bytes_per_token"] == facts["before"]["kv_bytes_per_token"]
