"""Banks of nested choices: for every family what is chosen leaves as planned, whatever holds the weights; killed ones
go on to the same bytes; others' are refused.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.arch.conftest import CONFIGS, GROUPED, MIXTURES, POST_NORM, build
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from compresso.arch.base import arch_for
from compresso.arch.queries import axes_of
from compresso.checkpoint.source import open_source
from compresso.core.axis import Kind
from compresso.core.plan import Plan
from compresso.edit.shrink import shrink_
from compresso.errors import CheckpointError
from compresso.solve.bank import Bank, columns, levels, plan, weights_at
from compresso.sweep.bank import BankKnobs, make_bank
from compresso.sweep.bank_file import read, read_moment
from compresso.sweep.calibration import Calibration
from compresso.sweep.offload import Offloaded
from compresso.sweep.survey import Weighting
from compresso.sweep.swept import SweepRun
from compresso.sweep.targets import matrix

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "max_position_embeddings": 64,
}
QUICK = ("llama_gqa", "gpt2", "bloom", "phi", "gemma2", "bert")
"""Families that every run of the tests asks; the others are slow together."""
TEXTS = [
    name if name in QUICK else pytest.param(name, marks=pytest.mark.slow)
    for name in CONFIGS
    if not name.startswith("vit") and name not in MIXTURES  # whose experts show no inputs
]


def rows(n: int = 12, length: int = 16, seed: int = 0, vocabulary: int = 64) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        {"input_ids": torch.randint(3, vocabulary, (length + i % 3,), generator=generator).tolist()} for i in range(n)
    ]


def llama() -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**SIZES, num_attention_heads=8, num_key_value_heads=2)).eval()
        for parameter in model.parameters():
            parameter.data.add_(torch.randn_like(parameter), alpha=0.2)
    return model


def run_of(model: PreTrainedModel, folder: Path, examples: Sequence[Any] | None = None) -> SweepRun:
    given = rows() if examples is None else examples
    return SweepRun("test", model, arch_for(model.config), given, 0, folder, lambda _: {})


def bank_of(model: PreTrainedModel, folder: Path, **knobs: Any) -> Bank:
    return make_bank(run_of(model, folder), Calibration(batch=4), BankKnobs(**knobs))


def inputs_and_stream(model: PreTrainedModel, consumer: str, layer: int) -> tuple[Tensor, Tensor, Tensor]:
    """What a linear reads, and the stream before and behind its block, of all tokens of `rows()`."""
    seen: dict[str, list[Tensor]] = {"read": [], "before": [], "behind": []}
    block = arch_for(model.config).blocks(model)[layer]

    def around(_: nn.Module, given: Any, named: Any, output: Any) -> None:
        first = given[0] if given else named["hidden_states"]
        after = output[0] if isinstance(output, tuple) else output
        seen["before"].append(first.flatten(0, 1))
        seen["behind"].append(after.flatten(0, 1))

    handles = [
        model.get_submodule(consumer).register_forward_pre_hook(
            lambda _, given: seen["read"].append(given[0].reshape(-1, given[0].shape[-1]))
        ),
        block.register_forward_hook(around, with_kwargs=True),
    ]
    with torch.no_grad():
        for row in rows():
            model(input_ids=torch.tensor([row["input_ids"]]))
    for handle in handles:
        handle.remove()
    read_, before, behind = (torch.cat(seen[name]).double() for name in ("read", "before", "behind"))
    return read_, before, behind


def one_of_each(bank: Bank, turn: int) -> dict[str, Any]:
    """A level of every sub-layer, another one each time; hardly ever gone."""
    chosen: dict[str, Any] = {}
    for i, (name, one) in enumerate(bank.sub_layers.items()):
        there = levels(one, grid=4)
        chosen[name] = there[(turn * 5 + i * 3) % max(len(there) - 1, 1)] if (i + turn) % 5 else there[-1]
    return chosen


@pytest.mark.parametrize("name", TEXTS)
def test_for_every_family_what_is_chosen_leaves_without_a_trace(name: str, tmp_path: Path) -> None:
    """Fitted weights are 0 in front of what leaves, so the smaller model computes what the edited one did."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build(name).eval()
        for parameter in model.parameters():
            parameter.data.add_(torch.randn_like(parameter), alpha=0.05)
    arch, examples = arch_for(model.config), rows(8, 12, vocabulary=model.config.vocab_size)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    bank = make_bank(run_of(model, tmp_path, examples), Calibration(batch=4), BankKnobs(moments=True))
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    axes = axes_of(arch, model, (Kind.QUERY,))
    assert [(one.layer, one.kind) for one in bank.sub_layers.values()] == [
        (i, kind) for i in range(bank.layers) for kind in (Kind.ATTENTION, Kind.MLP)
    ]
    assert bool(bank.blocks) == any(axis.kind == Kind.LAYER for axis in axes)
    assert any(one.slots > 1 for one in bank.sub_layers.values()) == (name in GROUPED)
    for turn in range(2):
        edited = build(name).eval()
        edited.load_state_dict(before)
        chosen = one_of_each(bank, turn)
        assert any(level.gone for level in chosen.values())
        for key, level in chosen.items():
            one = bank.sub_layers[key]
            weight = matrix(edited, one.consumer)
            weight.copy_(weights_at(one, level, weight, read_moment(tmp_path / "bank", one)))
            bias = getattr(edited.get_submodule(one.consumer), "bias", None)
            if level.gone and bias is not None:
                bias.data.zero_()
        ids = torch.tensor([examples[0]["input_ids"]])
        with torch.no_grad():
            masked = edited(input_ids=ids)[0]
            shrink_(edited, axes, plan(bank, chosen))
            smaller = edited(input_ids=ids)[0]
        if name not in POST_NORM:  # norms behind the sum stay as they are
            torch.testing.assert_close(smaller, masked, atol=2e-4, rtol=2e-4)
        assert sum(p.numel() for p in edited.parameters()) < sum(p.numel() for p in model.parameters())


