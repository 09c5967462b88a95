"""JSON that is read: what Python's own reader lets through and this one does not."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compresso.core.plan import Plan
from compresso.core.strict_json import MOST_DEPTH, loads

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**20), 10**20)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@given(VALUES)
def test_what_is_json_is_read_as_python_does(value: object) -> None:
    text = json.dumps(value)
    assert loads(text) == loads(text.encode()) == json.loads(text)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[" * 200_000, "nested deeper"),
        ("[" * (MOST_DEPTH + 2) + "]" * (MOST_DEPTH + 2), "nested deeper"),
        ('{"a":' * 300 + "1" + "}" * 300, "nested deeper"),
        ('{"a": [Infinity]}', "a is inf; a finite number is wanted"),
        ('{"a": {"b": -Infinity}}', "b is -inf"),
        ("NaN", "it is nan"),
        ('{"a": 1e999}', "a is inf"),
        ('{"a": 1, "b": 2, "a": 3}', "the key 'a' stands twice"),
        ("1" * 5000, "has more than 300 digits"),
        ("\ufeff{}", "byte order mark"),
        (b"\xef\xbb\xbf{}", "byte order mark"),
        (b'{"a": "\xff"}', "byte 7 is no UTF-8"),
        ("", "it is empty"),
        (" ", "it is empty"),
        ('{"a": }', "^a value is missing at line 1, column 7$"),
        ('{"a": 1}\n{"a": 2}', "^another value begins at line 2, column 1$"),
        ('{"a": 1', "^a comma or the closing bracket is missing at line 1, column 8$"),
    ],
)  # fmt: skip
def test_what_is_not_is_a_value_error(text: str | bytes, said: str) -> None:
    with pytest.raises(ValueError, match=said) as error:
        loads(text)
    assert len(str(error.value)) < 200


def test_a_bound_may_be_infinite_where_it_is_allowed_to_be() -> None:
    assert loads('{"limit": [0.0, Infinity]}', ("limit",)) == {"limit": [0.0, float("inf")]}
    for text in ('{"limit": [NaN]}', '{"other": Infinity}'):
        with pytest.raises(ValueError, match="a finite number is wanted"):
            loads(text, ("limit",))


@pytest.mark.parametrize("kept", ["[Infinity]", "[1.5]", '"ab"', "null", "[true]", "[-1]", "{}", "[[1]]", "3"])
def test_a_plan_keeps_lists_of_indices(kept: str) -> None:
    with pytest.raises(ValueError, match=r"wanted a list of unit indices|finite number"):
        Plan.from_json(f'{{"format": 1, "kept": {{"a": {kept}}}}}')
