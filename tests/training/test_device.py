"""Devices and precisions that exist, and messages about those that do not."""

import pytest
import torch

from compresso.errors import ResourceError
from compresso.training.device import choose_device, choose_precision, slow_precision


def test_auto_takes_cuda_where_there_is_one(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_device() == torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == torch.device("cpu")


def test_named_devices(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_device(torch.device("cuda:1")) == torch.device("cuda:1")
    for name, message in (
        ("cuda:2", "torch sees 2 CUDA devices"),
        ("mps", "not supported"),
        ("gpu", "'gpu' is not a device name"),
    ):
        with pytest.raises(ResourceError, match=message):
            choose_device(name)


def test_precision(monkeypatch: pytest.MonkeyPatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    assert [choose_precision("auto", d) for d in (cpu, cuda)] == ["no", "bf16"]
    assert [choose_precision("bf16", d) for d in (cpu, cuda)] == ["bf16", "bf16"]
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Old GPU")
    assert [choose_precision(name, cuda) for name in ("auto", "no")] == ["no", "no"]
    with pytest.raises(ResourceError, match="Old GPU does not compute in it; use precision=no"):
        choose_precision("bf16", cuda)
    with pytest.raises(ResourceError, match="precision='fp16' is unknown; wanted auto, no or bf16"):
        choose_precision("fp16", cpu)


def test_bf16_without_instructions_is_said(monkeypatch: pytest.MonkeyPatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    old = {"architecture": "x86_64", "avx2": True, "avx512_bf16": False, "amx_bf16": False}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: old)
    assert "precision=no is faster here" in (slow_precision("bf16", cpu) or "")
    assert slow_precision("no", cpu) is None and slow_precision("bf16", cuda) is None
    for new in ({**old, "avx512_bf16": True}, {**old, "amx_bf16": True}, {"architecture": "aarch64"}):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda new=new: new)
        assert slow_precision("bf16", cpu) is None
