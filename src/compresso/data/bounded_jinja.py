"""The environment that chat templates are rendered in: jinja's sandbox, with each step of a loop, call and filter
counted, and what an operator, a method or a filter is about to make looked at before it is made.

References:
    jinja2.sandbox: `intercepted_binops` and `call`, through which operators and calls pass.
"""

import functools
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import cast

from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from compresso.errors import DataError

STEPS, STEPS_FOR_EACH = 100_000, 1_000
"""Of loops, calls and filters in one rendering, beside so many for each turn; templates take some dozens."""
SECONDS = 1.0
"""Of computing, for what takes few steps and long ones."""
LETTERS, LETTERS_FOR_EACH = 4_000_000, 64
"""That one rendering may make on its way, beside so many for each letter of the conversation."""
LARGEST, BITS, INDENT = 1_000_000, 10_000, 64
"""A number that is passed to a method or a filter, what one that is computed may take, and an indent of JSON."""
_WIDTH = re.compile(r"\d{6,}|\*")
_NESTED = re.compile(r"\{[^{}]*\{")
_GROWS = frozenset({"join", "replace", "expandtabs", "translate", "format", "format_map", "indent", "wordwrap"})


class TemplateLimit(DataError):
    """A chat template that was stopped; another conversation would fare no better."""


def stopped(why: str) -> TemplateLimit:
    """The error of a template that was stopped, and the cure."""
    return TemplateLimit(
        f"the tokenizer's chat template was stopped: {why}. Repair or remove it (chat_template.jinja, or chat_template"
        " in tokenizer_config.json)."
    )


class _Generator(CodeGenerator):
    """Joins the parts of `a ~ b` by the environment's own function, which counts them."""

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.write("environment.joined((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")


class _Counting(NodeTransformer):
    """Lets each loop run over `counted`, each list, tuple and dict pass through `made`, and each body that may run more
    than once say what it writes.
    """

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = _passed("counted", cast(nodes.Expr, node.iter))
        node.body = [_entered(node.body, node), *node.body]
        return node

    def visit_Macro(self, node: nodes.Macro | nodes.CallBlock) -> nodes.Node:
        self.generic_visit(node)
        node.body = [_entered(node.body, node), *node.body]
        return node

    visit_CallBlock = visit_Macro

    def visit_List(self, node: nodes.Expr) -> nodes.Node:
        self.generic_visit(node)
        return node if getattr(node, "ctx", "load") == "store" else _passed("made", node)

    visit_Tuple = visit_Dict = visit_List


def _entered(body: Sequence[nodes.Node], node: nodes.Node) -> nodes.Node:
    """A statement for the beginning of a body, with the letters that stand in it as they are."""
    letters = sum(len(data.data) for one in body for data in _data(one))
    count = nodes.Const(letters, lineno=node.lineno, environment=node.environment)
    return nodes.ExprStmt(_passed("entered", count), lineno=node.lineno, environment=node.environment)


def _data(node: nodes.Node) -> Iterator[nodes.TemplateData]:
    """Text of a template in a node, but for bodies inside that count their own."""
    if isinstance(node, nodes.TemplateData):
        yield node
    elif not isinstance(node, nodes.For | nodes.Macro | nodes.CallBlock):
        for inner in node.iter_child_nodes():
            yield from _data(inner)


def _passed(name: str, value: nodes.Expr) -> nodes.Expr:
    """A value passed through a function of the environment."""
    line, environment = value.lineno, value.environment
    function = nodes.EnvironmentAttribute(name, lineno=line, environment=environment)
    return nodes.Call(function, [value], [], None, None, lineno=line, environment=environment)


