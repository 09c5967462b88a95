"""What lies beside the weights of a checkpoint: config, generation config, tokenizer, and whatever came with the model.

The rules are three. What this machine or this library's loading added (paths, flags, the name of a class that only
version 5 of transformers has) is not written. What the model's folder said and loading dropped is written again. What
nobody reads here, such as licences, notices and the files of other tokenizer libraries, is copied.
"""

import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from compresso.checkpoint.atomic import write_text
from compresso.checkpoint.folder import read_json
from compresso.checkpoint.links import is_own
from compresso.checkpoint.overwrite import is_legal
from compresso.formats.config_text import config_text

log = logging.getLogger(__name__)

_PROCESSORS = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
_VOCABULARY = (
    "*.model",
    "*.tiktoken",
    "tekken.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
)
"""Files that number tokens: they are of use only while the numbers are the model's."""
_LARGEST = 64_000_000  # bytes of a file that is copied
_OF_THE_MACHINE = ("use_cache", "attn_implementation", "_attn_implementation", "output_attentions")
"""Fields of a config that say how a model is run: written as the model's folder has them, not as loading set them."""
_OF_LOADING = ("is_local", "local_files_only", "backend", "name_or_path", "device_map", "auto_map", "trust_remote_code")
_OF_CALLS = ("max_length", "stride", "truncation_strategy", "pad_to_multiple_of", "pad_token_type_id")
"""Settings that tokenizer.json holds, and that loading spells out once more."""
_NEVER = (*_OF_LOADING, "chat_template", "cache_dir", "token", "use_auth_token", "processor_class")
_ONLY_IN_5 = {"TokenizersBackend": "PreTrainedTokenizerFast", "PythonBackend": "PreTrainedTokenizer"}
"""Tokenizer classes of transformers 5, and those of the versions before it that read the same files."""
_NUMBERS = ("_token_id", "_token_ids", "_tokens", "_ids", "_words")


def write_beside(
    folder: Path,
    config: PreTrainedConfig | Mapping[str, Any],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    source: Path | None,
) -> None:
    """Write everything but weights and what a format adds.

    Args:
        folder: of the new checkpoint.
        config: that it gets.
        model: live, for its generation config.
        tokenizer: None for a model without one.
        source: the folder that the model came from; None where nothing is known of one.
    """
    given = read_json(source / "config.json") if source is not None and (source / "config.json").is_file() else {}
    write_text(folder / "config.json", _config_text(config, given if source is not None else None))
    numbered = bool(given) and given.get("vocab_size") == getattr(model.config, "vocab_size", None)
    if getattr(model, "generation_config", None) is not None and not (folder / "generation_config.json").exists():
        write_text(folder / "generation_config.json", _generation_text(model, source, numbered))
    if tokenizer is not None:
        _write_tokenizer(folder, tokenizer, source if numbered else None)
    if source is not None:
        _copy(folder, source, (*_PROCESSORS, *(_VOCABULARY if numbered and tokenizer is not None else ())))
        if tokenizer is not None:
            _mend_special_tokens(folder, tokenizer)


