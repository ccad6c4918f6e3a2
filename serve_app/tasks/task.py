"""A kind of request: its routes and wire types, and how its requests become work for an engine and answers."""

from __future__ import annotations

from collections.abc import Callable
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
A_co = TypeVar("A_co", covariant=True)


class PreparedRequest(Protocol[A_co]):
    """A request with its prompts built: what an engine must compute, and how its result becomes the answer."""

    @property
    def batch(self) -> TokenBatch: ...

    @property
    def query_tokens(self) -> int:
        """Tokens at the front of every prompt that may come again in another request; 0: those that all share."""
        ...

    @property
    def items(self) -> int:
        """The number of items, documents or prompts that are scored."""
        ...

    @property
    def size(self) -> int:
        """The approximate number of values in the answer."""
        ...

    def answer(self, result: BatchResult) -> A_co:
        """Make the answer. Runs in a thread if it is large.

        Raises:
            InternalError: the model's output is not finite.
        """
        ...


@dataclass(frozen=True, slots=True)
class Answered(Generic[A]):
    """A request that no engine needs to see."""

    value: A


@dataclass(frozen=True, slots=True)
class Converted(Generic[B, A]):
    """A prepared request with its answer in the shape of another service."""

    inner: PreparedRequest[B]
    convert: Callable[[B], A]

    @property
    def batch(self) -> TokenBatch:
        return self.inner.batch

    @property
    def query_tokens(self) -> int:
        return self.inner.query_tokens

    @property
    def items(self) -> int:
        return self.inner.items

    @property
    def size(self) -> int:
        return self.inner.size

    def answer(self, result: BatchResult) -> A:
        return self.convert(self.inner.answer(result))


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
        name: in the description of the API.
        paths: of its routes, all of them ``POST``.
        description: what its routes do, for the API's documentation.
        request: the body.
        response: the answer, or the type of its entries if it is a list.
        builder: makes what prepares requests to one model; called again when the model's settings change. It raises
            ValueError if the model cannot be served as the settings say.
        error: the shape of its errors.
        scores: whether an engine is needed, so that a busy service refuses requests at once.
        matches: whether a body is of this kind, for kinds that share a route; None: every body that no other kind of
            the route has taken.
        lines: what is on the lines of a streamed answer; None: answers are not streamed.
    """

    name: str
    paths: tuple[str, ...]
    description: str
    request: type[R]
    response: type[BaseModel]
    builder: Callable[[ModelFacts], Prepare[R, A]]
    error: type[BaseModel] = ErrorResponse
    scores: bool = True
    matches: Callable[[bytes], bool] | None = None
    lines: str | None = None


AnyTask = Task[Any, Any]
