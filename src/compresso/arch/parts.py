"""The parts of one layer of a `Stack` by name, and how its linears hold queries, keys and values, or gate and up.

Some families write q, k and v with one linear, and gate and up with another. Their outputs then lie one behind the
other, either all of q, all of k and all of v ("blocks": GPT-2, Phi-3), or for each head its q, k and v ("heads":
GPT-NeoX, BLOOM). GPT-2's linears are `Conv1D`s, whose weight is [in, out].
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from compresso.core.axis import Slice
from compresso.errors import ArchError

_Run = tuple[str, int, int]
"""A linear, where the first unit's outputs begin, and the outputs of one unit."""


@dataclass(frozen=True, slots=True)
class Parts:
    """Names of modules, relative to a layer, and of fields.

    Args:
        attention: the innermost module that holds q, k, v and o.
        core: the module that computes the attention and knows its head count and cache slot.
        read: q, k and v, or the one linear that writes all three.
        write: o.
        attention_norms: norms that have no use without the attention.
        head_norms: norms over one head's entries, shared by all heads; some models of a family may lack them.
        shared_norms: norms that attention and FFN both read, side by side (Phi); they leave with the whole layer.
        sum_norms: norms behind the residual sums (BERT), which stay.
        ffn: the innermost module that holds the FFN's linears; "" if they lie in the layer itself.
        up: the FFN's linears that read the stream.
        down: the one that writes to it.
        ffn_norms: norms that have no use without the FFN.
        head_dim: field of `core` that says a head's width.
        heads: fields of `core` that say how many heads there are.
        kv_heads: fields of `core` that say how many key/value heads there are.
        widths: fields of `core` that say how wide all its heads are together.
        channels: field of the config that says the FFN's width; "" if none does.
        packing: how a linear that writes q, k and v holds them.
        fused_up: how many times the FFN's width `up` writes, one behind the other.
        heads_in_config: whether the stock forward reads the head count off the config of `core`.
        heads_stay: whether no head can leave, because something outside the attention counts them (BLOOM).
        adds_stream: whether attention and FFN are given the residual stream and return their sum with it (BLOOM).
    """

    attention: str
    core: str
    read: tuple[str, ...]
    write: str
    ffn: str
    up: tuple[str, ...]
    down: str
    attention_norms: tuple[str, ...] = ()
    head_norms: tuple[str, ...] = ()
    ffn_norms: tuple[str, ...] = ()
    shared_norms: tuple[str, ...] = ()
    sum_norms: tuple[str, ...] = ()
    head_dim: str = "head_dim"
    heads: tuple[str, ...] = ()
    kv_heads: tuple[str, ...] = ()
    widths: tuple[str, ...] = ()
    channels: str = "intermediate_size"
    packing: Literal["apart", "blocks", "heads"] = "apart"
    fused_up: int = 1
    heads_in_config: bool = False
    heads_stay: bool = False
    adds_stream: bool = False

    def head_widths(self, block: nn.Module, where: str) -> tuple[int, int, int, int]:
        """How many entries q, k, v and o hold.

        Raises:
            ArchError: they are not plain linears or do not fit each other.
        """
        given = linear(block, self.write, where)[1]
        if self.packing == "apart":
            q, k, v = (linear(block, name, where)[0] for name in self.read)
            return q, k, v, given
        written = linear(block, self.read[0], where)[0]
        shared, odd = divmod(written - given, 2)
        if shared <= 0 or odd or (self.packing == "heads" and shared != given):
            raise ArchError(
                f"{where}.{self.read[0]} writes {written} entries of q, k and v, of which {where}.{self.write} reads"
                f" {given}"
            )
        return given, shared, shared, given

    def ffn_widths(self, block: nn.Module, where: str) -> tuple[int, ...]:
        """How many channels each of `up` writes, once for every time it does, then those that `down` reads. Raises
        ArchError likewise.
        """
        down, widths = linear(block, self.down, where)[1], list[int]()
        for name in self.up:
            width, rest = divmod(linear(block, name, where)[0], self.fused_up)
            widths += [width if not rest else -1] * self.fused_up
        return (*widths, down)

    def standing_for(self, name: str) -> str | None:
        """The linear, relative to the layer, that does what LLaMA's of that name does (q_proj, ..., down_proj); None if
        there is none.

        A fused linear stands for all that it holds, the first linear of an FFN without a gate for `gate_proj`, too.
        """
        read = self.read if self.packing == "apart" else self.read * 3
        names = dict(zip(("q_proj", "k_proj", "v_proj"), read, strict=True))
        names |= {"o_proj": self.write, "gate_proj": self.up[0], "up_proj": self.up[-1], "down_proj": self.down}
        return names.get(name)

    def head_runs(self, kv_heads: int, group: int, head_dim: int) -> tuple[_Run, ...]:
        """Where the outputs of a unit lie: a key/value head of `head_dim` with its query heads, `group` entries."""
        if self.packing == "heads":
            return ((self.read[0], 0, group + 2 * head_dim),)
        starts = (0, 0, 0) if self.packing == "apart" else (0, kv_heads * group, kv_heads * (group + head_dim))
        names = self.read if self.packing == "apart" else self.read * 3
        return tuple(zip(names, starts, (group, head_dim, head_dim), strict=True))

    def channel_runs(self, channels: int) -> tuple[_Run, ...]:
        """Where the outputs of a channel lie."""
        return tuple((name, part * channels, 1) for name in self.up for part in range(self.fused_up))

    def cached(self, module: str, kv_entries: int) -> int:
        """How many outputs of a linear, named relative to the layer, are keys or values. kv_entries: of the layer's
        keys.
        """
        if self.packing == "apart":
            return kv_entries if module in self.read[1:] else 0
        return 2 * kv_entries if module in self.read else 0


def linear(block: nn.Module, name: str, where: str) -> tuple[int, int]:
    """A linear's (out, in).

    Raises:
        ArchError: it is not a plain one.
    """
    module = block.get_submodule(name)
    if type(module) is Conv1D:
        return module.weight.shape[1], module.weight.shape[0]
    if type(module) is not nn.Linear:
        raise ArchError(
            f"{where}.{name} is {type(module).__name__}, wanted Linear; merge adapters or load unquantised weights"
        )
    return module.weight.shape[0], module.weight.shape[1]


def output_dim(module: nn.Module) -> int:
    """The dimension of a linear's weight along which its outputs lie."""
    return int(isinstance(module, Conv1D))


def written(model: PreTrainedModel, block: str, runs: tuple[_Run, ...]) -> tuple[Slice, ...]:
    """The slices of weights and biases that hold these outputs."""
    found: list[Slice] = []
    for part, start, width in runs:
        module = model.get_submodule(f"{block}.{part}")
        for name in tensors(model, f"{block}.{part}"):
            found.append(Slice(name, output_dim(module) if name.endswith(".weight") else 0, width, start=start))
    return tuple(found)


def tensors(model: PreTrainedModel, module: str) -> Iterator[str]:
    """Qualified names of a module's own parameters."""
    return (f"{module}.{name}" for name, _ in model.get_submodule(module).named_parameters())
