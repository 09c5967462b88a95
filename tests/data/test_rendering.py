"""What a template writes within the limits is what transformers writes; what goes beyond them is stopped at once."""

import resource
import time
from typing import Any

import pytest
from tests.formats.nano_variants import nano_tokenizer
from transformers.utils.chat_template_utils import render_jinja_template

from compresso.data.conversations import templated_prompt, templated_transcript
from compresso.data.records import Message
from compresso.data.rendering import TemplateLimit, render, render_marked
from compresso.data.template import chat_template
from compresso.errors import DataError

MESSAGES: list[dict[str, Any]] = [
    {"role": "system", "content": "Be | brief.\n"},
    {"role": "user", "content": '  Wer \u00e4rgert <b>"wen"</b>?\n\nNobody.'},
    {"role": "assistant", "content": "a\tb"},
    {"role": "user", "content": ""},
    {"role": "assistant", "content": "c" * 3_000},
]
TEMPLATES = [
    "{% for m in messages %}{{ '<|' ~ m['role'] ~ '|>' ~ m.content | trim ~ 3 ~ none }}{% endfor %}",
    (
        "{% for m in messages %}{{ loop.index }}/{{ loop.length }}{% if loop.last %}!{% endif %}"
        "{{ loop.previtem }}{% endfor %}"
    ),
    "{% for m in messages if m.role != 'system' %}{{ loop.revindex }}{{ m.content }}{% else %}none{% endfor %}",
    (
        "{% for m in messages %}{% if loop.index0 == 1 %}{% continue %}{% endif %}{{ m.role }}"
        "{% if loop.index > 3 %}{% break %}{% endif %}{% endfor %}"
    ),
    (
        "{% for k, v in {'a': 1, 'b': [2, (3, 4)]}.items() %}{{ k }}{{ v }}{% endfor %}"
        "{% set a, b = 'x', 'y' %}{{ b + a }}"
    ),
    "{% for x in [[1, [2, 3]], 4] recursive %}{{ loop(x) if x is iterable else x * 2 }},{% endfor %}",
    (
        "{% macro f(a, b='z') %}[{{ a }}{{ b }}{{ caller() if caller }}]{% endmacro %}{{ f(1) }}"
        "{% call f(2) %}in{% endcall %}"
    ),
    (
        "{% set ns = namespace(n=0, s='') %}{% for m in messages %}{% set ns.n = ns.n + 1 %}"
        "{% set ns.s = ns.s ~ m.role[0] %}{% endfor %}{{ ns.n }}{{ ns.s }}"
    ),
    (
        "{{ messages[1:] | map(attribute='role') | join(', ') }}"
        "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}"
    ),
    "{{ messages | tojson(indent=2) }}{{ {'b': [1, 2.5, none, true]} | tojson }}{{ messages[0] | items | list }}",
    "{{ '%s is %05.1f %%' % ('it', 2.5) }}{{ '{:>8}|{a!r:^9}'.format('it', a=2) }}{{ '%d%s' | format(3, 'x') }}",
    (
        "{{ 'a-b'.split('-') }}{{ 'aba'.replace('a', 'c') }}{{ 'aba' | replace('b', '<>') }}"
        "{{ '-'.join(['x', 'y']) }}{{ 'x' * 3 }}{{ [0] * 2 }}"
    ),
    (
        "{{ 'a\nb' | indent(2) }}{{ 'x' | center(7) }}|{{ 'y'.ljust(3) }}"
        "|{{ 'long words here' | wordwrap(5) }}{{ 2 ** 10 % 7 }}"
    ),
    (
        "{{ bos_token }}{{ missing ~ 'x' }}{{ missing is defined }}{{ eos_token | default('none') }}"
        "{{ 'u' in messages[1].role }}"
    ),
    (
        "{% set block %}{{ messages[0].content }}{% endset %}{{ block | upper }}{% filter lower %}"
        "ABC{{ block }}{% endfilter %}"
    ),
    (
        "{% if tools %}tools{% endif %}{% if add_generation_prompt %}go{% endif %}{{ range(3) | list }}"
        "{{ dict(a=1) }}{{ [3, 1] | sort | sum }}"
    ),
    "  {%- for m in messages -%}  \n {{- m.role -}} \n {% endfor %}\n  end",
    chat_template(None, True),
    chat_template("{% for m in messages %}{{ m.role + m.content }}{% endfor %}", True),
]
MARKED = (
    "{% for m in messages %}{{ m.role }}{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content }}{% endgeneration %}{% endif %}{% endfor %}"
)
GROW = (
    "{% set ns = namespace(s='aaaaaaaaaa', l=['a']) %}{% for i in range(70) %}{% set ns.s = WHAT %}"
    "{% endfor %}{{ ns.s }}"
)
ENDLESS = {
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "loop that filters": "{% for i in range(99999) %}{% for j in range(99999) if j < 0 %}{% endfor %}{% endfor %}",
    "macro": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "map": "{{ range(99999) | map('string') | map('center', 99999) | list | length }}",
    "cycler": (
        "{% set c = cycler(1) %}{% for i in range(99999) %}{% for j in range(9) %}{{ c.next() }}"
        "{% endfor %}{% endfor %}"
    ),
    "comparisons": "{{ range(99999) | select('in', range(99999) | list) | list | length }}",
}
LARGE = {
    "letter": "{{ 'a' * 10**9 }}",
    "number first": "{{ 10**9 * 'a' }}",
    "list": "{{ [0] * 10**9 }}",
    "power": "{{ 9 ** 9999 ** 2 }}",
    "center": "{{ 'a' | center(10**9) }}",
    "ljust": "{{ 'a'.ljust(10**9) }}",
    "zfill": "{{ 'a'.zfill(width=10**9) if false else 'a'.zfill(10**9) }}",
    "to_bytes": "{{ (1).to_bytes(10**9, 'big') }}",
    "expandtabs": "{{ ('\t' * 99999).expandtabs(99999) }}",
    "percent": "{{ '%1000000000d' % 3 }}",
    "percent star": "{{ '%*d' % (10**9, 3) }}",
    "format": "{{ '{:>1000000000}'.format('a') }}",
    "format by name": "{{ '{:>{w}}'.format('a', w=10**9) }}",
    "format filter": "{{ '%1000000000d' | format(3) }}",
    "json": "{{ range(999) | list | tojson(indent=10**6) }}",
    "indent": "{{ ('a\n' * 99999) | indent(99999) }}",
    "wordwrap": "{{ ('a ' * 99999) | wordwrap(1, wrapstring='a' * 9999) }}",
    "translate": "{{ ('a' * 99999).translate({97: 'b' * 99999}) }}",
    "filter block": "{% filter replace('a', 'b' * 99999) %}" + "a" * 9_999 + "{% endfilter %}",
    "output": "{% for i in range(99999) %}" + "a" * 200 + "{% endfor %}",
    "data in a block": "{% set x %}{% for i in range(99999) %}" + "a" * 20_000 + "{% endfor %}{% endset %}",
    "data in a macro": "{% macro f() %}"
    + "a" * 50_000
    + "{% endmacro %}{% for i in range(99999) %}{% set x = f() %}{% endfor %}",
    "calls": "{% macro f() %}{{ caller() * 2 }}{% endmacro %}"
    + "{% call f() %}" * 18
    + "x" * 99
    + "{% endcall %}" * 18,
    "set block": (
        "{% set ns = namespace(s='a') %}{% for i in range(99) %}{% set x %}{{ ns.s }}{{ ns.s }}"
        "{% endset %}{% set ns.s = x %}{% endfor %}"
    ),
    "namespaces": GROW.replace("WHAT", "namespace(x=[ns.s, ns.s])"),
    **{
        what: GROW.replace("WHAT", what)
        for what in (
            "ns.s + ns.s",
            "ns.s ~ ns.s",
            "[ns.s, ns.s] | join",
            "ns.s.join(['a', 'b', ns.s])",
            "'{}{}'.format(ns.s, ns.s)",
            "'{0}{0}'.format(ns.s)",
            "'{a}{a}'.format_map({'a': ns.s})",
            "'%s%s' % (ns.s, ns.s)",
            "'%(a)s%(a)s' % {'a': ns.s}",
            "'%s%s' | format(ns.s, ns.s)",
            "ns.s.replace('a', ns.s)",
            "ns.s | replace('', ns.s)",
            "[ns.s, ns.s] | string",
            "[ns.s, ns.s] | tojson",
            "[ns.s, ns.s]",
            "(ns.s, ns.s)",
            "{'a': ns.s, 'b': ns.s}",
            "dict(a=ns.s, b=ns.s)",
        )
    },
    "template": "{{ x }}" * 60_000,
}


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("generation", [False, True])
def test_what_is_written_is_what_transformers_writes(template: str, generation: bool) -> None:
    names = {"bos_token": "<s>", "eos_token": "</s>"}
    (wanted,), _ = render_jinja_template([MESSAGES], chat_template=template, add_generation_prompt=generation, **names)
    assert render(template, MESSAGES, add_generation_prompt=generation, **names) == wanted
    assert wanted


