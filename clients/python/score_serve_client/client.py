"""The two clients: ``Client`` waits, ``AsyncClient`` is awaited. Their methods are the same."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import httpx
from tenacity import (
    AsyncRetrying,
    RetryCallState,
    Retrying,
    retry_if_exception_type,
    stop_after_attempt,
    wait_exponential_jitter,
)

from score_serve_client import calls
from score_serve_client.answers import Answer, DecisionLine, Decisions, Models, Ranking, Row, Scores
from score_serve_client.calls import Call
from score_serve_client.errors import ScoreServeError, UnavailableError, error_of, unreachable

if TYPE_CHECKING:
    import pandas as pd

A = TypeVar("A", bound=Answer)

LONGEST_WAIT_S = 30.0
"""Most seconds between two attempts, whatever Retry-After says."""

_BACKOFF = wait_exponential_jitter(multiplier=0.25, jitter=0.25, max=LONGEST_WAIT_S)


class _Both:
    """What both clients are made of.

    A request is retried while the service is overloaded or cannot be reached; scoring has no side effects.

    Args:
        base_url: the service's address, such as ``http://127.0.0.1:8000``.
        model: the served name that requests send.
        api_key: the API key that requests send.
        timeout_s: time limit of one attempt, in seconds.
        attempts: number of attempts, at least 1.
        transport: replaces the network, for tests.

    Methods that send a request raise ``ScoreServeError``; ``UnavailableError`` if no attempt reached a service that
    had room. ``options`` are the other fields of the request, which the service's /docs describe.
    """

    def __init__(
        self,
        base_url: str,
        *,
        model: str = "default",
        api_key: str | None = None,
        timeout_s: float = 600.0,
        attempts: int = 5,
        transport: Any = None,
    ) -> None:
        self._model = model
        self._options = {
            "base_url": base_url,
            "headers": {} if api_key is None else {"authorization": f"Bearer {api_key}"},
            "timeout": timeout_s,
            "transport": transport,
        }
        self._retrying: dict[str, Any] = {
            "retry": retry_if_exception_type(UnavailableError),
            "stop": stop_after_attempt(attempts),
            "wait": _wait,
            "reraise": True,
        }


class Client(_Both):
    __doc__ = _Both.__doc__

    def __init__(self, base_url: str, **options: Any) -> None:
        super().__init__(base_url, **options)
        self._http = httpx.Client(**self._options)

    def score(self, query: str, items: Iterable[str], **options: Any) -> Scores:
        """Score each item by its ``labels`` or ``label_token_ids``, or a classifier's classes."""
        return self._send(calls.score(self._model, query, items, options))

    def stream(self, query: str, items: Iterable[str], **options: Any) -> Iterator[Row]:
        """Score like ``score``, and yield each item's row as soon as it is there, in any order."""
        return self._lines(calls.stream(self._model, query, items, options))

    def score_series(self, query: str, items: pd.Series[Any], **options: Any) -> pd.DataFrame:
        """Score a Series of any length. Returns a DataFrame with its index and a column for each label."""
        return calls.frame([*map(self._send, calls.series(self._model, query, items, options))], items, options)

    def rerank(self, query: str, documents: Iterable[str], **options: Any) -> Ranking:
        """Rank documents by their relevance to the query."""
        return self._send(calls.rerank(self._model, query, documents, options))

    def decide(self, state: Any, questions: Mapping[str, Any], **options: Any) -> Decisions:
        """Answer typed questions about a state."""
        return self._send(calls.decide(self._model, state, questions, options))

    def decide_each(self, state: Any, questions: Mapping[str, Any], **options: Any) -> Iterator[DecisionLine]:
        """Decide like ``decide``, and yield each answer as soon as it is there, in any order."""
        return self._lines(calls.decide_each(self._model, state, questions, options))

    def models(self) -> Models:
        """List the served models."""
        return self._send(calls.MODELS)

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _send(self, call: Call[A]) -> A:
        response = Retrying(**self._retrying)(self._open, call)
        try:
            return call.answer.model_validate_json(response.read())
        finally:
            response.close()

    def _lines(self, call: Call[A]) -> Iterator[A]:
        response = Retrying(**self._retrying)(self._open, call)
        try:
            rest = b""
            for piece in response.iter_bytes():
                *lines, rest = (rest + piece).split(b"\n")  # not iter_lines: JSON may hold other line ends
                for line in lines:
                    if (read := _line(line, call)) is None:
                        return
                    yield read
        except httpx.TransportError as error:
            raise unreachable(self._http.base_url, error) from error
        finally:
            response.close()
        raise _cut_short(self._http.base_url)

    def _open(self, call: Call[Any]) -> httpx.Response:
        try:
            response = self._http.send(_built(self._http.build_request, call), stream=True)
            if not response.is_success or not _streams(call):
                response.read()
        except httpx.TransportError as error:
            raise unreachable(self._http.base_url, error) from error
        return _checked(response)


