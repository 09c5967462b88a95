"""From a hub name to a local folder: one short question to the hub, then a download; the local cache at once where
there is no network.

The hub client retries for half a minute when the network is away. Here a single request with a short timeout decides:
answered, the named revision is fetched; not answered, or HF_HUB_OFFLINE set, the newest cached revision is used, or the
error says what to do.
"""

import logging
import re
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError

from compresso.checkpoint.links import check_links
from compresso.checkpoint.storage import storage_errors
from compresso.errors import CheckpointError, CompressoError

_FILE = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)/([\w.-]+\.gguf)")
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_SMALL_FILES = ["*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken"]
_SECONDS = 10.0
_log = logging.getLogger(__name__)


def is_hub_name(name: str) -> bool:
    """Whether this could be `name` or `owner/name` on the hub; what ends like a file is not taken for one."""
    return (
        _NAME.fullmatch(name) is not None
        and ".." not in name
        and not name.endswith((".json", ".safetensors", ".yaml", ".gguf"))
    )


def is_hub_file(name: str) -> bool:
    """Whether this could be `owner/name/file.gguf` on the hub."""
    return _FILE.fullmatch(name) is not None and ".." not in name


def fetch_file(name: str) -> tuple[Path, str]:
    """A GGUF file of a hub model, `owner/name/file.gguf`, and its revision.

    Raises:
        CheckpointError: the hub does not know it, or is out of reach with nothing in the cache.
        ResourceError: the disk is full.
    """
    match = _FILE.fullmatch(name)
    assert match is not None, "callers ask is_hub_file first"
    owner, file = match.groups()
    folder, revision = fetch(owner, file=file)
    if not (folder / file).is_file():
        raise CheckpointError(f"{file} of hub model {owner} is not in the hub cache. Fetch it while online.")
    check_links(folder)
    return folder / file, revision


def fetch(name: str, weights: bool = True, file: str | None = None) -> tuple[Path, str]:
    """Folder and revision of a hub model: safetensors (if `weights`), configs and tokenizer files, never code or
    pickles. Of a model that has GGUF files alone, the one there is.

    Args:
        name: on the hub.
        weights: whether they are fetched.
        file: a GGUF file that is fetched instead of all others.

    Raises:
        CheckpointError: the hub does not know it, offers pickled weights only, or is out of reach with nothing in the
            cache.
        ResourceError: the disk is full.
    """
    patterns = [file] if file else [*_SMALL_FILES, *(["*.safetensors"] if weights else [])]
    if constants.HF_HUB_OFFLINE:
        return _cached(name, patterns, "HF_HUB_OFFLINE is set")
    try:
        info = HfApi(endpoint=constants.ENDPOINT).model_info(name, timeout=_SECONDS)
        files = [one.rfilename for one in info.siblings or ()]
        patterns = _wanted(name, files, patterns, weights, file)
        with storage_errors(Path(constants.HF_HUB_CACHE)):
            folder = snapshot_download(name, revision=info.sha, allow_patterns=patterns, endpoint=constants.ENDPOINT)
        return Path(folder), info.sha or ""
    except CompressoError:
        raise
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f"model '{name}' is neither a local folder nor a hub model that you may read. Check the spelling, or `hf"
            " auth login`."
        ) from error
    except Exception as error:  # the client's network errors have no common base that is part of its interface
        why = f"the hub did not answer ({type(error).__name__})"
        _log.warning("%s; looking for a cached copy of %s", why, name)
        return _cached(name, patterns, why, error)


def _wanted(name: str, files: list[str], patterns: list[str], weights: bool, file: str | None) -> list[str]:
    """Patterns of what is fetched, by what the hub has. Raises CheckpointError if that is no weights that are read."""
    if file is not None:
        if file not in files:
            raise CheckpointError(f"hub model {name} has no {file} (files: {', '.join(files[:6])}). Name one it has.")
        return [file]
    if any(fnmatch(one, "*.safetensors") for one in files):
        return patterns
    packed = [one for one in files if one.endswith(".gguf") and "/" not in one]
    if len(packed) == 1 and "config.json" not in files:
        return packed
    if packed:
        named = ", ".join(f"{name}/{one}" for one in packed[:6])
        raise CheckpointError(f"hub model {name} has GGUF files and no safetensors; name one of them: {named}")
    if weights:
        raise CheckpointError(
            f"hub model {name} has no safetensors weights (files: {', '.join(files[:6])}). Choose a revision or"
            " copy that has them."
        )
    return patterns


def _cached(name: str, patterns: list[str], why: str, cause: Exception | None = None) -> tuple[Path, str]:
    """Folder and revision of the newest cached copy. Raises CheckpointError if there is none."""
    try:
        folder = Path(snapshot_download(name, local_files_only=True, allow_patterns=patterns))
    except LocalEntryNotFoundError as error:
        raise CheckpointError(
            f"model '{name}' is neither a local folder nor in the hub cache, and {why}. Give a local folder, or fetch"
            " it while online."
        ) from (cause or error)
    return folder, folder.name
