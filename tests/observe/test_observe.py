"""The observing loop against sums taken by hand, over families, with padding on any side, stopped and continued."""

import io
import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
)

from compresso.arch.base import arch_for
from compresso.core.axis import Kind
from compresso.errors import ResumeError
from compresso.observe.activations import SCORED, activation_scores, mean_inputs, mean_squares, reader
from compresso.observe.folds import Fold, absolute_sums, known_sums, moments, second_moment, squares, sums
from compresso.observe.gate_taylor import gate_taylor
from compresso.observe.influence import angular_distances, block_influence
from compresso.observe.journal import FoldJournal
from compresso.observe.linear_uses import linear_uses
from compresso.observe.observe import Pass, observe
from compresso.observe.sites import Positions, calls, inputs, outputs
from compresso.training.progress import Progress
from compresso.training.signals import Interrupted

FAMILIES = ("llama", "opt", "gpt2", "gpt_neox", "phi3")
Batch = dict[str, Tensor]


def made(family: str = "llama") -> PreTrainedModel:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 50}
    wide: dict[str, Any] = {**sizes, "intermediate_size": 24, "initializer_range": 0.3}
    if family == "opt":
        return OPTForCausalLM(OPTConfig(**sizes, ffn_dim=24, word_embed_proj_dim=32, init_std=0.3)).eval()
    if family == "gpt2":
        return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=3, n_head=4, n_inner=24, vocab_size=50)).eval()
    if family == "gpt_neox":
        return GPTNeoXForCausalLM(GPTNeoXConfig(**wide)).eval()
    if family == "phi3":
        return Phi3ForCausalLM(Phi3Config(**wide, pad_token_id=0)).eval()
    return LlamaForCausalLM(LlamaConfig(**wide, num_key_value_heads=2)).eval()


def examples(n: int = 7) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 50, (3 + i % 5,), generator=generator) for i in range(n)]


