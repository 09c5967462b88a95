"""`compresso verify`: in which engines a checkpoint opens and computes the same."""

import json
from collections.abc import Sequence
from dataclasses import asdict

from compresso.engines.context import NAME as CONTEXT
from compresso.engines.parity import Parity
from compresso.engines.transformers import OWN
from compresso.engines.transformers_process import NEW_TOKENS
from compresso.engines.verify import verify

__all__ = ["opens_here", "show", "verify"]


def opens_here(found: Sequence[Parity]) -> bool:
    """Whether compresso itself opens the checkpoint and computes the same."""
    return all(one.opens == "yes" for one in found if one.engine in (OWN.name, CONTEXT))


def show(found: Sequence[Parity], as_json: bool) -> None:
    """Print the parity of each engine, as JSON or one a line."""
    if as_json:
        print(json.dumps([asdict(one) for one in found], indent=2, allow_nan=False))
        return
    width = max(len(one.engine) for one in found)
    for one in found:
        remarks = [one.reason] if one.reason else []
        if one.difference is not None and (one.opens == "yes" or not one.reason):
            remarks.append(f"largest difference {one.difference:.1g}")
        if one.same_tokens is not None:
            remarks.append(f"{one.same_tokens} of {NEW_TOKENS} greedy tokens the same")
        print(f"{one.engine:{width}}  {one.opens:13}  {', '.join(remarks)}".rstrip())
