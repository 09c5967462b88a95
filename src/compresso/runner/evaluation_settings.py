"""The texts that both models of a run are asked for, and how prompts reach them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from compresso.data.instructions import encode_prompt
from compresso.data.template import original_template, single_template
from compresso.errors import DataError
from compresso.metrics.forward import context_of
from compresso.metrics.generation import world_prompts
from compresso.metrics.prompts import OPENINGS, REQUESTS

NEW_TOKENS, LEAST_NEW_TOKENS = 48, 8
"""Of each text: at most, and the fewest that texts are asked for."""


@dataclass(frozen=True)
class EvaluationSettings:
    """How both models are evaluated.

    Args:
        corpus: of the held-out examples, in a word.
        prompts, encode, new_tokens: of the texts; no prompts where none can be encoded.
        prompt_format: how a prompt reaches the model.
        refused: why there are no texts; "" if there are.
    """

    corpus: str
    prompts: Sequence[str]
    encode: Callable[[PreTrainedTokenizerBase, str], list[int]] | None
    new_tokens: int
    prompt_format: str
    refused: str = ""


def evaluation_settings(
    model: PreTrainedModel,
    tokenizers: Sequence[PreTrainedTokenizerBase | None],
    *,
    corpus: str,
    instructions: bool,
    prompt_on: bool,
) -> EvaluationSettings:
    """The texts to ask for: requests through the chat template or in the format of training, openings of the embedded
    world, or plain openings.

    tokenizers: of all models that are evaluated; there must be room for the longest encoding.
    """
    known = [tokenizer for tokenizer in tokenizers if tokenizer is not None]
    if not known:
        return EvaluationSettings(corpus, (), None, 0, "", "the model has no tokenizer")
    of_world = corpus.startswith("world")
    chats = all(original_template(single_template(tokenizer)) is not None for tokenizer in known)
    prompts = world_prompts(len(OPENINGS)) if of_world else OPENINGS
    encode, words = None, "beginning token, then the bare text"
    if (instructions or chats) and not of_world:
        prompts, encode = REQUESTS, lambda tokenizer, text: encode_prompt(tokenizer, text, prompt_on=prompt_on)
        words = "by the chat template" if chats else "as an instruction"
        words += ", with the collaborative prompt" if prompt_on else ""
    try:
        longest = max(len(encode(one, text) if encode else one.encode(text)) for one in known for text in prompts) + 1
    except DataError as error:
        return EvaluationSettings(corpus, (), None, 0, words, f"the prompts cannot be written: {error}")
    context = context_of(model)
    room = NEW_TOKENS if context is None else min(NEW_TOKENS, context - longest)
    if room < LEAST_NEW_TOKENS:
        return EvaluationSettings(
            corpus, (), None, 0, words, f"the context of {context} tokens leaves no room after prompts of {longest}"
        )
    return EvaluationSettings(corpus, prompts, encode, room, words)
