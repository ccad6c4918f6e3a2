"""One table of errors: each exception class has an HTTP status, a type and a body, over HTTP, handles and the client.

Errors cross Serve handles, so every class keeps its arguments when it is pickled.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

COMPLETIONS = "/v1/completions"
DECISIONS = "/v1/decisions"
"""The routes that answer with OpenAI's nested errors."""
SYSTEM_ONE = "/v1/systemone"
"""The route that answers with TypeSafe's errors."""

UNPROCESSABLE = 422
"""Status of an invalid request where TypeSafe's clients ask."""

RETRY_AFTER_S = 1
"""``Retry-After`` of a 503 when no better estimate is known."""


Place = tuple[str | int, ...]
"""The fields and indices that lead to a part of a request."""


class ScoringError(Exception):
    """Base class of all errors that a caller may see.

    Attributes:
        message: text that names the value, the limit and the remedy.
        param: the request field that is wrong, or None.
        index: the item that is wrong, or None if the whole request is.
        retry_after_s: seconds after which to retry, or None.
        where: the place of what is wrong in the request, such as ``("questions", "urgent", "criteria")``; empty:
            ``param`` alone says it.
    """

    status: ClassVar[int] = 500
    type: ClassVar[str] = "InternalServerError"

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        index: int | None = None,
        retry_after_s: int | None = None,
        where: Place = (),
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.index = index
        self.retry_after_s = retry_after_s
        self.where = where

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.message, self.param, self.index, self.retry_after_s, self.where)

    def at(self, where: Place) -> ScoringError:
        """The same error, of this place in the request."""
        return _rebuild(type(self), self.message, self.param, self.index, self.retry_after_s, where)

    def answer_on(self, path: str) -> tuple[int, dict[str, Any]]:
        """The status and the body of this error on the route at ``path``."""
        for pattern, answer in _SHAPES:
            if pattern.fullmatch(path):
                return answer(self)
        return self.status, self.body()

    def body(self) -> dict[str, Any]:
        """The flat error object of the scoring routes."""
        return {
            "object": "error",
            "message": self.message,
            "type": self.type,
            "param": self.param,
            "code": self.status,
        }


def _rebuild(
    cls: type[ScoringError],
    message: str,
    param: str | None,
    index: int | None,
    retry_after_s: int | None,
    where: Place,
) -> ScoringError:
    return cls(message, param=param, index=index, retry_after_s=retry_after_s, where=where)


class InvalidRequestError(ScoringError):
    """The request is invalid and must be changed."""

    status = 400
    type = "BadRequestError"


class AuthenticationError(ScoringError):
    """The API key is missing or wrong."""

    status = 401
    type = "AuthenticationError"


class NotFoundError(ScoringError):
    """The model or route is unknown."""

    status = 404
    type = "NotFoundError"


class MethodNotAllowedError(ScoringError):
    """The route exists, but does not allow this method."""

    status = 405
    type = "MethodNotAllowedError"


class TooLargeError(ScoringError):
    """The request has more bytes, items or tokens than a limit allows."""

    status = 413
    type = "RequestTooLargeError"


class UnsupportedEncodingError(ScoringError):
    """The body's Content-Encoding is not supported."""

    status = 415
    type = "UnsupportedEncodingError"


class InternalError(ScoringError):
    """The service or the model failed."""


class OverloadedError(ScoringError):
    """The service is overloaded, or no replica is healthy: retry after ``retry_after_s`` seconds."""

    status = 503
    type = "ServiceUnavailableError"


class QuotaExceededError(OverloadedError):
    """The API key has used its quota: retry after ``retry_after_s`` seconds."""

    status = 429
    type = "RateLimitError"


class SelfTestError(OverloadedError):
    """A model failed its self-test (``readiness.py``); a retry will not help."""

    type = "SelfTestError"


class DeadlineExceededError(ScoringError):
    """The request's time limit passed; its queued work was dropped."""

    status = 504
    type = "TimeoutError"


ERRORS: tuple[type[ScoringError], ...] = (
    InvalidRequestError,
    AuthenticationError,
    NotFoundError,
    MethodNotAllowedError,
    TooLargeError,
    UnsupportedEncodingError,
    QuotaExceededError,
    InternalError,
    OverloadedError,
    DeadlineExceededError,
)

BY_STATUS: dict[int, type[ScoringError]] = {error.status: error for error in ERRORS}


def _nested(error: ScoringError, status: int | None = None) -> tuple[int, dict[str, Any]]:
    """OpenAI's error object."""
    status = status or error.status
    return status, {"error": {"message": error.message, "type": error.type, "param": error.param, "code": status}}


def _typesafe(error: ScoringError) -> tuple[int, dict[str, Any]]:
    """TypeSafe's ``detail``: FastAPI's list for an invalid request. OpenAI's object is beside it, for other clients."""
    if isinstance(error, InvalidRequestError):
        where = error.where or (() if error.param is None else (error.param,))
        status, nested = _nested(error, UNPROCESSABLE)
        return status, {"detail": [{"loc": ["body", *where], "msg": error.message, "type": "value_error"}], **nested}
    status, nested = _nested(error)
    words = re.findall("[A-Z][a-z]*", error.type)
    return status, {"detail": {"error_type": "_".join(words).lower(), "message": error.message}, **nested}


# Paths that resemble these routes too, after a prefix, as a misconfigured client sends. A model may be called
# completions: its card is at /v1/models/completions.
_SHAPES: Sequence[tuple[re.Pattern[str], Callable[[ScoringError], tuple[int, dict[str, Any]]]]] = (
    (re.compile(r"(?!.*/v1/models/).*(completions|decisions)/*", re.DOTALL), _nested),
    (re.compile(r"(?!.*/v1/models/).*systemone/*", re.DOTALL), _typesafe),
)
"""Errors on the routes of other services' clients, by path; elsewhere errors are flat."""
