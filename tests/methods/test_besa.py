"""BESA: blocks that learn their own shares of zeros, land on the number asked for, and beat equal shares where one
linear is redundant.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from transformers import GPT2Config, GPT2LMHeadModel

from compresso.arch.base import arch_for
from compresso.core.learned_sparsity import channel_error
from compresso.core.rounding import recovered
from compresso.errors import NumericError
from compresso.job import Job
from compresso.methods.besa import Besa
from compresso.methods.wanda import Wanda
from compresso.sweep.block import BlockEdit, BlockVisit, Reference
from compresso.sweep.calibration import Calibration
from compresso.sweep.sweep import sweep
from compresso.sweep.targets import Where, matrix, names_of
from tests.methods.conftest import MakeJob

FEW = Calibration(examples=24, batch=4)


def zeros_of(job: Job) -> dict[str, float]:
    """Share of zeros of each linear."""
    groups = Besa().check(job.model, job.arch)
    return {name: float((matrix(job.model, name) == 0).double().mean()) for name in names_of(groups)}


@pytest.mark.parametrize("per", ["matrix", "row"])
@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.7])
def test_every_block_has_exactly_the_zeros_asked_for(make_job: MakeJob, per: Any, sparsity: float) -> None:
    dense = dict(make_job().model.named_parameters())
    job = Besa(sparsity=sparsity, per=per, optimizer="adam", calibration=FEW)(make_job())
    of_block = {layer: [0, 0] for layer in range(3)}
    for name, weight in job.model.named_parameters():
        gone = (weight == 0) & (dense[name] != 0)
        assert torch.equal(weight, dense[name].masked_fill(gone, 0))  # what stays is untouched
        if name.endswith("proj.weight"):
            found = of_block[int(name.split(".")[2])]
            found[0] += int(gone.sum())
            found[1] += gone.numel()
        else:
            assert not gone.any()
    assert all(zeros == int(sparsity * total + 1e-9) for zeros, total in of_block.values())
    facts = job.records["besa"]
    assert all(abs(block["shift"]) < 0.05 and block["steps"] == 6 for block in facts["blocks"].values())
    assert any(abs(one["learned"] - sparsity) > 1e-3 for one in facts["of"].values())  # something was learned
    assert len({one["least_of_a_row"] for one in facts["of"].values()}) > 1


def test_without_a_step_it_is_wanda(make_job: MakeJob) -> None:
    """A rate that moves nothing leaves flat logits, which are half of each row by Wanda's score."""
    mine = Besa(optimizer="adam", lr=1e-12)(make_job()).model.state_dict()
    plain = Wanda(sparsity=0.5, calibration=Calibration(batch=1))(make_job(folder="other")).model.state_dict()
    assert all(torch.equal(tensor, plain[name]) for name, tensor in mine.items())


def redundant(job: Job) -> Job:
    """Three quarters of the channels are never fed: `down_proj` may lose what reads them, and it changes nothing."""
    for layer in job.model.model.layers:
        layer.mlp.gate_proj.weight.data[12:] *= 1e-6
    return job


def error_of_first_block(job: Job, dense: Job) -> float:
    """Mean over channels of the first block's relative squared error, on the rows it was calibrated on."""
    found: list[float] = []
    batches = FEW.batches(job.rows, 0)

    def look(visit: BlockVisit) -> dict[str, Any]:
        block = job.model.model.layers[0]
        replaced = {name: tensor.detach() for name, tensor in block.named_parameters()}
        for index, batch in enumerate(visit.batches()):
            found.append(float(channel_error(visit.run(batch, replaced), visit.dense_output(index))))
        return {}

    first = Besa(where=Where(layers=(0, 1))).check(dense.model, dense.arch)
    sweep(dense.model, dense.arch, first, batches, None, BlockEdit(look))
    return sum(found) / len(found)


@pytest.mark.parametrize(
    "knobs",
    [
        {"optimizer": "adam", "lr": 0.1},
        {"optimizer": "prodigy"},
        {"optimizer": "adam", "lr": 0.1, "per": "row"},
    ],
    ids=["adam", "prodigy", "row"],
)
def test_a_redundant_linear_loses_more_and_the_block_errs_less_than_with_equal_shares(
    make_job: MakeJob, knobs: dict[str, Any]
) -> None:
    first = Where(layers=(0, 1))
    job = Besa(**knobs, epochs=8, where=first, calibration=FEW)(redundant(make_job()))
    equal = Wanda(sparsity=0.5, where=first, calibration=FEW)(redundant(make_job(folder="other")))
    of = job.records["besa"]["of"]
    down = of.pop("model.layers.0.mlp.down_proj")
    assert all(down["share"] > one["share"] for one in of.values())
    assert down["share"] > 0.55
    dense = redundant(make_job(folder="third"))
    mine, uniform = error_of_first_block(job, dense), error_of_first_block(equal, dense)
    assert mine < 0.95 * uniform
    begun, ended = job.records["besa"]["blocks"]["0"]["error"]
    assert ended < begun


@pytest.mark.parametrize("reference", Reference)
def test_rows_end_on_grids_of_their_own_with_bits(make_job: MakeJob, reference: Reference) -> None:
    job = Besa(bits=4, clip_lr=0.05, optimizer="adam", reference=reference, calibration=FEW, epochs=3)(make_job())
    facts = job.records["besa"]
    assert facts["sparsity"] >= 0.5  # what is small rounds to zero, too
    for name, one in facts["of"].items():
        weight = matrix(job.model, name)
        assert recovered(weight, 4, symmetric=False) is not None
        assert max(len(row.unique()) for row in weight) <= 16
        assert 0.1 <= one["low"] <= 1 and 0.1 <= one["high"] <= 1
    assert min(one["high"] for one in facts["of"].values()) < 0.99  # ends were learned


