"""One forward of a model on the meta device, recorded as a list of elementary tensor operations.

The parameters are replaced by shapes without memory, so tracing a large model costs neither memory nor arithmetic.
Composite operations (linear, matmul, attention) arrive already taken apart, which leaves a few dozen operations to know
about.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from transformers import PreTrainedModel

from compresso.errors import ArchError, first_line

POSITIONS = 4
"""Tokens in the traced sequence."""


@dataclass(frozen=True, slots=True)
class Ref:
    """A tensor of the trace, by its number."""

    number: int


@dataclass(frozen=True, slots=True)
class Step:
    """One operation: what ran, in which module, on which tensors, giving which.

    Args:
        op: the overload that ran.
        module: qualified name of the innermost module that was running.
        args: positional arguments with a `Ref` in place of every tensor.
        kwargs: named arguments, likewise.
        inputs: numbers of all tensors read.
        outputs: numbers of the tensors made; an operation in place makes a new number.
    """

    op: Any
    module: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]

    @property
    def name(self) -> str:
        """The operation without namespace and overload: `add`, `mm`."""
        return self.op._schema.name.split("::")[-1].removesuffix("_")


@dataclass
class Trace:
    """The steps of one forward, the shape of every tensor, and which tensors are parameters or the model's output."""

    steps: list[Step] = field(default_factory=list)
    shapes: list[tuple[int, ...]] = field(default_factory=list)
    parameters: dict[int, str] = field(default_factory=dict)
    results: tuple[int, ...] = ()


def trace(model: nn.Module, inputs: Mapping[str, Tensor] | None = None) -> Trace:
    """Record a forward of the model; inputs (any device) default to `POSITIONS` tokens or one image.

    Raises:
        ArchError: the forward needs tensor values, or reads a tensor that was written to through a view of it.
    """
    given = {name: torch.empty_like(tensor, device="meta") for name, tensor in (inputs or _inputs(model)).items()}
    parameters = {
        name: nn.Parameter(torch.empty_like(p, device="meta"), p.is_floating_point())
        for name, p in model.named_parameters()
    }
    buffers = {name: torch.empty_like(b, device="meta") for name, b in model.named_buffers()}
    recorder = _Recorder()
    for name, parameter in parameters.items():
        recorder.trace.parameters[recorder.number(parameter)] = name
    with _evaluating(model), _without_padding(model), _naming(model, recorder), torch.no_grad():
        try:
            with recorder:
                result = torch.func.functional_call(model, {**parameters, **buffers}, (), given)
        except (RuntimeError, NotImplementedError, TypeError, ValueError) as error:
            where, what = recorder.module or type(model).__name__, first_line(error)
            raise ArchError(f"{where} cannot be traced without weights: {what}; describe this architecture") from error
    recorder.trace.results = tuple(
        recorder.number(leaf) for leaf in tree_leaves(_plain(result)) if isinstance(leaf, Tensor)
    )
    recorder.trace.steps = _needed(recorder.trace)
    return recorder.trace


def _needed(traced: Trace) -> list[Step]:
    """The steps that the output depends on; a cache is filled for a next forward that never comes."""
    wanted = set(traced.results)
    needed: list[Step] = []
    for step in reversed(traced.steps):
        if not wanted.isdisjoint(step.outputs):
            wanted.update(step.inputs)
            needed.append(step)
    return needed[::-1]


class _Recorder(TorchDispatchMode):
    """Writes down every operation; holds every tensor, so that identities stay unique."""

    def __init__(self) -> None:
        super().__init__()
        self.trace, self.module = Trace(), ""
        self._numbers: dict[int, int] = {}
        self._held: list[Tensor] = []
        self._sharers: dict[int, set[int]] = {}
        self._stale: set[int] = set()

    def number(self, tensor: Tensor, *, new: bool = False) -> int:
        """The tensor's number, a fresh one if it has none or was written to."""
        if new or id(tensor) not in self._numbers:
            self._numbers[id(tensor)] = len(self.trace.shapes)
            self.trace.shapes.append(tuple(tensor.shape))
            self._held.append(tensor)
            self._sharers.setdefault(tensor.untyped_storage()._cdata, set()).add(id(tensor))
        return self._numbers[id(tensor)]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        def referred(leaf: Any) -> Any:
            if isinstance(leaf, Tensor) and id(leaf) in self._stale:
                raise ArchError(
                    f"{self.module} ({func}) reads a tensor that was written to under another name; describe this"
                    " architecture"
                )
            return Ref(self.number(leaf)) if isinstance(leaf, Tensor) else leaf

        kwargs = kwargs or {}
        seen_args, seen_kwargs = tree_map(referred, args), tree_map(referred, kwargs)
        inputs = tuple(leaf.number for leaf in tree_leaves((seen_args, seen_kwargs)) if isinstance(leaf, Ref))
        written = (
            {id(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
            if func._schema.is_mutable
            else set[int]()
        )
        result = func(*args, **kwargs)
        outputs: list[int] = []
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                in_place = id(leaf) in written
                outputs.append(self.number(leaf, new=in_place))
                if in_place:
                    self._stale |= self._sharers[leaf.untyped_storage()._cdata]
                    self._stale.discard(id(leaf))
        self.trace.steps.append(Step(func, self.module, seen_args, seen_kwargs, inputs, tuple(outputs)))
        return result


@contextmanager
def _without_padding(model: nn.Module) -> Iterator[None]:
    """No padding token in the config for a while: stock forwards look for it among the token ids, which have no values
    here.
    """
    config = getattr(model, "config", None)
    if getattr(config, "pad_token_id", None) is None:
        yield
        return
    assert config is not None
    kept, config.pad_token_id = config.pad_token_id, None
    try:
        yield
    finally:
        config.pad_token_id = kept


@contextmanager
def _naming(model: nn.Module, recorder: _Recorder) -> Iterator[None]:
    """Let the recorder know which module runs."""
    stack: list[str] = []
    handles: list[Any] = []
    for name, module in model.named_modules():

        def enter(_module: nn.Module, _args: Any, name: str = name) -> None:
            stack.append(name)
            recorder.module = name

        def leave(_module: nn.Module, _args: Any, _result: Any) -> None:
            stack.pop()
            recorder.module = stack[-1] if stack else ""

        handles += [module.register_forward_pre_hook(enter, prepend=True), module.register_forward_hook(leave)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Dropout off, and afterwards every module as it was."""
    were = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in were:
            module.training = training


def _inputs(model: nn.Module) -> dict[str, Tensor]:
    """Meta inputs for a transformers model that reads tokens or images."""
    wanted = model.main_input_name if isinstance(model, PreTrainedModel) else None
    if wanted == "input_ids":
        tokens = torch.empty(1, POSITIONS, dtype=torch.long, device="meta")
        return {wanted: tokens, "decoder_input_ids": tokens} if model.config.is_encoder_decoder else {wanted: tokens}  # type: ignore[union-attr]
    size = getattr(getattr(model, "config", None), "image_size", None)
    if wanted == "pixel_values" and isinstance(size, int):
        return {wanted: torch.empty(1, model.config.num_channels, size, size, device="meta")}  # type: ignore[union-attr]
    raise ArchError(f"{type(model).__name__} reads {wanted or 'unknown inputs'}; pass example inputs to trace it")


def _plain(result: Any) -> Any:
    """Model outputs are dictionaries to a tree walker only once they are plain; a key/value cache is for the model's
    own use.
    """
    return (
        {name: part for name, part in result.items() if name != "past_key_values"}
        if isinstance(result, Mapping)
        else result
    )
