"""A rendered template is the training text, for base models and, wrapped, for chat models."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from compresso.data.prompt import collaborative_prompt, full_prompt, user_turn
from compresso.data.records import Message
from compresso.data.template import (
    apply_to_tokenizer_,
    chat_template,
    keeps_system,
    original_template,
    transcript,
    with_system_in_user_turn,
)

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' +"
    " '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
NO_SYSTEM = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'system' %}{{ raise_exception('no system"
    " role') }}{% endif %}{{ '[' + message['role'] + '] ' + message['content'] + eos_token }}{% endfor %}"
)
LAST_TURN = (  # Mistral 7B v0.3's and Nemo's way: the system text goes where the last question is, while that is last
    "{%- if messages[0].role == 'system' %}{%- set sys = messages[0].content %}{%- set rest = messages[1:] %}"
    "{%- else %}{%- set rest = messages %}{%- endif %}{{ bos_token }}{%- for m in rest %}{%- if m.role == 'user' %}"
    "{%- if loop.last and sys is defined %}{{ '[INST] ' + sys + '\n\n' + m.content + '[/INST]' }}"
    "{%- else %}{{ '[INST] ' + m.content + '[/INST]' }}{%- endif %}{%- else %}{{ ' ' + m.content + eos_token }}"
    "{%- endif %}{%- endfor %}"
)
DROPPING = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] != 'system' %}{{ '[' + m['role'] + '] ' + m['content'] +"
    " eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '[assistant] ' }}{% endif %}"
)
IN_THE_FIRST_TURN = (  # LLaMA 2's way
    "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}{% set sys = '<<' + messages[0]['content'] +"
    " '>>' %}{% else %}{% set rest = messages %}{% set sys = '' %}{% endif %}{% for m in rest %}"
    "{{ '[' + m['role'] + '] ' + (sys if loop.first else '') + m['content'] + eos_token }}{% endfor %}"
)
ONE_QUESTION = (
    "{% if messages | length > 3 %}{{ raise_exception('one question only') }}{% endif %}{% for m in messages %}"
    "{{ '[' + m['role'] + '] ' + m['content'] }}{% endfor %}"
)
LEADING_NEWLINE = "\n\nAt the top:\n{% for message in messages %}{{ message['content'] }}{% endfor %}"
PROMPT = collaborative_prompt(with_input=False).text

contents = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40)


def render(template: str, messages: list[tuple[str, str]], generation: bool = False, bos: str = "<s>") -> str:
    conversation = [{"role": role, "content": content} for role, content in messages]
    rendered, _ = render_jinja_template(
        [conversation], chat_template=template, add_generation_prompt=generation, bos_token=bos, eos_token="</s>"
    )
    return rendered[0]


@given(contents, st.one_of(st.just(""), contents), st.booleans())
def test_one_user_message_renders_to_the_full_prompt(instruction: str, given_input: str, prompt_on: bool) -> None:
    rendered = render(chat_template(None, prompt_on), [("user", user_turn(instruction, given_input))], generation=True)
    assert rendered == "<s>" + full_prompt(instruction, given_input, prompt_on)
    assert rendered.endswith("### Response:")


@settings(max_examples=50)
@given(st.lists(contents, min_size=2, max_size=5), st.one_of(st.none(), contents), st.booleans())
def test_any_conversation_renders_to_its_transcript(turns: list[str], system: str | None, prompt_on: bool) -> None:
    messages = [("system", system)] if system is not None else []
    messages += [(("user", "assistant")[place % 2], content) for place, content in enumerate(turns)]
    text, spans = transcript([Message(role, content) for role, content in messages], prompt_on, "<s>", "</s>")
    assert render(chat_template(None, prompt_on), messages) == text
    assert [text[begin:end] for begin, end in spans] == [content + "</s>" for content in turns[1::2]]


def test_a_generation_prompt_is_a_prefix_of_the_answered_conversation() -> None:
    template = chat_template(None, prompt_on=True)
    asked = [("system", "Be short."), ("user", "Hello"), ("assistant", "Hi"), ("user", "Name a colour.")]
    assert render(template, [*asked, ("assistant", "red")]) == render(template, asked, generation=True) + "red</s>"


def test_without_a_bos_token_none_is_written() -> None:
    assert render(chat_template(None, prompt_on=False), [("user", "a")], bos="").startswith("###User")


def test_turns_out_of_order_are_refused() -> None:
    with pytest.raises(Exception, match="take turns"):
        render(chat_template(None, prompt_on=True), [("user", "a"), ("user", "b")])
    with pytest.raises(Exception, match="no user turn"):
        render(chat_template(None, prompt_on=True), [("system", "a")])


def test_tokenising_the_template_gives_one_bos(tokenizer: PreTrainedTokenizerFast) -> None:
    apply_to_tokenizer_(tokenizer, prompt_on=True)
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], add_generation_prompt=True)["input_ids"]
    assert ids.count(tokenizer.convert_tokens_to_ids("<s>")) == (1 if tokenizer.bos_token else 0)


def test_a_chat_model_gets_the_prompt_before_its_system_message() -> None:
    wrapped = chat_template(CHATML, prompt_on=True)
    user = ("user", "Hello")
    assert render(wrapped, [user]) == render(CHATML, [("system", PROMPT), user])
    assert render(wrapped, [("system", "Be short."), user]) == render(
        CHATML, [("system", PROMPT + "\n\nBe short."), user]
    )
    assert render(wrapped, [user], generation=True).endswith("<|im_start|>assistant\n")


def test_a_template_without_system_messages_gets_the_prompt_before_the_first_message() -> None:
    wrapped = chat_template(NO_SYSTEM, prompt_on=True)
    assert render(wrapped, [("user", "Hello"), ("assistant", "Hi")]) == render(
        NO_SYSTEM, [("user", PROMPT + "\n\nHello"), ("assistant", "Hi")]
    )


def test_text_at_the_beginning_of_a_template_survives_wrapping() -> None:
    assert (
        render(chat_template(LEADING_NEWLINE, prompt_on=True), [("user", "Hello")])
        == "\n\nAt the top:\n" + PROMPT + "Hello"
    )


@pytest.mark.parametrize("original", [None, CHATML, NO_SYSTEM])
def test_applying_twice_is_applying_once_and_can_be_undone(original: str | None) -> None:
    once = chat_template(original, prompt_on=True)
    assert chat_template(once, prompt_on=True) == once
    assert original_template(once) == original
    assert chat_template(once, prompt_on=False) == chat_template(original, prompt_on=False)


def test_every_named_template_of_a_tokenizer_is_set(plain_tokenizer: PreTrainedTokenizerFast) -> None:
    plain_tokenizer.chat_template = {"default": CHATML, "tool_use": NO_SYSTEM}
    apply_to_tokenizer_(plain_tokenizer, prompt_on=True)
    assert plain_tokenizer.chat_template == {
        "default": chat_template(CHATML, True),
        "tool_use": chat_template(NO_SYSTEM, True),
    }


def test_the_template_survives_saving(plain_tokenizer: PreTrainedTokenizerFast, tmp_path) -> None:
    apply_to_tokenizer_(plain_tokenizer, prompt_on=True)
    plain_tokenizer.save_pretrained(tmp_path)
    assert PreTrainedTokenizerFast.from_pretrained(tmp_path).chat_template == chat_template(None, prompt_on=True)


@pytest.mark.parametrize(
    ("template", "keeps"),
    [
        (CHATML, True),
        (IN_THE_FIRST_TURN, True),
        (ONE_QUESTION, True),
        (NO_SYSTEM, False),
        (DROPPING, False),
        (LAST_TURN, False),
        ("{{ raise_exception('never') }}", False),
    ],
)
def test_whether_a_system_text_stays_where_it_is(template: str, keeps: bool) -> None:
    assert keeps_system(template) is keeps


@pytest.mark.parametrize("template", [NO_SYSTEM, DROPPING, LAST_TURN])
def test_where_no_system_text_stays_prompt_and_system_stand_in_the_first_user_turn(template: str) -> None:
    wrapped = chat_template(template, prompt_on=True)
    talk = [("user", "Hello"), ("assistant", "Hi"), ("user", "More"), ("assistant", "Yes")]
    shown = render(template, [("user", PROMPT + "\n\nBe short.\n\nHello"), *talk[1:]])
    assert render(wrapped, [("system", "Be short."), *talk]) == shown
    moved = with_system_in_user_turn([Message(role, said) for role, said in [("system", "Be short."), *talk]])  # type: ignore[arg-type]
    assert render(wrapped, [(turn.role, turn.content) for turn in moved]) == shown
    assert original_template(wrapped) == template and chat_template(wrapped, prompt_on=True) == wrapped
    for n in (1, 3):  # what the model is asked at inference begins what it was trained on
        asked = render(wrapped, talk[:n], generation=True)
        assert render(wrapped, talk).startswith(asked)
