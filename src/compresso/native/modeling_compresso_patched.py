"""A model whose forward pass is patched beside its weights, for transformers with trust_remote_code=True.

The weights are those of a stock class, which opens them without this file and computes without the patches: without
learned gates on the context, say. This file lies beside such weights, so that transformers can be told to put the
patches on; how they compute is in the package compresso-llm, which must be installed.
"""

import copy
from importlib import import_module
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils.hub import cached_file

RECORDS, TENSORS = "records.json", "patches/tensors.safetensors"
_HUB = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")


class PatchedForCausalLM:
    """Opens a causal language model of a stock class, and puts the patches of its records on it."""

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """Nothing: what is opened is of a stock class, and is saved as one."""

    @classmethod
    def from_pretrained(cls, name: str, *args: Any, config: Any = None, **options: Any) -> PreTrainedModel:
        """The patched model of a folder or a hub id, in evaluation mode. Options as for a stock class.

        Raises ImportError without compresso-llm.
        """
        try:
            patches = import_module("compresso.edit.patches")
        except ImportError as error:
            raise ImportError(
                f"the forward pass of {name} is patched, which takes the package compresso-llm (pip install"
                " compresso-llm); trust_remote_code=False opens its weights without the patches."
            ) from error
        hub = {key: options[key] for key in _HUB if key in options}
        records = cached_file(name, RECORDS, **hub)
        cached_file(name, TENSORS, **hub, _raise_exceptions_for_missing_entries=False)  # some have no tensors
        options.pop("trust_remote_code", None)
        config = _plain(config)
        opened = AutoModelForCausalLM.from_pretrained(name, *args, config=config, trust_remote_code=False, **options)
        model = opened[0] if isinstance(opened, tuple) else opened  # a pair with output_loading_info
        folder = Path(str(records)).parent
        patches.patch_(model, patches.read_patches(patches.records_of(folder), folder))
        return opened

    @classmethod
    def _from_config(cls, config: Any, **options: Any) -> PreTrainedModel:
        """Nothing: a config alone has neither weights nor patches. Raises ValueError."""
        raise ValueError(
            "what patches this model lies beside its weights; use from_pretrained, or give trust_remote_code=False for"
            " a model of the stock class with new weights"
        )


def _plain(config: Any) -> Any:
    """A config that names no code, as what is saved from the patched model holds no patch; the caller's stays."""
    if getattr(config, "auto_map", None) is None:
        return config
    config = copy.deepcopy(config)
    del config.auto_map
    return config
