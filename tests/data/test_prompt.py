"""The bytes before a response are fixed: models trained on them depend on each line break."""

from compresso.data.prompt import body


def test_body_without_input():
    assert body("Name it.") == "###User Instruction:\nName it.\n\n### Response:"


def test_body_with_input():
    assert body("Sort.", "b a") == "###User Instruction:\nSort.\n\n### Input:\nb a\n\n### Response:"
