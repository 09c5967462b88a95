"""A chat template that leaves the request out is refused before a model is asked."""

import pytest

from compresso.data import nano
from compresso.errors import DataError
from compresso.loading import load
from compresso.metrics.trust.asking import check_asks


@pytest.mark.parametrize("template", ["", " \n", "hello"])
def test_it_is_one_line(template: str) -> None:
    tokenizer = load(nano.path()).tokenizer
    assert tokenizer is not None
    tokenizer.chat_template = template
    with pytest.raises(DataError, match="leaves out what the user says"):
        check_asks(tokenizer, "m")


@pytest.mark.parametrize("template", [None, "{% for m in messages %}<{{ m['content'] | trim }}>{% endfor %}"])
def test_others_pass(template: str | None) -> None:
    tokenizer = load(nano.path()).tokenizer
    assert tokenizer is not None
    tokenizer.chat_template = template
    check_asks(tokenizer, "m")