def test_spans_of_generation_marks_are_those_of_transformers() -> None:
    (text,), (spans,) = render_jinja_template([MESSAGES], chat_template=MARKED, return_assistant_tokens_mask=True)
    found, marked = render_marked(MARKED, MESSAGES)
    assert (found, marked) == (text, [tuple(span) for span in spans])
    assert [text[start:end] for start, end in marked] == ["a\tb", "c" * 3_000]


@pytest.mark.slow
@pytest.mark.parametrize("name", [*ENDLESS, *LARGE])
def test_a_template_without_end_is_stopped_in_a_line(name: str) -> None:
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with pytest.raises(TemplateLimit, match="the tokenizer's chat template was stopped: it ") as raised:
        render((ENDLESS | LARGE)[name], MESSAGES[:2])
    assert time.process_time() - began < 2.5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB
    assert "\n" not in str(raised.value) and "Repair or remove it" in str(raised.value)


def test_a_long_conversation_has_room() -> None:
    turns = [{"role": ("user", "assistant")[n % 2], "content": "word " * 200} for n in range(2_000)]
    template = "{% set ns = namespace(s='') %}" + TEMPLATES[0]
    assert len(render(template, turns)) > 2_000_000


def test_what_a_conversation_asks_for_is_refused_with_the_limit_s_own_words() -> None:
    """Not as a conversation that the template would not have."""
    tokenizer = nano_tokenizer()
    template = "{% if messages | length > 1 %}{{ 'a' * 10**9 }}{% endif %}{{ messages[0].content }}"
    assert templated_prompt(tokenizer, template, "hello", prompt_on=False) == "hello"
    with pytest.raises(DataError, match=r"^the tokenizer's chat template was stopped"):
        templated_transcript(tokenizer, template, [Message("user", "a"), Message("assistant", "b")], prompt_on=False)
    with pytest.raises(DataError, match=r"^the tokenizer's chat template was stopped"):
        chat_template(LARGE["letter"], prompt_on=True)
