"""Losses under masks against the smaller models, one at a time, and a search that is stopped and continued."""

import io
import os
import signal
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM, PreTrainedModel

from compresso.arch.base import arch_for
from compresso.core.axis import Axis
from compresso.core.loss import NEXT_TOKEN
from compresso.core.plan import Plan
from compresso.edit.shrink import shrink_
from compresso.errors import NumericError, ResumeError
from compresso.observe.losses import losses_under, losses_without
from compresso.training.progress import Progress
from compresso.training.rounds import RoundJournal
from compresso.training.signals import Interrupted


def made(family: str = "llama") -> PreTrainedModel:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 50}
    if family == "opt":
        return OPTForCausalLM(OPTConfig(**sizes, ffn_dim=24, word_embed_proj_dim=32, init_std=0.3)).eval()
    config = LlamaConfig(**sizes, num_key_value_heads=2, intermediate_size=24, initializer_range=0.3)
    return LlamaForCausalLM(config).eval()


def axes_of(model: PreTrainedModel) -> list[Axis]:
    return [axis for axis in arch_for(model.config).axes(model) if axis.kind != "vocab"]


def batches() -> list[dict[str, Tensor]]:
    """Two batches with unequal numbers of labels, padded on the right."""
    found: list[dict[str, Tensor]] = []
    for rows, seed in ((3, 1), (2, 2)):
        ids = torch.randint(2, 50, (rows, 9), generator=torch.Generator().manual_seed(seed))
        mask, labels = torch.ones_like(ids), ids.clone()
        for row in range(rows):
            mask[row, 9 - row :] = 0
            labels[row, 9 - row :] = labels[row, : 2 * seed] = -100
        found.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return found


def plans(axes: list[Axis]) -> list[Plan]:
    """Six plans: each of them takes half of every other head and channel axis, and one a layer."""
    inner = [axis for axis in axes if axis.kind in ("head", "channel")]
    some = [Plan({axis.name: tuple(range(i % 2, axis.size, 2)) for axis in inner[i % 3 :: 2]}) for i in range(5)]
    return [*some, Plan({"layers": (0, 2)})]


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_a_loss_is_that_of_the_smaller_model(family: str) -> None:
    model = made(family)
    axes, given = axes_of(model), batches()
    counts = [int((batch["labels"][:, 1:] != -100).sum()) for batch in given]
    tried = plans(axes)
    found = losses_under(model, axes, [plan.masks(axes) for plan in tried], given)
    by_batch = losses_under(model, axes, [plan.masks(axes) for plan in tried], given, mean_over="batches")
    assert found.dtype == torch.float64 and counts[0] != counts[1]
    for plan, loss, mean in zip(tried, found.tolist(), by_batch.tolist(), strict=True):
        smaller = made(family)
        shrink_(smaller, axes_of(smaller), plan)
        with torch.no_grad():
            each = [float(NEXT_TOKEN(smaller, batch)) for batch in given]
        assert loss == pytest.approx(sum(one * n for one, n in zip(each, counts, strict=True)) / sum(counts), rel=1e-5)
        assert mean == pytest.approx(sum(each) / 2, rel=1e-5)
    assert not torch.allclose(found, by_batch, rtol=1e-5) and len(set(found.tolist())) == len(tried)


def test_a_loss_does_not_depend_on_the_masks_around_it_and_no_mask_stays() -> None:
    model = made()
    axes, given = axes_of(model), batches()
    masks = [plan.masks(axes) for plan in plans(axes)]
    together = losses_under(model, axes, masks, given)
    assert torch.equal(torch.cat([losses_under(model, axes, [mask], given) for mask in masks]), together)
    assert torch.equal(losses_under(model, axes, masks[::-1], given), together.flip(0))
    whole = losses_under(model, axes, [masks[0], {}], given)[1]
    assert torch.equal(whole, losses_under(model, axes, [{a.name: torch.ones(a.size) for a in axes}], given)[0])
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_most_takes_the_first() -> None:
    model = made()
    axes, given = axes_of(model), batches()
    masks = [plan.masks(axes) for plan in plans(axes)]
    whole = losses_under(model, axes, masks, given)
    assert torch.equal(losses_under(model, axes, masks, given, most=2), whole[:2])
    assert torch.equal(losses_under(model, axes, masks, given, most=100), whole)


