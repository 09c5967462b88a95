"""Another run's work is refused by the fields that differ."""

from pathlib import Path

import pytest

from compresso.checkpoint.identity import differences, refuse_other_run
from compresso.errors import ResumeError


def test_another_runs_checkpoint_is_refused_with_all_differences(tmp_path: Path) -> None:
    found = {"seed": 1, "groups": {"lora": {"lr": 0.1, "betas": [0.9, 0.999]}}, "data": "a", "old": 3}
    same_run = {"seed": 1, "groups": {"lora": {"lr": 0.1, "betas": (0.9, 0.999)}}, "data": "a", "old": 3}
    refuse_other_run(tmp_path, found, same_run)
    other = {"seed": 1, "groups": {"lora": {"lr": 0.2, "betas": (0.9, 0.999)}}, "data": "b", "new": None}
    with pytest.raises(ResumeError) as refusal:
        refuse_other_run(tmp_path, found, other)
    message = str(refusal.value)
    assert (
        "data was 'a', is 'b'; groups.lora.lr was 0.1, is 0.2; new was 'absent', is None; old was 3, is 'absent'"
        in message
    )
    assert "seed" not in message and "betas" not in message


def test_fields_of_nested_lists_are_named() -> None:
    before = {"stages": [{"name": "a", "lr": 1.0}], "empty": {}, "sizes": [1, 2]}
    assert differences(before, before) == []
    now = {"stages": [{"name": "a", "lr": 2.0}, {"name": "b"}], "empty": {"x": 1}, "sizes": (1, 2)}
    assert differences(before, now) == [
        "empty was {}, is 'absent'",
        "empty.x was 'absent', is 1",
        "stages.0.lr was 1.0, is 2.0",
        "stages.1.name was 'absent', is 'b'",
    ]
