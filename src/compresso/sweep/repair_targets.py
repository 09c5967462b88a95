"""What the linears of a smaller model read, and what they are to write, block by block beside the dense model."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from compresso.core.axis import Kind
from compresso.sweep.activation_store import ActivationStore
from compresso.sweep.least_squares import Fit
from compresso.sweep.lost import Consumer, Place
from compresso.sweep.two_streams import Stream, cut, lifted
from compresso.training.ranks import Ranks


@dataclass
class Targets:
    """The two streams, at the smaller model's block that is next, and what the dense stream was behind its places."""

    dense: Stream
    smaller: Stream
    layers: Sequence[int]
    kept: Sequence[int] | None
    width: int
    n_seen: int
    fit: Fit
    goals: Mapping[Kind, ActivationStore]
    at: int = 0
    adds: dict[int, bool] = field(default_factory=dict[int, bool])

    def leading(self) -> None:
        """Run what left before the first block that is left."""
        while self.at < self.layers[0]:
            self.dense.step(self.at)
            self.at += 1

    def look_for_norms(self, layer: int, wanted: Mapping[Kind, Consumer], ranks: Ranks) -> None:
        """Note whether the dense block of a smaller one's, of which something is wanted, adds to the stream what its
        linears write; the main process looks at its first batch.
        """
        own, adds = self.layers[layer], True
        with ranks.failing_alike():
            if wanted and ranks.is_main:
                adds = self.dense.is_sum(own, 0, self.dense.states[0])
        self.adds[own] = ranks.agreed(adds)

    def pass_dense(self, layer: int, wanted: Mapping[Kind, Consumer]) -> None:
        """Run the dense block and the gap behind it, noting the streams that are wanted of them."""
        own = self.layers[layer]
        following = self.layers[layer + 1] if layer + 1 < len(self.layers) else len(self.dense.blocks)
        for index in range(len(self.dense)):
            hidden = self.dense.states[index]
            beyond = [one for one in wanted.values() if self.adds[own] and one.until.layer >= following]
            for at in range(own, following):
                output, written = self.dense.own(at, index, hidden)
                for kind, one in wanted.items():
                    if not self.adds[own]:
                        if at == own:
                            self.goals[kind].put(index, written.outputs[kind])
                    elif one.until.layer == at:
                        behind = output if one.until.kind is Kind.MLP else hidden + written.outputs[one.until.kind]
                        self.goals[kind].put(index, behind)
                hidden = output
            self.dense.states.put(index, hidden)
            for one in beyond:  # sub-layers of blocks that are left are gone, too
                self.goals[one.place.kind].put(index, self._followed(index, hidden, following, one.until))
        self.at = following

    def same_until(self) -> int:
        """How many of the smaller model's first blocks give what the dense ones give: they are those, unchanged, and
        nothing left before the next one.
        """
        if self.kept is not None or not _equal_states(self.dense.states, self.smaller.states):
            return 0
        for layer, own in enumerate(self.layers):
            if own != layer or not _equal(self.dense.blocks[own], self.smaller.blocks[layer]):
                return max(0, layer - (own != layer))
        return len(self.layers)

    def step(self, layer: int, as_dense: bool) -> None:
        """Run a block of the smaller model on every batch; where it does as the dense one did, its states are taken."""
        if as_dense:
            for index in range(len(self.dense)):
                self.smaller.states.put(index, self.dense.states[index])
        else:
            self.smaller.step(layer)

    def tokens(self, one: Consumer) -> Iterator[tuple[bool, Tensor, list[Tensor], Tensor, int]]:
        """Batch by batch: whether it is held out, x~ [tokens, in], y* [tokens, out] of each target, the stream that the
        last of them leads to [tokens, out], and how many tokens a row has.
        """
        kind, own = one.place.kind, one.place.layer
        bias = getattr(self.smaller.linear(one.layer, kind), "bias", None)
        constant = bias.float() if isinstance(bias, Tensor) else 0.0
        adds = self.adds[own]
        for index in range(len(self.smaller)):
            hidden = self.smaller.states[index]
            until = kind if kind is Kind.ATTENTION or not adds else None
            output, written = self.smaller.run(one.layer, index, hidden, until=until)
            if not adds:
                already: Tensor | float = 0.0
            elif kind is Kind.ATTENTION:
                already = hidden.float()
            else:
                already = output.float() - written.outputs[kind].float()
            goals: list[Tensor] = []
            if self.fit.mixes:
                forced = None
                if kind is Kind.MLP:
                    attention = written.outputs.get(Kind.ATTENTION)
                    forced = torch.zeros_like(hidden) if attention is None else attention
                goals.append(self._made_of(one, index, hidden, forced))
            if self.fit.residual:
                goals.append(cut(self.goals[kind][index], self.kept))
            wanted = [(goal.float() - already - constant).flatten(0, -2) for goal in goals]
            inputs, led_to = written.inputs[kind].flatten(0, -2), goals[-1].flatten(0, -2)
            yield index >= self.n_seen, inputs, wanted, led_to, hidden.shape[-2]

    def _made_of(self, one: Consumer, index: int, hidden: Tensor, forced: Tensor | None) -> Tensor:
        """The stream at a consumer's last place, made by the dense blocks of the smaller model's stream."""
        own = one.place.layer
        hidden = lifted(hidden, self.kept, self.width)
        forced = None if forced is None else lifted(forced, self.kept, self.width)
        if self.adds[own]:
            return cut(self._followed(index, hidden, own, one.until, forced), self.kept)
        _, written = self.dense.run(own, index, hidden, until=one.place.kind, forced=forced)
        return cut(written.outputs[one.place.kind], self.kept)

    def _followed(self, index: int, hidden: Tensor, first: int, until: Place, forced: Tensor | None = None) -> Tensor:
        """The stream behind a place, made by the dense blocks from the first on.

        forced: what the first one's attention is to have written.
        """
        for at in range(first, until.layer + 1):
            last = Kind.ATTENTION if at == until.layer and until.kind is Kind.ATTENTION else None
            output, written = self.dense.run(at, index, hidden, last, forced if at == first else None)
            hidden = hidden + written.outputs[last] if last else output
        return hidden


def _equal(a: nn.Module, b: nn.Module) -> bool:
    """Whether two blocks hold the same numbers under the same names, and none is patched beside them."""
    of_a, of_b = a.state_dict(), b.state_dict()
    if any(_patched(module) for block in (a, b) for module in block.modules()):
        return False
    return of_a.keys() == of_b.keys() and all(_same(of_a[name], of_b[name]) for name in of_a)


def _equal_states(a: ActivationStore, b: ActivationStore) -> bool:
    return len(a) == len(b) and all(_same(a[i], b[i]) for i in range(len(a)))


def _patched(module: nn.Module) -> bool:
    """Whether calls of a module do more than its class; transformers' own hooks only look."""
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    return "forward" in vars(module) or any(not str(hook.__module__).startswith("transformers.") for hook in hooks)


def _same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b)
