"""Contextual pruning to a size: planted unused units leave first and without a trace, constant ones move into a bias,
domains differ.
"""

from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from compresso.arch.base import arch_for
from compresso.core.axis import Kind
from compresso.core.plan import Plan
from compresso.job import Job
from compresso.methods.contextual import Contextual, relative
from compresso.metrics.divergence import divergence, reference
from compresso.observe.activations import mean_inputs, reader
from tests.conftest import Call
from tests.methods.conftest import MakeJob

QUICK = {"batches": 2, "batch": 8, "micro_batch": 8}
IDS = torch.arange(1, 40).unsqueeze(0)


def biased(job: Job) -> Job:
    """The job on a model whose FFN has biases and ReLU."""
    config = LlamaConfig(**{**job.model.config.to_dict(), "mlp_bias": True, "hidden_act": "relu"})
    model = LlamaForCausalLM(config).eval()
    model.load_state_dict(job.model.state_dict(), strict=False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.1, generator=torch.Generator().manual_seed(len(name)))
    return replace(job, model=model, arch=arch_for(config))


@torch.no_grad()
def planted(job: Job, *, up: float) -> Job:
    """Every fourth FFN unit gives `relu(gate) * up` with gate 1 and up constant: 0 is unused, others are the same
    whatever is read. What it gives weighs a hundred times as much as others'.
    """
    for layer in range(3):
        for part, value in (("gate_proj", 1.0), ("up_proj", up)):
            job.model.get_parameter(f"model.layers.{layer}.mlp.{part}.weight")[::4] = 0
            job.model.get_parameter(f"model.layers.{layer}.mlp.{part}.bias")[::4] = value
        job.model.get_parameter(f"model.layers.{layer}.mlp.down_proj.weight")[:, ::4] *= 100
    return job


def logits(job: Job) -> Tensor:
    with torch.no_grad():
        return job.model(IDS, use_cache=False).logits


def keeping_three_quarters(job: Job) -> tuple[float, dict[str, tuple[int, ...]]]:
    """The share of block parameters that is left without the planted units, and the plan of that."""
    left = {f"layers.{layer}.channels": tuple(i for i in range(48) if i % 4) for layer in range(3)}
    cost = job.cost()
    return float(cost.of(Plan(left)).blocks / cost().blocks), left


def test_unused_units_leave_first_and_without_a_trace(make_job: MakeJob) -> None:
    job = planted(biased(make_job()), up=0.0)
    before, (keep, left) = logits(job), keeping_three_quarters(job)
    after = Contextual(keep=keep, **QUICK)(job)  # type: ignore[arg-type]
    assert dict(after.plan.kept) == left
    torch.testing.assert_close(logits(after), before, atol=1e-5, rtol=1e-5)


def test_constant_units_survive_in_the_bias_alone(make_job: MakeJob) -> None:
    """Units that always give 1e-3 are the least used; with compensation they leave no trace, without it they do."""
    errors: list[float] = []
    for compensate in (True, False):
        job = planted(biased(make_job(folder=str(compensate))), up=0.001)
        before, (keep, left) = logits(job), keeping_three_quarters(job)
        after = Contextual(keep=keep, compensate=compensate, **QUICK)(job)  # type: ignore[arg-type]
        assert dict(after.plan.kept) == left
        errors.append(float((logits(after) - before).abs().max()))
    assert errors[0] < 1e-4 < 1e-2 < errors[1]
    assert "compensated" not in after.records["contextual"]


def test_the_records_say_where_no_bias_could_take_the_mean(make_job: MakeJob) -> None:
    plain, with_bias = (
        Contextual(keep=0.8, **QUICK)(make_job()),
        Contextual(keep=0.8, **QUICK)(biased(make_job(folder="b"))),
    )  # type: ignore[arg-type]
    assert plain.records["contextual"]["compensated"] == 0 < plain.records["contextual"]["without_bias"]
    assert with_bias.records["contextual"]["without_bias"] == 0 < with_bias.records["contextual"]["compensated"]


