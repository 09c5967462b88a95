"""Mixtures of experts as torch's exporter takes them: a token goes through the experts that its router chose, and
through no other.

transformers' ways of multiplying experts do not make such a graph. `grouped_mm` is one product of its own, which has no
translation; `eager` loops over the experts that were hit, whose number a trace does not know; `batched_mm` gathers a
copy of its weights for every token and expert (512 tokens of OLMoE in float32: 69 GB for the first product of a layer).
All experts on all tokens would be right, at eight times the products of OLMoE. So the stacks are taken apart while a
model is traced. Rows are sorted by their expert, as `grouped_mm` does, and cut into a piece an expert, perhaps one
without rows:

    rows [tokens x k, in] -> Split by counts [experts] -> MatMul with [in, out] of each -> Concat [tokens x k, out]

The graph computes what transformers computes, and holds as much: no product and no copy of an expert that no token
chose. Matrices have two dimensions, so what rounds matrices of a graph rounds experts like any other. The price is a
node an expert and product.
"""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from compresso.arch.mixture import EXPERTS


@torch.library.custom_op("compresso::by_expert", mutates_args=())
def by_expert(rows: Tensor, counts: Tensor, matrices: list[Tensor]) -> Tensor:
    """Rows through the matrix of their expert, one node of a trace.

    Args:
        rows: [rows, in], those of the first expert first.
        counts: how many rows each has [experts], int64.
        matrices: [in, out] of each.

    Returns:
        [rows, out].
    """
    pieces = rows.split(counts.tolist())
    return torch.cat([piece @ matrix for piece, matrix in zip(pieces, matrices, strict=True)])


@by_expert.register_fake
def _(rows: Tensor, counts: Tensor, matrices: list[Tensor]) -> Tensor:
    del counts
    return rows.new_empty(rows.shape[0], matrices[0].shape[1])


class _Apart(nn.Module):
    """The experts of a layer with a parameter for each matrix, which are views of the stacks.

    Args:
        experts: transformers' module of them.
    """

    def __init__(self, experts: Any) -> None:
        super().__init__()
        self.up, self.down = (
            nn.ParameterList(
                nn.Parameter(matrix if experts.is_transposed else matrix.T, requires_grad=False)
                for matrix in stack.detach()
            )
            for stack in (experts.gate_up_proj, experts.down_proj)
        )
        self.up_bias = experts.gate_up_proj_bias if experts.has_bias else None
        self.down_bias = experts.down_proj_bias if experts.has_bias else None
        self.gate = experts._apply_gate

    def forward(self, tokens: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """What the experts of each token give, weighted and summed.

        Args:
            tokens: [tokens, hidden].
            chosen: numbers of experts [tokens, k].
            weights: of each [tokens, k].

        Returns:
            [tokens, hidden].
        """
        k = chosen.shape[1]
        numbers, order = chosen.reshape(-1).sort()
        counts = (numbers.unsqueeze(1) == torch.arange(len(self.up))).sum(dim=0)
        inner = by_expert(tokens[order // k], counts, list(self.up))
        if self.up_bias is not None:
            inner = inner + self.up_bias[numbers]
        outer = by_expert(self.gate(inner), counts, list(self.down))
        if self.down_bias is not None:
            outer = outer + self.down_bias[numbers]
        back = torch.empty_like(order).scatter(0, order, torch.arange(order.shape[0]))
        return (outer[back].view(-1, k, tokens.shape[1]) * weights.unsqueeze(-1)).sum(dim=1).to(tokens.dtype)


@contextmanager
def experts_apart(model: nn.Module) -> Iterator[None]:
    """A model whose stacks of experts are taken apart; it is as it was afterwards, whatever happens."""
    stacked = {
        name: module
        for name, module in model.named_modules()
        if name.rpartition(".")[2] == EXPERTS and hasattr(module, "is_transposed")
    }
    try:
        for name, module in stacked.items():
            model.set_submodule(name, _Apart(module))
        yield
    finally:
        for name, module in stacked.items():
            model.set_submodule(name, module)


def translations() -> dict[Any, Any]:
    """What torch's exporter writes for a product that only we have; wants onnxscript."""
    op: Any = importlib.import_module("onnxscript.onnx_opset").opset18

    def split_by_expert(rows: Any, counts: Any, matrices: Any) -> Any:
        if len(matrices) == 1:
            return op.MatMul(rows, matrices[0])
        pieces = op.Split(rows, counts, axis=0, num_outputs=len(matrices))
        return op.Concat(*(op.MatMul(*pair) for pair in zip(pieces, matrices, strict=True)), axis=0)

    return {torch.ops.compresso.by_expert.default: split_by_expert}


def mend_splits(model: Any) -> None:
    """Take the number of outputs off pieces of given sizes, which has to be said while a graph is built, and which ONNX
    allows for equal ones alone.
    """
    for node in model.graph.all_nodes():
        if node.op_type == "Split" and len(node.inputs) > 1:
            node.attributes.pop("num_outputs", None)
