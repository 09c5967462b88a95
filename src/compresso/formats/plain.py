"""Models that their own class and config hold with the same widths in every layer: families without a per-layer form of
ours, and mixtures of experts, some of which have one for all else (`formats/native_moe.py`).
"""

import copy
from collections.abc import Sequence

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig, PreTrainedModel

from compresso.arch.base import LayerShape
from compresso.checkpoint.kinds import of_pictures
from compresso.checkpoint.reasons import reason_of
from compresso.errors import ExportError
from compresso.native import has_unequal_form, segformer_auto_map, staged_family_of

_FFN_WIDTHS = ("intermediate_size", "ffn_dim", "n_inner", "hidden_dim")
"""What families call the width of an FFN in their configs."""
_WIDTHS = {"query_heads": "query heads", "kv_heads": "key/value heads", "channels": "channels"}
_GROUPED = 8
"""Multiple of a 16-bit row's entries that transformers multiplies stacked experts by."""


def check_plain(model: PreTrainedModel, shapes: Sequence[LayerShape], layout: str) -> None:
    """Raise ExportError, saying what would do, if a layout other than uniform is asked for or the model's own config
    cannot hold it, or it is one whose layers differ already.
    """
    kind = model.config.model_type
    check_written(kind, layout)
    obstacle = staged_obstacle(model) if staged_family_of(kind) else plain_obstacle(model, shapes)
    if obstacle is not None:
        others = ". Use layout native" if has_unequal_form(kind) else ", and no other layout is written for it"
        raise ExportError(f"layout uniform cannot hold this {kind}: {obstacle}{others}.")


def check_written(model_type: str, layout: str) -> None:
    """Raise ExportError for a layout that such families have not."""
    if layout == "native" and has_unequal_form(model_type):
        return
    if layout not in ("auto", "uniform"):
        or_native = ", or native" if has_unequal_form(model_type) else ""
        raise ExportError(
            f"layout {layout} is not written for model_type '{model_type}'. Use uniform, with the same widths in every"
            f" layer{or_native}."
        )


def staged_obstacle(model: PreTrainedModel) -> str | None:
    """Why the stock class of a model of stages, built from its config, is not this model; None if it is."""
    if segformer_auto_map(model.config.model_type):
        return "its layers differ already"
    return plain_obstacle(model, ())


def plain_obstacle(model: PreTrainedModel, shapes: Sequence[LayerShape]) -> str | None:
    """Why the model's own class, built from its config, is not this model, and what to keep; None if it is."""
    first: dict[bool, int] = {}
    for index, shape in enumerate(shapes):
        alike = first.setdefault(shape.experts > 0, index)  # a layer of experts has other widths than one without
        for field, words in (*_WIDTHS.items(), ("experts", "experts")):
            mine, wanted = getattr(shape, field), getattr(shapes[alike], field)
            if mine == 0 and field in _WIDTHS:
                return f"layers.{index} has no {words}; keep some in every layer, or drop whole layers"
            if mine != wanted:
                return f"layers.{index} has {mine} {words}, layers.{alike} has {wanted}; keep as many in every layer"
    if (odd := ungrouped(model, shapes)) is not None:
        return odd
    cure = _cure(model.config)
    try:
        model.config.validate()
        with torch.device("meta"):
            reader = type(model)._from_config(copy.deepcopy(model.config))
    except (ValueError, StrictDataclassError) as error:
        return (
            f"its config takes no such shape ({reason_of(error)[:200].rstrip('.')}); keep all heads and hidden"
            " dimensions and prune FFN channels, such as by kinds: [channel]"
        )
    have, expected = ({name: tuple(t.shape) for name, t in one.state_dict().items()} for one in (model, reader))
    odd = sorted(name for name in expected.keys() | have.keys() if expected.get(name) != have.get(name))
    if odd:
        return f"{odd[0]} is {have.get(odd[0], 'absent')}, its class wants {expected.get(odd[0], 'none')}{cure}"
    return None


def ungrouped(model: PreTrainedModel, shapes: Sequence[LayerShape]) -> str | None:
    """Why transformers would not multiply a model's stacked experts; None if it would, or it has none."""
    if not any(shape.experts for shape in shapes):
        return None
    hidden = model.config.hidden_size
    for index, shape in enumerate(shapes):
        for width, words in ((shape.channels, "channels"), (hidden, "hidden dimensions")):
            if shape.experts and width % _GROUPED:
                return (
                    f"the experts of layers.{index} have {width} {words}, and transformers multiplies stacked experts"
                    f" whose widths are multiples of {_GROUPED}; keep such a number, as by multiple_of"
                )
    return None


def _cure(config: PreTrainedConfig) -> str:
    """What to do instead, for what a config has no field for."""
    if staged_family_of(config.model_type):
        return ""  # what holds it is said behind this
    if of_pictures(config) and not any(hasattr(config, field) for field in _FFN_WIDTHS):
        return (
            "; its config has one ratio for the channels of all its stages, so keep the same share in each, such as by"
            " the recipe segmenter"
        )
    if not any(hasattr(config, field) for field in _FFN_WIDTHS):
        return (
            "; its config has no field for the width of heads or of an FFN, so drop whole layers, such as by the recipe"
            " shortgpt, or zero and round weights"
        )
    if not hasattr(config, "head_dim"):
        return "; its config has no head_dim, so keep all heads and prune FFN channels, such as by kinds: [channel]"
    return ""