def counted_of_rows(behind: Tensor) -> Tensor:
    """How often each token of `rows()` counts [tokens]: first ones a fifth of all others of the batch, which holds rows
    of one length.
    """
    lengths = [len(row["input_ids"]) for row in rows()]
    found = list[float]()
    for length in lengths:
        found += [max(1.0, 0.2 * (length - 1)), *[1.0] * (length - 1)]
    assert len(found) == len(behind)
    return torch.tensor(found, dtype=torch.float64)


@pytest.mark.parametrize("weighting", Weighting)
def test_errors_are_those_of_the_outputs_of_the_dense_model(weighting: Weighting, tmp_path: Path) -> None:
    model = llama()
    bank = bank_of(model, tmp_path, weighting=weighting, damping=1e-9, moments=True)
    for one in bank.sub_layers.values():
        read_, before, behind = inputs_and_stream(model, one.consumer, one.layer)
        alike = weighting is Weighting.NONE
        share = torch.ones(len(behind)) if alike else behind.square().sum(dim=1).reciprocal()
        if weighting is Weighting.SINKS:
            share *= counted_of_rows(behind)
        weight = matrix(model, one.consumer)
        moment = read_moment(tmp_path / "bank", one)
        torch.testing.assert_close(moment.double(), (read_.T * share) @ read_ / len(read_), atol=1e-5, rtol=1e-4)
        for level in levels(one, grid=8):
            fitted = weights_at(one, level, weight, moment, 1e-9)
            off = ((read_ @ (fitted - weight).double().T).square().sum(dim=1) * share).mean()
            assert level.error == pytest.approx(float(off), rel=5e-3, abs=1e-6 * one.gone)
        assert levels(one)[-1].relative == 1
        moved = ((behind - before).square().sum(dim=1) * share).mean()
        assert bank.blocks[one.layer] == pytest.approx(float(moved), rel=1e-4)


def test_a_bias_outlives_units_and_leaves_with_the_sub_layer(tmp_path: Path) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = LlamaForCausalLM(LlamaConfig(**SIZES, num_attention_heads=4, mlp_bias=True, attention_bias=True)).eval()
        for parameter in model.parameters():
            parameter.data.add_(torch.randn_like(parameter), alpha=0.2)
    bank = bank_of(model, tmp_path, weighting=Weighting.NONE, damping=1e-9)
    for one in bank.sub_layers.values():
        assert one.fewest == 1 and min(level.units for level in levels(one, 1)[:-1]) == 1
        read_, _, _ = inputs_and_stream(model, one.consumer, one.layer)
        module = model.get_submodule(one.consumer)
        with torch.no_grad():
            gone = (read_ @ module.weight.double().T + module.bias.double()).square().sum(dim=1).mean()
        assert one.gone == pytest.approx(float(gone), rel=1e-3)
        assert abs(one.ladders[0].errors[-1] / one.gone - 1) > 5e-3