def test_learned_ends_lose_less_than_the_same_masks_with_whole_ranges(make_job: MakeJob) -> None:
    knobs: dict[str, Any] = {"bits": 3, "optimizer": "adam", "lr": 1e-12, "calibration": FEW, "epochs": 6}
    first = Where(layers=(0, 1))
    learned = Besa(**knobs, where=first)(make_job())
    whole = Besa(**knobs, where=first, clip_lr=0)(make_job(folder="other"))
    dense = make_job(folder="third")
    assert error_of_first_block(learned, dense) < 0.97 * error_of_first_block(whole, dense)


@pytest.mark.parametrize("bits", [None, 4])
def test_what_stays_can_make_up_for_what_leaves(make_job: MakeJob, bits: int | None) -> None:
    knobs: dict[str, Any] = {"per": "row", "bits": bits, "optimizer": "adam", "where": Where(layers=(0, 1))}
    moved = Besa(**knobs, compensate=True)(make_job())
    plain = Besa(**knobs)(make_job(folder="other"))
    for name, weight in plain.model.named_parameters():  # the same masks
        kept = moved.model.get_parameter(name)
        if bits is None:
            assert torch.equal(weight == 0, kept == 0)
    facts = moved.records["besa"]
    assert facts["sparsity"] >= 0.5
    if bits is not None:
        assert all(recovered(matrix(moved.model, name), bits, symmetric=False) for name in facts["of"])
    dense = make_job(folder="third")
    most = 0.9 if bits is None else 0.96  # rounding to grids that were learned without it is left
    assert error_of_first_block(moved, dense) < most * error_of_first_block(plain, dense)


def test_weights_that_are_stored_the_other_way_round(make_job: MakeJob) -> None:
    config = GPT2Config(n_embd=32, n_layer=2, n_head=4, n_inner=48, vocab_size=64, n_positions=32)
    job = make_job()
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, 0.2, generator=torch.Generator().manual_seed(5))
    job = Job(
        **{name: getattr(job, name) for name in ("rows", "held", "plan", "records", "identity", "seed", "out")},
        model=model,
        arch=arch_for(config),
        tokenizer=None,
        quiet=True,
    )
    done = Besa(optimizer="adam", lr=0.1, bits=4, calibration=FEW)(job)
    counts = {(one["least_of_a_row"], one["most_of_a_row"]) for one in done.records["besa"]["of"].values()}
    assert len(counts) > 1 and len(zeros_of(done)) == 8


def test_the_bound_on_what_a_row_may_lose_holds(make_job: MakeJob) -> None:
    job = Besa(rates=(0.4, 0.6), per="row", optimizer="adam", lr=0.5, calibration=FEW, epochs=2)(make_job())
    for one in job.records["besa"]["of"].values():
        assert one["least_of_a_row"] >= 0.4 - 0.06 and one["most_of_a_row"] <= 0.6 + 0.06  # but for what landing moves


def test_a_row_at_the_bound_loses_no_more_where_the_block_is_to_lose_more(make_job: MakeJob) -> None:
    few, first = Calibration(examples=16, batch=1), Where(layers=(0, 1))
    knobs: dict[str, Any] = {"optimizer": "adam", "lr": 0.3, "calibration": few, "where": first}
    job = Besa(sparsity=0.85, per="row", rates=(0.0, 0.9), **knobs)(make_job())
    assert job.records["besa"]["sparsity"] == pytest.approx(0.85, abs=1e-3)
    assert max(one["most_of_a_row"] for one in job.records["besa"]["of"].values()) <= 0.9


def test_shares_that_no_shift_should_hide_are_an_error(make_job: MakeJob) -> None:
    job = make_job()
    with pytest.raises(NumericError, match=r"block \d learned a share of zeros .*; raise penalty"):
        Besa(penalty=1e-9, optimizer="adam", lr=2.0, epochs=4, calibration=FEW)(job)


@pytest.mark.parametrize(
    ("knobs", "words"),
    [
        ({"sparsity": 0.7, "smooth": True}, r"sparsity=0.7 is out of reach .* 0\.376 .* 0\.624; set smooth to false"),
        ({"sparsity": 0.7, "rates": (0.0, 0.6)}, r"less than 0\.600; widen rates"),
        ({"rates": (0.5, 0.51), "step": 0.1}, "fewer than two"),
        ({"step": 9e-4, "smooth": True}, r"greater than or equal to 0\.001"),
        ({"calibration": Calibration(true_sequential=True)}, "set true_sequential to false"),
    ],
)
def test_knobs_that_cannot_be(knobs: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        Besa(**knobs)


@pytest.mark.parametrize("reference", Reference)
def test_a_killed_run_goes_on_to_the_same_bytes(
    make_job: MakeJob, reference: Reference, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stage = Besa(per="row", bits=4, optimizer="prodigy", reference=reference, calibration=FEW)
    whole = stage(make_job())
    learn = Besa._learned  # pyright: ignore[reportPrivateUsage]

    def killed(self: Besa, model: Any, visit: BlockVisit) -> Any:
        if visit.layer == 2:
            raise KeyboardInterrupt
        return learn(self, model, visit)

    with monkeypatch.context() as patch:
        patch.setattr(Besa, "_learned", killed)
        with pytest.raises(KeyboardInterrupt):
            stage(make_job(folder="killed"))
    assert sorted(path.name for path in (tmp_path / "killed").iterdir()) == ["step-000000", "step-000001"]
    again = stage(make_job(folder="killed"))
    assert again.records == whole.records
    assert all(torch.equal(tensor, whole.model.state_dict()[name]) for name, tensor in again.model.state_dict().items())
