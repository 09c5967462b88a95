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

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from compresso.discover.labels import Classes, Place, Value, Weight, along, as_entries, refuse, spread, varying
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


class Propagation:
    """One round over a trace; `values` are the classes of every tensor made so far."""

    def __init__(self, trace: Trace, classes: Classes, foldable: Callable[[Step], bool]) -> None:
        self.trace, self.classes, self.foldable = trace, classes, foldable
        self.zeros: set[int] = set()
        self.values: dict[int, Value] = {
            number: classes.weight(name, len(trace.shapes[number])) for number, name in trace.parameters.items()
        }

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

    def _entries(self, number: int, place: Place) -> Tensor:
        """A tensor's classes entry by entry; zeros for a constant."""
        value = self.values.get(number)
        if isinstance(value, Weight):
            return as_entries(value, self.classes, place)
        return torch.zeros((), dtype=torch.long).expand(self.trace.shapes[number]) if value is None else value

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

    def _product(self, step: Step, place: Place) -> Value:
        """Matrix products, with or without something added."""
        *added, left, right = step.inputs
        a, b = self.values.get(left), self.values.get(right)
        for value in (a, b):
            if isinstance(value, Weight) and len(value.wide) > 2:
                raise refuse(place, "multiplies by a stack of matrices")
        if isinstance(b, Weight) and len(b.classes) == 2:
            out = self._read(a, self.trace.shapes[left], b, place)
        elif isinstance(a, Weight) and len(a.classes) == 2:
            flipped = Weight(a.classes[::-1], a.sources[::-1])
            shape = self.trace.shapes[right]
            turned = self._read(b.transpose(0, 1) if isinstance(b, Tensor) else b, (shape[1], shape[0]), flipped, place)
            assert isinstance(turned, Tensor)
            out = turned.transpose(0, 1)
        else:
            out = self._attend(self._entries(left, place), self._entries(right, place), place)
        if not added:
            return out
        if not isinstance(out, Tensor):
            raise refuse(place, "adds to a product of parameters, or of nothing that is followed")
        return self._with(out, added[0], place)

    def _with(self, out: Tensor, number: int, place: Place) -> Value:
        """A product plus a bias."""
        value = self.values.get(number)
        if isinstance(value, Weight):
            self._meet(out, value, place)
            self._note_bias(value, place)
        elif value is None:
            for dim in varying(out):
                shape = self.trace.shapes[number]
                if dim >= out.ndim - len(shape) and shape[dim - out.ndim + len(shape)] > 1:
                    self.classes.pin(out, place, "it meets a table of fixed size")
        else:
            self.classes.join(out, value.expand(out.shape))
        return out

    def _note_bias(self, value: Weight, place: Place) -> None:
        source = value.sources[-1]
        if source is not None:
            self.classes.writes.setdefault(source, place)

    def _read(self, a: Value, shape: tuple[int, ...], b: Weight, place: Place) -> Value:
        """`a` (rows, k) times a parameter (k, n): k joins, n is written."""
        for dim, notes in ((0, self.classes.reads), (1, self.classes.writes)):
            if (source := b.sources[dim]) is not None:
                notes.setdefault(source, place)
        if isinstance(a, Weight):
            self.classes.join(a.classes[1], b.classes[0])
            return Weight((a.classes[0], b.classes[1]), (a.sources[0], b.sources[1]))
        if a is None or not bool(a.any()):
            self.classes.pin(b.classes[0], place, "it reads an input of fixed size")
        else:
            read = spread(b.classes[0], 1, shape)
            self.classes.join(a, read)
            self.classes.pin(torch.where(a == 0, read, 0), place, "it reads an input of fixed size")
        return spread(b.classes[1], 1, (shape[0], len(b.classes[1])))

    def _attend(self, a: Tensor, b: Tensor, place: Place) -> Value:
        """Activations times activations: in each batch entry everything leaves together."""
        batched = a.ndim == 3
        if not batched:
            a, b = a[None], b[None]
        if not bool(a.any()) or not bool(b.any()):
            one = a if bool(a.any()) else b
            out = self._normalised(one, 2 if one is a else 1, place, "is multiplied by a fixed table").narrow(
                2 if one is a else 1, 0, 1
            )
            out = out.expand(a.shape[0], a.shape[1], b.shape[2])
            return out if batched else out[0]
        flat = torch.cat([a.reshape(a.shape[0], -1), b.reshape(b.shape[0], -1)], dim=1)
        head = flat.amax(dim=1, keepdim=True)
        self.classes.join(flat, head.expand(flat.shape))
        if bool((flat == 0).any()):
            self.classes.pin(
                torch.where((flat == 0).any(dim=1, keepdim=True), flat, 0),
                place,
                "it is multiplied by entries of fixed size",
            )
        self.classes.attended.append(head.reshape(-1))
        out = head[:, :, None].expand(a.shape[0], a.shape[1], b.shape[2])
        return out if batched else out[0]

    def _lookup(self, step: Step, place: Place) -> Value:
        """An embedding: its columns are written, its rows are looked up."""
        table = self.values.get(step.inputs[0])
        if not isinstance(table, Weight):
            raise refuse(place, "looks up activations")
        self.classes.pin(table.classes[0], place, "its rows are looked up by number")
        if (source := table.sources[1]) is not None:
            self.classes.writes.setdefault(source, place)
        shape = self.trace.shapes[step.outputs[0]]
        return spread(table.classes[1], len(shape) - 1, shape)

    def _convolution(self, step: Step, place: Place) -> Value:
        """A convolution without groups: input channels join, output channels are written, kernel positions stay. One of
        each channel by itself scales and shifts what it reads.
        """
        x, weight = self.values.get(step.inputs[0]), self.values.get(step.inputs[1])
        transposed, groups, each = step.args[6], step.args[8], self._of_each_channel(step)
        if not isinstance(weight, Weight) or transposed or (groups != 1 and not each):
            raise refuse(place, "is a convolution with groups, transposed, or without a weight of its own")
        if each and isinstance(x, Tensor):
            for classes in weight.classes[2:]:
                self.classes.pin(classes, place, "it is a kernel position")
            return self._by_channel(x, step.inputs[1:], self.trace.shapes[step.outputs[0]])
        for classes in weight.classes[2:]:
            self.classes.pin(classes, place, "it is a kernel position")
        for dim, notes in ((1, self.classes.reads), (0, self.classes.writes)):
            if (source := weight.sources[dim]) is not None:
                notes.setdefault(source, place)
        if not isinstance(x, Tensor):
            self.classes.pin(weight.classes[1], place, "it reads an input of fixed size")
        else:
            read = spread(weight.classes[1], 1, tuple(x.shape))
            self.classes.join(x, read)
            self.classes.pin(torch.where(x == 0, read, 0), place, "it reads an input of fixed size")
        out = spread(weight.classes[0], 1, self.trace.shapes[step.outputs[0]])
        if isinstance(step.args[2], Ref) and isinstance(bias := self.values.get(step.args[2].number), Weight):
            self.classes.join(bias.classes[0], weight.classes[0])
            self._note_bias(bias, place)
        return out

    def _of_each_channel(self, step: Step) -> bool:
        """Whether a convolution reads one channel for each that it writes, and is not transposed."""
        shape, groups = self.trace.shapes[step.inputs[1]], step.args[8]
        return not step.args[6] and groups == shape[0] > 1 and shape[1] == 1

    def _by_channel(self, x: Tensor, numbers: Sequence[int], shape: tuple[int, ...]) -> Tensor:
        """What is done to each channel of feature maps by parameters with an entry for each: they leave together."""
        channels = along(x, 1)
        for number in numbers:
            if isinstance(weight := self.values.get(number), Weight):
                self.classes.join(channels, weight.classes[0])
        return spread(channels, 1, shape)

    def _batch_norm(self, step: Step, place: Place) -> Value:
        """A batch norm of a model that is asked: its statistics are constants with an entry for each channel."""
        x = self._entries(step.inputs[0], place)
        return self._by_channel(x, step.inputs[1:], self.trace.shapes[step.outputs[0]])

    def _resampled(self, step: Step, place: Place) -> Value:
        """Feature maps in another size: channels stay apart, places mix."""
        x = self._entries(step.inputs[0], place)
        for dim in (2, 3):
            x = self._normalised(x, dim, place, "is mixed with its neighbours")
        return spread(along(x, 1), 1, self.trace.shapes[step.outputs[0]])

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

    def _normalised(self, x: Tensor, dim: int, place: Place, why: str) -> Tensor:
        """Pinned where classes differ along a dimension."""
        if dim % x.ndim in varying(x):
            self.classes.pin(x, place, f"it {why}")
        return x

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
