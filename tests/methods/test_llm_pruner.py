"""LLM-Pruner: what the authors' classes computed, the sizes they printed, planted units, and every knob."""

import copy
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from compresso.arch.base import arch_for
from compresso.checkpoint.load import load_model
from compresso.checkpoint.source import open_source
from compresso.checkpoint.tokenizer import load_tokenizer
from compresso.core.axis import Axis, Kind
from compresso.core.plan import Plan
from compresso.core.saliency import salience
from compresso.data import nano
from compresso.data.instructions import encode
from compresso.data.registry import load_records
from compresso.edit.gate import gated
from compresso.errors import BudgetError, DataError
from compresso.job import Job
from compresso.methods.llm_pruner import LlmPruner
from compresso.metrics.held import held_loss
from compresso.observe.gradients import weight_fisher, weight_gradients
from compresso.runner.dry_run import dry_run
from compresso.runner.recipe import build, override, read
from compresso.training.order import ShuffledBatches
from tests.arch.test_counts import LLAMA_3_8B, LLAMA_7B, TINY_LLAMA
from tests.methods.conftest import MakeJob

MHA = Path(os.environ.get("COMPRESSO_DATA", "")) / "oracles" / "mha"
needs_oracle = pytest.mark.skipif(
    not (MHA / "llmpruner_taylor.safetensors").is_file(), reason="COMPRESSO_DATA: no oracles/mha"
)
PUBLISHED = {"vector": "vectorize", "first": "param_first", "second": "param_second", "mixed": "param_mix"}
"""Our importances and the authors' names for them."""


@pytest.fixture(scope="module")
def reference_job() -> Job:
    """The oracle's model with the four examples that its importances were taken on."""
    model = AutoModelForCausalLM.from_pretrained(MHA, dtype=torch.float32).eval()
    ids = load_file(MHA / "tokens.safetensors")["calib_ids"][:4].long().tolist()
    rows = [{"input_ids": row, "labels": row} for row in ids]
    return Job(model, arch_for(model.config), None, rows, [], Plan(), {}, {}, 0, Path("training"), quiet=True)  # type: ignore[arg-type]


def axes_of(job: Job, *kinds: Kind) -> list[Axis]:
    return [axis for axis in job.arch.axes(job.model) if axis.kind in kinds]


@needs_oracle
@pytest.mark.parametrize(("importance", "name"), PUBLISHED.items())
def test_scores_and_choices_are_those_of_the_authors_classes(reference_job: Job, importance: Any, name: str) -> None:
    published = load_file(MHA / "llmpruner_taylor.safetensors")
    stage = LlmPruner(ratio=0.25, importance=importance, batch=4, micro_batch=4)
    axes = axes_of(reference_job, Kind.HEAD, Kind.CHANNEL)
    scores = stage.scores(reference_job, axes)
    counts = stage.counts(reference_job.arch.axes(reference_job.model), reference_job.cost())
    for axis in axes:
        root, width = ("self_attn.q_proj", 32) if axis.kind == Kind.HEAD else ("mlp.gate_proj", 1)
        told = f"old.{name}/model.layers.{axis.layer}.{root}"
        wanted = published[f"{told}.importance"].double().reshape(axis.size, width).sum(dim=1)
        torch.testing.assert_close(scores[axis.name], wanted, rtol=1e-4, atol=0)
        kept = published[f"{told}.kept_rows"].reshape(-1, width)[:, 0] // width
        best = scores[axis.name].argsort(descending=True)[: counts[axis.name]].sort().values
        assert best.tolist() == kept.tolist()


@needs_oracle
@pytest.mark.parametrize("importance", ["first", "second", "mixed"])
def test_saliences_of_single_matrices_are_those_of_plain_autograd(reference_job: Job, importance: Any) -> None:
    published = load_file(MHA / "taylor_formula.safetensors")
    model, batch = reference_job.model, reference_job.collated(reference_job.rows)
    names = {piece.param for axis in axes_of(reference_job, Kind.HEAD, Kind.CHANNEL) for piece in axis.slices}
    gradients, fisher = weight_gradients(model, names, batch, 4), weight_fisher(model, names, batch)

    def entries(name: str) -> Tensor:
        return salience(importance, model.get_parameter(name), gradients[name], fisher[name])

    for layer in range(3):
        for module in ("q_proj", "k_proj", "v_proj", "o_proj"):
            got = entries(f"model.layers.{layer}.self_attn.{module}.weight").sum(dim=0 if module == "o_proj" else 1)
            torch.testing.assert_close(
                got, published[f"attn.{layer}.{module}.{PUBLISHED[importance]}"], rtol=1e-4, atol=0
            )
        mlp = [
            entries(f"model.layers.{layer}.mlp.{m}.weight").sum(dim=d)
            for m, d in (("gate_proj", 1), ("up_proj", 1), ("down_proj", 0))
        ]
        torch.testing.assert_close(
            torch.stack(mlp), published[f"mlp.{layer}.{PUBLISHED[importance]}"], rtol=1e-4, atol=0
        )


