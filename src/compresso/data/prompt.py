"""The text that stands before a response: byte for byte the same in training, in measures and in the chat template."""


def body(instruction: str, input: str = "") -> str:
    """The instruction part of an example, up to the place where the response begins.

    The response follows directly, without a space or a line break between.

    >>> body("Name a colour.")
    '###User Instruction:\\nName a colour.\\n\\n### Response:'
    """
    if input:
        return f"###User Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
    return f"###User Instruction:\n{instruction}\n\n### Response:"
