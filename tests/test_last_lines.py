"""The last lines of a run name what tests were skipped for, one process or several, tests or whole modules."""

from pathlib import Path

import pytest

from tests.last_lines import WANTED, coverage_lines, summed_up

pytest_plugins = ["pytester"]
ROOT = Path(__file__).parents[1]
HOOKS = """
from tests.last_lines import pytest_collectreport, pytest_sessionfinish
from tests.last_lines import pytest_terminal_summary, pytest_testnodedown
"""
ONE_BY_ONE = """
import pytest
@pytest.mark.parametrize("i", range(3))
def test_a(i):
    pytest.skip("CUDA: no device")
@pytest.mark.skipif(True, reason="vLLM: not installed")
def test_b(): ...
def test_c(): ...
"""
WHOLE = 'import pytest\npytest.importorskip("no_such_module", reason="engine: not installed")\n'


@pytest.mark.slow
@pytest.mark.parametrize("processes", [0, 2])
def test_skips_are_counted_by_name(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, processes: int) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    pytester.makeconftest(HOOKS)
    pytester.makepyfile(test_one=ONE_BY_ONE, test_whole=WHOLE)
    done = pytester.runpytest_subprocess("-q", "-p", "no:cacheprovider", "-n", str(processes))
    assert done.ret == 0
    (line,) = (line for line in done.outlines[-3:] if line.startswith("skipped: "))
    listed = line.removeprefix("skipped: ").split(", ")
    assert listed[0] == "CUDA 3 (no device)"
    assert set(listed[1:3]) == {"vLLM 1 (not installed)", "engine 1 (not installed)"}
    assert listed[3:] == [f"{name} 0" for name in WANTED if name not in ("CUDA", "vLLM")]


def test_reasons_of_one_name_stand_together_once() -> None:
    line = summed_up(["disk: 32 GB must be free", "Skipped: data: no b", "data: no a", "data: no b", "odd"])
    assert line.startswith("skipped: data 3 (no b; no a), disk 1 (32 GB must be free), odd 1, vLLM 0")
    assert summed_up([]) == "skipped: " + ", ".join(f"{name} 0" for name in WANTED)


def test_modules_that_a_test_wrote_and_that_are_gone_do_not_count(tmp_path: Path) -> None:
    """The table was lost with all results where another run had cleared the folder of a test's own module."""
    from coverage import CoverageData

    import compresso

    data = CoverageData(str(tmp_path / "measured"))
    data.add_lines({str(Path(compresso.__file__)): [1, 2], str(tmp_path / "made_up.py"): [1]})
    data.write()
    lines = coverage_lines(str(tmp_path / "measured"))
    assert any("__init__" in line for line in lines)
    assert any(line.startswith("TOTAL") for line in lines)
    assert not any("made_up" in line for line in lines)