def test_query_heads_leave_at_equal_counts_and_every_level_is_nested(tmp_path: Path) -> None:
    bank = bank_of(llama(), tmp_path)
    one = bank.sub_layers["layers.1.attention"]
    assert [(level.units, level.slots) for level in levels(one)] == [
        *((units, slots) for slots in (4, 3, 2, 1) for units in (2, 1)),
        (0, 0),
    ]
    assert all(sorted(order) != list(order) or len(order) == 3 for order in one.queries)
    assert [len(order) for order in one.queries] == [3, 3]
    for there in levels(one)[:-1]:
        mine = set(columns(one, there).tolist())
        assert len(mine) == there.units * there.slots * 4
        for other in levels(one)[:-1]:
            if other.slots == there.slots and other.units < there.units:
                assert set(columns(one, other).tolist()) < mine
                assert other.error > there.error
            if other.slots < there.slots and other.units == there.units == 2:
                assert set(columns(one, other).tolist()) < mine
                assert other.error > there.error


def test_a_sink_token_rules_the_order_unless_tokens_count_by_their_stream(tmp_path: Path) -> None:
    """A token whose states are 300 times as large is planted, and a channel that only it uses."""
    model, token, planted = llama(), 5, 17
    with torch.no_grad():
        embedding = model.get_input_embeddings().weight
        embedding[token] *= 300
        mlp = model.get_submodule("model.layers.0.mlp")
        for name in ("gate_proj", "up_proj"):
            mlp.get_parameter(f"{name}.weight")[planted] = embedding[token] / embedding[token].norm()
    examples = [{"input_ids": [token, *row["input_ids"]]} for row in rows()]
    ranks: dict[Weighting, int] = {}
    for weighting in Weighting:
        run = run_of(model, tmp_path / weighting, examples)
        bank = make_bank(run, Calibration(batch=4), BankKnobs(weighting=weighting))
        ranks[weighting] = bank.sub_layers["layers.0.mlp"].ladders[0].order.index(planted)
    assert ranks[Weighting.STREAM] < 24 < 40 < ranks[Weighting.NONE]


def test_what_left_before_is_not_there_and_an_empty_block_leaves_at_no_cost(tmp_path: Path) -> None:
    model = llama()
    axes = axes_of(arch_for(model.config), model, ())
    shrink_(model, axes, Plan({"attention": (0, 2), "mlp": (0, 2), "layers.2.channels": tuple(range(20))}))
    bank = bank_of(model, tmp_path)
    assert list(bank.sub_layers) == [f"layers.{i}.{kind}" for i in (0, 2) for kind in (Kind.ATTENTION, Kind.MLP)]
    assert bank.blocks[1] == 0 < bank.blocks[0]
    assert len(bank.sub_layers["layers.2.mlp"].ladders[0].order) == 20
    chosen = {"layers.0.mlp": levels(bank.sub_layers["layers.0.mlp"])[-1]}
    shrink_(model, axes_of(arch_for(model.config), model, ()), plan(bank, chosen, without=[1]))
    assert [(shape.kv_heads, shape.channels) for shape in arch_for(model.config).shapes(model)] == [(2, 0), (2, 20)]


@pytest.mark.parametrize("n", [12, 30])
def test_too_few_calibration_tokens_are_said_with_the_number_that_would_do(
    n: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_bank(run_of(llama(), tmp_path, rows(n)), Calibration(batch=4), BankKnobs())
    said = (
        "calibration has 204 tokens, fewer than 8 for each of the 48 inputs of model.layers.0.mlp.down_proj; 384 would"
        " do"
    )
    assert [record.getMessage() for record in caplog.records] == ([said] if n == 12 else [])


def test_a_bank_is_read_and_not_made_again_and_another_is_refused_by_the_field(tmp_path: Path) -> None:
    model = llama()
    bank = bank_of(model, tmp_path)
    assert bank == read(tmp_path / "bank", bank.identity)
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "bank").rglob("*")}
    assert bank_of(model, tmp_path) == bank
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "bank").rglob("*")} == written
    with pytest.raises(
        CheckpointError, match=r"another model, calibration or kind: knobs\.damping was 0\.01, is 0\.02"
    ):
        bank_of(model, tmp_path, damping=0.02)
    with pytest.raises(CheckpointError, match=r": calibration was '\w+', is '\w+'\. Give"):
        make_bank(run_of(model, tmp_path, rows(seed=1)), Calibration(batch=4), BankKnobs())
    with pytest.raises(CheckpointError, match="has no second moments; build it with moments: true"):
        read_moment(tmp_path / "bank", bank.sub_layers["layers.0.mlp"])
    with torch.no_grad():
        model.get_parameter("lm_head.weight")[0, 0] += 1
    with pytest.raises(CheckpointError, match=r": model was '\w+', is '\w+'\. Give"):
        bank_of(model, tmp_path)
    with pytest.raises(CheckpointError, match=r"dtype was 'float32', is 'bfloat16'"):
        read(tmp_path / "bank", {**bank.identity, "dtype": "bfloat16"})


