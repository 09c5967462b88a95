"""From what was asked for to a recipe: what is refused before a model is opened."""

import pytest

from compresso.errors import RecipeError
from compresso.runner.options import with_options


def test_one_override_that_is_no_list_is_refused_with_the_list_to_give() -> None:
    with pytest.raises(RecipeError, match=r"sets='stages\.x\.y=1': wanted a list.*give sets=\['stages\.x\.y=1'\]"):
        with_options("magnitude-structured", model="unread", sets="stages.x.y=1")
