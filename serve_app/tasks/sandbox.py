"""Jinja templates from a checkpoint's files, which may be hostile: rendered as transformers does, within bounds.

Jinja's immutable sandbox keeps a template from Python's internals, but it bounds neither time nor memory. Here every
loop and call, and every text or list that a template makes, is paid for from the *budget* of one rendering.
"""

from __future__ import annotations

import json
import operator
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from datetime import datetime
from functools import wraps
from typing import Any, cast

from jinja2 import TemplateError, meta, nodes, pass_environment
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import do_indent
from jinja2.parser import Parser
from jinja2.runtime import Context, LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

MOST_SOURCE = 2**17
"""The most characters of a template."""
_ALLOWANCE = 2**20
"""What a rendering may cost at least, in characters, steps and entries of lists."""
_PER_CHARACTER = 64
"""What it may cost more for each character of the messages."""
_CPU_S = 1.0
"""Seconds of a thread that a rendering may take, for work that costs little but takes long."""
_MOST_BITS = 1_024
"""The most bits of a number."""
_MOST_INDENT = 16
"""The most characters of JSON's indents and separators."""
_MOST_DATE = 128
"""The most characters of a date's format; each makes 256 at most."""
_SPECIFIER = re.compile(r"%(?:\(\w*\))?[#0+ -]*[0-9]{0,2}(?:\.[0-9]{0,2})?[hlL]?[a-zA-Z%]")
"""What ``%`` may replace in a text: widths and precisions of more digits make a text of any length."""
_MOST_NUMBER = 512
"""The most characters that a number becomes there: 99 after the point, and as many before it as float64 has."""

_METHODS = frozenset(
    (
        "capitalize",
        "count",
        "endswith",
        "find",
        "index",
        "isalnum",
        "isalpha",
        "isdigit",
        "islower",
        "isnumeric",
        "isspace",
        "isupper",
        "join",
        "lower",
        "lstrip",
        "partition",
        "removeprefix",
        "removesuffix",
        "replace",
        "rfind",
        "rindex",
        "rpartition",
        "rsplit",
        "rstrip",
        "split",
        "splitlines",
        "startswith",
        "strip",
        "title",
        "upper",
    )
)
"""The methods of texts that a template may call."""
_FILTERS = frozenset(
    (
        "abs",
        "capitalize",
        "count",
        "d",
        "default",
        "dictsort",
        "first",
        "float",
        "groupby",
        "int",
        "items",
        "join",
        "last",
        "length",
        "list",
        "lower",
        "map",
        "max",
        "min",
        "reject",
        "rejectattr",
        "replace",
        "reverse",
        "safe",
        "select",
        "selectattr",
        "sort",
        "string",
        "title",
        "trim",
        "unique",
        "upper",
    )
)
"""Jinja's filters that a template may use, beside ``tojson``."""


class _Budget:
    """What is left to one rendering."""

    def __init__(self, characters: int) -> None:
        self.most = self.left = _ALLOWANCE + _PER_CHARACTER * characters
        self._until = time.thread_time() + _CPU_S

    def spend(self, cost: int) -> None:
        self.left -= cost + 1
        if self.left < 0:
            raise SecurityError(f"it takes more than {self.most:,} steps and characters")
        if time.thread_time() > self._until:
            raise SecurityError(f"it takes more than {_CPU_S:g} seconds")


_budget: ContextVar[_Budget] = ContextVar("_budget")


def _spend(cost: int) -> None:
    _budget.get().spend(cost)


def _paid(value: Any) -> Any:
    """The value, after it is paid for: lists with all that is in them."""
    found = [value]
    while found:
        each = found.pop()
        match each:
            case str() as text:
                _spend(len(text))
            case list() | tuple() as entries:
                _spend(len(cast(Sequence[Any], entries)))
                found += entries
            case dict() as entries:
                _spend(len(cast(Mapping[Any, Any], entries)))
                found += [*entries, *entries.values()]
            case Namespace() if each is not value:
                raise SecurityError("a list must not hold a namespace")
            case _:
                _spend(0)
    return value


