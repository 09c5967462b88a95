"""Open a checkpoint that compresso wrote, with the collaborative prompt it was pruned with."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from compresso.checkpoint.folder import read_json
from compresso.checkpoint.source import Source, has_tokenizer, load_model, load_tokenizer, open_source
from compresso.data.batches import pad_id
from compresso.data.instructions import encode_prompt
from compresso.data.prompt import Prompt, collaborative_prompt, prompt_identity
from compresso.edit.patches import patch_
from compresso.errors import CheckpointError, DataError


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
            DataError: if the model has no tokenizer.
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
    def _continued(self, tokenizer: PreTrainedTokenizerBase, ids: list[int], max_new_tokens: int, options: dict[str, Any]) -> str:
        inputs = torch.tensor([ids], device=self.model.device)
        options = {"do_sample": False, "pad_token_id": pad_id(tokenizer), "eos_token_id": tokenizer.eos_token_id, **options}
        output = self.model.generate(inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=max_new_tokens, **options)  # type: ignore[operator]
        return str(tokenizer.decode(output[0, inputs.shape[1] :], skip_special_tokens=True))


def load(path: str | Path, *, dtype: torch.dtype | None = None, device: str | torch.device = "cpu") -> Loaded:
    """Open a checkpoint folder.

    Args:
        path: a folder that `compresso.run` wrote, or any model folder or hub id.
        dtype: None keeps the stored one.
        device: where the weights go.

    Raises:
        CheckpointError: if it is not a safe, complete checkpoint, or was pruned with a prompt that this version does not know.
    """
    source = open_source(path)
    prompt = _prompt(source)
    tokenizer = load_tokenizer(source) if has_tokenizer(source) else None
    model = load_model(source, dtype=dtype, device=device)
    patch_(model, _patches(source))
    return Loaded(model, tokenizer, prompt)


def _patches(source: Source) -> list[str]:
    """The forward patches that a checkpoint's records name."""
    records = source.folder / "records.json" if source.folder else None
    return list(read_json(records).get("patches", ())) if records is not None and records.is_file() else []


def _prompt(source: Source) -> Prompt | None:
    """The prompt that a checkpoint's records name, if it has records."""
    records = source.folder / "records.json" if source.folder else None
    if records is None or not records.is_file():
        return None
    stored = read_json(records).get("prompt")
    if not isinstance(stored, dict):
        return None
    known = prompt_identity()
    if stored != known:
        raise CheckpointError(
            f"{source.name} was pruned with prompt {stored.get('version')} ({str(stored.get('sha256'))[:12]}), this compresso has "
            f"{known['version']} ({known['sha256'][:12]}); use the compresso version in its records.json"
        )
    return collaborative_prompt(with_input=False)
