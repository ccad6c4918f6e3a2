"""One table of errors: each exception class has an HTTP status, a type and a body, over HTTP, handles and the client.

Errors cross Serve handles, so every class keeps its arguments when it is pickled.
"""

from __future__ import annotations

import re
from typing import Any, ClassVar

COMPLETIONS = "/v1/completions"
"""The route that answers with nested errors."""
_LIKE_COMPLETIONS = re.compile(r"(?!.*/v1/models/).*completions/*", re.DOTALL)
"""Paths that resemble OpenAI's routes, after a prefix too, as a misconfigured client of OpenAI's API sends: their
errors are nested. A model may be called ``completions``."""

RETRY_AFTER_S = 1
"""``Retry-After`` of a 503 when no better estimate is known."""


class ScoringError(Exception):
    """Base class of all errors that a caller may see.

    Attributes:
        message: text that names the value, the limit and the remedy.
        param: the request field that is wrong, or None.
        index: the item that is wrong, or None if the whole request is.
        retry_after_s: seconds after which to retry, or None.
    """

    status: ClassVar[int] = 500
    type: ClassVar[str] = "InternalServerError"

    def __init__(
        self, message: str, *, param: str | None = None, index: int | None = None, retry_after_s: int | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.index = index
        self.retry_after_s = retry_after_s

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.message, self.param, self.index, self.retry_after_s)

    def body_on(self, path: str) -> dict[str, Any]:
        """The error object of the route at ``path``."""
        return self.nested_body() if _LIKE_COMPLETIONS.fullmatch(path) else self.body()

    def nested_body(self) -> dict[str, Any]:
        """The nested error object of the routes for OpenAI's clients."""
        error = {"message": self.message, "type": self.type, "param": self.param, "code": self.status}
        return {"error": error}

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
    cls: type[ScoringError], message: str, param: str | None, index: int | None, retry_after_s: int | None
) -> ScoringError:
    return cls(message, param=param, index=index, retry_after_s=retry_after_s)


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
    InternalError,
    OverloadedError,
    DeadlineExceededError,
)

BY_STATUS: dict[int, type[ScoringError]] = {error.status: error for error in ERRORS}
