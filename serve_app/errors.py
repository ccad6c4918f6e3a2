"""One table of errors: exception class -> HTTP status, type and body, the same over HTTP, handles and the client.

Every class takes keyword arguments that survive pickling, since they cross Serve handles.
"""

from __future__ import annotations

import re
from typing import Any, ClassVar

COMPLETIONS = "/v1/completions"
"""The route with nested errors."""
_LIKE_COMPLETIONS = re.compile(r"(?!.*/v1/models/).*completions/*", re.DOTALL)
"""Paths that clients of OpenAI's API ask, behind a prefix or when they are not quite right: their errors are nested,
too. A model may be called ``completions``."""

RETRY_AFTER_S = 1
"""What a 503 says when nothing better is known."""


class ScoringError(Exception):
    """Base of all errors that a caller may see. ``message`` names the value, the limit and the remedy.

    Attributes:
        param: the request field concerned, or None.
        index: the item concerned, or None when the whole request is.
        retry_after_s: seconds after which to try again, or None.
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
        """The error object of the routes that OpenAI's clients ask."""
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
    """The request is wrong: the caller must change it."""

    status = 400
    type = "BadRequestError"


class AuthenticationError(ScoringError):
    """The API key is missing or wrong."""

    status = 401
    type = "AuthenticationError"


class NotFoundError(ScoringError):
    """Unknown model or route."""

    status = 404
    type = "NotFoundError"


class MethodNotAllowedError(ScoringError):
    """The route exists, the method does not."""

    status = 405
    type = "MethodNotAllowedError"


class TooLargeError(ScoringError):
    """More bytes or items than the configured limit."""

    status = 413
    type = "RequestTooLargeError"


class UnsupportedEncodingError(ScoringError):
    """The body's Content-Encoding is none that this service decodes."""

    status = 415
    type = "UnsupportedEncodingError"


class InternalError(ScoringError):
    """A fault of ours."""


class OverloadedError(ScoringError):
    """No room, or no healthy replica: try again after ``retry_after_s`` seconds."""

    status = 503
    type = "ServiceUnavailableError"


class SelfTestError(OverloadedError):
    """A model failed its self-test, see ``readiness``; waiting will not mend it."""

    type = "SelfTestError"


class DeadlineExceededError(ScoringError):
    """The request's time is over; its queued work was dropped."""

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
