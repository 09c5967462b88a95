"""Finding the engines: every module of this package that lists some as `ENGINES`."""

import importlib
import pkgutil
from functools import cache

import compresso.engines
from compresso.engines.parity import Engine, Format


@cache
def engines() -> tuple[Engine, ...]:
    """All engines, those of one format beside each other, by module within it."""
    found: list[Engine] = []
    for module in sorted(pkgutil.iter_modules(compresso.engines.__path__), key=lambda one: one.name):
        if not module.name.endswith("_process"):  # scripts that run without compresso
            found += vars(importlib.import_module(f"compresso.engines.{module.name}")).get("ENGINES", ())
    formats = list(Format)
    return tuple(sorted(found, key=lambda engine: formats.index(engine.reads)))


def engine_for(written: Format) -> Engine:
    """The first engine that reads a format and is here; the first that reads it if none is."""
    reading = [engine for engine in engines() if engine.reads is written]
    return next((engine for engine in reading if engine.missing() is None), reading[0])


def commands() -> dict[str, str]:
    """What a model card says of each engine, by its name."""
    return {engine.name: engine.command for engine in engines() if engine.command}