def folder_of(tmp_path: Path, sizes: dict[str, int]) -> Path:
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"], **sizes})
    )
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sizes", "recipe", "layers", "total"),
    [
        (LLAMA_7B, "block20", None, 5_422_977_024),
        (LLAMA_7B, "block50", None, 3_350_188_032),
        (LLAMA_7B, "channel20", None, 3276 * (2 * 32000 + 65 + 32 * (4 * 4096 + 3 * 11008))),
        (LLAMA_7B, "channel50", None, 3_369_207_808),
        (LLAMA_3_8B, "block20", None, 6_612_586_496),
        (TINY_LLAMA, "block20", [4, 18], 945_907_712),
    ],
    ids=["20 %", "50 %", "channel 20 %", "channel 50 %", "llama-3-8b", "tinyllama"],
)
def test_published_sizes(
    tmp_path: Path, sizes: dict[str, int], recipe: str, layers: list[int] | None, total: int
) -> None:
    raw = read(f"llm-pruner/{recipe}")
    for knob in ("attention_layers", "mlp_layers") if layers else ():
        raw = override(raw, f"stages.llm_pruner.{knob}", layers)
    shown = dry_run(build(raw), open_source(folder_of(tmp_path, sizes), weights=False))
    assert shown.after["parameters"]["total"] == total
    if total == 5_422_977_024:
        assert shown.stages[-1].trainable == {"lora": 17_419_264}


@pytest.mark.parametrize("importance", ["vector", "first", "second", "mixed", "l1", "l2"])
@pytest.mark.parametrize("reduction", ["sum", "mean", "max", "prod", "last"])
def test_dead_units_leave_first(make_job: MakeJob, importance: Any, reduction: Any) -> None:
    job = make_job()
    with torch.no_grad():
        for name in ("mlp.gate_proj", "mlp.up_proj"):
            job.model.get_parameter(f"model.layers.1.{name}.weight")[5] = 0
        job.model.get_parameter("model.layers.1.mlp.down_proj.weight")[:, 5] = 0
        for name, width in (("q_proj", 16), ("k_proj", 8), ("v_proj", 8)):
            job.model.get_parameter(f"model.layers.2.self_attn.{name}.weight")[3 * width :] = 0
        job.model.get_parameter("model.layers.2.self_attn.o_proj.weight")[:, 48:] = 0
    plan = LlmPruner(ratio=0.25, importance=importance, reduction=reduction, batch=4)(job).plan
    assert 5 not in plan.kept["layers.1.channels"]
    assert plan.kept["layers.2.heads"] == (0, 1, 2)


@pytest.fixture(scope="module")
def taught() -> LlamaForCausalLM:
    """A tiny model trained for a second on a stream where the next token is the last one plus one."""
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 8,
    }
    model = LlamaForCausalLM(LlamaConfig(**sizes, intermediate_size=48, vocab_size=64, pad_token_id=0))  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(60):
        ids = (torch.randint(63, (16, 1)) + torch.arange(12)) % 63 + 1
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@pytest.mark.slow
def test_first_order_scores_follow_the_true_change_of_the_loss(make_job: MakeJob) -> None:
    """On the embedded model, against the loss without a channel. The signed sum is the first-order term of removing all
    of it.

    Element^1 adds up sizes instead, of which no derivative is made: it follows at about 0.8, and so does not bear a
    bound of 0.8.
    """
    source = open_source(nano.path())
    model, tokenizer = load_model(source, dtype=torch.float32), load_tokenizer(source)
    encoded = encode(
        load_records("world"), tokenizer, max_length=64, prompt_on=False, pack=False, limit=16, vocab_size=1024
    )
    job = replace(make_job(), model=model, arch=arch_for(model.config), rows=encoded.rows)
    axes = axes_of(job, Kind.CHANNEL)
    stage = LlmPruner(ratio=0.25, importance="vector", batch=4, micro_batch=4)
    scores, batch = stage.scores(job, axes), job.batches(4, "llm_pruner").at(0, range(4))
    generator = torch.Generator().manual_seed(0)
    units = [(axis, unit) for axis in axes for unit in torch.randperm(axis.size, generator=generator)[:12].tolist()]

    @torch.no_grad()
    def loss_without(axis: Axis, unit: int) -> float:
        mask = torch.ones(axis.size)
        mask[unit] = 0
        with gated(model, axes, {axis.name: mask}):
            return float(model(**batch).loss)

    with torch.no_grad():
        dense = float(model(**batch).loss)
    true = [abs(loss_without(axis, unit) - dense) for axis, unit in units]
    ranks = torch.stack(
        [torch.tensor(values).argsort().argsort() for values in ([scores[a.name][u] for a, u in units], true)]
    )
    assert torch.corrcoef(ranks.float())[0, 1] > 0.8


