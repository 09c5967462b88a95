"""The training text as a chat template, so that every engine which applies templates gives a pruned model the bytes it
was trained on.

A base model gets a template of its own: opening, "###User Instruction:", response, end token, and so on turn by turn. A
chat model keeps its template; the collaborative prompt is put before its system message. Some templates refuse a system
text, drop it, or show it with the last user turn only, so that it moves as the conversation goes on: there, prompt and
system text stand in the first user turn. What is wrapped is marked, so that wrapping twice changes nothing and the
prompt can be taken out again.

The template writes the beginning-of-sequence token itself, because engines tokenise a rendered template without adding
special tokens. Who renders to text and tokenises later must therefore pass `add_special_tokens=False`, or the model
sees two of them.

Limits: a template that hides its own default system message when one is given (Qwen's) loses that default; messages are
strings, not lists of parts, where the prompt has to go before them.
"""

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache

from transformers import PreTrainedTokenizerBase

from compresso.data.prompt import (
    BETWEEN_BLOCKS,
    INPUT_HEADER,
    RESPONSE_HEADER,
    USER_HEADER,
    VERSION,
    collaborative_prompt,
    opening,
)
from compresso.data.records import Message
from compresso.data.rendering import TemplateLimit, render
from compresso.data.tokens import Spans

_OWN = "{#- compresso template -#}"
_WRAPPED = "{#- compresso wrapper -#}"
_WRAPPED_END = '{#- end of compresso wrapper -#}{{- "" }}'
_PROMPT_MARK = f"{{#- collaborative prompt {VERSION} -#}}"
_PROBE = "probe of the system message"
_QUESTION = "probe of the first question"


def transcript(messages: Sequence[Message], prompt_on: bool, bos: str, eos: str) -> tuple[str, Spans]:
    """The text of a conversation in our format, and the character span of each assistant turn with its end token."""
    system = messages[0].content + BETWEEN_BLOCKS if messages[0].role == "system" else ""
    turns = messages[1:] if messages[0].role == "system" else messages
    text = bos + opening(turns[0].content, prompt_on) + system
    spans: Spans = []
    for number, turn in enumerate(turns):
        if turn.role == "user":
            text += (BETWEEN_BLOCKS if number else "") + USER_HEADER + turn.content
        else:
            text += RESPONSE_HEADER
            spans.append((len(text), len(text) + len(turn.content) + len(eos)))
            text += turn.content + eos
    return text, spans


def chat_template(tokenizer_template: str | None, prompt_on: bool) -> str:
    """The jinja template for a tokenizer that has `tokenizer_template`; ours, where it has none."""
    original = original_template(tokenizer_template)
    if original is None:
        return _own_template(prompt_on)
    return _wrapped_template(original) if prompt_on else original


def original_template(template: str | None) -> str | None:
    """The template that a model came with: without our wrapper, and None where the template is ours."""
    if template is None or template.startswith(_OWN):
        return None
    if template.startswith(_WRAPPED):
        return template.partition(_WRAPPED_END)[2]
    return template


def single_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The template that a tokenizer uses for conversations; of several named ones, the default."""
    template = tokenizer.chat_template
    if isinstance(template, Mapping):
        return template.get("default")
    return template


def apply_to_tokenizer_(tokenizer: PreTrainedTokenizerBase, prompt_on: bool) -> None:
    """Set the tokenizer's chat template; each of them, where it has several under names."""
    template = tokenizer.chat_template
    if isinstance(template, Mapping):
        tokenizer.chat_template = {name: chat_template(each, prompt_on) for name, each in template.items()}  # pyright: ignore[reportAttributeAccessIssue]
    else:
        tokenizer.chat_template = chat_template(template, prompt_on)


