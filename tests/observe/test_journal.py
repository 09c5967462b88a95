"""States of a pass on disk: what was on a device that is gone goes on elsewhere, and says so."""

import json
import logging
from pathlib import Path

import pytest
import torch

from compresso.checkpoint.atomic import write_manifest
from compresso.observe.folds import Stats
from compresso.observe.journal import FoldJournal, State


def test_statistics_come_back_bit_for_bit(tmp_path: Path) -> None:
    journal = FoldJournal(tmp_path / "journal", {"run": 1})
    total = torch.rand(3, 4, dtype=torch.float64)
    journal.write(State(2, "data", {"a": Stats(total, 7)}))
    found = journal.latest()
    assert found is not None and (found.n_batches, found.data, found.stats["a"].n) == (2, "data", 7)
    assert torch.equal(found.stats["a"].total, total)


def test_statistics_of_a_device_that_is_gone_go_on_on_the_cpu(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    journal = FoldJournal(tmp_path / "journal", {"run": 1})
    journal.write(State(2, "data", {"a": Stats(torch.ones(3), 7)}))
    (entry,) = (tmp_path / "journal").iterdir()
    facts = json.loads((entry / "facts.json").read_text())
    facts["statistics"]["a"][1] = "meta"  # a kind that no machine computes on
    (entry / "facts.json").write_text(json.dumps(facts))
    (entry / "manifest.json").unlink()
    write_manifest(entry)
    with caplog.at_level(logging.WARNING):
        found = journal.latest()
    assert found is not None and found.stats["a"].total.device.type == "cpu"
    assert "statistics of a pass on meta go on on the CPU" in caplog.text