@pytest.mark.parametrize("scope", ["block", "global", "channel"])
@pytest.mark.parametrize("iterations", [1, 3])
def test_it_lands_on_the_budget(make_job: MakeJob, scope: Any, iterations: int) -> None:
    before = make_job().cost()().parameters()["blocks"]
    job = LlmPruner(keep=0.6, scope=scope, iterations=iterations, batch=4)(make_job())
    records = job.records["llm_pruner"]
    unit = 2 * 3 * 32 * 3 if scope != "channel" else before / 32  # a channel in every layer; a hidden dimension
    assert 0.6 * before - unit < job.cost()().parameters()["blocks"] <= 0.6 * before
    assert records["parameters_before"]["blocks"] == before
    assert records["kept_share_of_blocks"] == job.cost()().parameters()["blocks"] / before
    assert records["units_kept"] == {name: f"{len(kept)}/{size_of(name)}" for name, kept in job.plan.kept.items()}


def size_of(axis: str) -> int:
    return {"heads": 4, "channels": 48, "hidden": 32}[axis.rpartition(".")[2]]


def test_iterations_end_at_the_widths_of_one_step_with_scores_taken_again(make_job: MakeJob) -> None:
    once, thrice = (LlmPruner(ratio=0.5, iterations=n, batch=8)(make_job(folder=str(n))) for n in (1, 3))
    assert once.arch.shapes(once.model) == thrice.arch.shapes(thrice.model)
    assert once.plan != thrice.plan
    assert thrice.records["llm_pruner"]["calibration_examples"] == 24


def test_only_layers_of_the_ranges_lose_units(make_job: MakeJob) -> None:
    job = LlmPruner(ratio=0.5, attention_layers=(1, 3), mlp_layers=(0, 1), batch=4)(make_job())
    assert [(shape.kv_heads, shape.query_heads, shape.channels) for shape in job.arch.shapes(job.model)] == [
        (4, 8, 24),
        (2, 4, 48),
        (2, 4, 48),
    ]


@pytest.mark.parametrize("layout", ["free", "uniform"])
def test_a_global_ranking_removes_both_kinds_and_has_equal_widths_on_request(make_job: MakeJob, layout: Any) -> None:
    job = LlmPruner(keep=0.6, scope="global", iterations=2, batch=4, layout=layout, floor={Kind.HEAD: 1})(make_job())
    shapes = job.arch.shapes(job.model)
    assert (len(set(shapes)) == 1) == (layout == "uniform")
    assert 3 <= sum(shape.kv_heads for shape in shapes) < 12
    assert 36 < sum(shape.channels for shape in shapes) < 144


def test_layers_leave_by_position_as_published_or_by_score(make_job: MakeJob) -> None:
    assert LlmPruner(ratio=0.4, scope="layer", importance="position")(make_job()).plan.kept["layers"] == (0,)
    job = make_job()
    with torch.no_grad():
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            job.model.get_parameter(f"model.layers.1.{name}.weight").zero_()
    assert LlmPruner(ratio=0.3, scope="layer", batch=4)(job).plan.kept["layers"] == (0, 2)


def test_windows_are_drawn_from_text_that_is_long_enough(make_job: MakeJob) -> None:
    assert LlmPruner(ratio=0.25, batch=4, tokens=8)(make_job()).records["llm_pruner"]["calibration_examples"] == 4
    with pytest.raises(DataError, match="0 of 36 examples have the 64 tokens of a calibration window, wanted 10"):
        LlmPruner(ratio=0.25, tokens=64)(make_job())


