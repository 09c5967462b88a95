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

from compresso.checkpoint.storage import storage_errors
from compresso.errors import CheckpointError, CompressoError

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_SMALL_FILES = ["*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken"]
_SECONDS = 10.0
_log = logging.getLogger(__name__)


def is_hub_name(name: str) -> bool:
    """Whether this could be `name` or `owner/name` on the hub; what ends like a file is not taken for one."""
    return (
        _NAME.fullmatch(name) is not None and ".." not in name and not name.endswith((".json", ".safetensors", ".yaml"))
    )


def fetch(name: str, weights: bool = True) -> tuple[Path, str]:
    """Folder and revision of a hub model: safetensors (if `weights`), configs and tokenizer files, never code or
    pickles.

    Raises:
        CheckpointError: the hub does not know it, offers pickled weights only, or is out of reach with nothing in the
            cache.
        ResourceError: the disk is full.
    """
    patterns = [*_SMALL_FILES, *(["*.safetensors"] if weights else [])]
    if constants.HF_HUB_OFFLINE:
        return _cached(name, patterns, "HF_HUB_OFFLINE is set")
    try:
        info = HfApi(endpoint=constants.ENDPOINT).model_info(name, timeout=_SECONDS)
        files = [one.rfilename for one in info.siblings or ()]
        if weights and not any(fnmatch(file, "*.safetensors") for file in files):
            raise CheckpointError(
                f"hub model {name} has no safetensors weights (files: {', '.join(files[:6])}). Choose a revision or"
                " copy that has them."
            )
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
