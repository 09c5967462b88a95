"""Who makes and who reads each tensor of a trace: RMSNorms, and the sub-layers that only add to a residual stream.

A sub-layer is a term f(x) of a sum x + f(x) + ... whose operations read x, constants and parameters, and are read by
nobody else. Without it the sum is what it is with f = 0, so it can leave whole; this is proved on the trace, not read
off the module names. Terms of one sum may begin with the same operations (Phi's norm, which attention and FFN both
read): the parameters of these leave when all the terms do.
"""

from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property

from torch import nn

from compresso.discover.trace import Step, Trace

_RESHAPES = {"view", "_unsafe_view", "_to_copy", "clone", "alias", "detach"}


@dataclass(frozen=True, slots=True)
class SubLayer:
    """A removable term of a residual sum.

    Args:
        parameters: names of the parameters only it uses.
        writer: the innermost module whose output is the term.
        attends: whether it multiplies activations by activations.
        shared: names of the parameters that only it and the other terms of its sum use.
    """

    parameters: tuple[str, ...]
    writer: str
    attends: bool
    shared: tuple[str, ...] = ()


class Flow:
    """Producers and consumers of a trace."""

    def __init__(self, trace: Trace, model: nn.Module) -> None:
        self.trace, self.model = trace, model
        self.maker: dict[int, int] = {}
        self.readers: dict[int, list[int]] = defaultdict(list)
        for at, step in enumerate(trace.steps):
            for number in step.inputs:
                self.readers[number].append(at)
            for number in step.outputs:
                self.maker[number] = at

    def made_by(self, number: int) -> Step | None:
        """The step that made a tensor; None for inputs and parameters."""
        return self.trace.steps[self.maker[number]] if number in self.maker else None

    def is_rms_norm(self, mean: Step) -> bool:
        """Whether a mean is that of an RMSNorm, weight * x * rsqrt(mean(x * x) + eps), in a module that holds weight
        and eps.
        """
        module = self.model.get_submodule(mean.module)
        squares = self.made_by(mean.inputs[0])
        if (
            mean.name != "mean"
            or squares is None
            or not any(hasattr(module, name) for name in ("variance_epsilon", "eps"))
        ):
            return False
        squared = (squares.name == "pow" and squares.args[1] == 2) or (
            squares.name == "mul" and len(set(squares.inputs)) == 1
        )
        shifted = self._only_reader(mean.outputs[0])
        scale = (
            self._only_reader(shifted.outputs[0])
            if shifted and shifted.name == "add" and len(shifted.inputs) == 1
            else None
        )
        scaled = self._only_reader(scale.outputs[0]) if scale and scale.name == "rsqrt" else None
        if not squared or scaled is None or scaled.name != "mul":
            return False
        if {self._uncast(number) for number in scaled.inputs} != {
            self._uncast(squares.inputs[0]),
            scale.outputs[0] if scale else -1,
        }:
            return False
        weighted = self._only_reader(scaled.outputs[0])
        while weighted is not None and weighted.name == "_to_copy":
            weighted = self._only_reader(weighted.outputs[0])
        factors = [self.trace.parameters.get(self._uncast(number)) for number in weighted.inputs] if weighted else []
        return weighted is not None and weighted.name == "mul" and f"{mean.module}.weight" in factors

    def is_leaf(self, module: str) -> bool:
        """Whether a module has no modules inside and no parameters but a weight and a bias, so that its output is its
        operation's.
        """
        found = self.model.get_submodule(module)
        return not found._modules and {name for name, _ in found.named_parameters()} <= {"weight", "bias"}

    def _only_reader(self, number: int) -> Step | None:
        readers = self.readers[number]
        return self.trace.steps[readers[0]] if len(readers) == 1 else None

    def _uncast(self, number: int) -> int:
        while (step := self.made_by(number)) is not None and step.name == "_to_copy":
            number = step.inputs[0]
        return number

    @cached_property
    def residual_sums(self) -> tuple[int, ...]:
        """Tensors that are a stream plus sub-layers."""
        return tuple(total for total, _ in self._sums)

    @cached_property
    def sub_layers(self) -> tuple[SubLayer, ...]:
        """Every sub-layer, in the order of computation."""
        return tuple(sub_layer for _, sub_layers in self._sums for sub_layer in sub_layers)

    @cached_property
    def _sums(self) -> list[tuple[int, list[SubLayer]]]:
        found: list[tuple[int, list[SubLayer]]] = []
        for step in self.trace.steps:
            if step.name != "add" or len(step.inputs) != 2 or self._continues(step.outputs[0]):
                continue
            terms = self._terms(step.outputs[0])
            streams = [t for t in terms if all(t == other or self._reaches(other, t) for other in terms)]
            if not streams:
                continue
            added = [term for term in terms if term != streams[0]]
            together = [self._sub_layer(term, streams[0], set(added) - {term}) for term in added]
            each = together if None not in together else [self._sub_layer(term, streams[0], set()) for term in added]
            if sub_layers := [sub_layer for sub_layer in each if sub_layer is not None]:
                found.append((step.outputs[0], sub_layers))
        return found

    def _continues(self, number: int) -> bool:
        """Whether a sum is only a part of the next sum."""
        reader = self._only_reader(number)
        return reader is not None and reader.name == "add" and len(reader.inputs) == 2

    def _terms(self, number: int) -> list[int]:
        """The terms of a sum of sums. A bias belongs to what it is added to, whether one operation does both or two."""
        step = self.made_by(number)
        assert step is not None
        terms: list[int] = []
        for term in step.inputs:
            maker = self.made_by(term)
            inner = (
                maker is not None
                and maker.name == "add"
                and len(maker.inputs) == 2
                and len(self.readers[term]) == 1
                and not any(number in self.trace.parameters for number in maker.inputs)
            )
            terms += self._terms(term) if inner else [term]
        return terms

    def _between(self, end: int, start: int) -> set[int]:
        """Steps that `end` is made by, as far back as `start`."""
        oldest = self.maker.get(start, -1)
        steps: set[int] = set()
        waiting = [end]
        while waiting:
            number = waiting.pop()
            at = self.maker.get(number, -1)
            if number != start and at > oldest and at not in steps:
                steps.add(at)
                waiting += self.trace.steps[at].inputs
        return steps

    def _reaches(self, end: int, start: int) -> bool:
        return any(start in self.trace.steps[at].inputs for at in self._between(end, start))

    def _sub_layer(self, term: int, stream: int, others: set[int]) -> SubLayer | None:
        """The term as a sub-layer, if its parameters are its own and nothing but the sum reads it.

        others: terms of the same sum that may begin with the same operations.
        """
        steps = self._between(term, stream)
        beside = {at for other in others for at in self._between(other, stream)}
        weights = {number for at in steps for number in self.trace.steps[at].inputs if number in self.trace.parameters}
        own = {number for number in weights if all(at in steps for at in self.readers[number])}
        depends = self._depending(steps, weights | {stream})
        leaks = any(
            reader not in steps and reader not in beside
            for at in depends
            for n in self.trace.steps[at].outputs
            if n != term
            for reader in self.readers[n]
        )
        shared = {number for number in own if any(at in beside for at in self.readers[number])}
        if own == shared or own != weights or leaks or len(self.readers[term]) != 1 or term in self.trace.results:
            return None
        writer = self.made_by(term)
        while writer is not None and (writer.name in _RESHAPES or (writer.name == "mul" and len(writer.inputs) == 1)):
            writer = self.made_by(writer.inputs[0])
        if writer is None or not self.is_leaf(writer.module):
            return None
        names = tuple(name for number, name in self.trace.parameters.items() if number in own - shared)
        with_others = tuple(name for number, name in self.trace.parameters.items() if number in shared)
        attends = any(self.trace.steps[at].name == "bmm" and self._is_activation_product(at, depends) for at in steps)
        return SubLayer(names, writer.module, attends, with_others)

    def _depending(self, steps: set[int], sources: set[int]) -> set[int]:
        """The steps among `steps` that depend on the sources; the others make masks and position tables."""
        known, found = set(sources), set[int]()
        for at in sorted(steps):
            step = self.trace.steps[at]
            if any(number in known for number in step.inputs):
                found.add(at)
                known.update(step.outputs)
        return found

    def _is_activation_product(self, at: int, depends: set[int]) -> bool:
        return all(self.maker.get(number, -1) in depends for number in self.trace.steps[at].inputs)
