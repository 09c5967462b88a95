"""What an offloaded sweep takes, estimated, and what this process may still take."""

import resource
from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from compresso.arch.base import arch_for
from compresso.methods.besa import Besa
from compresso.methods.sparsegpt import SparseGpt
from compresso.methods.wanda import Wanda
from compresso.stage import learned_bytes
from compresso.sweep import memory
from compresso.sweep.calibration import Calibration
from compresso.sweep.memory import Estimate, available, estimate
from compresso.sweep.targets import Where

CPU = torch.device("cpu")


def of(
    stage: Wanda | SparseGpt | Besa,
    layers: int = 2,
    dtype: torch.dtype = torch.float32,
    rows: tuple[int, ...] = (100,) * 16,
) -> Estimate:
    config = LlamaConfig(
        hidden_size=64, intermediate_size=176, num_hidden_layers=layers, num_attention_heads=4, vocab_size=1000
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    arch = arch_for(config)
    held = (stage.keeps_moments, learned_bytes(stage))
    return estimate(model, arch, stage.check(model, arch), stage.calibration, rows, dtype, *held)


def test_it_does_not_grow_with_depth_and_counts_what_is_there() -> None:
    shallow = of(Wanda())
    assert of(Wanda(), layers=20) == shallow
    one_block = 4 * 64 * 64 + 3 * 64 * 176 + 2 * 64
    assert shallow.block == 2 * 4 * one_block and of(Wanda(), dtype=torch.bfloat16).block == 2 * 2 * one_block
    assert shallow.around == 4 * (1000 * 64 + 64)
    assert shallow.total > memory.OVERHEAD


def test_second_moments_tokens_and_disk_count() -> None:
    wanda, obs = of(Wanda()), of(SparseGpt())
    assert obs.statistics - wanda.statistics >= 4 * (3 * 64**2 + 176**2)
    on_disk = of(Wanda(calibration=Calibration(activations="disk")))
    assert (
        wanda.activations - on_disk.activations == 4 * 64 * 100 * 8
    )  # 16 rows are kept, of which one batch of 8 is at hand
    assert of(Wanda(calibration=Calibration(examples=8))).activations == on_disk.activations


def test_what_learns_is_counted_beside_the_largest_block() -> None:
    how = Calibration(examples=16, batch=8)
    plain, learned = of(SparseGpt(calibration=how)), of(Besa(calibration=how))
    linears = 4 * 64 * 64 + 3 * 64 * 176
    assert learned.statistics - plain.statistics == Besa.learned_bytes * linears
    assert learned.activations == 2 * plain.activations  # dense outputs, and what the way back needs
    assert of(Besa(calibration=how, where=Where(modules=("*.q_proj",)))).statistics < learned.statistics


def test_a_limit_of_the_process_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    before = available(CPU)
    assert before > 0
    plain = resource.getrlimit
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (1, 1) if kind == resource.RLIMIT_DATA else plain(kind))
    assert available(CPU) == 0
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (10**15, 10**15))
    assert available(CPU) <= before * 2


def test_refused_above_what_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    needed = of(Wanda())
    monkeypatch.setattr(memory, "available", lambda device: needed.total)
    memory.refuse_above(needed, CPU)
    with pytest.raises(memory.ResourceError, match=r"this needs about 0\.2\d GB at once .*, and 0\.2\d GB are there"):
        memory.refuse_above(replace(needed, activations=needed.activations + 1), CPU)
