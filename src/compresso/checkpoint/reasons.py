"""What another library's error says, on one line of ours."""

from huggingface_hub.errors import StrictDataclassError

from compresso.errors import quoted


def reason_of(error: BaseException) -> str:
    """The rule that was broken, on one bounded line, without the frame in which a config class words its own rules.

    >>> reason_of(ValueError("first\\n  second"))
    'first second'
    """
    if isinstance(error, StrictDataclassError) and error.__cause__ is not None:
        error = error.__cause__
    return quoted(error) or type(error).__name__
