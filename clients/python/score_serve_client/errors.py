"""What a request may fail with."""

from __future__ import annotations

import httpx
from pydantic import BaseModel, ValidationError

_UNAVAILABLE = (429, 502, 503)
"""Statuses, of the service or of a proxy in front of it, after which a later try may succeed."""


class ScoreServeError(Exception):
    """The service refused the request or failed on it.

    Attributes:
        message: what is wrong, and what to do.
        status: the HTTP status; None if there was no response.
        param: the field of the request that is wrong, if one is.
        retry_after_s: seconds after which to try again, if the service says so.
    """

    def __init__(
        self,
        message: str,
        status: int | None = None,
        param: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.param = param
        self.retry_after_s = retry_after_s


class UnavailableError(ScoreServeError):
    """The service is overloaded or cannot be reached; a later try may succeed."""


class _Flat(BaseModel):
    message: str
    param: str | None = None


class _Nested(BaseModel):
    error: _Flat


def error_of(status: int, body: bytes, retry_after: str = "") -> ScoreServeError:
    """The error of a response: the service's own by its body, a proxy's by its status."""
    try:
        flat = _Nested.model_validate_json(body).error
    except ValidationError:
        try:
            flat = _Flat.model_validate_json(body)
        except ValidationError:
            # Ray Serve's proxy answers 500, without our body, when a front end dies.
            text = body[:200].decode(errors="replace")
            unavailable = status == 500 or status in _UNAVAILABLE
            return (UnavailableError if unavailable else ScoreServeError)(f"HTTP {status}: {text}", status)
    kind = UnavailableError if status in _UNAVAILABLE else ScoreServeError
    return kind(flat.message, status, flat.param, float(retry_after) if retry_after.isdecimal() else None)


def unreachable(url: httpx.URL, error: httpx.TransportError) -> ScoreServeError:
    """The error of a request without a response."""
    if isinstance(error, httpx.ReadTimeout):
        return ScoreServeError(f"{url} gave no answer in time; raise timeout_s or send fewer items")
    return UnavailableError(f"{url} cannot be reached: {error or type(error).__name__}; is the service running?")
