"""Which linears of a model a weight method works on: those in its blocks, by layer, name pattern and exception.

The head, the embeddings and the norms lie outside of the blocks' linears and are never among them. Patterns are those
of a shell, matched against full module names such as `model.layers.3.self_attn.q_proj`.

Experts are stacked in tensors of three dimensions, one matrix each, named by their number: `experts.down_proj.5`. They
have no module of their own; a sweep sees what each reads through its mixture (`compresso.sweep.looking`), and a stage
says whether that is enough for it. Gate and up are one matrix there. Routers are no linears and are never among them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Annotated

from annotated_types import Ge
from pydantic import BeforeValidator, ConfigDict
from pydantic.dataclasses import dataclass as validated_dataclass
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from compresso.arch.base import Arch
from compresso.arch.producers import Feeder
from compresso.errors import ArchError, RecipeError, nearest


def _two(given: object) -> object:
    """Refuse what is no pair, in the words of a range. Raises ValueError."""
    if isinstance(given, list | tuple) and len(given) == 2:  # pyright: ignore[reportUnknownArgumentType]
        return given  # pyright: ignore[reportUnknownVariableType]
    raise ValueError("wanted [first, end) of the layers, counted from 0, such as [0, 6] for the first six")


LayerRange = Annotated[tuple[Annotated[int, Ge(0)], Annotated[int, Ge(1)]], BeforeValidator(_two)]
"""[first, end) of layers."""


@validated_dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Where:
    """Which linears a stage works on.

    Args:
        layers: [first, end) of the layers; None for all.
        modules: patterns of module names, such as "*.self_attn.*"; a linear that matches one is worked on.
        ignore: patterns of those left unchanged.
    """

    layers: LayerRange | None = None
    modules: tuple[str, ...] = ("*",)
    ignore: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse a range that holds nothing."""
        if self.layers is not None and self.layers[0] >= self.layers[1]:
            raise ValueError(f"layers={list(self.layers)} is empty; give [first, end) with first < end")


@dataclass(frozen=True)
class Group:
    """Linears of one block that read the same input, by full name.

    Args:
        layer: of the block.
        names: the linears.
        producer: what writes their inputs, by full name, if they are all that reads them.
        stack: full name of the tensor that holds it, if it is the matrix of an expert, which reads its own tokens.
    """

    layer: int
    names: tuple[str, ...]
    producer: Feeder | None = None
    stack: str | None = None

    @property
    def weights(self) -> tuple[str, ...]:
        """Full names of the parameters that hold its linears."""
        return tuple(f"{name}.weight" for name in self.names) if self.stack is None else (self.stack,)

    @property
    def turn(self) -> str:
        """What groups that are looked at together have in common where they take turns: the matrices of a stack."""
        return self.stack or self.names[0]


Groups = Mapping[int, Sequence[Group]]
"""By layer, in the order of computation; layers without any are absent."""


def chosen(model: PreTrainedModel, arch: Arch, where: Where, multiple_of: int = 1, *, experts: bool = False) -> Groups:
    """The linears that a stage works on; their inputs must be a multiple of some number. Needs shapes only.

    experts: whether it can work on stacked experts, each a group of its own behind the layer's linears.

    Raises:
        RecipeError: a pattern matches no linear, no layer has that number, nothing is left, inputs are no such
            multiple, or stacked experts are asked for that the stage cannot work on.
        ArchError: one of them is no linear, or its weight is shared with another module.
    """
    blocks = arch.blocks(model)
    root = next(name for name, module in model.named_modules() if module is blocks)
    if where.layers is not None and where.layers[1] > len(blocks):
        raise RecipeError(
            f"layers={list(where.layers)} reaches past the model's {len(blocks)} layers; end it at {len(blocks)} or"
            " before"
        )
    everything = {
        layer: [tuple(f"{root}.{layer}.{name}" for name in names) for names in arch.linear_groups(block)]
        for layer, block in enumerate(blocks)
    }
    stacks = {layer: stacked_experts(block, f"{root}.{layer}") for layer, block in enumerate(blocks)}
    in_stacks = {name for names in stacks.values() for name in names}
    for layer, names in stacks.items() if experts else ():
        everything[layer] += [(name,) for name in names]
    producers = {
        tuple(f"{root}.{layer}.{name}" for name in names): producer.within(f"{root}.{layer}")
        for layer, block in enumerate(blocks)
        for names, producer in arch.producers(block).items()
        if experts or not producer.readers
    }
    in_blocks = [name for groups in everything.values() for names in groups for name in names]
    anywhere = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)]
    anywhere += in_stacks
    dense = "" if in_stacks else model.config.model_type
    _check_patterns("where.modules", where.modules, in_blocks, "; the head and the embeddings are never pruned", dense)
    _check_patterns("where.ignore", where.ignore, [*in_blocks, *anywhere], "", dense)
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    wanted = range(*(where.layers or (0, len(blocks))))
    found: dict[int, list[Group]] = {}
    for layer in wanted:
        for name in () if experts else stacks[layer]:
            if matches(name, where.modules) and not matches(name, where.ignore):
                raise RecipeError(
                    f"{name} is one of a stack of experts, and this stage works on single linears. Take magnitude,"
                    " wanda or sparsegpt for zeros, rtn, gptq or awq for few bits, or work on the rest with"
                    " where.ignore: ['*.experts.*']"
                )
        for names in everything[layer]:
            mine = tuple(name for name in names if matches(name, where.modules) and not matches(name, where.ignore))
            if mine:
                inputs = matrix(model, mine[0]).shape[1]
                if inputs % multiple_of:
                    raise RecipeError(
                        f"{mine[0]} has {inputs} inputs, no multiple of {multiple_of}; choose another pattern or group,"
                        " or add it to where.ignore"
                    )
                stack = mine[0].rpartition(".")[0] if mine[0] in in_stacks else None
                found.setdefault(layer, []).append(Group(layer, mine, producers.get(mine), stack))
            for name in mine:
                sharing = owners.get(id(weight_of(model, name)), ())  # a matrix of a stack is no parameter
                if len(sharing) > 1:
                    raise ArchError(
                        f"{name} shares its weight with {sharing[-1]}, which would change with it; add {name} to"
                        " where.ignore"
                    )
    if not found:
        raise RecipeError(
            f"no linear is left to work on: where.modules={list(where.modules)}, where.ignore={list(where.ignore)};"
            " ignore less"
        )
    return found


