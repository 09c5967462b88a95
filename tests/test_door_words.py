"""A word that an argument does not know is answered with those that it does, from Python as on the command line."""

import pytest

import compresso
from compresso.data import nano
from compresso.errors import ArgumentError


@pytest.mark.parametrize(("word", "said"), [("quik", "did you mean 'quick'?"), ("all", "known: full, none, quick")])
def test_an_unknown_extent_of_trust(word: str, said: str) -> None:
    with pytest.raises(ArgumentError) as error:
        compresso.plan("wanda/attention-20", nano.path(), trust=word)  # pyright: ignore[reportArgumentType]
    assert said in str(error.value) and "typing" not in str(error.value)
    with pytest.raises(ArgumentError, match=r"wanted 'none' or 'quick' or 'full', got int"):
        compresso.plan("wanda/attention-20", nano.path(), trust=3)  # pyright: ignore[reportArgumentType]
