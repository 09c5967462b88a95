"""Out of memory in training: the micro-batch is halved, and the update is the same up to rounding."""

import logging
from collections.abc import Mapping

import pytest
import torch
from tests.training.tiny import Gated
from torch import Tensor

from compresso.core.losses import IGNORED
from compresso.errors import ResourceError, out_of_memory
from compresso.training import halving
from compresso.training.fit import fit
from compresso.training.groups import Group
from compresso.training.history import History
from compresso.training.order import Micro, ShuffledBatches

ERRORS = {
    "device": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "host": RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried"),
    "system": RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 64 bytes."),
    "python": MemoryError(),
}


class Narrow(Gated):
    """The tiny objective on a machine that holds `most` examples at once; a larger batch fails after some gradient was
    made.
    """

    def __init__(self, most: int, error: BaseException, noise: str) -> None:
        super().__init__(noise)
        self.most, self.error = most, error
        self.sizes: list[int] = []

    def forward(self, batch: dict[str, Tensor], micro: Micro) -> dict[str, Tensor]:
        assert len(batch["labels"]) == len(micro.rows)
        self.sizes.append(len(micro.rows))
        if len(micro.rows) > self.most:
            super().forward(batch, micro)["loss"].backward()
            raise self.error
        return super().forward(batch, micro)


def batches(global_batch: int) -> ShuffledBatches:
    """Examples of which each has another number of labels."""
    generator = torch.Generator().manual_seed(3)
    rows = [torch.randint(0, 32, (12,), generator=generator) for _ in range(10)]
    labels = [row.masked_fill(torch.arange(12) < i, IGNORED) for i, row in enumerate(rows)]

    def collate(some: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        return {"input_ids": torch.stack([x for x, _ in some]), "labels": torch.stack([y for _, y in some])}

    return ShuffledBatches(list(zip(rows, labels, strict=True)), global_batch, collate, seed=1)


def trained(most: int, error: BaseException, noise: str = "batch") -> tuple[Mapping[str, Tensor], History, list[int]]:
    objective = Narrow(most, error, noise)
    lora = [p for n, p in objective.named_parameters() if p.requires_grad and "lora" in n]
    groups = [
        Group("lora", lora, lr=1e-2),
        Group("gates", [objective.log_alpha], lr=1e-2),
        Group("multipliers", [objective.lambdas], lr=1e-2, ascend=True),
    ]
    history = fit(objective, groups, batches(8), 4, seed=0, accumulation=2, device="cpu")
    state = {name: one.detach().double() for name, one in objective.named_parameters() if one.requires_grad}
    return state, history, objective.sizes


@pytest.mark.slow
@pytest.mark.parametrize("noise", ["batch", "example"])
@pytest.mark.parametrize("kind", ERRORS)
def test_a_halved_micro_batch_makes_the_same_updates(kind: str, noise: str, caplog: pytest.LogCaptureFixture) -> None:
    whole, history, _ = trained(4, ERRORS[kind], noise)
    for most, parts in ((2, 2), (1, 4)):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            halved, again, sizes = trained(most, ERRORS[kind], noise)
        assert max(sizes[parts.bit_length() - 1 :]) == most  # once too large for each halving, and never again
        for name, one in whole.items():
            torch.testing.assert_close(halved[name], one, rtol=1e-4, atol=1e-6)
        for here, there in zip(again.rows, history.rows, strict=True):
            assert here == pytest.approx(there, rel=1e-4)
        said = [record.getMessage() for record in caplog.records]
        assert len(said) == parts.bit_length() - 1
        assert f"micro-batches of 4 examples go on in {parts} parts" in said[-1]


def test_parts_are_weighed_by_their_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Means of parts averaged plainly are another loss: these examples have between one and eleven labels."""
    _, whole, _ = trained(4, MemoryError())
    monkeypatch.setattr(halving, "labels_in", lambda batch: 1)
    _, plain, _ = trained(1, MemoryError())
    assert abs(plain.rows[0]["loss"] - whole.rows[0]["loss"]) > 1e-3


def test_an_example_that_does_not_fit_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with (
        caplog.at_level(logging.WARNING),
        pytest.raises(ResourceError, match="out of memory with a single example") as error,
    ):
        trained(0, ERRORS["host"])
    assert "checkpointing: true" in str(error.value)


def test_other_errors_are_left_as_they_are() -> None:
    with pytest.raises(RuntimeError, match="shapes disagree"):
        trained(2, RuntimeError("shapes disagree"))
    assert not out_of_memory(RuntimeError("shapes disagree"))
    assert not out_of_memory(ValueError("can't allocate memory of the reader"))