def _config_text(config: PreTrainedConfig | Mapping[str, Any], given: Mapping[str, Any] | None) -> str:
    """config.json without what loading set, but for what the model's own says."""
    text: dict[str, Any] = json.loads(config_text(config))
    if given is not None:
        for key in _OF_THE_MACHINE:
            text.pop(key, None)
            if key in given:
                text[key] = given[key]
    return json.dumps(text, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def _generation_text(model: PreTrainedModel, source: Path | None, numbered: bool) -> str:
    """generation_config.json of a live model, with the fields of its folder's that this version does not know."""
    live: dict[str, Any] = json.loads(model.generation_config.to_json_string())  # pyright: ignore[reportOptionalMemberAccess]
    path = None if source is None else source / "generation_config.json"
    given = read_json(path) if path is not None and path.is_file() else {}
    for key, value in given.items():
        code = key in ("trust_remote_code", "custom_generate")
        if key not in live and not code and (numbered or not key.endswith(_NUMBERS)):
            live[key] = value
    return json.dumps(live, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def _write_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerBase, source: Path | None) -> None:
    """Save a tokenizer so that both generations of readers build it as it was built here.

    Args:
        folder: where to.
        tokenizer: live.
        source: its own folder, if the tokens still have the numbers they have there.
    """
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    described = None if source is None else source / "tokenizer_config.json"
    given = read_json(described) if described is not None and described.is_file() else {}
    write_text(path, json.dumps(_tokenizer_config(read_json(path), given), indent=2, ensure_ascii=False) + "\n")


def _tokenizer_config(saved: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """tokenizer_config.json.

    Args:
        saved: as transformers 5 writes it.
        given: as it was; empty where there is none, or it holds no longer.
    """
    kept = {key: value for key, value in given.items() if key not in _NEVER and not key.endswith("_file")}
    tokens = [key for key in kept if key.endswith("_token") and not key.startswith("add_")]
    for key in (*tokens, "extra_special_tokens", "additional_special_tokens"):
        kept.pop(key, None)  # those of the live tokenizer count
    dropped = (*_OF_LOADING, *(name for name in _OF_CALLS if name not in given))
    text = kept | {key: value for key, value in saved.items() if key not in dropped}
    named = given.get("tokenizer_class")
    if not isinstance(named, str) or named in _ONLY_IN_5:
        named = text.get("tokenizer_class")
    if named is not None:
        text["tokenizer_class"] = _ONLY_IN_5.get(named, named)
    extra = text.get("extra_special_tokens")
    if isinstance(extra, list):  # the older field of this name is a mapping, and fails on a list
        text["additional_special_tokens"] = text.pop("extra_special_tokens")
    if isinstance(named_tokens := text.get("model_specific_special_tokens"), dict):  # which is what it maps
        text["extra_special_tokens"] = named_tokens
    return dict(sorted(text.items()))


def _copy(folder: Path, source: Path, patterns: tuple[str, ...]) -> None:
    """Copy licences, notices and the files of these names that the checkpoint does not have yet; a link only if it
    stays in the model's repository. JSON loses an auto_map: it names code, and no code is carried over.
    """
    for path in sorted(_named(source, patterns)):
        target = folder / path.name
        if target.exists():
            continue
        if path.stat().st_size > _LARGEST:
            log.warning("%s is larger than %s MB and was not carried over", path.name, _LARGEST // 1_000_000)
        elif path.name in _PROCESSORS:
            fields = {key: value for key, value in read_json(path).items() if key != "auto_map"}
            write_text(target, json.dumps(fields, indent=2, ensure_ascii=False) + "\n")
        else:
            shutil.copyfile(path, target)


def _named(folder: Path, patterns: tuple[str, ...]) -> Iterator[Path]:
    """The plain files of a folder that are to be carried over."""
    for path in folder.iterdir():
        wanted = is_legal(path.name) or any(fnmatchcase(path.name, pattern) for pattern in patterns)
        if wanted and path.is_file():
            if is_own(path.resolve(), folder):
                yield path
            else:
                log.warning("%s leads out of the model's folder and was not carried over", path.name)


def _mend_special_tokens(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Let a carried special_tokens_map.json name the tokens of the live tokenizer, where a run changed one."""
    path = folder / "special_tokens_map.json"
    if not path.is_file():
        return
    given, live = read_json(path), tokenizer.special_tokens_map
    changed = {
        name: live.get(name)
        for name, token in given.items()
        if name.endswith("_token") and (token.get("content") if isinstance(token, dict) else token) != live.get(name)
    }
    if changed:
        kept = {name: token for name, token in (given | changed).items() if token is not None}
        write_text(path, json.dumps(kept, indent=2, ensure_ascii=False) + "\n")
