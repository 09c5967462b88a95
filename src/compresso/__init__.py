"""compresso: smaller, faster Hugging Face checkpoints, with an account of what they cost.

Importing it registers our per-layer model classes, so that `AutoModelForCausalLM.from_pretrained` opens what compresso wrote.
"""

from importlib.metadata import version as _version

from compresso.core.allocate import allocate
from compresso.core.budget import Budget
from compresso.core.cost import CostModel
from compresso.core.plan import Plan
from compresso.drive.fit import fit
from compresso.edit.gate import gated
from compresso.edit.shrink import shrink_
from compresso.inspection import inspect
from compresso.loading import load
from compresso.native import register as _register
from compresso.run import Result, run

__version__ = _version("compresso-llm")
__all__ = ["Budget", "CostModel", "Plan", "Result", "allocate", "fit", "gated", "inspect", "load", "run", "shrink_"]

_register()
