"""Where a number was made: the versions are those installed, and are read once however often they are asked for."""

from importlib.metadata import PackageNotFoundError, version

import pytest

from compresso.metrics import record
from compresso.metrics.record import Environment, installed
from compresso.runner.output import versions


def test_versions_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []

    def counted(package: str) -> str:
        read.append(package)
        return version(package)

    monkeypatch.setattr(record, "version", counted)
    installed.cache_clear()
    one, other = Environment.here(), Environment.here(pytest="pytest")
    assert one.versions == {name: version(name) for name in ("torch", "transformers")} | {
        "compresso": version("compresso-llm")
    }
    assert other.versions == one.versions | {"pytest": version("pytest")}
    assert versions() == versions() and versions().items() >= one.versions.items()
    assert sorted(read) == sorted({*read})


def test_a_package_that_is_lacking_is_asked_for_again() -> None:
    for _ in range(2):
        with pytest.raises(PackageNotFoundError):
            installed("no-such-package-of-anybody")
