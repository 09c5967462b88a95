"""Writing linears that `svd` left with a low rank as products of two: smaller, and fewer multiplications.

No class of transformers has such linears, and no other engine's format either. So a run writes them multiplied out, as
a stock folder that every engine opens and that is no smaller; from it, this writes a folder with a modelling file of
ours (`native/modeling_compresso_lowrank.py`), which transformers opens after `import compresso`, or by itself where
that file may run.

A stage after `svd` may have changed weights: each is given the least rank that explains it within the rounding of its
dtype, and stays whole where a product would be no smaller.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from compresso.checkpoint.folder import read_json
from compresso.core.low_rank import factored_size, most_rank, rank_within, truncated
from compresso.errors import ExportError
from compresso.formats.own_class import how_to_load, name_of, own_config, save_own
from compresso.native import LOW_RANK_CLASSES, LOW_RANK_FILE, is_low_rank, is_sliced

_IN_LAYER = re.compile(r"(\D*\.)(\d+)(\..+)")


def factored_linears(folder: Path | None) -> tuple[str, ...]:
    """Full names of the linears that stage `svd` may have left with a low rank, by the records of a folder that
    compresso wrote.

    Records name them as they were then. Where layers have left since and the others have new numbers, it is those of
    these kinds in every layer there is: their weights say which of them have a low rank.

    Raises ExportError, with the cure, if there are none.
    """
    path = None if folder is None else folder / "records.json"
    records: dict[str, Any] = read_json(path) if path is not None and path.is_file() else {}
    stages: dict[str, Any] = records.get("stages", {})
    names = tuple(stages.get("svd", {}).get("ranks", ()))
    if not names:
        raise ExportError(
            f"svd is no stage of the run that wrote it ({', '.join(stages)}), and its records know nothing of what an"
            " earlier run did to its model; put svd and what follows it into one recipe"
            if stages
            else "svd left nothing in it with a low rank, so there is nothing to factor; run svd on it first"
        )
    since = list(stages.values())[list(stages).index("svd") + 1 :]
    layers = [kept["layers"].split("/") for facts in since if "layers" in (kept := facts.get("units_kept", {}))]
    if all(left == all_ for left, all_ in layers):
        return names
    placed = [match.groups() for match in map(_IN_LAYER.fullmatch, names) if match]
    kinds = dict.fromkeys((before, after) for before, _, after in placed)
    return tuple(f"{before}{i}{after}" for i in range(int(layers[-1][0])) for before, after in kinds)


def refuse_products(model_type: str, form: str) -> None:
    """Raise ExportError if a model of this type has linears that are products, or a sliced stream, which the form does
    not hold.
    """
    if is_sliced(model_type):
        raise ExportError(
            f"its stream is sliced, which {form} does not hold; export the folder that it was exported from"
        )
    if is_low_rank(model_type):
        raise ExportError(
            f"its linears are products of low rank, which {form} does not hold; export the folder that it was exported"
            " from, where they are multiplied out"
        )


@dataclass(frozen=True)
class Products:
    """A model's linears as products of two.

    Args:
        ranks: of those that are products, by full name.
        tensors: all of the model's, these replaced, by the names that are written.
        whole: how many numbers the linears in `ranks` had before.
    """

    ranks: Mapping[str, int]
    tensors: Mapping[str, Tensor]
    whole: int

    @property
    def numbers(self) -> int:
        """How many there are."""
        return sum(tensor.numel() for tensor in self.tensors.values())


def products_of(model: PreTrainedModel, names: tuple[str, ...]) -> Products:
    """Factor the linears of these names, where that is smaller.

    Args:
        model: live, of a stock class, in the dtype that is written.
        names: of linears of its layers.

    Raises:
        ExportError: its family has no class of ours, a name is of no linear, or no product is smaller.
    """
    kind = model.config.model_type
    if kind not in LOW_RANK_CLASSES:
        raise ExportError(
            f"low-rank is written for {', '.join(LOW_RANK_CLASSES)} of equal widths in all layers, not for model_type"
            f" '{kind}'. Keep the folder, which opens as it is."
        )
    tied = model.config.tie_word_embeddings
    tensors = {
        name: tensor.detach() for name, tensor in model.state_dict().items() if not (tied and name == "lm_head.weight")
    }
    ranks, whole = dict[str, int](), 0
    for name in names:
        linear = dict(model.named_modules()).get(name)
        if not isinstance(linear, nn.Linear):
            raise ExportError(f"{name} is no linear of this model; export the folder that svd's run wrote")
        weight = linear.weight.detach()
        rows, columns = weight.shape
        rank = rank_within(torch.linalg.svdvals(weight.double()), torch.finfo(weight.dtype).eps / 2)
        if rank > most_rank(rows, columns):
            continue
        found = truncated(weight, rank)
        del tensors[f"{name}.weight"]
        tensors[f"{name}.right.weight"], tensors[f"{name}.left.weight"] = (
            factor.to(weight.dtype) for factor in (found.right, found.left)
        )
        if linear.bias is not None:
            tensors[f"{name}.left.bias"] = tensors.pop(f"{name}.bias")
        assert factored_size(rows, columns, rank) < weight.numel()
        ranks[name] = rank
        whole += weight.numel()
    if not ranks:
        raise ExportError(
            "none of the linears that svd worked on has a low rank now: a later stage rounded, zeroed or tuned them."
            " Export the folder that svd alone left."
        )
    return Products(ranks, tensors, whole)


def save_low_rank(
    model: PreTrainedModel,
    names: tuple[str, ...],
    folder: Path | str,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    force: bool = False,
    check: Callable[[Path], None] | None = None,
    source: Path | None = None,
) -> str:
    """Write a checkpoint whose linears of low rank are products of two; `folder` is complete or untouched.

    Args:
        model: live, of a stock class, in the dtype that is written.
        names: of the linears that svd may have left with one.
        tokenizer: written beside it.
        force: replace a folder that is not empty.
        check: looks at the written folder before it takes its name; what it raises leaves nothing behind.
        source: the folder that the model came from; what it holds beside weights and config is carried over.

    Returns:
        The model type that it gets.

    Raises:
        ExportError: as `products_of`.
        CheckpointError: `folder` may not be written.
    """
    found = products_of(model, names)
    config_class, language_model = LOW_RANK_CLASSES[model.config.model_type]
    config = own_config(model, config_class, language_model, LOW_RANK_FILE, ranks=dict(found.ranks))
    dense = sum(parameter.numel() for parameter in model.parameters())
    save_own(
        folder,
        config,
        found.tensors,
        LOW_RANK_FILE,
        _card(found, dense, source),
        model,
        tokenizer=tokenizer,
        force=force,
        check=check,
        source=source,
    )
    return config_class.model_type


def _card(found: Products, dense: int, source: Path | None) -> str:
    """README.md: what the folder holds, what opens it, and where the rest is told."""
    own = sum(found.tensors[f"{one}.{part}.weight"].numel() for one in found.ranks for part in ("left", "right"))
    return f"""---
library_name: transformers
tags:
- compresso
---

# Low-rank weights{name_of(source)}

{len(found.ranks)} linears that compresso (`pip install compresso-llm`) left with a low rank, as products of two:
{own:,} numbers, and as many multiplications a token, in place of {found.whole:,}. All parameters: {found.numbers:,} in
place of {dense:,}. What it computes is what the folder that it was exported from computes, but for rounding. How that
was made and what it can do stands in its README.md, recipe.yaml and records.json.

{how_to_load(LOW_RANK_FILE)} llama.cpp, ONNX Runtime and vLLM have no linears of this form: give them the folder
that it was exported from.

## Limits

Fewer multiplications are not less time by themselves: two small products may take longer than one. Measure first.
The licence and terms of the original model apply.
"""
