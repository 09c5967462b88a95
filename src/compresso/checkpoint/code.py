"""The gate for code: what in a model folder transformers would import or run, refused before anything opens the folder.

Every way into a folder goes through `refuse_code`, also that of a fresh process; the processes that pass
trust_remote_code=True, and those of vLLM, go through `trusted` as well. What transformers 5.23 would import or run, by
the file that makes it do so:

    custom_generate/generate.py   replaces `generate`, without a field that names it (generation/utils.py,
                                  load_custom_generate)
    custom_generate               a folder or repository whose generate.py takes over; in generation_config.json or
                                  config.json
    auto_map                      module.Class or owner/repo--module.Class for a config, a model, a tokenizer or a
                                  processor; in the files
                                  of any of them, and in configs inside configs
    custom_pipelines              module.Class for `pipeline`; in config.json
    configuration_files           another config in place of config.json, which nobody would have looked at
    gguf_file                     a file in place of the tokenizer's, at any path
    fast_tokenizer_files          the same, by version; names without a folder are fine
    tokenizer_class               any public name of transformers, also one that is no tokenizer and opens further
                                  folders
    attn_implementation           owner/repo[@revision][:function], a kernel from the hub; also with `_` before it, or
                                  one a sub-config
    experts_implementation        the same; some of transformers' own names fetch kernels, too
    kernel_config, use_kernels    layers replaced by kernels from the hub or from a local folder
    quantization_config           quant_method chooses a package to import, and some fetch kernels; compressed-tensors
                                  is data alone
    auto_mapping                  peft imports its parent_library; a folder with adapter_config.json is refused whole,
                                  by `check_folder`

An auto_map at the top of a file, as many published folders have it, is not followed without trust: where transformers
has a class of its own for the model_type, that one is opened, and refused otherwise. With trust it would be followed.

Python files that no field names are not imported, and may lie there. Nor does trust reach further than we ask:
`generate` is never allowed to trust, so decoding modes that moved to the hub are not loaded; pickles are refused beside
this (`folder.py`), chat templates run in a sandbox. The files that may run are the modelling files that
compresso writes, byte for byte, with no link that leads elsewhere.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import transformers
from transformers import CONFIG_MAPPING, PreTrainedTokenizerBase

from compresso.checkpoint.folder import read_json
from compresso.checkpoint.links import is_own
from compresso.errors import CheckpointError, quoted
from compresso.native import (
    CLASSES,
    LOW_RANK_CLASSES,
    LOW_RANK_FILE,
    MODELING_FILE,
    MOE_CLASSES,
    MOE_FILE,
    PATCHED_CLASS,
    PATCHED_FILE,
    PYRAMID_CLASSES,
    PYRAMID_FILE,
    SEGFORMER_CLASSES,
    SEGFORMER_FILE,
    SLICED_CLASSES,
    SLICED_FILE,
)

_CONFIGS = (
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "audio_tokenizer_config.json",
)
_NOT_FOLLOWED = frozenset(_CONFIGS) - {"config.json", "generation_config.json"}
"""Of tokenizers and processors: with trust_remote_code=False, transformers builds a class of its own, or raises."""
_EXPERTS = ("eager", "batched_mm", "grouped_mm")
_NEVER = "no code of a model folder is run"


@dataclass(frozen=True, slots=True)
class Shipped:
    """A Python file that compresso brings along and writes beside weights.

    Args:
        file: the original.
        classes: names in it that an auto_map may point to.
        needed: whether the weights beside it open with it alone; else engines open them without it.
    """

    file: Path
    classes: frozenset[str]
    needed: bool = True

    def named_by(self, auto_map: object) -> bool:
        """Whether an auto_map points to these classes and nothing else."""
        known = {f"{self.file.stem}.{name}" for name in self.classes}
        return isinstance(auto_map, dict) and all(isinstance(one, str) and one in known for one in auto_map.values())


NATIVE = (
    *(
        Shipped(file, frozenset(cls.__name__ for classes in families.values() for cls in classes))
        for file, families in (
            (MODELING_FILE, CLASSES),
            (MOE_FILE, MOE_CLASSES),
            (LOW_RANK_FILE, LOW_RANK_CLASSES),
            (SLICED_FILE, SLICED_CLASSES),
            (PYRAMID_FILE, PYRAMID_CLASSES),
            (SEGFORMER_FILE, SEGFORMER_CLASSES),
        )
    ),
    Shipped(PATCHED_FILE, frozenset({PATCHED_CLASS.__name__}), needed=False),
)
"""The classes per layer, those of low rank, of a sliced stream and of a pyramid, which `import compresso` registers, so
that a folder's copy of a file is not read unless it is trusted; and what puts forward patches on a stock class.
"""


def refuse_code(folder: Path, shipped: Sequence[Shipped] = NATIVE) -> None:
    """Let a folder pass if opening it without trust_remote_code runs none of its code and none that it names.

    Args:
        folder: a model folder; links in it were resolved by `check_folder`.
        shipped: what an auto_map may name, one of them.

    Raises:
        CheckpointError: naming file and field, with the cure.
    """
    _refuse_code(folder, shipped, trust=False)


def _refuse_code(folder: Path, shipped: Sequence[Shipped], trust: bool) -> None:
    """`refuse_code`, for an opening with or without trust_remote_code."""
    custom = folder / "custom_generate"
    if custom.exists() or custom.is_symlink():
        raise CheckpointError(
            f"{custom} holds code that replaces `generate`, and {_NEVER}. Remove it; the weights open without it."
        )
    for name in _CONFIGS:
        if (folder / name).is_file():
            refuse_fields(folder / name, read_json(folder / name), shipped, trust)


def refuse_fields(
    path: Path, data: dict[str, object], shipped: Sequence[Shipped] = NATIVE, trust: bool = False
) -> None:
    """Raise CheckpointError if a field of a config, however deep, makes transformers import or run something.

    Args:
        path: the file that was read.
        data: what it holds.
        shipped: what an auto_map of a config.json may name.
        trust: whether the folder is opened with trust_remote_code=True, so that any other auto_map would be followed.
    """
    for where, key, value in _fields(data):
        if where == "auto_map" and path.name == "config.json" and any(one.named_by(value) for one in shipped):
            continue
        if where == "auto_map" and not trust and _not_followed(path, data):
            continue
        if key in _RULES and value and (why := _RULES[key](value)):
            raise CheckpointError(f"{path}: {where} {why}")


def _not_followed(path: Path, data: dict[str, object]) -> bool:
    """Whether transformers, opening without trust, passes over the auto_map of a file."""
    if path.name in _NOT_FOLLOWED:
        return True
    mapped, model_type = data["auto_map"], data.get("model_type")
    # a value of another kind is looked into before trust is asked about, and raises whatever it raises
    usual = isinstance(mapped, dict) and all(isinstance(one, str | list) for one in mapped.values())
    return usual and isinstance(model_type, str) and model_type in CONFIG_MAPPING


def names_own_class(folder: Path, shipped: Sequence[Shipped] = NATIVE) -> bool:
    """Whether a folder's config names a class of ours without which its weights do not open; nothing is run or read of
    that file.
    """
    auto_map = read_json(folder / "config.json").get("auto_map")
    return bool(auto_map) and any(one.needed and one.named_by(auto_map) for one in shipped)


def trusted(folder: Path, shipped: Sequence[Shipped] = NATIVE) -> bool:
    """Whether a folder names code of ours that may and must run: False too if its weights open without it.

    Raises:
        CheckpointError: it names other code, in an auto_map too, or if the file beside it is not, byte for byte, the
            one that this version writes.
    """
    _refuse_code(folder, shipped, trust=True)
    config = folder / "config.json"
    auto_map = read_json(config).get("auto_map") if config.is_file() else None
    if not auto_map:
        return False
    named = next(one for one in shipped if one.named_by(auto_map))
    beside = folder / named.file.name
    if not beside.is_file() or not is_own(beside.resolve(), folder) or beside.read_bytes() != named.file.read_bytes():
        raise CheckpointError(
            f"{beside} is not the file that this version of compresso writes, and is not run. Open the folder after"
            " `import compresso`, which does not read the file, or write it again with this version."
        )
    return named.needed


def _fields(data: dict[str, object]) -> Iterator[tuple[str, str, object]]:
    """Every field of a JSON object as (dotted place, name, value), without recursion, as files choose how deep they
    are.
    """
    waiting: list[tuple[str, object]] = [("", data)]
    while waiting:
        place, value = waiting.pop()
        inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for key, one in inside:
            where = f"{place}.{key}" if place else str(key)
            if isinstance(value, dict):
                yield where[:120], str(key), one
            if isinstance(one, dict | list):
                waiting.append((where, one))


def _words(value: object) -> list[str]:
    """A setting's words: itself, or one for each sub-config."""
    return [one for one in (value.values() if isinstance(value, dict) else [value]) if isinstance(one, str)]


