"""Benchmark tasks, run by lm_eval and never by a copy of it: suites, local data, the collaborative prompt, and what
becomes of the scores.

lm_eval is an extra (`pip install 'compresso-llm[evaluate]'`) and takes seconds to import, so it is imported where it is
used.
"""

from compresso.metrics.tasks.measured import task_measurements
from compresso.metrics.tasks.ready import Ready, prepare
from compresso.metrics.tasks.suites import SUITES

__all__ = ["SUITES", "Ready", "prepare", "task_measurements"]
