"""What a model folder holds, found out without trusting it: no code is imported, no pickle opened, nothing outside it
read.
"""

from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, GenerationConfig, PreTrainedConfig

from compresso.checkpoint.bounds import check_numbers, unshared_heads
from compresso.checkpoint.header import TensorInfo, read_header
from compresso.checkpoint.least import check_mixture
from compresso.checkpoint.links import check_links
from compresso.checkpoint.lists import check_entries
from compresso.checkpoint.reasons import reason_of
from compresso.core import strict_json
from compresso.core.plain_values import shown
from compresso.errors import CheckpointError
from compresso.native import is_low_rank, is_sliced

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
_MAX_JSON_BYTES = {
    "config.json": 4_000_000,
    INDEX: 32_000_000,
    "tokenizer_config.json": 32_000_000,
    "records.json": 64_000_000,
}
_UNBOUNDED = ("time_step_limit",)
"""What Mamba's configs say to be at most Infinity."""
_CONVERT = "Convert it once where you trust it: AutoModelForCausalLM.from_pretrained(old).save_pretrained(new)."


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of bounded size.

    Raises:
        CheckpointError: naming the file and the place.
    """
    limit = _MAX_JSON_BYTES.get(path.name, _MAX_JSON_BYTES["config.json"])
    try:
        if not path.is_file():
            raise CheckpointError(f"{path} is no file; a file with a JSON object is wanted.")
        if (size := path.stat().st_size) > limit:
            raise CheckpointError(f"{path} has {size} bytes; at most {limit} are read. It is not what its name says.")
        value = strict_json.loads(path.read_bytes(), _UNBOUNDED)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}. Check the path.") from error
    except strict_json.Refused as error:
        raise CheckpointError(f"{path}: {error}. Correct it, or fetch or write the file again.") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON ({error}). Fetch or write the file again.") from error
    if not isinstance(value, dict):
        raise CheckpointError(
            f"{path} holds a {type(value).__name__}; a JSON object is wanted. Fetch or write the file again."
        )
    return value


def read_config(path: Path, packed: bool = False) -> PreTrainedConfig:
    """The config in a config.json, built by a class that transformers or compresso brings along.

    Args:
        path: the file.
        packed: whether weights may be stored in few bits, factored, or of a sliced stream.

    Raises:
        CheckpointError: it is malformed, needs code from the folder, is quantised, or points elsewhere for its weights.
    """
    data = read_json(path)
    model_type = data.get("model_type")
    if not isinstance(model_type, str):
        raise CheckpointError(f"{path} has no model_type. Give a folder that holds a Hugging Face model.")
    if model_type not in CONFIG_MAPPING:
        code = " and wants to run code of its own (auto_map), which is never run" if "auto_map" in data else ""
        raise CheckpointError(
            f"{path}: transformers does not know model_type '{model_type[:60]}'{code}. Convert the model to one it"
            " knows."
        )
    if data.get("quantization_config") and not packed:
        raise CheckpointError(
            f"{path}: the weights are quantised, which cannot be pruned or exported again. Give the model before"
            " quantisation, such as the folder that it was exported from."
        )
    if is_low_rank(model_type) and not packed:
        raise CheckpointError(
            f"{path}: its linears are products of low rank, which only transformers opens. Give the folder that it was"
            " exported from, where they are multiplied out."
        )
    if is_sliced(model_type) and not packed:
        raise CheckpointError(
            f"{path}: its stream is sliced, which only transformers opens. Give the folder that it was exported from,"
            " where a forward patch cuts it."
        )
    if "transformers_weights" in data:
        raise CheckpointError(f"{path}: transformers_weights names another weight file. Give a folder with {SINGLE}.")
    check_numbers(path, data)
    cls = CONFIG_MAPPING[model_type]
    if cls.__module__.startswith("transformers."):
        data.pop("auto_map", None)  # of code that is not run; what is written from this config must not name it either
    unshared = unshared_heads(data)
    try:
        config = cls.from_dict(data)
    except Exception as error:  # a config class may fail on malformed values in any way
        besides = f" Besides, {unshared}." if unshared else ""
        raise CheckpointError(
            f"{path} is not a valid {model_type} config: {reason_of(error).rstrip('.')}.{besides} Fetch or write the"
            " file again."
        ) from error
    if unshared:
        raise CheckpointError(f"{path}: {unshared}. Check the config.")
    check_mixture(path, config, data)
    check_entries(path, config)
    return config


def check_folder(folder: Path) -> None:
    """Raise CheckpointError if the folder is a LoRA adapter, lacks config.json, or holds links that lead out of it."""
    check_links(folder)
    if (folder / "adapter_config.json").exists():
        raise CheckpointError(
            f"{folder} holds a LoRA adapter (adapter_config.json). Merge it into its base model first."
        )
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} has no config.json. Give a folder that holds a Hugging Face model.")


def check_generation_config(folder: Path) -> None:
    """Raise CheckpointError if the folder's generation_config.json is none: transformers reads it with the weights."""
    path = folder / "generation_config.json"
    if not path.is_file():
        return
    data = read_json(path)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = data.get(name)
        if value is not None and any(type(one) is not int for one in (value if isinstance(value, list) else [value])):
            raise CheckpointError(
                f"{path}: {name} is {shown(value, 60)}; a token's number is wanted. Correct or delete the file."
            )
    try:
        GenerationConfig.from_dict(data)
    except Exception as error:  # it may fail on malformed values in any way
        raise CheckpointError(
            f"{path} is no valid generation config: {reason_of(error).rstrip('.')}. Correct or delete the file."
        ) from error