def _paying(function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)  # keeps Jinja's mark of what the function wants as its first argument
    def paying(*args: Any, **named: Any) -> Any:
        return _paid(function(*args, **named))

    return paying


def _paying_each(function: Callable[..., Iterable[Any]]) -> Callable[..., Iterator[Any]]:
    @wraps(function)
    def paying(*args: Any, **named: Any) -> Iterator[Any]:
        yield from map(_paid, function(*args, **named))

    return paying


def _each(entries: Iterable[Any], cost: int) -> Iterator[Any]:
    """The entries of a loop whose body costs this much each time."""
    for entry in entries:
        _spend(cost)
        yield entry


def _concatenated(values: Sequence[Any]) -> str:
    return "".join(map(str, values))


def _joined(separator: str, values: Iterable[Any]) -> str:
    texts: list[str] = []
    for value in values:
        texts.append(str(value))
        _spend(len(texts[-1]) + len(separator))
    return separator.join(texts)


def _join(values: Iterable[Any], d: str = "") -> str:
    return _joined(str(d), values)


def _replace(text: Any, old: str, new: str, count: int = -1) -> str:
    text = str(text)
    found = text.count(old)
    _spend(len(text) + len(new) * (found if count < 0 else min(count, found)))
    return text.replace(old, new, count)


def _formatted(text: str, values: Any) -> str:
    if "%" in _SPECIFIER.sub("", text):
        raise SecurityError("it must not format text with % by more than names, and widths and digits below 100")
    # Names may stand for the same value many times.
    _spend(len(text) + len(_SPECIFIER.findall(text)) * (_MOST_NUMBER + len(str(values))))
    return text % values


def _format(text: Any, *values: Any, **named: Any) -> str:
    return _formatted(str(text), named or values)