def _own_template(prompt_on: bool) -> str:
    """One line, all text in string literals: engines differ in how they trim the text between tags, but not in
    literals.
    """
    with_input, without = (_literal(collaborative_prompt(variant).text + BETWEEN_BLOCKS) for variant in (True, False))
    prompt = (
        f'{_PROMPT_MARK}{{%- if {_literal(INPUT_HEADER)} in turns[0]["content"] -%}}{{{{- {with_input} -}}}}'
        f"{{%- else -%}}{{{{- {without} -}}}}{{%- endif -%}}"
    )
    return "".join(
        (
            _OWN,
            (
                '{%- if messages[0]["role"] == "system" -%}{%- set system = messages[0]["content"] -%}{%- set turns ='
                " messages[1:] -%}"
            ),
            "{%- else -%}{%- set system = none -%}{%- set turns = messages -%}{%- endif -%}",
            '{%- if not turns -%}{{- raise_exception("The conversation has no user turn.") -}}{%- endif -%}',
            '{{- bos_token or "" -}}',
            prompt if prompt_on else "",
            f"{{%- if system is not none -%}}{{{{- system + {_literal(BETWEEN_BLOCKS)} -}}}}{{%- endif -%}}",
            "{%- for message in turns -%}",
            '{%- if message["role"] != ("user" if loop.index0 % 2 == 0 else "assistant") -%}',
            '{{- raise_exception("User and assistant must take turns, the user first.") -}}{%- endif -%}',
            '{%- if message["role"] == "user" -%}',
            f"{{%- if not loop.first -%}}{{{{- {_literal(BETWEEN_BLOCKS)} -}}}}{{%- endif -%}}",
            f'{{{{- {_literal(USER_HEADER)} + message["content"] -}}}}',
            "{%- else -%}",
            f'{{{{- {_literal(RESPONSE_HEADER)} + message["content"] + (eos_token or "") -}}}}',
            "{%- endif -%}{%- endfor -%}",
            f"{{%- if add_generation_prompt -%}}{{{{- {_literal(RESPONSE_HEADER)} -}}}}{{%- endif -%}}",
        )
    )


def _wrapped_template(original: str) -> str:
    prompt = _literal(collaborative_prompt(with_input=False).text)
    between = _literal(BETWEEN_BLOCKS)
    before_first = (
        '{%- set messages = [{"role": messages[0]["role"], "content": '
        f'{prompt} + {between} + messages[0]["content"]}}] + messages[1:] -%}}'
    )
    if keeps_system(original):
        own_system = f'{{%- set messages = [{{"role": "system", "content": {prompt}}}] + messages -%}}'
        choice = f'{{%- if messages[0]["role"] == "system" -%}}{before_first}{{%- else -%}}{own_system}{{%- endif -%}}'
    else:
        with_system = (
            '{%- set messages = [{"role": messages[1]["role"], "content": '
            f'{prompt} + {between} + messages[0]["content"] + {between} + messages[1]["content"]}}] + messages[2:] -%}}'
        )
        choice = (
            f'{{%- if messages[0]["role"] == "system" and messages[1] -%}}{with_system}{{%- else -%}}{before_first}'
            "{%- endif -%}"
        )
    return f"{_WRAPPED}{_PROMPT_MARK}{choice}{_WRAPPED_END}{original}"


def with_system_in_user_turn(messages: Sequence[Message]) -> Sequence[Message]:
    """The conversation with its system text, if it has one, at the head of the first user turn."""
    if len(messages) < 2 or messages[0].role != "system":
        return messages
    system, first = messages[:2]
    return (Message(first.role, system.content + BETWEEN_BLOCKS + first.content), *messages[2:])


@lru_cache(maxsize=16)
def keeps_system(template: str) -> bool:
    """Whether a system text stands before the first question and stays there as the conversation goes on: many
    templates refuse it, drop it, or show it with the last question only.
    """
    system = {"role": "system", "content": _PROBE}
    asked = [{"role": "user", "content": _QUESTION}]
    answer = {"role": "assistant", "content": "answer"}
    heads: list[str] = []
    for conversation in (asked, [*asked, answer], [*asked, answer, {"role": "user", "content": "another"}, answer]):
        head = _head(template, [system, *conversation])
        if head is not None:
            heads.append(head)
        elif _head(template, conversation) is not None:
            return False
    return bool(heads) and _PROBE in heads[0] and len(set(heads)) == 1


def _head(template: str, conversation: list[dict[str, str]]) -> str | None:
    """What a template writes before the first question; None if it refuses the conversation."""
    try:
        return render(template, conversation, bos_token="", eos_token="").partition(_QUESTION)[0]
    except TemplateLimit:
        raise
    except Exception:  # templates refuse with any error they like
        return None


def _literal(text: str) -> str:
    """A jinja string literal; JSON's escapes of ASCII text are jinja's."""
    return json.dumps(text)