def stored_names(folder: Path) -> tuple[str, ...]:
    """Names of the tensors beside a config, where a header or an index can be read; none otherwise, as a config alone
    is enough to count.
    """
    try:
        if (folder / SINGLE).is_file():
            return tuple(read_header(folder / SINGLE))
        listed = read_json(folder / INDEX).get("weight_map") if (folder / INDEX).is_file() else None
    except CheckpointError:
        return ()
    return tuple(listed) if isinstance(listed, dict) else ()


def lie_beside(folder: Path) -> bool:
    """Whether weights lie beside a config, whole or damaged: a config alone is enough to count."""
    return (folder / SINGLE).is_file() or (
        (folder / INDEX).is_file() and any(path.suffix == ".safetensors" for path in folder.iterdir())
    )


def stored_tensors(folder: Path) -> dict[str, TensorInfo]:
    """All tensors in the files that transformers would load, from their checked headers.

    Raises:
        CheckpointError: weights are absent, pickled, or if the index names files outside the folder, missing, or not as
            described.
    """
    if (folder / SINGLE).is_file():
        return read_header(folder / SINGLE)
    if not (folder / INDEX).is_file():
        pickles = sorted(path.name for path in folder.iterdir() if path.name.endswith(_PICKLES))
        if pickles:
            raise CheckpointError(
                f"{folder} holds pickled weights only ({pickles[0]}), and reading a pickle can run any code. {_CONVERT}"
            )
        if packed := sorted(path.name for path in folder.iterdir() if path.name.endswith(".gguf")):
            raise CheckpointError(f"{folder} has GGUF files and no safetensors. Give one of them: {folder / packed[0]}")
        if (folder / "model.onnx").is_file():
            raise CheckpointError(f"{folder} is an ONNX export. Give the folder that it was made from.")
        raise CheckpointError(f"{folder} has neither {SINGLE} nor {INDEX}. Give a folder with safetensors weights.")
    index = folder / INDEX
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise CheckpointError(f"{index} has no weight_map from tensor to file. Fetch or write the file again.")
    tensors: dict[str, TensorInfo] = {}
    for shard in sorted(set(weight_map.values())):
        if not shard.endswith(".safetensors") or shard.startswith(".") or any(mark in shard for mark in "/\\:\0"):
            raise CheckpointError(f"{index} names '{shard[:80]}'; only safetensors files in the same folder are read.")
        if not (folder / shard).is_file():
            raise CheckpointError(f"{index} names {shard}, which is missing. Fetch the rest of the model.")
        header = read_header(folder / shard)
        if twice := sorted(header.keys() & tensors.keys()):
            raise CheckpointError(
                f"{folder / shard}: '{twice[0]}' is in {tensors[twice[0]].file} too. Fetch or write the model again."
            )
        tensors |= header
    if absent := sorted(
        name for name, shard in weight_map.items() if name not in tensors or tensors[name].file != shard
    ):
        raise CheckpointError(
            f"{index} says that '{absent[0][:120]}' is in {weight_map[absent[0]]}; it is not. Fetch the model again."
        )
    return tensors