def _indent(text: Any, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    text = str(text)
    if isinstance(width, int):
        _spend(max(width, 0))
        width = " " * width
    _spend((1 + len(text.splitlines())) * (1 + len(width)) + len(text))
    return do_indent(text, width, first, blank)


def _strftime_now(format: str) -> str:
    if len(format) > _MOST_DATE:
        raise SecurityError(f"a date's format must not have more than {_MOST_DATE} characters")
    return datetime.now().strftime(format)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    for text in (" " * min(indent or 0, _MOST_INDENT + 1), *(separators or ())):
        if len(text) > _MOST_INDENT:
            raise SecurityError(f"JSON's indents and separators must not have more than {_MOST_INDENT} characters")
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


class _Dict:
    """``dict`` for templates, without its attributes."""

    def __call__(self, *args: Any, **named: Any) -> dict[Any, Any]:
        return dict(*args, **named)


class _Namespace(Namespace):
    """Jinja's namespace, without private names."""

    def __init__(*args: Any, **named: Any) -> None:
        self, *own = args
        attributes = dict(*own, **named)
        for name, value in attributes.items():
            _check_attribute(name, value)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_attribute(name, value)
        super().__setitem__(name, value)


def _check_attribute(name: Any, value: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace must not have a private name such as {name!r}")
    if isinstance(value, Namespace):
        raise SecurityError("a namespace must not hold another one")


class _Generation(Extension):
    """The tag ``generation``, which marks an assistant's text for training; its body is rendered as it is."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Bounded(NodeTransformer):
    """Puts the payments for loops, lists and joined texts into a parsed template."""

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802
        cost = sum(len(each.data) for each in node.find_all(nodes.TemplateData))
        self.generic_visit(node)
        node.iter = _filter("each", cast(nodes.Expr, node.iter), nodes.Const(cost))
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _filter("concatenated", nodes.List(node.nodes))

    def _visit_made(self, node: nodes.Expr) -> nodes.Node:
        self.generic_visit(node)
        return node if getattr(node, "ctx", "load") == "store" else _filter("paid", node)

    visit_List = visit_Tuple = visit_Dict = _visit_made  # noqa: N815


def _filter(name: str, node: nodes.Expr, *args: nodes.Expr) -> nodes.Filter:
    return nodes.Filter(node, name, list(args), [], None, None)


@pass_environment  # so that no output is worked out when the template is compiled, which has no budget
def _paid_output(_: object, value: Any) -> Any:
    return _paid(value)


class _Environment(ImmutableSandboxedEnvironment):
    """Jinja's environment as transformers sets it up for chat templates, within bounds."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, size: int) -> None:
        self._size = size
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, loopcontrols],
            finalize=_paid_output,
        )
        own: dict[str, Callable[..., Any]]
        own = {"join": _join, "replace": _replace, "tojson": _tojson, "concatenated": _concatenated}
        own |= {"format": _format, "indent": _indent}
        own["map"] = _paying_each(self.filters["map"])  # one list may be what every entry is mapped to
        given = {name: function for name, function in self.filters.items() if name in _FILTERS} | own
        self.filters = {name: _paying(function) for name, function in given.items()} | {"each": _each, "paid": _paid}
        self.globals = {
            "range": self.globals["range"],
            "dict": _Dict(),
            "namespace": _Namespace,
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
        }

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, str):
            return attr in _METHODS
        # An integer's to_bytes makes any number of bytes, and these can be multiplied.
        return not isinstance(obj, int | float) and super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> None:
        if getattr(value, "__name__", "") in ("format", "format_map") and isinstance(
            getattr(value, "__self__", None), str
        ):
            raise SecurityError("it must not call str.format")

    def call(self, context: Context, obj: Any, *args: Any, **named: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        text, name = getattr(obj, "__self__", None), getattr(obj, "__name__", "")
        if isinstance(text, str) and name in ("join", "replace"):
            own = _joined if name == "join" else _replace
            return _paid(own(text, *args))  # what is named are the scopes that Jinja passes to every call
        if isinstance(obj, Macro):
            _spend(self._size)
        if isinstance(obj, LoopContext):
            args = tuple(_each(entries, self._size) for entries in args)
        return _paid(super().call(context, obj, *args, **named))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:  # noqa: ARG002
        return _paid(_BINOPS[operator](left, right))


def _times(left: Any, right: Any) -> Any:
    numbers = [each for each in (left, right) if isinstance(each, int | float)]
    for many, each in ((left, right), (right, left)):
        if isinstance(each, int) and isinstance(many, str | list | tuple):
            _spend(len(cast(Sequence[Any], many)) * max(each, 0))
    if sum(each.bit_length() for each in numbers if isinstance(each, int)) > _MOST_BITS:
        raise SecurityError(f"it makes a number of more than {_MOST_BITS} bits")
    return operator.mul(left, right)


def _modulo(left: Any, right: Any) -> Any:
    if isinstance(left, str):
        return _formatted(left, right)
    return operator.mod(left, right)


def _power(*_: Any) -> Any:
    raise SecurityError("it must not use **")


_BINOPS: Mapping[str, Callable[[Any, Any], Any]] = {"+": operator.add, "*": _times, "%": _modulo, "**": _power}


class BoundedTemplate:
    """A template that can be rendered within bounds.

    Attributes:
        variables: the names that the template expects to be given.

    Raises:
        TemplateError: the template is too long, or no valid template.
    """

    def __init__(self, source: str) -> None:
        if len(source) > MOST_SOURCE:
            raise TemplateError(f"it has {len(source):,} characters; at most {MOST_SOURCE:,} are allowed")
        environment = _Environment(len(source))
        try:
            parsed = environment.parse(source)
            self.variables = frozenset(meta.find_undeclared_variables(parsed))
            self._template = environment.from_string(_Bounded().visit(parsed))
        except (RecursionError, SyntaxError, MemoryError, ValueError) as error:
            # Python's own limits on nesting and on the digits of a number.
            raise TemplateError(f"it is nested too deep, or has too long a number ({type(error).__name__})") from None

    def render(self, variables: Mapping[str, Any], characters: int) -> str:
        """Render the template.

        Args:
            characters: the number of characters of the variables' texts.

        Raises:
            Exception: of any kind that Python knows, since a template is code.
        """
        token = _budget.set(_Budget(characters))
        try:
            return "".join(self._template.generate(variables))
        finally:
            _budget.reset(token)
