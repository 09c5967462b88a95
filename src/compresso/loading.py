"""Open a checkpoint that compresso wrote, with the collaborative prompt it was pruned with."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from compresso.checkpoint.folder import read_json
from compresso.checkpoint.load import load_model
from compresso.checkpoint.patched import stored_patches
from compresso.checkpoint.source import Source, open_source
from compresso.checkpoint.tokenizer import has_tokenizer, load_tokenizer
from compresso.data.batches import pad_id
from compresso.data.instructions import encode_prompt
from compresso.data.prompt import Prompt, collaborative_prompt, prompt_identity
from compresso.data.tokens import refuse_ids
from compresso.door import public
from compresso.edit.context_gates import PATCH as GATES
from compresso.edit.evict import evict_, parse
from compresso.edit.gather import gather_inputs_
from compresso.edit.patches import patch_
from compresso.errors import ArchError, CheckpointError, DataError


@dataclass(frozen=True)
class Loaded:
    """A model ready to use.

    Args:
        model: in evaluation mode.
        tokenizer: its chat template carries the prompt; None for a model without tokenizer.
        prompt: the collaborative prompt the model was pruned with, or None.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    prompt: Prompt | None

    def generate(self, instruction: str, input: str = "", *, max_new_tokens: int = 128, **options: Any) -> str:
        """The model's answer to an instruction, with the text format (and prompt) it was trained with.

        Args:
            instruction, input: as in the training data.
            max_new_tokens, options: as for `transformers`' `generate`.

        Raises:
            DataError: if the model has no tokenizer, or writes no text.
        """
        if self.tokenizer is None:
            raise DataError("this checkpoint has no tokenizer; call `model.generate` with token ids")
        ids = encode_prompt(self.tokenizer, instruction, input, prompt_on=self.prompt is not None)
        return self._continued(self.tokenizer, ids, max_new_tokens, options)

    def complete(self, text: str, *, max_new_tokens: int = 128, **options: Any) -> str:
        """The model's continuation of plain text, special tokens left out."""
        if self.tokenizer is None:
            raise DataError("this checkpoint has no tokenizer; call `model.generate` with token ids")
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        if self.tokenizer.bos_token_id is not None:
            ids = [self.tokenizer.bos_token_id, *ids]
        return self._continued(self.tokenizer, ids, max_new_tokens, options)

    @torch.no_grad()
    def _continued(
        self, tokenizer: PreTrainedTokenizerBase, ids: list[int], max_new_tokens: int, options: dict[str, Any]
    ) -> str:
        if not self.model.can_generate():
            raise DataError(f"a {type(self.model).__name__} writes no text; call `model` with token ids")
        size = int(self.model.config.get_text_config().vocab_size)
        refuse_ids(ids, size, "a token of the request")
        inputs = torch.tensor([ids], device=self.model.device)
        options = {
            "do_sample": False,
            "pad_token_id": pad_id(tokenizer, size),
            "eos_token_id": tokenizer.eos_token_id,
            **options,
        }
        output = self.model.generate(
            inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=max_new_tokens, **options
        )  # type: ignore[operator]
        return str(tokenizer.decode(output[0, inputs.shape[1] :], skip_special_tokens=True))


@public
def load(
    path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    gather: bool = False,
    cache: str | None = None,
) -> Loaded:
    """Open a checkpoint folder or a GGUF file.

    Args:
        path: a folder that `compresso.run` wrote, or any model folder, GGUF file or hub id.
        dtype: None keeps the stored one.
        device: where the weights go.
        gather: weights that E-Sparse pruned lie in n:m groups, and their inputs are gathered to meet them; see
            `compresso.edit.gather`.
        cache: a rule by which the cache forgets, and how much of it stays: a share, such as "keydiff:0.5", or a number
            of tokens, such as "window:256". Others are knorm, h2o and snapkv; see `compresso.edit.evict`. None for the
            whole cache, or what learned gates leave of it.

    Raises:
        ArgumentError: the rule is unknown.
        ArchError: the model's attention is not one whose cache can forget, or learned gates decide already.
        CheckpointError: if it is not a safe, complete checkpoint, was pruned with a prompt that this version does not
            know, or has no orders to gather by.
    """
    eviction = None if cache is None else parse(cache)
    source = open_source(path, packed=True)
    prompt = _prompt(source)
    tokenizer = load_tokenizer(source) if has_tokenizer(source) else None
    model = load_model(source, dtype=dtype, device=device)
    patches = stored_patches(source)
    patch_(model, patches)
    if eviction is not None:
        if any(patch.name == GATES for patch in patches):
            raise ArchError(f"--cache {cache!r}: learned gates decide what this model's cache holds; leave --cache out")
        evict_(model, eviction)
    if gather:
        gather_inputs_(model, _orders(source, _records(source)))
    return Loaded(model, tokenizer, prompt)


def _records(source: Source) -> dict[str, Any]:
    """What compresso wrote beside a checkpoint, or nothing."""
    path = source.folder / "records.json" if source.folder else None
    return dict(read_json(path)) if path is not None and path.is_file() else {}


def _orders(source: Source, records: dict[str, Any]) -> list[dict[str, Any]]:
    """The orders in which E-Sparse left groups of linears."""
    found: list[dict[str, Any]] | None = records.get("stages", {}).get("e_sparse", {}).get("orders")
    if not found:
        raise CheckpointError(
            f"gather=True: {source.name} has no orders to gather by; they are in the records of e_sparse with"
            " shuffle: all"
        )
    return found


def _prompt(source: Source) -> Prompt | None:
    """The prompt that a checkpoint's records name, if it has records."""
    stored = _records(source).get("prompt")
    if not isinstance(stored, dict):
        return None
    known = prompt_identity()
    if stored != known:
        raise CheckpointError(
            f"{source.name} was pruned with prompt {stored.get('version')} ({str(stored.get('sha256'))[:12]}), this"
            f" compresso has {known['version']} ({known['sha256'][:12]}); use the compresso version in its records.json"
        )
    return collaborative_prompt(with_input=False)
