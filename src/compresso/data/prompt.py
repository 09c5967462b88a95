"""The collaborative prompt, and the text that surrounds an instruction.

Compresso (arXiv 2310.05015, on the collaborative prompt) tells the model, in words, that it is being pruned and asks it
to go along. The wording here is ours; the structure follows the paper: a header that marks a system instruction, a line
that asks for attention, six titled one-liners, a closing encouragement, and the sentence that leads over to the user's
instruction, which has a variant for one with input.

The same bytes serve training and inference, so the text has a version and a hash, and a new wording gets a new file.
"""

import hashlib
from dataclasses import dataclass
from functools import cache
from importlib import resources

VERSION = "v1"

USER_HEADER = "###User Instruction:\n"
INPUT_HEADER = "\n\n### Input:\n"
RESPONSE_HEADER = "\n\n### Response:"
BETWEEN_BLOCKS = "\n\n"


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt's text (no newline at its end), its version, and the sha256 of its UTF-8 bytes."""

    text: str
    version: str
    sha256: str


@cache
def collaborative_prompt(with_input: bool) -> Prompt:
    """The collaborative prompt in the variant for an instruction with, or without, an input."""
    name = f"collaborative_{VERSION}{'_with_input' if with_input else ''}.txt"
    text = resources.files("compresso.data").joinpath("prompts", name).read_text(encoding="utf-8").removesuffix("\n")
    return Prompt(text, VERSION, hashlib.sha256(text.encode()).hexdigest())


def prompt_identity() -> dict[str, str]:
    """Version and sha256 of both variants: what a checkpoint records and `compresso.load` compares."""
    return {
        "version": VERSION,
        "sha256": collaborative_prompt(False).sha256,
        "sha256_with_input": collaborative_prompt(True).sha256,
    }


def user_turn(instruction: str, input: str = "") -> str:
    """What the user says: the instruction, followed by its input if there is one; the content of a chat message with
    the same meaning.
    """
    return f"{instruction}{INPUT_HEADER}{input}" if input else instruction


def body(instruction: str, input: str = "") -> str:
    """The text that stands directly before a response, without the collaborative prompt."""
    return f"{USER_HEADER}{user_turn(instruction, input)}{RESPONSE_HEADER}"


def opening(turn: str, prompt_on: bool) -> str:
    """What precedes the first user header: the collaborative prompt in the variant that suits `turn`, or nothing.

    The variant is read from the text of the turn, so that a chat message which spells out its input gets the same bytes
    as an instruction that came with one.
    """
    return collaborative_prompt(INPUT_HEADER in turn).text + BETWEEN_BLOCKS if prompt_on else ""


def full_prompt(instruction: str, input: str = "", prompt_on: bool = True) -> str:
    """All text before a response: the collaborative prompt if it is on, then the body.

    >>> full_prompt("Say hello.", prompt_on=False)
    '###User Instruction:\\nSay hello.\\n\\n### Response:'
    """
    return opening(user_turn(instruction, input), prompt_on) + body(instruction, input)
