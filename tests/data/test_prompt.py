"""The prompt's bytes are part of every trained checkpoint:
they are pinned, and so is the text around an instruction.
"""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compresso.data.prompt import body, collaborative_prompt, full_prompt, user_turn


@pytest.mark.parametrize(
    ("with_input", "sha256"),
    [
        (False, "f8ec0312063f05ff9e4fac0d723006e5944429648ea4817996fe17aff9efde4e"),
        (True, "6a17d1c0ed1d91d2d05bfca97a29e2acb60fc4823e0bc979eddb0fdb5e6b1a76"),
    ],
)
def test_the_text_of_version_1_never_changes(with_input: bool, sha256: str) -> None:
    prompt = collaborative_prompt(with_input)
    assert (prompt.version, prompt.sha256) == ("v1", sha256)


def test_the_structure_is_the_papers() -> None:
    blocks = collaborative_prompt(with_input=False).text.split("\n\n")
    assert blocks[0].startswith("###System Instruction:\n")
    points = blocks[1].split("\n")
    assert len(blocks) == 4 and len(points) == 6
    assert all(re.fullmatch(r"- [A-Z][a-z]+: .+\.", point) for point in points)
    assert 150 <= len(" ".join(blocks).split()) <= 200
    assert collaborative_prompt(with_input=False).text.isascii()


def test_the_variants_differ_in_one_sentence() -> None:
    without, with_input = (collaborative_prompt(variant).text.split("\n\n") for variant in (False, True))
    assert without[:3] == with_input[:3]
    assert "input" in with_input[3] and "input" not in without[3]
    assert without[3].partition(". ")[2] == with_input[3].partition(". ")[2]


def test_the_body_is_byte_for_byte_fixed() -> None:
    assert body("Add.") == "###User Instruction:\nAdd.\n\n### Response:"
    assert body("Add.", "1 2") == "###User Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:"


def test_the_full_prompt_is_the_prompt_a_blank_line_and_the_body() -> None:
    assert full_prompt("Add.") == collaborative_prompt(False).text + "\n\n" + body("Add.")
    assert full_prompt("Add.", "1 2") == collaborative_prompt(True).text + "\n\n" + body("Add.", "1 2")
    assert full_prompt("Add.", "1 2", prompt_on=False) == body("Add.", "1 2")


@given(st.text(min_size=1), st.text())
def test_an_input_written_into_the_turn_gives_the_same_bytes(instruction: str, given_input: str) -> None:
    assert full_prompt(user_turn(instruction, given_input)) == full_prompt(instruction, given_input)