def names_of(groups: Groups) -> list[str]:
    """Full names of all linears, in order."""
    return [name for here in groups.values() for group in here for name in group.names]


def edited_names(model: nn.Module, groups: Sequence[Group], rescales: bool = False) -> list[str]:
    """Names of the parameters that an edit of some groups may change: their weights, and those of what feeds them, with
    the routers that read it, too, if it rescales.
    """
    feeders = dict.fromkeys(group.producer for group in groups if group.producer and rescales)
    feeding = [f"{of.module}.{name}" for of in feeders for name, _ in model.get_submodule(of.module).named_parameters()]
    feeding += [name for of in feeders for name in of.beside]
    return list(dict.fromkeys([*(name for group in groups for name in group.weights), *feeding]))


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether a name matches one of some shell patterns."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def stacked_experts(block: nn.Module, where: str) -> list[str]:
    """Full names of the matrices that a layer's tensors of three dimensions hold. where: full name of the layer."""
    return [
        f"{where}.{name}.{i}" for name, stack in block.named_parameters() if stack.dim() == 3 for i in range(len(stack))
    ]


def stacked(model: nn.Module, name: str) -> Tensor | None:
    """An expert's matrix as [out, in], a view of its stack; None for a name that is not of one."""
    parts = name.rsplit(".", 2)
    if len(parts) < 3 or not parts[2].isdigit():
        return None
    owner = model.get_submodule(parts[0])
    stack = owner._parameters.get(parts[1])
    if stack is None or stack.dim() != 3:
        return None
    one = stack.detach()[int(parts[2])]
    return one.T if getattr(owner, "is_transposed", False) else one


def weight_of(model: nn.Module, name: str) -> Tensor:
    """A linear's weight parameter, or an expert's matrix. Raises ArchError if the module is neither `nn.Linear` nor
    transformers' `Conv1D`.
    """
    if (one := stacked(model, name)) is not None:
        return one
    module = model.get_submodule(name)
    if not isinstance(module, nn.Linear | Conv1D):
        raise ArchError(
            f"{name} is a {type(module).__name__}, and only linears can be worked on; add it to where.ignore"
        )
    return module.weight


def is_linear(model: nn.Module, name: str) -> bool:
    """Whether a module is an `nn.Linear` or transformers' `Conv1D`."""
    return isinstance(model.get_submodule(name), nn.Linear | Conv1D)


def matrix(model: nn.Module, name: str) -> Tensor:
    """A linear's weight as [out, in], a view; `Conv1D` stores it the other way round."""
    if (one := stacked(model, name)) is not None:
        return one
    weight = weight_of(model, name).detach()
    return weight.T if isinstance(model.get_submodule(name), Conv1D) else weight


def _check_patterns(knob: str, patterns: Sequence[str], names: Sequence[str], remark: str, dense: str) -> None:
    """Raise RecipeError for a pattern that matches nothing. dense: model type of a model without experts; else ""."""
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            if dense and "experts" in pattern:
                raise RecipeError(
                    f"{knob}: '{pattern}' names experts, and a {dense} has none; give a mixture of experts, or a"
                    " recipe that works on all linears, or leave the pattern out with --set"
                )
            raise RecipeError(f"{knob}: '{pattern}' matches no linear; {nearest(pattern, names[:16])}{remark}")
