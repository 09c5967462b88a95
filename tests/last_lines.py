"""The last lines of a run of the tests: the files that coverage found least of, and what tests were skipped for.

A skip's reason is "NAME: why", so that skips can be counted by the name of what was missing. Names of `WANTED` are
listed with 0, too: a whole run says of each of them that nothing was skipped for it.
"""

import importlib.util
import io
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest

WANTED = (
    "vLLM",
    "transformers 4.57",
    "bitsandbytes",
    "CUDA",
    "llama.cpp",
    "chromium",
    "COMPRESSO_DATA",
    "COMPRESSO_LARGE",
)
"""What a clean clone may lack, and tests want."""
LEAST = 10
"""Files listed of those that coverage found least of."""
_SKIPPED_MODULES: dict[str, str] = {}
"""Modules that were skipped as a whole -> why. Processes of xdist do not report them, so they are sent along."""


def summed_up(reasons: Iterable[str]) -> str:
    """One line of what tests were skipped for, the most frequent first, then the names of `WANTED` that none was."""
    counts: dict[str, int] = {}
    whys: dict[str, list[str]] = {}
    for reason in reasons:
        name, _, why = reason.removeprefix("Skipped: ").partition(": ")
        counts[name] = counts.get(name, 0) + 1
        if why and why not in whys.setdefault(name, []):
            whys[name].append(why)
    there = sorted(counts, key=lambda name: -counts[name])
    found = [f"{name} {counts[name]}" + (f" ({'; '.join(whys[name])})" if whys.get(name) else "") for name in there]
    return "skipped: " + ", ".join([*found, *(f"{name} 0" for name in WANTED if name not in counts)])


def reason_of(report: Any) -> str:
    """Why a report says that a test or a module was skipped; its longrepr is (path, line, reason)."""
    return str(report.longrepr[2])


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.skipped:
        _SKIPPED_MODULES[report.nodeid] = reason_of(report)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    sent: dict[str, Any] | None = getattr(session.config, "workeroutput", None)  # only processes of xdist have it
    if sent is not None:
        sent["skipped_modules"] = dict(_SKIPPED_MODULES)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    sent: Mapping[str, Any] = getattr(node, "workeroutput", None) or {}  # none where the process crashed
    _SKIPPED_MODULES.update(sent.get("skipped_modules", {}))


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if config.pluginmanager.hasplugin("_cov") and config.getoption("cov_source", default=None):
        terminalreporter.section("coverage, least covered files first")
        for line in coverage_lines():
            terminalreporter.write_line(line)
    skipped = [one for one in terminalreporter.stats.get("skipped", []) if isinstance(one, pytest.TestReport)]
    terminalreporter.write_line("")
    terminalreporter.write_line(summed_up([*map(reason_of, skipped), *_SKIPPED_MODULES.values()]))


def coverage_lines(data_file: str | None = None) -> list[str]:
    """The head, the first rows and the total of coverage's table, or why there is none.

    Modules that tests write count nothing: they lie in temporary folders, which another run may have cleared by now.

    data_file: what was measured; None for where coverage writes it.
    """
    from coverage import Coverage
    from coverage.exceptions import NoDataError

    table = io.StringIO()
    measured = Coverage() if data_file is None else Coverage(data_file)
    package = importlib.util.find_spec("compresso")
    assert package is not None and package.origin is not None
    ours = str(Path(package.origin).parent / "*")
    try:
        measured.load()
        measured.report(sort="cover", skip_empty=True, file=table, include=ours)
    except NoDataError as error:
        return [f"no coverage: {error}"]
    lines = table.getvalue().splitlines()
    return [*lines[: LEAST + 2], *(line for line in lines if re.match("TOTAL", line))]
