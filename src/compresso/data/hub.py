"""Rows of a data set on the Hugging Face hub, through `datasets`: at once, or an error at once.

Without a network the libraries would try for half a minute before they say so. Here the hub is asked one question
first, with a short time limit; when it does not answer, or HF_HUB_OFFLINE is set, only the local cache is tried.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import Any

from compresso.errors import DataError, first_line

ANSWER_WITHIN_S = 5.0


@dataclass(frozen=True, slots=True)
class HubSet:
    """Where a data set lies on the hub.

    Args:
        id: `owner/name`.
        config: the configuration, where there are several.
        files: per split, the files to read instead of the whole set.
    """

    id: str
    config: str | None = None
    files: dict[str, str] | None = None


def rows(hub: HubSet, split: str, limit: int | None = None) -> list[dict[str, Any]]:
    """The first `limit` rows of a split, or all.

    Raises:
        DataError: the set is not in the cache and the hub cannot be reached, does not have it, or refuses it.
    """
    # these take a second to import, and local data does not need them
    import datasets

    silent = why_silent(hub.id)
    try:
        with cache_only() if silent else nullcontext():
            loaded = datasets.load_dataset(hub.id, hub.config, data_files=_files(hub, split), split=split)
    except Exception as error:
        reason = silent or first_line(error)
        raise DataError(
            f"data set {hub.id}{f' ({hub.config})' if hub.config else ''}, split '{split}': not in the local cache, and"
            f" {reason}. Download it where there is a network, or pass a local file (.jsonl, .json, .parquet, .txt)."
        ) from error
    return [dict(row) for row in islice(loaded, limit)]


def _files(hub: HubSet, split: str) -> dict[str, str] | None:
    if hub.files is None:
        return None
    if split not in hub.files:
        raise DataError(f"data set {hub.id} has no split '{split}' here; known: {', '.join(sorted(hub.files))}")
    return {split: hub.files[split]}


def why_silent(hub_id: str) -> str:
    """Why the hub gives no answer about a data set, or "" if it does."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    try:
        HfApi().dataset_info(hub_id, timeout=ANSWER_WITHIN_S)
    except HfHubHTTPError as error:
        return f"the hub refused it ({first_line(error)})"
    except (
        Exception
    ) as error:  # the HTTP library and so the error type depend on the hub client's version; all of them mean no answer
        return f"the hub did not answer ({type(error).__name__})"
    return ""


@contextmanager
def cache_only() -> Iterator[None]:
    """While the block runs, `datasets` opens what is in its cache, and asks nobody."""
    from datasets import config

    before = config.HF_HUB_OFFLINE
    config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        config.HF_HUB_OFFLINE = before
