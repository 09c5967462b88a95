"""Whether the tensors of a folder are those of the model that its config describes: one set of rules for all families.

transformers renames tensors while it reads them, so only its own reading knows what is missing or left over. It is
asked on the meta device, where no tensor is read: a model of 7e9 parameters takes a second. What it passes over in
silence is looked for here: codes of few bits under the name of a weight, and a head that the config ties but the file
does not.
"""

import copy
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import logging as transformers_logging

from compresso.checkpoint.header import TensorInfo
from compresso.checkpoint.reasons import reason_of
from compresso.errors import CheckpointError

log = logging.getLogger(__name__)

FLOATS = {"F64", "F32", "F16", "BF16"}
"""How safetensors calls the types in which weights are numbers, not codes."""
_PACKED = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx", "input_scale")
"""What compressed-tensors stores in place of, or beside, a weight."""
_ADAPTER = re.compile(r"(^|\.)(lora_|adapter|ia3_|hada_|oft_|modules_to_save)")
_CODED = re.compile(r"(scales?|scale_inv|qweight|qzeros|zero_point|zeros|absmax|quant_map|quant_state\S*|SCB|g_idx)$")
_EXPERT = re.compile(r"\.experts\.(\d+)\.")
HEADS = ("lm_head.weight", "embed_out.weight", "predictions.decoder.weight", "output_layer.weight")
"""How the names of stored heads end."""
_TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_CHUNK = 16_000_000  # bytes that are compared at once


def check_tensors(
    where: Path, config: PreTrainedConfig, auto: Any, model: PreTrainedModel, stored: Mapping[str, TensorInfo]
) -> None:
    """Refuse a folder whose tensors are not the model's.

    Args:
        where: the folder.
        config: in it.
        auto: the auto class that opens it.
        model: of that class and config, on the meta device.
        stored: its tensors.

    Raises:
        CheckpointError: listing tensors that are missing, unexpected, of the wrong shape or not plain numbers.
    """
    if is_packed(config):
        problems = _packed_problems(model, stored)
    else:
        problems = _loading_problems(where, config, auto, model, stored)
        problems["not plain floats"] = _coded(model, stored)
    if any(problems.values()):
        problem = "; ".join(f"{what}: {listed(names)}" for what, names in problems.items() if names)
        raise CheckpointError(f"{where} does not fit its config.json: {problem}. {_cure(problems, config)}")


def is_packed(config: PreTrainedConfig) -> bool:
    """Whether a config says that weights are stored in few bits."""
    return bool(getattr(config, "quantization_config", None))


def untied_as_stored(
    config: PreTrainedConfig, model: PreTrainedModel, folder: Path, stored: Mapping[str, TensorInfo]
) -> bool:
    """Whether a config ties head and embedding, while both are stored and differ.

    A reader that ties them all the same computes something else, and version 5 of transformers leaves them apart
    without saying so in the config.

    Args:
        config: of the folder.
        model: on the meta device.
        folder: with the tensors.
        stored: tensors by name.
    """
    if not getattr(config, "tie_word_embeddings", False):
        return False
    head, embedding = (_stored_name(model, part, stored) for part in (_head(model), _embedding(model)))
    if head is None or embedding is None or head == embedding:
        return False
    return not _equal(folder, stored[head], stored[embedding])


def listed(names: list[str]) -> str:
    """The first names, and how many more there are."""
    rest = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return ", ".join(name[:120] for name in names[:8]) + rest


