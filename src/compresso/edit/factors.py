"""Linears of low rank as products of two while something learns, and multiplied out again: what is trained then keeps
the rank.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import nn
from transformers import PreTrainedModel

from compresso.core.low_rank import rank_within, truncated
from compresso.errors import RecipeError
from compresso.native.modeling_compresso_lowrank import Factored


def factor_(model: PreTrainedModel, ranks: Mapping[str, int]) -> None:
    """Put a product of two in the place of each linear that is named, in place.

    Args:
        model: of a stock class.
        ranks: by full name.

    Raises RecipeError: a linear is not there, or no product of this rank explains it.
    """
    modules, made = dict(model.named_modules()), dict[str, Factored]()
    for name, rank in ranks.items():
        linear = modules.get(name)
        if not isinstance(linear, nn.Linear) or rank > min(linear.weight.shape):
            raise RecipeError(
                f"{name}, which svd left with rank {rank}, is no such linear now; recover right behind svd"
            )
        weight = linear.weight.detach()
        values = torch.linalg.svdvals(weight.double())
        if (found := rank_within(values, torch.finfo(weight.dtype).eps / 2)) > rank:
            raise RecipeError(
                f"{name} has rank {found}, and svd left it with {rank}: a stage between them changed it; recover right"
                " behind svd, or train lora"
            )
        factors = truncated(weight, rank)
        product = Factored(linear, rank)
        with torch.no_grad():
            product.right.weight.copy_(factors.right)
            product.left.weight.copy_(factors.left)
            if linear.bias is not None:
                product.left.bias.copy_(linear.bias)
        made[name] = product.requires_grad_(False).train(linear.training)
    for name, product in made.items():
        _put(model, name, product)


def multiply_out_(model: PreTrainedModel, names: Iterable[str]) -> None:
    """Undo `factor_`: products become linears again, rounded once to their dtype."""
    for name in names:
        product = model.get_submodule(name)
        assert isinstance(product, Factored)
        right, left = product.right.weight.detach(), product.left.weight.detach()
        linear = nn.Linear(
            right.shape[1], left.shape[0], bias=product.left.bias is not None, device=left.device, dtype=left.dtype
        )
        with torch.no_grad():
            linear.weight.copy_(left.double() @ right.double())
            if product.left.bias is not None:
                linear.bias.copy_(product.left.bias)
        _put(model, name, linear.requires_grad_(False).train(product.training))


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    owner, _, own = name.rpartition(".")
    setattr(model.get_submodule(owner), own, module)
