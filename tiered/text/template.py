"""The sandbox that a model's chat template runs in: jinja2 without side effects, and finite."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from datetime import datetime
from types import BuiltinMethodType
from typing import Any, NoReturn, cast

from jinja2 import TemplateError, nodes
from jinja2.compiler import CodeGenerator
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, LoopControlExtension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_STEPS = 1_000_000  # calls and rounds of loops; a long conversation takes some thousands
MAX_TEXT = 64 * 1024 * 1024  # characters of any one value
MAX_VALUE = 1_000_000  # items or characters that one operation may make out of a few


class GenerationTag(Extension):
    """`{% generation %}...{% endgeneration %}` marks text for training and changes nothing."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class BoundedCode(CodeGenerator):
    """Counts the rounds of every loop, and looks at the size of what is put together."""

    def visit_Template(self, node: nodes.Template, frame: Any = None) -> None:
        for loop in list(node.find_all(nodes.For)):
            loop.iter = filtered(cast(nodes.Expr, loop.iter), "counted")
        for concat in list(node.find_all(nodes.Concat)):
            concat.nodes = [filtered(part, "bounded") for part in concat.nodes]
        super().visit_Template(node, frame)


def filtered(node: nodes.Expr, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


class Sandbox(ImmutableSandboxedEnvironment):
    """What Hugging Face's templates expect of their environment, with a limited number of steps.

    The sandbox itself refuses attributes that lead out of it and everything that changes data.
    """

    code_generator_class = BoundedCode
    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            finalize=bounded,
            extensions=[LoopControlExtension, GenerationTag],
        )
        self.filters["counted"] = self._counted
        self.filters["bounded"] = bounded
        self.filters["join"] = join
        self.filters["tojson"] = to_json
        for name in ("batch", "center", "format", "indent", "slice"):
            del self.filters[name]  # each makes much out of a number
        del self.globals["lipsum"]
        self.globals["raise_exception"] = raise_exception
        self.globals["strftime_now"] = strftime_now
        self._steps_left = 0

    def start(self) -> None:
        """Count steps from zero again."""
        self._steps_left = MAX_STEPS

    def call(self, context: Any, called: Any, /, *args: Any, **kwargs: Any) -> Any:
        self._step()
        method = getattr(called, "__wrapped__", called)  # the sandbox wraps str.format
        if isinstance(method, BuiltinMethodType) and isinstance(method.__self__, str):
            check_text_method(method.__self__, method.__name__, args)
        return super().call(context, called, *args, **kwargs)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        self._step()
        if operator == "**":
            raise SecurityError("powers are not allowed")
        if operator == "*":
            check_product(left, right)
        if operator == "%" and isinstance(left, str):
            raise SecurityError("formatting with % is not allowed")
        return bounded(super().call_binop(context, operator, left, right))

    def _counted(self, values: Iterable[Any]) -> Iterator[Any]:
        for value in values:
            self._step()
            yield value

    def _step(self) -> None:
        self._steps_left -= 1
        if self._steps_left < 0:
            raise SecurityError(f"it takes more than {MAX_STEPS} steps")


def bounded(value: Any) -> Any:
    """`value`, unless it is a text of absurd length: doubling one thirty times makes a gigabyte."""
    if isinstance(value, str) and len(value) > MAX_TEXT:
        raise SecurityError(f"it makes more than {MAX_TEXT} characters of text")
    return value


def join(values: Iterable[Any], separator: str = "", attribute: str | None = None) -> str:
    """jinja2's filter for plain text, within bounds."""
    if attribute is not None:
        raise SecurityError("join by attribute is not allowed")
    pieces, length = [], 0
    for value in values:
        pieces.append(str(value))
        length += len(pieces[-1]) + len(separator)
        if length > MAX_TEXT:
            raise SecurityError(f"it makes more than {MAX_TEXT} characters of text")
    return separator.join(pieces)


def check_product(left: Any, right: Any) -> None:
    """A sequence times a number stays small."""
    for sequence, count in ((left, right), (right, left)):
        is_repeated = isinstance(count, int) and hasattr(sequence, "__len__")
        if is_repeated and len(sequence) * count > MAX_VALUE:
            raise SecurityError("it makes too long a value")


def check_text_method(text: str, method: str, args: tuple[Any, ...]) -> None:
    """Methods that make long text out of short keep within bounds."""
    if method in ("format", "format_map") and ":" in text:
        raise SecurityError("widths in format are not allowed")
    if method in ("ljust", "rjust", "center", "zfill", "expandtabs"):
        grown = max((arg for arg in args if isinstance(arg, int)), default=0)
    elif method == "replace" and len(args) >= 2 and isinstance(args[0], str):
        grown = text.count(args[0]) * len(args[1])
    elif method == "join" and args:
        grown = len(text) * len(args[0]) if hasattr(args[0], "__len__") else 0
    else:
        return
    if grown > MAX_VALUE + len(text):
        raise SecurityError("it makes too long a text")


def raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def to_json(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any
) -> str:
    """JSON as it is, where jinja2's own filter escapes it for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)
