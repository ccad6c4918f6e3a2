"""A task is a kind of request: its routes and wire types, and how requests become engine work and answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from pydantic import BaseModel

from serve_app.contract import BatchResult, TokenBatch
from serve_app.schemas import ErrorResponse, RequestBody
from serve_app.tasks.model_facts import ModelFacts
from serve_app.tasks.steps import Steps

R = TypeVar("R", bound=RequestBody)
A = TypeVar("A")
B = TypeVar("B")


@dataclass(frozen=True, slots=True)
class PreparedRequest(Generic[A]):
    """A request with its prompts built: what an engine must compute, and how its result becomes the answer.

    Attributes:
        batch: the prompts and their reads.
        query_tokens: the number of tokens at the front of every prompt that another request may repeat. 0: the tokens
            that all prompts share.
        items: the number of items, documents or prompts that are scored.
        size: the approximate number of values in the answer.
        answer: the function that makes the answer, called in a thread if the answer is large. It raises InternalError
            if the model's output is not finite.
    """

    batch: TokenBatch
    query_tokens: int
    items: int
    size: int
    answer: Callable[[BatchResult], A]

    def converted(self, convert: Callable[[A], B]) -> PreparedRequest[B]:
        """Convert the answer to another service's shape."""
        answer = self.answer
        return PreparedRequest(
            self.batch, self.query_tokens, self.items, self.size, lambda result: convert(answer(result))
        )


@dataclass(frozen=True, slots=True)
class Binary:
    """An answer that is not JSON."""

    content: bytes
    media_type: str


@dataclass(frozen=True, slots=True)
class Answered(Generic[A]):
    """A request answered without an engine."""

    value: A


class Stream(Protocol):
    """A request whose answer is made in pieces. Only one thread may use it at a time."""

    @property
    def left(self) -> int:
        """The number of entries that are not prepared yet."""
        ...

    def some(self, tokens: int) -> Steps[PreparedRequest[Sequence[BaseModel]]]:
        """Prepare the next entries: one at first, then more each time, up to about ``tokens`` that no other has. Their
        answer is their lines.

        Raises:
            InvalidRequestError: an entry is wrong.
            TooLargeError: the request asks for more than the limits allow.
        """
        ...

    def end(self, computed_tokens: int) -> BaseModel:
        """The last line, when all entries are answered.

        Args:
            computed_tokens: the number of tokens that had to be computed.
        """
        ...


@dataclass(frozen=True, slots=True)
class Lines(Generic[R]):
    """How the answers of a kind of request are streamed, as lines of JSON.

    Attributes:
        description: for the API's documentation.
        builder: makes the function that begins a stream, for one model, as ``Task.builder`` does.
    """

    description: str
    builder: Callable[[ModelFacts], Callable[[R], Stream]]


Prepare = Callable[[R, str], Steps[PreparedRequest[A] | Answered[A]]]
"""Builds a request's prompts in steps, given the request and its id.

Raises:
    InvalidRequestError: the request is wrong.
    TooLargeError: it asks for more than the limits allow.
"""


@dataclass(frozen=True)
class Task(Generic[R, A]):
    """A kind of request.

    Attributes:
        name: the task's name in the API's documentation.
        paths: the paths of its routes; all of them are ``POST``.
        description: what its routes do, for the API's documentation.
        example: a request that every causal model answers, for the API's documentation.
        request: the type of the body.
        response: the type of the answer, or of its entries if the answer is a list.
        builder: the function that makes ``Prepare`` for one model, called again when the model's settings change. It
            raises ValueError if the model cannot be served with its settings.
        error: the type of its errors.
        scores: whether its requests need an engine, so that an overloaded service refuses them at once.
        matches: whether a body is of this task, for tasks that share a route. None: the task takes every body that no
            other task of the route takes.
        lines: how answers are streamed to a request with ``stream``. None: they are not.
        binary: the media type of answers that are not JSON, and what they are. None: all are JSON.
        parse: the function that makes a checked request of a body. None: ``schemas.parse``, in pieces if it is large.
        aliases: names that mean the default model here, where no model is served under them.
    """

    name: str
    paths: tuple[str, ...]
    description: str
    example: Mapping[str, Any]
    request: type[R]
    response: type[BaseModel]
    builder: Callable[[ModelFacts], Prepare[R, A]]
    error: type[BaseModel] = ErrorResponse
    scores: bool = True
    matches: Callable[[bytes], bool] | None = None
    lines: Lines[R] | None = None
    binary: tuple[str, str] | None = None
    parse: Callable[[type[R], bytes], R] | None = None
    aliases: tuple[str, ...] = ()


AnyTask = Task[Any, Any]
