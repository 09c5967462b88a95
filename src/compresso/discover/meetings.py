"""What meets what: entries of activations, and the parameters that scale or shift them.

What every rule of the propagation stands on, whichever operation it is for.
"""

import torch
from torch import Tensor

from compresso.discover.labels import Classes, Place, Value, Weight, along, as_entries, varying
from compresso.discover.trace import Trace


class Meetings:
    """The classes of every tensor of a trace made so far, and how two of them meet.

    Args:
        trace: the steps of one forward pass.
        classes: which entries leave together, and which never do.
    """

    def __init__(self, trace: Trace, classes: Classes) -> None:
        self.trace, self.classes = trace, classes
        self.values: dict[int, Value] = {
            number: classes.weight(name, len(trace.shapes[number])) for number, name in trace.parameters.items()
        }

    def _entries(self, number: int, place: Place) -> Tensor:
        """A tensor's classes entry by entry; zeros for a constant."""
        value = self.values.get(number)
        if isinstance(value, Weight):
            return as_entries(value, self.classes, place)
        return torch.zeros((), dtype=torch.long).expand(self.trace.shapes[number]) if value is None else value

    def _meet(self, out: Tensor, weight: Weight, place: Place) -> None:
        """A parameter that scales or shifts activations: joined where it lies along their one removable dimension."""
        offset, dims = out.ndim - len(weight.classes), varying(out)
        joined = None
        if len(dims) == 1 and dims[0] >= offset and len(weight.classes[dims[0] - offset]) > 1:
            joined = dims[0] - offset
            self.classes.join(along(out, dims[0]), weight.classes[joined])
        for dim in weight.wide:
            if dim != joined:
                self.classes.pin(weight.classes[dim], place, "all units share it")
            if joined is None and dim + offset in dims:
                self.classes.pin(out, place, "it meets a parameter that is not divided like it")

    def _note_bias(self, value: Weight, place: Place) -> None:
        source = value.sources[-1]
        if source is not None:
            self.classes.writes.setdefault(source, place)

    def _normalised(self, x: Tensor, dim: int, place: Place, why: str) -> Tensor:
        """Pinned where classes differ along a dimension."""
        if dim % x.ndim in varying(x):
            self.classes.pin(x, place, f"it {why}")
        return x