class Bounded(ImmutableSandboxedEnvironment):
    """An environment that counts; one rendering at a time."""

    code_generator_class = _Generator
    intercepted_binops = frozenset({"+", "*", "**", "%"})
    steps = letters = most_steps = room = 0
    until = float("inf")

    def begin(self, turns: int, letters: int) -> None:
        """Start a rendering of a conversation of so many turns and letters."""
        self.steps, self.most_steps = 0, STEPS + STEPS_FOR_EACH * turns
        self.letters, self.room = 0, LETTERS + LETTERS_FOR_EACH * letters
        self.until = time.process_time() + SECONDS

    def step(self) -> None:
        self.steps += 1
        if self.steps > self.most_steps:
            raise stopped(f"it takes more than {self.most_steps:,} steps")
        if self.steps % 16 == 0 and time.process_time() > self.until:
            raise stopped(f"it computes for more than {SECONDS:g} s")

    def entered(self, letters: int) -> None:
        """Note what a body writes that is run once more."""
        self.grow(letters)

    def grow(self, letters: int) -> None:
        """Note what is about to be made."""
        self.letters += letters
        if self.letters > self.room:
            raise stopped(f"it makes more than {self.room:,} letters of text")

    def made(self, value: object) -> object:
        """Note what was made, with all that is in it: a list of lists may be written out much longer than it is."""
        waiting = [value]
        while waiting:
            one = waiting.pop()
            if isinstance(one, Namespace):
                one = object.__getattribute__(one, "_Namespace__attrs")
            if isinstance(one, str | bytes | list | tuple | dict):
                self.grow(len(one) if isinstance(one, str | bytes) else 8 * len(one) + 8)
            if isinstance(one, list | tuple):
                waiting += one
            elif isinstance(one, dict):
                waiting += one.values()
        return value

    def counted(self, values: Iterable[object]) -> Iterator[object]:
        """The values of a loop."""
        for value in values:
            self.step()
            yield value

    def joined(self, parts: Sequence[object]) -> str:
        """`a ~ b`."""
        texts = [str(part) for part in parts]
        self.grow(sum(map(len, texts)))
        return "".join(texts)

    def _generate(self, source: nodes.Template, *arguments: object, **named: object) -> str:
        """Python code of a template, with what is to be counted marked in it."""
        return super()._generate(_Counting().visit(source), *arguments, **named)  # pyright: ignore[reportArgumentType]

    def call_binop(self, context: Context, operator: str, left: object, right: object) -> object:
        """An operator, once what it makes was found to be small."""
        self.step()
        for one, other in ((left, right), (right, left)):
            if operator == "*" and isinstance(one, str | bytes | list | tuple) and isinstance(other, int):
                self.grow(len(one) * max(0, other))
        if isinstance(left, int) and isinstance(right, int):
            bits = {"*": left.bit_length() + right.bit_length(), "**": left.bit_length() * max(0, right)}
            if bits.get(operator, 0) > BITS:
                raise stopped(f"it computes a number of more than {BITS:,} bits")
        if operator == "%" and isinstance(left, str | bytes):
            self._check_widths(left, right)
            self._fill(left, right if isinstance(right, list | tuple) else [right], "%")
        if operator == "+" and isinstance(left, str | list | tuple) and isinstance(right, str | list | tuple):
            self.grow(len(left) + len(right))
        return self.made(super().call_binop(context, operator, left, right))

    def call(__self, __context: Context, __obj: Callable[..., object], *args: object, **kwargs: object) -> object:
        """A call, once what a method of text makes was found to be small."""
        self, method = __self, getattr(__obj, "__wrapped__", __obj)
        self.step()
        owner = getattr(method, "__self__", None)
        if isinstance(owner, str | bytes | int | list | tuple):
            args = self.checked(getattr(method, "__name__", ""), (owner, *args), kwargs)[1:]
        return self.made(super().call(__context, __obj, *args, **kwargs))

    def checked(self, name: str, args: tuple[object, ...], kwargs: Mapping[str, object]) -> tuple[object, ...]:
        """The arguments of a method or a filter by its name, the text first, once they were found to make little; what
        can be read once only is read into a list.
        """
        values = [*args, *kwargs.values()]
        if any(isinstance(one, int) and one > LARGEST for one in values[1:]):
            raise stopped(f"it gives a number above {LARGEST:,} to {name}")
        text = args[0] if args else ""
        others = [one for one in values[1:] if isinstance(one, str | bytes)]
        longest = max(map(len, others), default=0)
        if name == "tojson" and any(
            (isinstance(one, int) and one > INDENT) or (isinstance(one, str) and len(one) > INDENT)
            for one in [*args[2:], kwargs.get("indent")]
        ):
            raise stopped(f"it indents JSON by more than {INDENT}")
        if name == "sum" and not isinstance(values[-1], int | float | str) and len(values) > 1:
            raise stopped("it adds up what are no numbers")
        if name not in _GROWS:
            return args
        if name == "join":
            return self._joining(text, args, longest)
        if not isinstance(text, str | bytes):
            return args
        if name in ("format", "format_map"):
            self._check_widths(text, values[1:])
            self._fill(text, values[1:], "{")
            self._fill(text, values[1:], "%")  # the filter of this name writes as the operator does
        elif name == "replace":
            old = cast(str, others[0]) if others else ""
            times = cast(str, text).count(old) if isinstance(text, type(old)) else 0
            self.grow(len(text) + times * longest)
        elif name == "translate":
            tables = [one for one in values[1:] if isinstance(one, Mapping)]
            self.grow(len(text) * max((len(str(one)) for table in tables for one in table.values()), default=1))
        else:
            widths = [one for one in values[1:] if isinstance(one, int)]
            self.grow((len(text) + 1) * max([longest, *widths, 8]) if name == "expandtabs" or longest else len(text))
            if name == "indent":
                self.grow((str(text).count("\n") + 1) * max([longest, *widths, 4]))
        return args

    def _joining(self, text: object, args: tuple[object, ...], longest: int) -> tuple[object, ...]:
        """Arguments of `join`, as a method of what stands between, or as a filter of what is joined."""
        second = next(iter(args[1:]), None)
        method = isinstance(text, str | bytes) and second is not None and not isinstance(second, str | bytes)
        given = second if method else text
        if not isinstance(given, Iterable) or isinstance(given, str | bytes):
            return args
        parts = list(cast(Iterable[object], self.counted(given)))
        between = len(cast(str, text)) if method else longest
        self.grow(sum(len(str(part)) + between for part in parts))
        return (text, parts, *args[2:]) if method else (parts, *args[1:])

    def _fill(self, text: str | bytes, values: Sequence[object], mark: str) -> None:
        """Note what a format makes at most: each of its marks may stand for the longest value."""
        marks = str(text).count(mark)
        self.grow(len(text) + marks * max((len(str(one)) for one in values), default=0))

    def _check_widths(self, text: str | bytes, values: object) -> None:
        """Refuse a format that fills up to a width which no line has."""
        words = text if isinstance(text, str) else text.decode("latin-1")
        numbers = values if isinstance(values, list | tuple) else [values]
        given = any(isinstance(one, int) and abs(one) >= 100_000 for one in numbers)
        if any(found != "*" or given for found in _WIDTH.findall(words)) or (given and _NESTED.search(words)):
            raise stopped("it formats text to a width of 100,000 or more")


def bounded_filter(environment: Bounded, name: str, function: Callable[..., object]) -> Callable[..., object]:
    """A filter that counts as a step, and is looked at before it makes text."""
    before = int(getattr(function, "jinja_pass_arg", None) is not None)

    @functools.wraps(function)
    def bounded(*args: object, **kwargs: object) -> object:
        environment.step()
        checked = environment.checked(name, args[before:], kwargs)
        return environment.made(function(*args[:before], *checked, **kwargs))

    return bounded
