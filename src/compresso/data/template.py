"""The training text as a chat template, so that every engine which applies templates gives a pruned model the bytes it
was trained on.

A base model gets a template of its own: opening, "###User Instruction:", response, end token, and so on turn by turn. A
chat model keeps its template; the collaborative prompt is put before its system message (or before the first message,
where the template has no place for a system message). What is wrapped is marked, so that wrapping twice changes nothing
and the prompt can be taken out again.

The template writes the beginning-of-sequence token itself, because engines tokenise a rendered template without adding
special tokens. Who renders to text and tokenises later must therefore pass `add_special_tokens=False`, or the model
sees two of them.

Limits: a template that hides its own default system message when one is given (Qwen's) loses that default; messages are
strings, not lists of parts, where the prompt has to go before them.
"""

import json
from collections.abc import Mapping, Sequence

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

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
from compresso.data.tokens import Spans

_OWN = "{#- compresso template -#}"
_WRAPPED = "{#- compresso wrapper -#}"
_WRAPPED_END = '{#- end of compresso wrapper -#}{{- "" }}'
_PROMPT_MARK = f"{{#- collaborative prompt {VERSION} -#}}"
_PROBE = "probe of the system message"


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
    before_first = (
        '{%- set messages = [{"role": messages[0]["role"], "content": '
        f'{prompt} + {_literal(BETWEEN_BLOCKS)} + messages[0]["content"]}}] + messages[1:] -%}}'
    )
    own_system = f'{{%- set messages = [{{"role": "system", "content": {prompt}}}] + messages -%}}'
    choice = (
        f'{{%- if messages[0]["role"] == "system" -%}}{before_first}{{%- else -%}}{own_system}{{%- endif -%}}'
        if _has_system_message(original)
        else before_first
    )
    return f"{_WRAPPED}{_PROMPT_MARK}{choice}{_WRAPPED_END}{original}"


def _has_system_message(template: str) -> bool:
    """Whether a system message reaches the text: many templates refuse or drop it."""
    conversation = [{"role": "system", "content": _PROBE}, {"role": "user", "content": "question"}]
    try:
        rendered, _ = render_jinja_template([conversation], chat_template=template, bos_token="", eos_token="")  # pyright: ignore[reportArgumentType, reportAssignmentType]
    except Exception:  # templates refuse with any error they like
        return False
    return _PROBE in rendered[0]


def _literal(text: str) -> str:
    """A jinja string literal; JSON's escapes of ASCII text are jinja's."""
    return json.dumps(text)
