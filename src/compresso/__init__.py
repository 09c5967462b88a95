"""compresso: smaller, faster Hugging Face checkpoints, with a report of what they cost.

Importing it registers our per-layer model classes, so that `AutoModelForCausalLM.from_pretrained` opens what compresso
wrote.
"""

from importlib.metadata import version as _version

from compresso.core.budget import Budget
from compresso.core.cost import CostModel
from compresso.core.plan import Plan
from compresso.edit.gate import gated
from compresso.edit.shrink import shrink_
from compresso.loading import load
from compresso.native import register as _register
from compresso.runner.inspection import inspect
from compresso.runner.run import Result, run
from compresso.solve.allocate import allocate
from compresso.training.fit import fit

__version__ = _version("compresso-llm")
__all__ = ["Budget", "CostModel", "Plan", "Result", "allocate", "fit", "gated", "inspect", "load", "run", "shrink_"]

_register()