class AsyncClient(_Both):
    __doc__ = _Both.__doc__

    def __init__(self, base_url: str, **options: Any) -> None:
        super().__init__(base_url, **options)
        self._http = httpx.AsyncClient(**self._options)

    async def score(self, query: str, items: Iterable[str], **options: Any) -> Scores:
        """Score each item by its ``labels`` or ``label_token_ids``, or a classifier's classes."""
        return await self._send(calls.score(self._model, query, items, options))

    def stream(self, query: str, items: Iterable[str], **options: Any) -> AsyncIterator[Row]:
        """Score like ``score``, and yield each item's row as soon as it is there, in any order."""
        return self._lines(calls.stream(self._model, query, items, options))

    async def score_series(self, query: str, items: pd.Series[Any], **options: Any) -> pd.DataFrame:
        """Score a Series of any length. Returns a DataFrame with its index and a column for each label."""
        answers = [await self._send(call) for call in calls.series(self._model, query, items, options)]
        return calls.frame(answers, items, options)

    async def rerank(self, query: str, documents: Iterable[str], **options: Any) -> Ranking:
        """Rank documents by their relevance to the query."""
        return await self._send(calls.rerank(self._model, query, documents, options))

    async def decide(self, state: Any, questions: Mapping[str, Any], **options: Any) -> Decisions:
        """Answer typed questions about a state."""
        return await self._send(calls.decide(self._model, state, questions, options))

    def decide_each(self, state: Any, questions: Mapping[str, Any], **options: Any) -> AsyncIterator[DecisionLine]:
        """Decide like ``decide``, and yield each answer as soon as it is there, in any order."""
        return self._lines(calls.decide_each(self._model, state, questions, options))

    async def models(self) -> Models:
        """List the served models."""
        return await self._send(calls.MODELS)

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _send(self, call: Call[A]) -> A:
        response = await AsyncRetrying(**self._retrying)(self._open, call)
        return call.answer.model_validate_json(response.content)

    async def _lines(self, call: Call[A]) -> AsyncIterator[A]:
        response = await AsyncRetrying(**self._retrying)(self._open, call)
        try:
            rest = b""
            async for piece in response.aiter_bytes():
                *lines, rest = (rest + piece).split(b"\n")
                for line in lines:
                    if (read := _line(line, call)) is None:
                        return
                    yield read
        except httpx.TransportError as error:
            raise unreachable(self._http.base_url, error) from error
        finally:
            await response.aclose()
        raise _cut_short(self._http.base_url)

    async def _open(self, call: Call[Any]) -> httpx.Response:
        try:
            response = await self._http.send(_built(self._http.build_request, call), stream=True)
            if not response.is_success or not _streams(call):
                await response.aread()
        except httpx.TransportError as error:
            raise unreachable(self._http.base_url, error) from error
        return _checked(response)


def _built(build: Callable[..., httpx.Request], call: Call[Any]) -> httpx.Request:
    return build("GET", call.path) if call.body is None else build("POST", call.path, json=call.body)


def _streams(call: Call[Any]) -> bool:
    return bool(call.body and call.body.get("stream"))


def _checked(response: httpx.Response) -> httpx.Response:
    if response.is_success:
        return response
    raise error_of(response.status_code, response.content, response.headers.get("retry-after", ""))


def _line(line: bytes, call: Call[A]) -> A | None:
    """A line of a stream; None for the last, which has the usage."""
    found = json.loads(line)
    if "error" in found and "index" not in found:
        raise error_of(found["error"].get("code", 500), line)
    return None if "usage" in found else call.answer.model_validate(found)


def _cut_short(url: httpx.URL) -> ScoreServeError:
    return UnavailableError(f"{url} ended its answer too early; ask again")


def _wait(state: RetryCallState) -> float:
    error = state.outcome.exception() if state.outcome else None
    asked = error.retry_after_s if isinstance(error, UnavailableError) else None
    return max(_BACKOFF(state), min(asked or 0, LONGEST_WAIT_S))
