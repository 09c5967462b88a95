"""Which layouts could hold the shapes that a dry run ends with."""

from collections.abc import Sequence

from transformers import PreTrainedModel

from compresso.arch.base import Arch
from compresso.errors import ExportError
from compresso.formats.layout import stock_obstacle, uniform_obstacle, widest
from compresso.formats.native_moe import mixture_config
from compresso.formats.plain import check_plain, plain_obstacle, staged_obstacle
from compresso.formats.shrunk import describe
from compresso.native import family_of, mixture_family_of, staged_family_of


def layouts(model_type: str, model: PreTrainedModel, arch: Arch, fixed: Sequence[str]) -> dict[str, str | None]:
    """Layout -> why it could not hold a model's shapes, or None if it can.

    Args:
        model_type: of the checkpoint that was given.
        model: on the meta device, of the shapes that are left.
        arch: describes it.
        fixed: stages that took heads or hidden dimensions and have no knob to leave them, for the cure.

    Raises:
        ExportError: no layout holds them.
    """
    if mixture_family_of(model_type) is not None:
        found = {"uniform": plain_obstacle(model, arch.shapes(model)), "native": None}
        if found["uniform"] is not None:
            mixture_config(model, arch.shapes(model))  # says what that layout would not take either
        return found
    if staged_family_of(model_type) is not None:
        return {"uniform": staged_obstacle(model), "native": None}
    if family_of(model_type) is None:
        try:
            check_plain(model, arch.shapes(model), "uniform")
        except ExportError as error:
            if not fixed:
                raise
            raise ExportError(
                f"{error} Stage '{fixed[0]}' has no kinds to leave out: take one that has, such as gate_taylor, in its"
                " place"
            ) from error
        return {"uniform": None}
    shrunk = describe(model, arch.shapes(model))
    return {"uniform": uniform_obstacle(shrunk), "padded": stock_obstacle(shrunk, widest(shrunk)), "native": None}