def _names_code(value: object) -> str:
    inside = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else [value]
    first = str(inside[0])[:60] if inside else str(value)[:60]
    return (
        f"names code to run ({first}), and {_NEVER}. Remove the field if transformers has a class for this; convert the"
        " model otherwise."
    )


def _elsewhere(value: object) -> str:
    return f"names other files to read ({str(value)[:60]}). Remove the field; the folder's own are read."


def _files_outside(value: object) -> str:
    outside = [one for one in (value if isinstance(value, list) else [value]) if not _is_name(one)]
    return (
        f"names a file that may lie outside the model folder ({str(outside[0])[:60]}). Remove the field."
        if outside
        else ""
    )


def _is_name(value: object) -> bool:
    """Whether a value is the name of a file, and no path."""
    return isinstance(value, str) and not value.startswith(".") and not any(mark in value for mark in "/\\:\0")


def _attention(value: object) -> str:
    hub = [word for word in _words(value) if "/" in word]
    return (
        f"names a kernel of the hub ({hub[0][:60]}), whose code would run. Remove the field, or write sdpa or eager."
        if hub
        else ""
    )


def _experts(value: object) -> str:
    other = [word for word in _words(value) if word not in _EXPERTS]
    return (
        f"is {other[0][:60]}, which may run code from the hub. Remove the field, or write one of {', '.join(_EXPERTS)}."
        if other
        else ""
    )


