"""Messages in the words of the interface in use.

They are written in the words of the command line (`--keep 0.5`, `--skip-bad`). Where a function was called from Python,
they leave it as they are written there (`keep=0.5`, `skip_bad=True`).
"""

import re
from collections.abc import Container, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

FLAGS = {
    "overwrite": "overwrite=True",
    "allow-collapsed": "allow_collapsed=True",
    "allow-dropped": "allow_dropped=True",
    "resume": "resume=True",
    "skip-bad": "skip_bad=True",
    "offload": "offload=True",
    "over-memory": "over_memory=True",
    "memory": "memory=True",
    "no-memory": "memory=False",
    "no-verify": "verify=False",
    "force": "force=True",
    "stream": "stream=True",
    "attention": "attention=True",
}
"""Options without a value, and what takes their place in Python."""
SHARES = {
    "drop_experts": "each layer's experts",
    "filter_pruning": "each layer's channels",
    "slicegpt": "the stream's dimensions",
    "svd": "the numbers of each linear",
}
"""What `keep` is a share of in stages that have no budget of the model's parameters."""
_AS_SPELT = (
    "model data output keep parameters macs milliseconds speedup latency-table memory bytes-at-context max-steps"
    " target task layout seed device dtype format corpus suite"
    " tasks protocol prompt limit data-root prompt-tokens new-tokens rounds measure"
    " engine phase context levels cache"
    " prompts benign judge judge-labels against answers scoring generations trust scorer scorer-label"
)
VALUED = {name: (name.replace("-", "_"),) for name in _AS_SPELT.split()} | {
    "set": ("sets",),
    "batch": ("batches", "batch_size", "batch"),
    "explain": ("explained",),
    "for": ("target",),
    "devices": ("device",),
}
"""Options with a value, and the arguments that take it: of several, the one that the called function has."""
_PLAIN = (
    "auto cpu cuda on off both decode prefill torch onnxruntime llama.cpp"
    " uniform padded native causal-lm classification masked-lm question-answering image-classification segmentation"
    " gguf onnx compressed-tensors vllm-deci low-rank sliced"
    " quick full none likelihood sampled refusal trust"
)
CHOICES = frozenset(_PLAIN.split())
"""Plain words that are an option's value where they follow it."""
_OTHER_NAMES = {
    "dtype": ("precision", "precisions", "quantization", "quantize", "quant", "bits", "outtype"),
    "output": ("out", "output-dir", "out-dir", "outfile", "save", "save-path"),
    "data": ("dataset", "datasets", "train", "train-data"),
    "keep": ("ratio", "share"),
    "batch": ("batch-size",),
    "max-steps": ("steps",),
    "overwrite": ("replace",),
    "target": ("engine",),
}
"""Options, and what the same is called in our tables and by other tools."""
_UNNAMED = ("models", "paths", "path", "recipe")
"""What the command line takes without an option's name."""
_VERBS = ("run", "plan", "inspect", "evaluate", "measure", "latency", "compare", "export", "verify")
_COMMAND = re.compile(r"`compresso (?P<verb>[a-z]+)(?: --(?P<option>[a-z-]+))?`")
_OPTION = re.compile(
    r"(?<![\w-])--(?P<name>[a-z]+(?:-[a-z]+)*)(?![\w-])(?P<value> '[^']*'| \"[^\"]*\"| [^\s`'\"-][^\s`]*)?"
)
_ON_COMMAND_LINE = ContextVar("_ON_COMMAND_LINE", default=False)


@contextmanager
def command_line() -> Iterator[None]:
    """While the block runs, messages stay in the words of the command line."""
    token = _ON_COMMAND_LINE.set(True)
    try:
        yield
    finally:
        _ON_COMMAND_LINE.reset(token)


def worded(message: str, arguments: Container[str]) -> str:
    """A message as the caller of a function that takes these arguments should read it."""
    return message if _ON_COMMAND_LINE.get() else in_python(message, arguments)


def in_python(message: str, arguments: Container[str] = ()) -> str:
    """A message with the command line's options written as arguments.

    Args:
        message: with options such as `--keep 0.5`; commands in backticks become the functions of their names.
        arguments: of the called function, which decide between two names of one option.

    >>> in_python("lower --keep, or give --layout native with --overwrite")
    "lower keep=, or give layout='native' with overwrite=True"
    >>> in_python("give the file of `compresso evaluate --output`")
    'give the file of `compresso.evaluate(output=...)`'
    """

    def function(found: re.Match[str]) -> str:
        verb, option = found["verb"], found["option"]
        if verb not in _VERBS or (option and option not in VALUED):
            return found[0]
        inner = f"({_argument(option, arguments)}=...)" if option else ""
        return f"`compresso.{verb}{inner}`"

    def argument(found: re.Match[str]) -> str:
        name, after = found["name"], found["value"] or ""
        if name in FLAGS and not (name in VALUED and _value(after[1:])):
            return FLAGS[name] + after
        if name not in VALUED:
            return found[0]
        name, value = _argument(name, arguments), _value(after[1:])
        rest = after[1 + len(value) :] if value else after
        if value and not (value[0] in "'\"" or _is_number(value)):
            value = repr(value)
        return f"{name}={f'[{value}]' if value and name == 'sets' else value}{rest}"

    return _OPTION.sub(argument, _COMMAND.sub(function, message))


def named(verb: str, argument: str) -> str:
    """What stands before an argument's value: `output=`; on the command line `--output `, or plain `model `."""
    if not _ON_COMMAND_LINE.get():
        return f"{argument}="
    if argument in _UNNAMED or (argument == "model" and verb not in ("run", "plan")):
        return f"{argument} "
    option = next((option for option, names in VALUED.items() if argument in names), argument)
    return f"--{option} "


def meant(name: str, known: Iterable[str]) -> str | None:
    """The option or argument that somebody means who gives one of another name; None if nobody can tell.

    >>> meant("--precision", ["--dtype", "--output"]), meant("dataset", ["data"]), meant("colour", ["data"])
    ('--dtype', 'data', None)
    """
    bare = name.lstrip("-").replace("_", "-")
    ours = next((option for option, others in _OTHER_NAMES.items() if bare in others), None)
    return next((one for one in known if one.lstrip("-").replace("_", "-") == ours), None)


def _argument(option: str, arguments: Container[str]) -> str:
    """The argument that takes an option's value."""
    return next((name for name in VALUED[option] if name in arguments), VALUED[option][0])


def _value(word: str) -> str:
    """What of the word after an option is its value; empty if the sentence goes on there."""
    if word[:1] in ("'", '"'):
        return word
    bare = word.rstrip(",.;:)")
    is_value = (
        _is_number(bare)
        or bare in CHOICES
        or any(mark in "/.=:,_0123456789" for mark in bare)
        or word[len(bare) :][:1] == ":"
    )
    return bare if bare and is_value else ""


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
