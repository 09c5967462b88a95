"""Conversations in a chat model's own template: its text, and which characters of it the assistant speaks."""

import re
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from compresso.core.counted import counted
from compresso.data.records import Message
from compresso.data.rendering import TemplateLimit, render, render_marked
from compresso.data.template import chat_template, keeps_system, with_system_in_user_turn
from compresso.data.tokens import Spans, special_texts
from compresso.errors import DataError, first_line

_GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")


def templated_prompt(tokenizer: PreTrainedTokenizerBase, template: str, user: str, prompt_on: bool) -> str:
    """The text before the assistant's answer to one user message."""
    return _render(tokenizer, chat_template(template, prompt_on), [Message("user", user)], generation=True)


def templated_opening(
    tokenizer: PreTrainedTokenizerBase, template: str, messages: Sequence[Message], prompt_on: bool
) -> str:
    """The text before the answer to the last turn; where the template keeps no system text, it stands in the first user
    turn.
    """
    if not keeps_system(template):
        messages = with_system_in_user_turn(messages)
    return _render(tokenizer, chat_template(template, prompt_on), messages, generation=True)


def templated_transcript(
    tokenizer: PreTrainedTokenizerBase, template: str, messages: Sequence[Message], prompt_on: bool
) -> tuple[str, Spans]:
    """The rendered conversation, and per assistant turn the span from where its generation begins to the token that
    ends it.

    Templates with generation marks say it themselves. For the others, a turn begins where the conversation before it,
    rendered with a generation prompt, ends. Where the template keeps no system text, it stands in the first user turn.

    Raises:
        DataError: the template refuses the conversation, or does not render a turn as a continuation of the turns
            before it.
    """
    jinja = chat_template(template, prompt_on)
    if not keeps_system(template):
        messages = with_system_in_user_turn(messages)
    if _GENERATION_MARK.search(template):
        return _marked(tokenizer, jinja, messages)
    text = _render(tokenizer, jinja, messages)
    spans: Spans = []
    for number, turn in enumerate(messages):
        if turn.role == "assistant":
            before = _render(tokenizer, jinja, messages[:number], generation=True)
            place = text.find(turn.content.strip(), len(before))
            if not text.startswith(before) or place < 0:
                raise DataError(
                    f"the tokenizer's chat template does not render turn {number + 1} as a continuation of the turns"
                    " before it; use a template with generation marks"
                )
            spans.append((len(before), _after_special(tokenizer, text, place + len(turn.content.strip()))))
    return text, spans


def _marked(tokenizer: PreTrainedTokenizerBase, jinja: str, messages: Sequence[Message]) -> tuple[str, Spans]:
    try:
        return render_marked(jinja, _plain(messages), **special_texts(tokenizer))
    except TemplateLimit:
        raise
    except Exception as error:  # templates refuse with any error they like
        raise _refused(messages, error) from error


def _after_special(tokenizer: PreTrainedTokenizerBase, text: str, place: int) -> int:
    """The end of the special or added token at `place`, or `place` if none stands there."""
    tokens = {*tokenizer.all_special_tokens, *(token.content for token in tokenizer.added_tokens_decoder.values())}
    rest = text[place:]
    white = len(rest) - len(rest.lstrip())
    end = max((len(token) for token in tokens if token and rest[white:].startswith(token)), default=0)
    return place + white + end if end else place


def _render(
    tokenizer: PreTrainedTokenizerBase, jinja: str, messages: Sequence[Message], generation: bool = False
) -> str:
    try:
        return render(jinja, _plain(messages), add_generation_prompt=generation, **special_texts(tokenizer))
    except TemplateLimit:
        raise
    except Exception as error:  # templates refuse with any error they like
        raise _refused(messages, error) from error


def _refused(messages: Sequence[Message], error: Exception) -> DataError:
    said, turns = first_line(error), counted(len(messages), "turn")
    return DataError(f"the tokenizer's chat template refuses a conversation of {turns}: {said}")


def _plain(messages: Sequence[Message]) -> list[dict[str, str]]:
    return [{"role": turn.role, "content": turn.content} for turn in messages]
