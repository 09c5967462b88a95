"""A checkpoint opened in a process that knows nothing of compresso: this file is run by its path, and imports only
torch and transformers.

Arguments: the folder, a safetensors file with `ids` [seq], the safetensors file to write, and any of the words
`compresso` (import it first) and `remote` (let the folder's own code run). Written are `logits` [seq, vocabulary] and
`greedy` [NEW_TOKENS], computed in float32. Whoever starts this process has had the folder looked at by
`compresso.checkpoint.code`.
"""

import importlib
import sys

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

NEW_TOKENS = 8


@torch.no_grad()
def continued(model: PreTrainedModel, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [seq, vocabulary] of token ids [seq], and the NEW_TOKENS likeliest next ids, one after the other, without
    a cache.
    """
    found, first = ids.unsqueeze(0), None
    for _ in range(NEW_TOKENS):
        logits = model(input_ids=found, use_cache=False).logits[0].float()
        first = logits if first is None else first
        found = torch.cat([found, logits[-1].argmax().reshape(1, 1)], dim=1)
    assert first is not None
    return first, found[0, len(ids) :]


def main(folder: str, given: str, result: str, *words: str) -> None:
    """Open, compute, write."""
    if "compresso" in words:
        importlib.import_module("compresso")
    elif "compresso" in sys.modules:
        raise RuntimeError("compresso was imported by something else")
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True, trust_remote_code="remote" in words
    )
    logits, greedy = continued(model.eval(), load_file(given)["ids"])
    save_file({"logits": logits.contiguous(), "greedy": greedy.contiguous()}, result)


if __name__ == "__main__":
    main(*sys.argv[1:])
