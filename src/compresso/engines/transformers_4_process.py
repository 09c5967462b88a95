"""A checkpoint opened in transformers 4, in a process that knows nothing of compresso: this file is run by its path,
and imports only torch, safetensors and transformers.

Arguments: the folder, a safetensors file with `ids` [seq], the safetensors file to write, and a text for the folder's
tokenizer, empty for none. Written are `logits` [seq, vocabulary] and `greedy` [NEW_TOKENS], computed in float32 without
a cache, and the ids of the `text`.
"""

import sys

import torch
import transformers
from safetensors.torch import load_file, save_file

NEW_TOKENS = 8


@torch.no_grad()
def main(folder: str, given: str, result: str, text: str) -> None:
    """Open, compute, write."""
    if not transformers.__version__.startswith("4."):
        raise RuntimeError(f"this is transformers {transformers.__version__}, and 4 was wanted")
    ids = load_file(given)["ids"]
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True, trust_remote_code=False
    ).eval()
    found, first = ids.unsqueeze(0), None
    for _ in range(NEW_TOKENS):
        logits = model(input_ids=found, use_cache=False).logits[0].float()
        first = logits if first is None else first
        found = torch.cat([found, logits[-1].argmax().reshape(1, 1)], dim=1)
    assert first is not None
    written = {"logits": first.contiguous(), "greedy": found[0, len(ids) :].contiguous()}
    if text:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        written["text"] = torch.tensor(tokenizer(text)["input_ids"], dtype=torch.long)
    save_file(written, result)


if __name__ == "__main__":
    main(*sys.argv[1:])