def test_an_iteration_looks_at_each_example_once_at_most(make_job: MakeJob, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, at = list[list[int]](), ShuffledBatches.at

    def noted(source: ShuffledBatches, update: int, rows: range) -> dict[str, torch.Tensor]:
        seen.append(source.indices(update, rows))
        return at(source, update, rows)

    monkeypatch.setattr(ShuffledBatches, "at", noted)
    for n, batch, looked_at in ((2, 4, 2), (6, 4, 4), (12, 4, 4)):
        seen.clear()
        job = make_job(folder=str(n))
        done = LlmPruner(ratio=0.5, iterations=3, batch=batch)(replace(job, rows=job.rows[:n]))
        assert [len(one) for one in seen] == [len(set(one)) for one in seen] == [looked_at] * 3
        assert done.records["llm_pruner"]["calibration_examples"] == 3 * looked_at
    assert len({i for one in seen for i in one}) == 12, "where there are enough, iterations share them out"


def test_weights_alone_need_no_data(make_job: MakeJob) -> None:
    for importance in ("l1", "l2", "random", "position"):
        job = LlmPruner(ratio=0.25, importance=importance)(replace(make_job(), rows=[], held=[]))  # type: ignore[arg-type]
        assert job.records["llm_pruner"]["calibration_examples"] == 0
    with pytest.raises(DataError):
        LlmPruner(ratio=0.25)(replace(make_job(), rows=[]))


def test_random_removal_follows_the_seed(make_job: MakeJob) -> None:
    stage = LlmPruner(ratio=0.5, importance="random")
    assert stage(make_job()).plan == stage(make_job()).plan != stage(make_job(seed=1)).plan


def test_less_is_lost_than_at_random(taught: LlamaForCausalLM, make_job: MakeJob) -> None:
    job = make_job()
    losses = [
        held_loss(
            LlmPruner(ratio=0.5, importance=importance, batch=16)(  # type: ignore[arg-type]
                replace(job, model=copy.deepcopy(taught), arch=arch_for(taught.config))
            ).model,
            job.held,
        ).mean
        for importance in ("first", "mixed", "random")
    ]
    assert max(losses[:2]) < losses[2]


@pytest.mark.parametrize(
    ("knobs", "told"),
    [
        ({"keep": 0.7, "ratio": 0.25}, "are two sizes"),
        ({"ratio": 0.25, "scope": "global"}, "give keep instead of ratio"),
        ({"scope": "global", "reduction": "prod"}, "cannot compare"),
        ({"scope": "channel", "reduction": "last"}, "means nothing for scope='channel'"),
        ({"scope": "layer", "mlp_layers": (0, 2)}, "lie in no range"),
        ({"attention_layers": (2, 2)}, "is empty"),
        ({"attention_layers": (1, 2), "layout": "uniform"}, "leaves other layers wider"),
    ],
)
def test_knobs_that_contradict_each_other_are_refused(knobs: dict[str, Any], told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        LlmPruner(**knobs)


def test_what_the_model_cannot_give_is_refused_before_weights_are_read(tmp_path: Path) -> None:
    source = open_source(folder_of(tmp_path, {**LLAMA_7B, "num_hidden_layers": 8}), weights=False)
    with pytest.raises(BudgetError, match=r"attention_layers=\[4, 30\] reaches past the model's 8 layers"):
        dry_run(build(read("llm-pruner/block20")), source)
    raw = {"stages": [{"llm_pruner": {"keep": 0.3, "attention_layers": [0, 2], "mlp_layers": [0, 2]}}]}
    with pytest.raises(
        BudgetError, match=r"keep=0.3 allows .* but at least .* are kept .* or widen attention_layers and mlp_layers"
    ):
        dry_run(build(raw), source)


@pytest.mark.parametrize("allocation", ["global", "exact"])
def test_a_cache_is_cut_by_heads_alone(make_job: MakeJob, allocation: str) -> None:
    job = LlmPruner(keep=0.5, of="kv", scope="global", allocation=allocation, batch=4, micro_batch=4)(make_job())  # type: ignore[arg-type,call-arg]
    assert [shape.channels for shape in job.arch.shapes(job.model)] == [48, 48, 48]
    assert float(job.cost()().cached) == 0.5 * float(make_job(folder="dense").cost()().cached)