def _kernels(value: object) -> str:
    return f"is {str(value)[:60]}, and kernels of a hub or a folder are code. Remove the field."


def _quantised(value: object) -> str:
    method = value.get("quant_method") if isinstance(value, dict) else value
    if method == "compressed-tensors":
        return ""
    return (
        f"says that the weights are quantised by {str(method)[:60]}, which imports code to read them. Give the model"
        " before quantisation."
    )


def _tokenizer(value: object) -> str:
    if not isinstance(value, str):
        return ""
    try:
        named = getattr(transformers, value, None)
    except Exception as error:  # transformers imports what a name stands for, which may fail in any way
        return f"is {value[:60]}, which transformers cannot import ({quoted(error, 120)}). Name a tokenizer class."
    absent = getattr(named, "__module__", "").startswith(
        "transformers.utils.dummy"
    )  # stands for a class whose package is not installed
    if named is None or absent or (isinstance(named, type) and issubclass(named, PreTrainedTokenizerBase)):
        return ""
    return f"is {value[:60]}, which is no tokenizer. Remove the field, or write TokenizersBackend."


_RULES: dict[str, Callable[[object], str]] = {
    "auto_map": _names_code,
    "auto_mapping": _names_code,
    "custom_generate": _names_code,
    "custom_pipelines": _names_code,
    "configuration_files": _elsewhere,
    "gguf_file": _elsewhere,
    "fast_tokenizer_files": _files_outside,
    "tokenizer_class": _tokenizer,
    "attn_implementation": _attention,
    "_attn_implementation": _attention,
    "_attn_implementation_internal": _attention,
    "experts_implementation": _experts,
    "_experts_implementation": _experts,
    "_experts_implementation_internal": _experts,
    "kernel_config": _kernels,
    "use_kernels": _kernels,
    "quantization_config": _quantised,
}
"""What is wrong with the value of a field, and the cure; empty if nothing is."""
