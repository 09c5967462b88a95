"""The sweep. Law: with no edits, each linear reads in it what it reads in a plain forward pass, whatever the
architecture passes along.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.methods.oracles import FOLDER, needs_oracles, oracle_job
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from compresso.arch.base import Arch, arch_for
from compresso.errors import ArchError, DataError, NumericError, ResumeError
from compresso.observe.folds import Stats, second_moment, squares
from compresso.sweep.activation_store import Place
from compresso.sweep.calibration import Calibration
from compresso.sweep.journal import Journal
from compresso.sweep.sweep import sweep
from compresso.sweep.targets import Group, Where, chosen, matrix
from compresso.sweep.visitors import Edit

SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "vocab_size": 32,
    "max_position_embeddings": 64,
}
MAKE: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=4)),
    "qwen3": lambda: Qwen3ForCausalLM(
        Qwen3Config(
            **SIZES,
            use_sliding_window=True,
            sliding_window=4,
            layer_types=["full_attention", *["sliding_attention"] * 2],
        )
    ),
}


def made(name: str = "llama") -> tuple[PreTrainedModel, Arch]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MAKE[name]().eval()
    return model, arch_for(model.config)


def ids(rows: int = 6, length: int = 10, seed: int = 0) -> Tensor:
    return torch.randint(0, 32, (rows, length), generator=torch.Generator().manual_seed(seed))


def nothing(group: Group, seen: Stats) -> dict[str, Any]:
    return {group.names[0]: {"tokens": seen.n, "total": seen.total.tolist()}}


def zeroing(model: nn.Module) -> Edit:
    def edit(group: Group, seen: Stats) -> dict[str, Any]:
        for name in group.names:
            matrix(model, name).masked_fill_(matrix(model, name).abs() < 0.01, 0)
        return {group.names[0]: {"trace": float(seen.total.sum())}}

    return edit


@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize("collect_only", [True, False])
def test_linears_read_what_they_read_in_a_plain_pass(name: str, collect_only: bool) -> None:
    model, arch = made(name)
    groups = chosen(model, arch, Where())
    found = sweep(model, arch, groups, [ids(), ids(2, 7, 1)], squares, nothing, collect_only=collect_only)
    read: dict[str, Tensor] = {}
    handles = [
        model.get_submodule(linear).register_forward_pre_hook(
            lambda _, inputs, linear=linear: read.__setitem__(
                linear, read.get(linear, 0) + inputs[0].detach().square().sum(dim=(0, 1))
            )
        )
        for linear in found
    ]
    model(input_ids=ids())
    model(input_ids=ids(2, 7, 1))
    for handle in handles:
        handle.remove()
    assert len(found) == 4 * 3  # q, k, v share, and so do gate and up
    for linear, facts in found.items():
        assert facts["tokens"] == 6 * 10 + 2 * 7
        torch.testing.assert_close(torch.tensor(facts["total"]), read[linear], rtol=1e-4, atol=1e-6)
    assert all("forward" not in block.__dict__ for block in arch.blocks(model))


@pytest.mark.parametrize("place", ["device", "cpu", "disk"])
@pytest.mark.parametrize("batch", [1, 4])
def test_where_states_are_kept_and_how_rows_are_batched_changes_nothing(
    tmp_path: Path, place: Place, batch: int
) -> None:
    model, arch = made()
    sweep(
        model,
        arch,
        chosen(model, arch, Where()),
        list(ids().split(batch)),
        second_moment,
        zeroing(model),
        place=place,
        scratch=tmp_path / "s",
    )
    other, _ = made()
    sweep(other, arch, chosen(other, arch, Where()), [ids()], second_moment, zeroing(other))
    assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert not (tmp_path / "s").exists()


def test_a_block_is_run_twice_but_the_last_one_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, arch = made()
    runs: list[int] = []
    for i, block in enumerate(arch.blocks(model)):
        block.register_forward_hook(lambda *_, i=i: runs.append(i))

    def counted(**knobs: Any) -> list[int]:
        runs.clear()
        sweep(model, arch, chosen(model, arch, knobs.pop("where", Where())), [ids()], squares, nothing, **knobs)
        return runs[3:]  # the first pass only records what blocks are called with

    assert counted() == [0, 0, 1, 1, 2]
    assert counted(collect_only=True) == [0, 1, 2]
    assert counted(where=Where(layers=(1, 2))) == [0, 1]
    assert counted(true_sequential=True, where=Where(layers=(0, 1))) == [0] * 4


def test_a_journal_is_read_instead_of_doing_the_work(tmp_path: Path) -> None:
    model, arch = made()
    groups = chosen(model, arch, Where())
    whole = sweep(model, arch, groups, [ids()], squares, zeroing(model), journal=Journal(tmp_path / "j", {"of": 1}))
    again, _ = made()

    def refuse(group: Group, seen: Stats) -> dict[str, Any]:
        assert group.layer == 2
        return zeroing(again)(group, seen)

    damaged = tmp_path / "j" / "step-000002" / "facts.json"
    damaged.write_text(damaged.read_text() + " ")
    assert sweep(again, arch, groups, [ids()], squares, refuse, journal=Journal(tmp_path / "j", {"of": 1})) == whole
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(ResumeError, match="of was 1, is 2"):
        sweep(again, arch, groups, [ids()], squares, nothing, journal=Journal(tmp_path / "j", {"of": 2}))


def test_a_gap_in_the_journal_drops_what_follows(tmp_path: Path) -> None:
    journal = Journal(tmp_path, {})
    for layer in range(4):
        journal.write(layer, {"w": torch.full((2,), float(layer))}, {"layer": layer})
    (tmp_path / "step-000001" / "manifest.json").unlink()
    assert journal.finished([0, 1, 2, 3]) == [0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000000"]
    weights, facts = journal.read(0)
    assert torch.equal(weights["w"], torch.zeros(2))
    assert facts == {"layer": 0}


def test_linears_that_do_not_share_an_input_are_found_out() -> None:
    model, arch = made()
    wrong = {0: [Group(0, ("model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj"))]}
    with pytest.raises(ArchError, match=r"up_proj does not read what model\.layers\.0\.self_attn\.q_proj reads"):
        sweep(model, arch, wrong, [ids()], squares, nothing)


def test_a_layer_that_overflows_is_named() -> None:
    model, arch = made()
    model.get_parameter("model.layers.1.mlp.down_proj.weight").data[0, 0] = float("inf")
    with pytest.raises(NumericError, match="layer 1 outputs NaN or Inf"):
        sweep(model, arch, chosen(model, arch, Where(ignore=("*.down_proj",))), [ids()], squares, nothing)


def test_calibration_rows_run_with_rows_of_their_length() -> None:
    rows = [{"input_ids": list(range(n)), "labels": list(range(n))} for n in (5, 3, 5, 5, 3, 2)]
    shapes = [tuple(batch.shape) for batch in Calibration(batch=2).batches(rows, 0)]
    assert shapes == [(1, 2), (2, 3), (2, 5), (1, 5)]
    few = Calibration(examples=2).batches(rows, 0)
    assert sum(len(batch) for batch in few) == 2
    assert [batch.tolist() for batch in few] == [batch.tolist() for batch in Calibration(examples=2).batches(rows, 0)]
    with pytest.raises(DataError, match=r"lower data\.held"):
        Calibration().batches([], 0)


@pytest.mark.parametrize("width", [1, 40, 128, 200, 1100])
def test_the_second_moment_is_the_product_however_it_is_cut(width: int) -> None:
    first, second = torch.randn(2, 30, width, dtype=torch.float64, generator=torch.Generator().manual_seed(width))
    found = second_moment(second_moment(None, first), second)
    torch.testing.assert_close(found, first.T @ first + second.T @ second)
    assert torch.equal(found, found.T)


@needs_oracles
def test_the_statistics_of_the_public_code(tmp_path: Path) -> None:
    """Of layer 0 on dense inputs: Wanda's mean of squares a sequence, SparseGPT's 2/n times the second moment, n
    sequences.
    """
    job = oracle_job(tmp_path)
    wanted = load_file(FOLDER / "stages.safetensors")
    groups = {0: chosen(job.model, job.arch, Where(layers=(0, 1)))[0]}
    batches = Calibration().batches(job.rows, 0)
    for fold, prefix, factor in ((squares, "wanda_scaler_row", 1 / 16), (second_moment, "sparsegpt_H", 2 / 16)):
        found = sweep(job.model, job.arch, groups, batches, fold, nothing, collect_only=True)
        for group in groups[0]:
            ours = torch.tensor(found[group.names[0]]["total"]) * factor
            for name in group.names:
                if (key := f"{prefix}.{name.removeprefix('model.layers.')}") in wanted:
                    torch.testing.assert_close(ours, wanted[key], rtol=1e-4, atol=1e-5 * float(wanted[key].abs().max()))
    assert sum(key.startswith("wanda_scaler_row.0.") for key in wanted) == 7
