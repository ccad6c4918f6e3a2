"""A kind of request: its routes and wire types, and how its requests become work for an engine and answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

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
        batch: the prompts, and what is read of them.
        query_tokens: tokens at the front of every prompt that may come again in another request; 0: those that all
            share.
        items: number of items, documents or prompts that are scored.
        size: approximate number of values in the answer.
        answer: makes the answer, in a thread if it is large; raises InternalError where the model's output is not
            finite.
    """

    batch: TokenBatch
    query_tokens: int
    items: int
    size: int
    answer: Callable[[BatchResult], A]

    def converted(self, convert: Callable[[A], B]) -> PreparedRequest[B]:
        """The same request with its answer in another service's shape."""
        answer = self.answer
        return PreparedRequest(
            self.batch, self.query_tokens, self.items, self.size, lambda result: convert(answer(result))
        )


@dataclass(frozen=True, slots=True)
class Answered(Generic[A]):
    """A request that no engine needs to see."""

    value: A


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