def _loading_problems(
    where: Path, config: PreTrainedConfig, auto: Any, model: PreTrainedModel, stored: Mapping[str, TensorInfo]
) -> dict[str, list[str]]:
    """What transformers finds missing, left over or of another shape."""
    opener: Any = type(model)  # its signature says nothing of the second thing that it returns
    try:
        with _silent():
            _, info = opener.from_pretrained(
                None,
                config=copy.deepcopy(config),
                state_dict=_claimed(stored),
                device_map="meta",
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
    except Exception as error:  # names of any kind may meet any rule of renaming
        if any((apart := _pieces_problems(model, stored)).values()):
            return apart
        raise CheckpointError(
            f"{where} cannot be matched with its config.json: {reason_of(error)}. Fetch the model again."
        ) from error
    if info["mismatched_keys"] and _gaps(stored) and any((apart := _pieces_problems(model, stored)).values()):
        return apart
    unexpected = sorted(info["unexpected_keys"])
    if passed := [
        name for name in unexpected if _of_another_head(name, model, auto) and stored_as_numbers(name, stored)
    ]:
        log.warning("%s: left out, as a %s has no such part: %s", where.name, type(model).__name__, listed(passed))
    return {
        "missing": sorted(info["missing_keys"]),
        "unexpected": [name for name in unexpected if name not in passed],
        "wrong shape": [
            f"{name} {list(found)} instead of {list(wanted)}" for name, found, wanted in sorted(info["mismatched_keys"])
        ],
    }


def _gaps(stored: Mapping[str, TensorInfo]) -> bool:
    """Whether some linear of a mixture is stored of fewer experts than others: what is stacked then is only short."""
    experts: dict[str, set[str]] = {}
    for match in filter(None, map(_EXPERT.search, stored)):
        experts.setdefault(f"{match.string[: match.start()]} {match.string[match.end() :]}", set()).add(match[1])
    return len(set(map(frozenset, experts.values()))) > 1


def _pieces_problems(model: PreTrainedModel, stored: Mapping[str, TensorInfo]) -> dict[str, list[str]]:
    """Of experts that are stored apart and stacked in memory, pieces of which no stack can be made."""
    written: dict[str, Tensor] = revert_weight_conversion(model, model.state_dict())
    wanted = {name: list(one.shape) for name, one in written.items() if _EXPERT.search(name)}
    there = {name: list(one.shape) for name, one in stored.items() if _EXPERT.search(name)}
    return {
        "missing": sorted(wanted.keys() - there.keys()),
        "unexpected": sorted(there.keys() - wanted.keys()),
        "wrong shape": [
            f"{name} {there[name]} instead of {wanted[name]}"
            for name in sorted(wanted.keys() & there.keys())
            if there[name] != wanted[name]
        ],
    }


def _claimed(stored: Mapping[str, TensorInfo]) -> dict[str, Tensor]:
    """Tensors of the stored names, shapes and types on the meta device: no file is opened or mapped for them, which
    counts as memory where that is limited.
    """
    return {
        name: torch.empty(tuple(one.shape), dtype=_TYPES.get(one.dtype, torch.uint8), device="meta")
        for name, one in stored.items()
    }


def stored_as_numbers(name: str, stored: Mapping[str, TensorInfo]) -> bool:
    """Whether a tensor holds plain floats, under its stored name; one that was renamed counts as such."""
    return name not in stored or stored[name].dtype in FLOATS


def _of_another_head(name: str, model: PreTrainedModel, auto: Any) -> bool:
    """Whether a left-over tensor belongs to a part that this class of an encoder lacks as a whole, such as the
    next-sentence head of a BERT: published encoders have several heads, and nothing of them is computed.
    """
    if (hasattr(model, "generate") and model.can_generate()) or _ADAPTER.search(name) or _CODED.search(name):
        return False
    parts = name.removeprefix(f"{model.base_model_prefix}.").split(".")
    modules = dict(model.base_model.named_modules()) | dict(model.named_modules())
    there = max((depth for depth in range(len(parts)) if ".".join(parts[:depth]) in modules), default=0)
    owner = modules.get(".".join(parts[:there]))
    return (
        there <= 1
        and not isinstance(owner, nn.ModuleList)
        and not list(owner.parameters(recurse=False) if owner else ())
    )


def _coded(model: PreTrainedModel, stored: Mapping[str, TensorInfo]) -> list[str]:
    """Tensors that are no plain floats, but for buffers and what transformers leaves aside."""
    prefix = f"{model.base_model_prefix}."
    parameters = {name.removeprefix(prefix) for name, _ in model.named_parameters(remove_duplicate=False)}
    buffers = {name.removeprefix(prefix) for name, buffer in model.named_buffers() if not buffer.is_floating_point()}
    aside = [*(model._keys_to_ignore_on_load_unexpected or ()), r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$"]
    found: list[str] = []
    for name, info in stored.items():
        short = name.removeprefix(prefix)
        harmless = short in buffers or (short not in parameters and any(re.search(one, name) for one in aside))
        if info.dtype not in FLOATS and not harmless:
            found.append(f"{name} {info.dtype}")
    return found


def _packed_problems(model: PreTrainedModel, stored: Mapping[str, TensorInfo]) -> dict[str, list[str]]:
    """As for plain weights, where a weight may be stored as what compressed-tensors makes of it."""
    state = model.state_dict()
    if any(name.endswith(".weight_packed") and ".experts." in name for name in stored):
        state = revert_weight_conversion(model, state)  # experts are stacked in memory, and linears in a folder
    wanted = {name: tuple(tensor.shape) for name, tensor in state.items()}
    tied = set(model._tied_weights_keys or ()) if getattr(model.config, "tie_word_embeddings", False) else set[str]()
    packed = {
        name: f"{name.rpartition('.')[0]}.weight"
        for name in stored
        if name.rpartition(".")[2] in _PACKED and f"{name.rpartition('.')[0]}.weight" in wanted
    }
    return {
        "missing": sorted(wanted.keys() - stored.keys() - set(packed.values()) - tied),
        "unexpected": sorted(stored.keys() - wanted.keys() - packed.keys()),
        "wrong shape": [
            f"{name} {list(stored[name].shape)} instead of {list(shape)}"
            for name, shape in wanted.items()
            if name in stored and stored[name].shape != shape
        ],
    }


def _cure(problems: Mapping[str, list[str]], config: PreTrainedConfig) -> str:
    """What to do about tensors that do not fit."""
    names = [name for of_kind in problems.values() for name in of_kind]
    if any(_ADAPTER.search(name) for name in names):
        return "Merge the adapter into its base model first, and give that."
    if problems.get("not plain floats") or any(_CODED.search(name) for name in problems["unexpected"]):
        return "Weights stored as codes are not read: give the model before quantisation."
    if problems["missing"] == ["lm_head.weight"] and not getattr(config, "tie_word_embeddings", False):
        return "Fetch the model again; or, if its head is its embedding, write tie_word_embeddings: true in its config."
    return "Fetch the model again, or correct its config."


def _head(model: PreTrainedModel) -> nn.Module | None:
    """What turns hidden states into logits over the vocabulary; None for a model without."""
    try:
        return model.get_output_embeddings()
    except NotImplementedError:  # encoders without one raise it
        return None


def _embedding(model: PreTrainedModel) -> nn.Module | None:
    """What turns tokens into hidden states; None for a model without."""
    try:
        return model.get_input_embeddings()
    except NotImplementedError:
        return None


def _stored_name(model: PreTrainedModel, part: nn.Module | None, stored: Mapping[str, TensorInfo]) -> str | None:
    """The stored name of a module's weight, with or without the prefix of the base model; None if it is not there."""
    name = next((name for name, module in model.named_modules() if module is part), None)
    spelled = () if name is None else (f"{name}.weight", f"{name}.weight".removeprefix(f"{model.base_model_prefix}."))
    return next((one for one in spelled if one in stored), None)


def _equal(folder: Path, one: TensorInfo, other: TensorInfo) -> bool:
    """Whether two stored tensors hold the same bytes."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    with (folder / one.file).open("rb") as first, (folder / other.file).open("rb") as second:
        for file, info in ((first, one), (second, other)):
            start = 8 + int.from_bytes(file.read(8), "little")
            file.seek(start + info.begin)
        left = one.end - one.begin
        while left > 0:
            size = min(left, _CHUNK)
            if first.read(size) != second.read(size):
                return False
            left -= size
    return True


@contextmanager
def _silent() -> Iterator[None]:
    """Keep transformers' table of tensors and its bar off the terminal: what they say is said in our words."""
    verbosity, bar = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(transformers_logging.CRITICAL)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bar:
            transformers_logging.enable_progress_bar()
