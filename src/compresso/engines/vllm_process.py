"""A checkpoint opened in vLLM, in a process that knows nothing of compresso: this file is run by its path, and imports
vLLM and torch only.

Arguments: the folder, a safetensors file with `ids` [seq], the safetensors file to write, how many tokens to add, the
precision to compute in, and by choice the word `remote` (let the folder's own code run). Written are `greedy` [new
tokens] and `logprobs` [vocabulary], the logarithms of the probabilities after the ids.
"""

import sys

import torch
from safetensors.torch import load_file, save_file


def main(folder: str, given: str, result: str, new_tokens: str, dtype: str, *words: str) -> None:
    """Open, compute, write."""
    from vllm import LLM, SamplingParams  # pyright: ignore[reportMissingImports] - of another environment

    ids = load_file(given)["ids"].tolist()
    model = LLM(
        model=folder,
        dtype=dtype,
        trust_remote_code="remote" in words,
        skip_tokenizer_init=True,
        enforce_eager=True,
        max_model_len=len(ids) + int(new_tokens),
        max_logprobs=-1,
        disable_log_stats=True,
    )
    settings = SamplingParams(
        temperature=0.0, max_tokens=int(new_tokens), ignore_eos=True, detokenize=False, logprobs=-1
    )
    (output,) = model.generate([{"prompt_token_ids": ids}], settings, use_tqdm=False)
    found = output.outputs[0]
    first = found.logprobs[0]
    logprobs = torch.full((max(first) + 1,), -torch.inf)
    for token, entry in first.items():
        logprobs[token] = entry.logprob
    save_file({"greedy": torch.tensor(list(found.token_ids)), "logprobs": logprobs}, result)


if __name__ == "__main__":
    main(*sys.argv[1:])