def test_what_is_no_bank_or_no_whole_one_is_refused(tmp_path: Path) -> None:
    bank = bank_of(llama(), tmp_path)
    with pytest.raises(CheckpointError, match=r"holds no bank: there is no bank\.json"):
        read(tmp_path)
    damaged = tmp_path / "bank" / "step-000001" / "weights.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-5] ^= 1
    damaged.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"weights\.safetensors"):
        read(tmp_path / "bank")
    assert bank_of(llama(), tmp_path) == bank  # a damaged layer, and those behind it, are made again
    (tmp_path / "bank" / "step-000002" / "weights.safetensors").unlink()
    with pytest.raises(CheckpointError, match="not finished: layer 2 of 3 is missing"):
        read(tmp_path / "bank")
    told = json.loads((tmp_path / "bank" / "bank.json").read_text())
    (tmp_path / "bank" / "bank.json").write_text(json.dumps({**told, "format": 9}))
    with pytest.raises(CheckpointError, match="its format is 9, and this release reads 1"):
        read(tmp_path / "bank")


def test_a_model_on_disk_gives_the_bank_of_one_in_memory(tmp_path: Path) -> None:
    model = llama()
    model.save_pretrained(tmp_path / "model")
    whole = bank_of(model, tmp_path / "memory", moments=True)
    offloaded = Offloaded(open_source(str(tmp_path / "model")), torch.float32, torch.device("cpu"))
    run = replace(run_of(offloaded.model, tmp_path / "disk"), offloaded=offloaded)
    calibration = Calibration(batch=4, activations="disk")
    assert make_bank(run, calibration, BankKnobs(moments=True)) == whole
    assert all(parameter.is_meta for parameter in offloaded.model.parameters())
    for entry in (tmp_path / "memory" / "bank").glob("step-*"):
        mine, other = (load_file(path / "weights.safetensors") for path in (entry, tmp_path / "disk/bank" / entry.name))
        assert mine.keys() == other.keys() and all(torch.equal(mine[name], other[name]) for name in mine)


SCRIPT = """
import os, signal, sys
import torch
torch.set_num_threads(1)
from pathlib import Path
from tests.sweep.test_bank import bank_of, llama
from compresso.training.progress import Progress

at, number = int(sys.argv[2]), int(sys.argv[3])
step = Progress.step

def stepped(self, done, *rest):
    step(self, done, *rest)
    if done == at:
        os.kill(os.getpid(), number)

Progress.step = stepped
bank_of(llama(), Path(sys.argv[1]), moments=True)
"""


def killed(folder: Path, at: int, number: int) -> int:
    """The exit code of a process that makes a bank and gets a signal after so many layers."""
    command = [sys.executable, "-c", SCRIPT, str(folder), str(at), str(number)]
    return subprocess.run(command, env=dict(os.environ), check=False, stderr=subprocess.DEVNULL).returncode


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.slow
def test_killed_after_every_block_a_bank_ends_in_the_same_bytes(tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    bank_of(llama(), whole, moments=True)
    for at in (1, 2):
        assert killed(tmp_path / "killed", at, signal.SIGKILL) == -signal.SIGKILL
        entries = sorted(path.name for path in (tmp_path / "killed" / "bank").glob("step-*"))
        assert entries == [f"step-{i:06d}" for i in range(at)]
    assert killed(tmp_path / "killed", 2, signal.SIGTERM) == 128 + signal.SIGTERM
    assert killed(tmp_path / "killed", 0, 0) == 0
    assert content(tmp_path / "killed") == content(whole)
