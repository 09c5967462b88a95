"""What each elementary operation does to classes: joins them, moves them, or pins them.

    elementwise          entries that meet leave together; a constant that differs along a removable dimension pins it
    contraction          the weight's input dimension joins what it reads; its output dimension is a new writer
    activation product   query times key, weights times value: everything inside one batch entry (a head) leaves
                         together
    reduction            over one class: that class; over several: a foldable RMSNorm, or they are pinned
    rearrangement        done to the classes themselves; a resampling of pictures leaves their channels where they are
    convolution          a contraction of channels; of each channel by itself, or a batch norm, scales what it reads
    anything else        refused by name if it touches a class

A small parameter that meets several units at one index (a norm shared by the heads) belongs to none of them.

An RMSNorm can be folded only if a masked entry reaches it as zero. So it is followed, too, which tensors vanish where
the modules that write them are masked: sums of such tensors do, and products with one, and functions with f(0) = 0;
nothing else is trusted to.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from compresso.discover.convolutions import Convolutions
from compresso.discover.labels import Classes, Place, Value, Weight, along, as_entries, refuse, varying
from compresso.discover.products import Products
from compresso.discover.trace import Ref, Step, Trace

_COPIES = {"_to_copy", "clone", "detach", "alias", "lift_fresh", "contiguous", "dropout"}
_MOVES = {
    "view", "_unsafe_view", "reshape", "permute", "transpose", "t", "expand", "unsqueeze", "squeeze", "slice", "select",
    "split", "split_with_sizes", "unbind", "cat", "stack", "repeat", "_reshape_alias",
}  # fmt: skip
_REDUCTIONS = {"mean", "sum", "var", "amax", "amin", "linalg_vector_norm", "prod"}
_ALONG = {"cumsum", "_softmax", "_safe_softmax", "_log_softmax", "softmax"}
_BATCH_NORMS = {"native_batch_norm", "cudnn_batch_norm", "_native_batch_norm_legit_no_training"}
_RESAMPLES = {"upsample_bilinear2d", "upsample_nearest2d", "upsample_bicubic2d"}
_ZERO_AT_ZERO = {
    "neg",
    "relu",
    "silu",
    "gelu",
    "tanh",
    "sin",
    "sqrt",
    "abs",
    "div",
    "erf",
    "leaky_relu",
    "hardswish",
    "mish",
}
_SHAPES_ONLY = {
    "zeros_like",
    "ones_like",
    "empty_like",
    "full_like",
    "new_zeros",
    "new_ones",
    "new_empty",
    "new_full",
    "new_empty_strided",
}


class Propagation(Products, Convolutions):
    """One round over a trace; `values` are the classes of every tensor made so far."""

    def __init__(self, trace: Trace, classes: Classes, foldable: Callable[[Step], bool]) -> None:
        super().__init__(trace, classes)
        self.foldable = foldable
        self.zeros: set[int] = set()

    def run(self) -> None:
        """Apply every step, check that what leaves is a slab of every tensor,
        and pin what reaches the model's output.
        """
        for step in self.trace.steps:
            self._apply(step)
            for number in step.outputs:
                self._check_slabs(number, Place(step.module, step.name))
            if self._vanishes(step):
                self.zeros.update(step.outputs)
        for number in self.trace.results:
            value = self.values.get(number)
            if isinstance(value, Tensor):
                for dim in varying(value):
                    self.classes.pin(along(value, dim), Place("", "output"), "it is an output of the model")

    def _apply(self, step: Step) -> None:
        """Set the values of a step's outputs."""
        given = [self.values.get(number) for number in step.inputs]
        if all(value is None for value in given) or step.name in _SHAPES_ONLY:
            return
        place = Place(step.module, step.name)
        if step.name in _COPIES:
            self.values[step.outputs[0]] = given[0]
        elif step.name in ("mm", "addmm", "bmm", "baddbmm"):
            self.values[step.outputs[0]] = self._product(step, place)
        elif step.name == "embedding":
            self.values[step.outputs[0]] = self._lookup(step, place)
        elif step.name == "convolution":
            self.values[step.outputs[0]] = self._convolution(step, place)
        elif step.name in _BATCH_NORMS:
            self.values[step.outputs[0]] = self._batch_norm(step, place)
        elif step.name in _RESAMPLES:
            self.values[step.outputs[0]] = self._resampled(step, place)
        elif step.name in _MOVES:
            self._move(step, place)
        elif step.name in _REDUCTIONS:
            self.values[step.outputs[0]] = self._reduction(step, place)
        elif step.name in _ALONG:
            self.values[step.outputs[0]] = self._normalised(
                self._entries(step.inputs[0], place), step.args[1], place, "is combined over"
            )
        elif step.name == "native_layer_norm":
            self.values[step.outputs[0]] = self._layer_norm(step, place)
        elif torch.Tag.pointwise in step.op.tags or step.name in ("masked_fill", "where"):
            self.values[step.outputs[0]] = self._elementwise(step.inputs, self.trace.shapes[step.outputs[0]], place)
        else:
            raise refuse(place, "is an operation nobody knows the dependencies of")

    def _vanishes(self, step: Step) -> bool:
        """Whether masking the writers makes the masked entries of the result zero."""
        inputs = [number in self.zeros for number in step.inputs]
        if step.name == "convolution" and self._of_each_channel(step):
            return inputs[0] and not isinstance(step.args[2], Ref)  # a bias outlives what it is added to
        if step.name in ("mm", "addmm", "embedding", "convolution"):
            return any(isinstance(self.values.get(number), Weight) for number in step.inputs)
        if step.name in ("add", "sub"):
            return all(inputs) and len(inputs) == 2
        if step.name == "mul":
            return any(inputs)
        if step.name == "pow":
            return inputs == [True] and isinstance(step.args[0], Ref) and step.args[1] > 0
        if step.name in _COPIES | _MOVES or (step.name in _ZERO_AT_ZERO and isinstance(step.args[0], Ref)):
            return bool(inputs) and (all(inputs) if step.name in ("cat", "stack") else inputs[0])
        return False

    def _elementwise(self, inputs: tuple[int, ...], shape: tuple[int, ...], place: Place) -> Value:
        """Entries that meet under broadcasting leave together."""
        weights = [(n, v) for n in inputs if isinstance(v := self.values.get(n), Weight)]
        entries = [v for n in inputs if isinstance(v := self.values.get(n), Tensor)]
        constants = [self.trace.shapes[n] for n in inputs if self.values.get(n) is None]
        if not entries:
            number, weight = weights[0]
            if (
                len(weights) == 1
                and self.trace.shapes[number] == shape
                and all(max(c, default=1) == 1 for c in constants)
            ):
                return weight
            entries, weights = [as_entries(weight, self.classes, place)], weights[1:]
        out = entries[0].expand(shape)
        for other in entries[1:]:
            other = other.expand(shape)
            self.classes.join(out, other)
            self.classes.pin(
                torch.where((out == 0) != (other == 0), out + other, 0), place, "it meets entries of fixed size"
            )
            out = torch.where(out != 0, out, other)
        for _, weight in weights:
            self._meet(out, weight, place)
        for constant in constants:
            offset = len(shape) - len(constant)
            for dim in varying(out):
                if dim >= offset and constant[dim - offset] > 1:
                    self.classes.pin(out, place, "it meets a table of fixed size")
        return out

    def _move(self, step: Step, place: Place) -> None:
        """Do the same to the classes as to the entries."""
        first = self.values.get(step.inputs[0])
        if isinstance(first, Weight) and step.name in ("t", "transpose", "permute"):
            dims = torch.empty(tuple(range(len(first.classes))), device="meta")  # sizes that name the dimensions
            at = step.op(*[dims if isinstance(arg, Ref) else arg for arg in step.args], **step.kwargs).shape
            self.values[step.outputs[0]] = Weight(
                tuple(first.classes[d] for d in at), tuple(first.sources[d] for d in at)
            )
            return
        for number in step.inputs:
            weight = self.values.get(number)
            if (
                isinstance(weight, Weight)
                and len(weight.wide) > 1
                and step.name not in ("expand", "cat", "slice", "unsqueeze", "select")
            ):
                raise refuse(place, f"rearranges the parameter {weight.sources[0][0] if weight.sources[0] else ''}")

        def classes_of(leaf: Any) -> Any:
            return self._entries(leaf.number, place) if isinstance(leaf, Ref) else leaf

        args, kwargs = tree_map(classes_of, step.args), tree_map(classes_of, step.kwargs)
        if step.name in ("view", "_unsafe_view", "_reshape_alias"):
            made: Any = args[0].reshape(self.trace.shapes[step.outputs[0]])
        else:
            made = step.op(*args, **kwargs)
        for number, labels in zip(step.outputs, tree_leaves(made), strict=True):
            self.values[number] = labels

    def _reduction(self, step: Step, place: Place) -> Value:
        """Over one class: that class. Over several: a norm that can be folded, or a pin."""
        x, shape = self._entries(step.inputs[0], place), self.trace.shapes[step.outputs[0]]
        given = (
            step.args[1]
            if len(step.args) > 1 and step.name != "linalg_vector_norm"
            else step.args[2]
            if len(step.args) > 2
            else None
        )
        dims = [given] if isinstance(given, int) else list(given) if given else list(range(x.ndim))
        reduced = sorted(d % x.ndim for d in dims)
        over = [d for d in varying(x) if d in reduced]
        if over and self.foldable(step) and step.inputs[0] in self.zeros and over == varying(x) == [x.ndim - 1]:
            self.classes.norms.append((torch.unique(x), place))
        elif over:
            self.classes.pin(x, place, "it is reduced over")
        if over:
            return None
        for dim in reduced:
            x = x.narrow(dim, 0, 1)
        return x.reshape(shape)

    def _layer_norm(self, step: Step, place: Place) -> Value:
        """A LayerNorm subtracts the mean over its width, which no change of weights makes up for; its parameters follow
        its input.
        """
        x = self._entries(step.inputs[0], place)
        for dim in range(x.ndim - len(step.args[1]), x.ndim):
            x = self._normalised(x, dim, place, "is averaged over, and the mean subtracted")
        for number in step.inputs[1:]:
            if isinstance(weight := self.values.get(number), Weight):
                self._meet(x, weight, place)
        return x

    def _check_slabs(self, number: int, place: Place) -> None:
        """Units can be cut out of a tensor only where its classes change along a single dimension."""
        value = self.values.get(number)
        if isinstance(value, Tensor) and len(varying(value)) > 1:
            self.classes.pin(value, place, "its entries do not form whole rows or columns there")