def test_compensation_reads_mean_inputs_by_hand(make_job: MakeJob) -> None:
    job = biased(make_job())
    axes = [axis for axis in job.arch.axes(job.model) if axis.kind in (Kind.CHANNEL, Kind.HEAD) and axis.layer == 2]
    batch = job.collated(job.rows[:5])
    batch["attention_mask"][0, 6:] = 0
    readers = {axis.name: reader(job.model, axis) for axis in axes}
    found = mean_inputs(job.model, readers, [batch])
    for name, module in (("layers.2.channels", "mlp.down_proj"), ("layers.2.heads", "self_attn.o_proj")):
        seen: list[Tensor] = []
        linear = job.model.get_submodule(f"model.layers.2.{module}")
        handle = linear.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(inputs[0]))
        with torch.no_grad():
            job.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        handle.remove()
        assert readers[name] is linear
        torch.testing.assert_close(found[name], seen[0][batch["attention_mask"].bool()].double().mean(dim=0))


def test_it_does_not_depend_on_how_many_examples_are_read_at_once(make_job: MakeJob) -> None:
    one, other = (
        Contextual(keep=0.7, batches=2, batch=8, micro_batch=size)(make_job(folder=str(size))) for size in (8, 1)
    )
    assert one.plan == other.plan


def test_what_a_domain_uses_stays_for_it(make_job: MakeJob) -> None:
    """Two domains of disjoint tokens, and units that fire for one of them each: pruning on a domain spares it and hurts
    the other.
    """

    @torch.no_grad()
    def two_domains() -> Job:
        job = biased(make_job(tied=False))
        model = job.model
        model.get_parameter("model.embed_tokens.weight")[:, 0] = torch.where(torch.arange(64) < 32, 4.0, -4.0)
        for layer in range(3):
            gate = model.get_parameter(f"model.layers.{layer}.mlp.gate_proj.weight")
            gate[:24, 0] += 3.0
            gate[24:, 0] -= 3.0
            for part in ("self_attn.o_proj", "mlp.down_proj"):
                model.get_parameter(f"model.layers.{layer}.{part}.weight")[0] = 0
            model.get_parameter(f"model.layers.{layer}.mlp.down_proj.bias")[0] = 0
        generator = torch.Generator().manual_seed(0)
        rows = torch.randint(1, 32, (40, 12), generator=generator).tolist()
        return replace(job, rows=[{"input_ids": row, "labels": row} for row in rows], held=[])

    generator = torch.Generator().manual_seed(1)
    own, other = (torch.randint(low, low + 31, (6, 12), generator=generator).tolist() for low in (1, 33))
    dense = two_domains().model
    after = Contextual(keep=0.8, **QUICK)(two_domains())  # type: ignore[arg-type]
    hurt = [divergence(after.model, reference(dense, windows, corpus="held"))[0].value for windows in (own, other)]
    assert hurt[0] < 0.2 * hurt[1]


def test_sizes_shapes_and_knobs(make_job: MakeJob) -> None:
    job = Contextual(
        keep=0.6, kinds=(Kind.CHANNEL, Kind.HEAD), layout="uniform", multiple_of={Kind.CHANNEL: 8}, **QUICK
    )(make_job())  # type: ignore[arg-type]
    widths = {(shape.kv_heads, shape.channels) for shape in job.arch.shapes(job.model)}
    assert len(widths) == 1 and widths.pop()[1] % 8 == 0
    assert relative(torch.tensor([1.0, 4.0])).tolist() == [0.25, 1] and relative(torch.zeros(2)).tolist() == [0, 0]
    with pytest.raises(ValidationError):
        Contextual(kinds=(Kind.HIDDEN,))  # type: ignore[arg-type]


def test_an_infeasible_size_is_refused_before_weights_are_read(call: Call, tiny_folder: object) -> None:
    code, _, err = call("plan", "contextual", "--model", tiny_folder, "--keep", "0.1")
    assert (code, err.count("\n")) == (2, 1)
    assert (
        "stage 'contextual': keep=0.1 allows" in err
        and "are kept in what the kinds channel do not reach. Raise keep to 0.581" in err
    )
