"""Rounding a trained model's weights and activations, without data and without training: for models that no recipe
runs on, such as ViT.

The quantisers, and what they are put on, are those of the stage `qat`, whose `steps: 0` does the same in a run: each
row of a linear's weight has a scale, and so has what it reads for each token (of a ViT, each patch of the image), taken
anew at every call. Embeddings, the projection of image patches, norms and the head keep their numbers, and so do
products of queries and keys.

Files hold rounded weights as full numbers. Activations are rounded by a forward patch, which `save_checkpoint` writes
and `compresso.load` applies; no engine here has it for a ViT, so it is simulated.
"""

import torch
from transformers import PreTrainedModel

from compresso.arch.base import arch_for
from compresso.core.quantisers import Quantiser, Style
from compresso.edit.patch import Patch
from compresso.edit.patches import patch_
from compresso.edit.precision import cast_
from compresso.edit.quantise_inputs import Asymmetric, inputs_of
from compresso.edit.quantised import QuantisedModel
from compresso.sweep.targets import Where, chosen, names_of

EVERYWHERE = Where()
"""All linears of all layers."""


def quantise_(
    model: PreTrainedModel,
    weight_bits: int = 8,
    input_bits: int = 8,
    *,
    style: Style = Style.TEXTBOOK,
    weight_symmetric: bool = True,
    asymmetric: Asymmetric = "activation",
    where: Where = EVERYWHERE,
) -> tuple[Patch, ...]:
    """Round a model in place, weights first.

    Args:
        model: of an architecture that is described; its dtype stays.
        weight_bits: 1 to 8, or 16 for none.
        input_bits: of what the linears read, 3 to 8, or 16 for none.
        style: whose grids; see `compresso.core.quantisers`.
        weight_symmetric: whether weights have a grid around 0.
        asymmetric: which inputs have a grid from their least to their greatest.
        where: layers, modules and exceptions.

    Returns:
        The forward patches that the model has from now on, for `save_checkpoint`; none at 16 bits.

    Raises:
        ValueError: other bits.
        ArchError, RecipeError: an architecture that nobody described; a pattern that matches nothing.

    Example:
        patches = quantise_(vit, weight_bits=8, input_bits=8)
        save_checkpoint(vit, arch_for(vit.config).shapes(vit), "vit-w8a8", patches=patches)
        again = compresso.load("vit-w8a8").model
    """
    weights = Quantiser(weight_bits, weight_symmetric, style)
    arch, stored = arch_for(model.config), model.dtype
    linears = names_of(chosen(model, arch, where))
    inputs = inputs_of(input_bits, style, asymmetric, linears, arch.axes(model))
    QuantisedModel(cast_(model, torch.float32), linears, weights, inputs).fold_()
    cast_(model, stored)
    patches = (inputs.patch(),) if inputs.linears else ()
    patch_(model, patches)
    return patches