def test_nothing_with_a_gradient_is_made() -> None:
    model = made()
    axes, seen = axes_of(model), list[Tensor]()
    for module in model.modules():
        module.register_forward_hook(lambda _, __, output: seen.append(output) if isinstance(output, Tensor) else None)
    soft = {axis.name: torch.full((axis.size,), 0.5, requires_grad=True) for axis in axes}
    found = losses_under(model, axes, [soft], batches())
    assert seen and not any(tensor.requires_grad or tensor.grad_fn is not None for tensor in seen)
    assert all(tensor.is_inference() for tensor in seen)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert not found.is_inference()


def test_batches_are_moved_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = made()
    axes = axes_of(model)
    moved = list[str]()

    class Counted(Mapping[str, Tensor]):
        def __init__(self, batch: dict[str, Tensor]) -> None:
            self._batch = batch

        def __getitem__(self, name: str) -> Tensor:
            moved.append(name)
            return self._batch[name]

        def __iter__(self) -> Iterator[str]:
            return iter(self._batch)

        def __len__(self) -> int:
            return len(self._batch)

    losses_under(model, axes, [plan.masks(axes) for plan in plans(axes)], [Counted(batch) for batch in batches()])
    assert len(moved) == 2 * 3


def test_a_loss_that_is_not_finite_is_returned_and_journalled(tmp_path: Path) -> None:
    model = made()
    axes, given = axes_of(model), batches()
    masks = [{"layers": torch.tensor([1.0, 1.0, one])} for one in (1.0, float("nan"), 1.0)]
    found = losses_under(model, axes, masks, given, journal=RoundJournal(tmp_path / "j", {}))
    assert found.isfinite().tolist() == [True, False, True] and found[0] == found[2]
    again = losses_under(model, axes, masks, given, journal=RoundJournal(tmp_path / "j", {}))
    torch.testing.assert_close(again, found, rtol=0, atol=0, equal_nan=True)
    with torch.no_grad():
        model.get_parameter("lm_head.weight").fill_(float("nan"))
    with pytest.raises(NumericError, match="the loss without unit 1 of layers is not finite"):
        losses_without(model, axes, [("layers", 1)], given)


def test_a_stopped_search_goes_on_with_the_same_numbers(tmp_path: Path) -> None:
    model = made()
    axes, given = axes_of(model), batches()
    masks = [plan.masks(axes) for plan in plans(axes)]
    whole = losses_under(model, axes, masks, given)
    calls = 0

    def stop(module: Any, inputs: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 6:  # the second batch of the third mask
            os.kill(os.getpid(), signal.SIGTERM)

    handle = model.register_forward_pre_hook(stop)
    journal = RoundJournal(tmp_path / "j", {"of": 1})
    with pytest.raises(Interrupted, match=r"stopped by SIGTERM; continue from .*j"):
        losses_under(model, axes, masks, given, journal=journal)
    assert calls == 6 and len(RoundJournal(tmp_path / "j", {"of": 1}).entries()) == 3
    lines = io.StringIO()
    again = losses_under(
        model,
        axes,
        masks,
        given,
        journal=RoundJournal(tmp_path / "j", {"of": 1}),
        progress=Progress("lines", 0.0, lines),
        name="probes",
    )
    assert torch.equal(again, whole) and calls == 12
    assert [line.split("  ")[1] for line in lines.getvalue().splitlines()] == ["4/6", "5/6", "6/6"]
    assert torch.equal(losses_under(model, axes, masks[:2], given, journal=journal), whole[:2]) and calls == 12
    handle.remove()


def test_losses_of_other_masks_or_other_batches_are_refused(tmp_path: Path) -> None:
    model = made()
    axes, given = axes_of(model), batches()
    masks = [plan.masks(axes) for plan in plans(axes)]
    losses_under(model, axes, masks, given, journal=RoundJournal(tmp_path / "j", {}))
    changed = [{name: value.clone() for name, value in batch.items()} for batch in given]
    changed[1]["input_ids"][0, 0] += 1
    for what in (
        {"masks": masks[::-1], "batches": given},
        {"masks": masks, "batches": changed},
        {"masks": masks, "batches": given, "mean_over": "batches"},
    ):
        with pytest.raises(ResumeError, match="loss 0 is of another mask or of other batches"):
            losses_under(model, axes, journal=RoundJournal(tmp_path / "j", {}), **what)  # type: ignore[arg-type]
