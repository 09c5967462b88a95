"""Chat templates rendered with a limit of steps and of text: a template is a program that came with a model.

transformers renders them in a sandbox that keeps them from files and from Python's insides, and lets them run and grow
as they like: two loops of 100,000 steps, one inside the other, or a letter times a thousand million. `bounded_jinja`
has the same environment with limits. What a template writes within them is what transformers writes.
"""

import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Protocol, cast

from transformers.utils.chat_template_utils import _compile_jinja_template  # pyright: ignore[reportPrivateUsage]

from compresso.data.bounded_jinja import Bounded, TemplateLimit, bounded_filter, stopped

__all__ = ["TemplateLimit", "render", "render_marked"]

TEMPLATE_LETTERS = 150_000
"""Of a template; those of published models have up to some 30,000."""


class _Marks(Protocol):
    """What transformers adds to its environment: it notes where the assistant speaks."""

    def activate_tracker(
        self, rendered_blocks: list[str], generation_indices: list[tuple[int, int]]
    ) -> AbstractContextManager[None]: ...


def render(template: str, messages: Sequence[Mapping[str, object]], **names: object) -> str:
    """The text of a conversation.

    Args:
        template: jinja, of any origin.
        messages: of the conversation.
        names: what else the template may use, such as bos_token and add_generation_prompt.

    Raises:
        TemplateLimit: it takes more steps or makes more text than any template needs.
        Exception: whatever the template raises.
    """
    return "".join(_blocks(template, messages, names))


def render_marked(
    template: str, messages: Sequence[Mapping[str, object]], **names: object
) -> tuple[str, list[tuple[int, int]]]:
    """As `render`, with the spans between generation marks."""
    blocks: list[str] = []
    spans: list[tuple[int, int]] = []
    environment = cast(_Marks, _compiled(template).environment)
    with environment.activate_tracker(blocks, spans):
        for block in _blocks(template, messages, names):
            blocks.append(block)
        return "".join(blocks), spans


def _blocks(template: str, messages: Sequence[Mapping[str, object]], names: Mapping[str, object]) -> Iterator[str]:
    """What a template writes, piece by piece."""
    compiled = _compiled(template)
    environment = cast(Bounded, compiled.environment)
    environment.begin(len(messages), sum(len(str(value)) for message in messages for value in message.values()))
    given = {"tools": None, "documents": None, "add_generation_prompt": False, **names}
    yield from compiled.generate(messages=[dict(message) for message in messages], **given)


@functools.lru_cache(maxsize=64)
def _compiled(template: str):
    """A template in an environment of its own, as its steps are counted there."""
    if len(template) > TEMPLATE_LETTERS:
        raise stopped(f"it has {len(template):,} letters, and at most {TEMPLATE_LETTERS:,} are read")
    return _environment().from_string(template)


def _environment() -> Bounded:
    """transformers' environment, bounded."""
    theirs = _compile_jinja_template("").environment
    ours = Bounded(
        trim_blocks=theirs.trim_blocks,
        lstrip_blocks=theirs.lstrip_blocks,
        extensions=[type(one) for one in theirs.extensions.values()],
    )
    ours.globals.update(theirs.globals)
    ours.globals.pop("lipsum", None)  # makes text by the page, for nobody's chat
    ours.finalize = ours.made
    ours.filters = {name: bounded_filter(ours, name, function) for name, function in theirs.filters.items()}
    ours.tests = {name: bounded_filter(ours, name, function) for name, function in theirs.tests.items()}
    return ours