def batches(size: int, left: int = 0, right: int = 0) -> list[Batch]:
    """The examples, `size` at a time, filled up on the right to the longest of all, and some more on either side."""
    rows, found = examples(), list[Batch]()
    width = left + max(map(len, rows)) + right
    for start in range(0, len(rows), size):
        some = rows[start : start + size]
        ids, mask = torch.full((len(some), width), 7), torch.zeros(len(some), width, dtype=torch.long)
        for row, tokens in enumerate(some):
            ids[row, left : left + len(tokens)], mask[row, left : left + len(tokens)] = tokens, 1
        found.append({"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)})
    return found


def alone(model: PreTrainedModel, module: nn.Module) -> Tensor:
    """What a module reads of each example run alone, without padding [tokens, in], float64."""
    seen: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, given: seen.append(given[0].flatten(0, -2).double()))
    with torch.no_grad():
        for row in examples():
            model.base_model(input_ids=row[None], attention_mask=torch.ones_like(row[None]), use_cache=False)
    handle.remove()
    return torch.cat(seen)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_linear_reads_is_that_of_examples_alone(family: str) -> None:
    """Also where the linear is given [batch * seq, width], and the mask [batch, seq]."""
    model = made(family)
    axes = [axis for axis in arch_for(model.config).axes(model) if axis.kind in (Kind.HEAD, Kind.CHANNEL)]
    means = mean_inputs(model, {axis.name: reader(model, axis) for axis in axes}, batches(3))
    squared = mean_squares(model, axes, batches(3))
    assert len(axes) == 6
    for axis in axes:
        by_hand = alone(model, reader(model, axis))
        assert len(by_hand) == sum(map(len, examples()))
        torch.testing.assert_close(means[axis.name], by_hand.mean(dim=0), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(squared[axis.name], by_hand.square().mean(dim=0), rtol=1e-4, atol=1e-7)


Scores = Callable[[PreTrainedModel, list[Batch], Pass | None], dict[str, Tensor]]


def activations(model: PreTrainedModel, given: list[Batch], how: Pass | None) -> dict[str, Tensor]:
    arch = arch_for(model.config)
    axes = [axis for axis in arch.axes(model) if axis.kind in SCORED]
    return activation_scores(model, axes, list(arch.blocks(model)), given, how=how)


def influences(model: PreTrainedModel, given: list[Batch], how: Pass | None) -> dict[str, Tensor]:
    arch, kinds = arch_for(model.config), (Kind.LAYER, Kind.ATTENTION, Kind.MLP)
    found = block_influence(model, arch.blocks(model), arch.axes(model), kinds, given, how)
    assert set(found.scores) == {"layers", "attention", "mlp"} and found.tokens == sum(map(len, examples()))
    return found.scores


def angles(model: PreTrainedModel, given: list[Batch], how: Pass | None) -> dict[str, Tensor]:
    return {"": angular_distances(model, arch_for(model.config).blocks(model), given, how)}


def uses(model: PreTrainedModel, given: list[Batch], how: Pass | None) -> dict[str, Tensor]:
    found = linear_uses(model, given, how)
    return {
        f"{name} {what}": value for name, one in found.items() for what, value in vars(one).items() if value is not None
    }


def gate_scores(model: PreTrainedModel, given: list[Batch], how: Pass | None) -> dict[str, Tensor]:
    axes = [axis for axis in arch_for(model.config).axes(model) if axis.kind in (Kind.HEAD, Kind.CHANNEL)]
    return gate_taylor(model, axes, given, how)


ALL: dict[str, Scores] = {
    "activations": activations,
    "influences": influences,
    "angles": angles,
    "uses": uses,
    "gate_taylor": gate_scores,
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scores", ["activations", "influences", "angles", "uses"])
def test_neither_padding_nor_the_batch_changes_a_score(family: str, scores: str) -> None:
    model = made(family)
    plain = ALL[scores](model, batches(1), None)
    assert plain and all(bool(score.isfinite().all()) and bool((score != 0).any()) for score in plain.values())
    for given in (batches(3), batches(7, right=4)):
        for name, score in ALL[scores](model, given, None).items():
            torch.testing.assert_close(score, plain[name], rtol=2e-4, atol=2e-6, msg=name)


@pytest.mark.parametrize("scores", list(ALL))
def test_a_stopped_pass_goes_on_with_the_same_numbers(scores: str, tmp_path: Path) -> None:
    model, calls_made = made(), 0
    whole = ALL[scores](model, batches(1), None)

    def stop(module: Any, given: Any) -> None:
        nonlocal calls_made
        calls_made += 1
        if calls_made == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    handle = model.base_model.register_forward_pre_hook(stop)
    journal = FoldJournal(tmp_path / "j", {"of": 1}, every=3)
    with pytest.raises(Interrupted, match=r"stopped by SIGTERM; continue from .*j"):
        ALL[scores](model, batches(1), Pass(journal))
    assert calls_made == 5 and [path.name for path in (tmp_path / "j").iterdir()] == ["batch-000005"]
    assert not any(m._forward_hooks for m in model.modules())
    again = ALL[scores](model, batches(1), Pass(FoldJournal(tmp_path / "j", {"of": 1}, every=3)))
    assert calls_made == 7 and again.keys() == whole.keys()
    assert all(torch.equal(again[name], score) for name, score in whole.items())
    last = ALL[scores](model, batches(1), Pass(FoldJournal(tmp_path / "j", {"of": 1}, every=3)))
    assert calls_made == 7 and all(torch.equal(last[name], score) for name, score in whole.items())
    handle.remove()


class Killed(BaseException):
    """Stands for a process that ends without a word."""


def killed_after(n: int) -> Iterator[Batch]:
    yield from batches(1)[:n]
    raise Killed


def energy(model: PreTrainedModel, given: Any, how: Pass | None = None) -> Tensor:
    down = model.get_submodule("model.layers.1.mlp.down_proj")
    return observe(model, [calls({"down": down}, inputs)], second_moment, given, how=how)["down"].total


def test_a_killed_pass_goes_on_from_its_last_entry_and_a_damaged_entry_is_no_entry(tmp_path: Path) -> None:
    model = made()
    whole = energy(model, batches(1))

    def kept() -> Pass:
        return Pass(FoldJournal(tmp_path / "j", {"of": 1}, every=2))

    with pytest.raises(Killed):
        energy(model, killed_after(5), kept())
    (entry,) = (tmp_path / "j").iterdir()
    assert entry.name == "batch-000004"
    assert json.loads((entry / "facts.json").read_text())["statistics"]["down"][0] == sum(map(len, examples(4)))
    torch.testing.assert_close(
        load_file(entry / "statistics.safetensors")["down"], energy(model, batches(1)[:4]), rtol=0, atol=0
    )
    assert torch.equal(energy(model, batches(1), kept()), whole)
    (entry,) = (tmp_path / "j").iterdir()
    weights = entry / "statistics.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    assert torch.equal(energy(model, batches(1), kept()), whole)


def test_a_pass_over_other_batches_is_not_continued(tmp_path: Path) -> None:
    model = made()
    with pytest.raises(Killed):
        energy(model, killed_after(5), Pass(FoldJournal(tmp_path / "j", {"of": 1}, every=2)))
    with pytest.raises(ResumeError, match="of was 1, is 2"):
        energy(model, batches(1), Pass(FoldJournal(tmp_path / "j", {"of": 2}, every=2)))
    changed = batches(1)
    changed[3]["input_ids"][0, 0] += 1
    for other in (changed, batches(1)[::-1], batches(1)[:3]):
        with pytest.raises(ResumeError, match="is of 4 other batches"):
            energy(model, other, Pass(FoldJournal(tmp_path / "j", {"of": 1}, every=2)))


def test_progress_counts_batches_also_of_a_generator() -> None:
    model, lines = made(), io.StringIO()
    energy(model, iter(batches(2)), Pass(progress=Progress("lines", 0.0, lines), name="scores"))
    assert [line.split("  ")[:2] for line in lines.getvalue().splitlines()] == [
        ["scores", f"{i}/4"] for i in range(1, 5)
    ]


def test_each_name_has_its_own_fold_and_nothing_stays_on_the_model() -> None:
    model = made()
    down, norm = (
        model.get_submodule("model.layers.1.mlp.down_proj"),
        model.get_submodule("model.layers.0.input_layernorm"),
    )
    folds: dict[str, Fold] = {"down": squares, "norm": moments}
    found = observe(model, [calls({"down": down}, inputs), calls({"norm": norm}, outputs)], folds, batches(3))
    n = sum(map(len, examples()))
    assert (found["down"].n, found["norm"].n) == (n, n)
    assert found["down"].total.shape == (24,) and found["norm"].total.shape == (2, 32)
    with pytest.raises(ZeroDivisionError):
        observe(model, [calls({"down": down}, inputs)], lambda total, rows: rows[0] * (1 // 0), batches(3))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert observe(model, [calls({"head": model.get_submodule("lm_head")}, inputs)], sums, batches(3)) == {}


def test_positions_give_flat_and_deep_values_one_shape() -> None:
    positions, values = Positions(), torch.arange(24.0).reshape(2, 3, 4)
    positions.set({"input_ids": torch.zeros(2, 3), "attention_mask": torch.tensor([[0, 1, 1], [1, 0, 0]])})
    wanted = values[[0, 0, 1], [1, 2, 0]]
    assert torch.equal(positions.tokens(values), wanted) and torch.equal(positions.tokens(values.flatten(0, 1)), wanted)
    assert torch.equal(positions.rows(values.flatten(0, 1)), values)
    positions.set({"pixel_values": torch.zeros(2, 1, 5, 5)})
    assert torch.equal(positions.tokens(values), values.flatten(0, 1))


@pytest.mark.parametrize("fold", [sums, absolute_sums, squares, moments, second_moment, known_sums])
def test_a_fold_does_not_depend_on_how_rows_are_cut(fold: Fold) -> None:
    rows = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    given, cut = rows.clone(), fold(None, rows[:7])
    for part in rows[7:].split(11):
        cut = fold(cut, part)
    torch.testing.assert_close(cut, fold(None, rows), rtol=1e-5, atol=1e-5)
    assert torch.equal(rows, given)


def test_stock_folds_by_hand() -> None:
    rows = torch.tensor([[1.0, -2.0], [3.0, float("nan")]])
    assert known_sums(None, rows).tolist() == [[4, -2], [2, 1], [0, 1]]
    rows = torch.tensor([[1.0, -2.0], [3.0, 1.0]])
    assert sums(None, rows).tolist() == [4, -1] and absolute_sums(None, rows).tolist() == [4, 3]
    assert squares(None, rows).tolist() == [10, 5] and moments(None, rows).tolist() == [[4, -1], [10, 5]]
    assert second_moment(None, rows).tolist() == [[10, 1], [1, 5]]
