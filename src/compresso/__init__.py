"""compresso: smaller, faster Hugging Face checkpoints, with a report of what they cost.

The public names are imported when they are first used, so that importing compresso costs milliseconds. Our per-layer
model classes are registered as soon as transformers' auto classes are there, whichever of the two packages is imported
first: `AutoModelForCausalLM.from_pretrained` then opens what compresso wrote.
"""

import importlib
import sys
import threading
from collections.abc import Sequence
from functools import partial
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.metadata import version as _version
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from compresso.commands.compare import compare
    from compresso.commands.evaluate import evaluate
    from compresso.commands.export import export
    from compresso.commands.latency import latency
    from compresso.commands.measure import measure
    from compresso.commands.plan import plan
    from compresso.core.budget import Budget
    from compresso.core.cost import CostModel
    from compresso.core.plan import Plan
    from compresso.edit.gate import gated
    from compresso.edit.shrink import shrink_
    from compresso.engines.verify import verify
    from compresso.loading import load
    from compresso.runner.inspection import inspect
    from compresso.runner.run import Result, run
    from compresso.solve.allocate import allocate
    from compresso.training.fit import fit

__version__ = _version("compresso-llm")
__all__ = [
    "Budget",
    "CostModel",
    "Plan",
    "Result",
    "allocate",
    "compare",
    "evaluate",
    "export",
    "fit",
    "gated",
    "inspect",
    "latency",
    "load",
    "measure",
    "plan",
    "run",
    "shrink_",
    "verify",
]

_HOME = {
    "Budget": "core.budget",
    "CostModel": "core.cost",
    "Plan": "core.plan",
    "Result": "runner.run",
    "allocate": "solve.allocate",
    "compare": "commands.compare",
    "evaluate": "commands.evaluate",
    "export": "commands.export",
    "fit": "training.fit",
    "gated": "edit.gate",
    "inspect": "runner.inspection",
    "latency": "commands.latency",
    "load": "loading",
    "measure": "commands.measure",
    "plan": "commands.plan",
    "run": "runner.run",
    "shrink_": "edit.shrink",
    "verify": "engines.verify",
}
"""Where each public name is defined."""
_AUTO = "transformers.models.auto.configuration_auto"
"""The module of transformers in which model types are registered."""


def __getattr__(name: str) -> Any:
    """A public name, imported at its first use."""
    if name not in _HOME:
        raise AttributeError(f"module 'compresso' has no attribute '{name}'")
    found = getattr(importlib.import_module(f"compresso.{_HOME[name]}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _WithTransformers(MetaPathFinder):
    """Imports `compresso.native`, which registers our classes, once transformers has imported its auto classes.

    That waits for the end of the outermost import of transformers, since ours import modules of transformers that are
    half made before. No module is changed: only the end of each one's execution is counted.
    """

    def __init__(self) -> None:
        self._here = threading.local()

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """What the other finders find, of a module of transformers; None of any other."""
        if name.partition(".")[0] != "transformers":
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next((found for finder in others if (found := finder.find_spec(name, path, target))), None)
        if spec is not None and spec.loader is not None:
            loader: Any = spec.loader
            loader.exec_module = partial(self._execute, loader, loader.exec_module)
        return spec

    def _execute(self, loader: Any, execute: Any, module: ModuleType) -> None:
        del loader.exec_module  # the loader's own again
        depth = getattr(self._here, "depth", 0)
        self._here.depth = depth + 1
        try:
            execute(module)
        finally:
            self._here.depth = depth
        if depth == 0 and _AUTO in sys.modules and self in sys.meta_path:
            sys.meta_path.remove(self)
            importlib.import_module("compresso.native")


if _AUTO in sys.modules:
    importlib.import_module("compresso.native")
else:
    sys.meta_path.insert(0, _WithTransformers())
