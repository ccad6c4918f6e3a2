"""An HTTP client of the scoring service, with the service's own types and errors."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from types import TracebackType
from typing import Any, Literal, Self, TypeVar, overload
from urllib.parse import urlencode

import httpx
from pydantic import BaseModel, TypeAdapter, ValidationError
from tenacity import RetryCallState, Retrying, retry_if_exception_type, stop_after_attempt, wait_exponential_jitter

from serve_app.errors import (
    BY_STATUS,
    SYSTEM_ONE,
    DeadlineExceededError,
    InternalError,
    InvalidRequestError,
    OverloadedError,
    ScoringError,
)
from serve_app.schemas import (
    DetokenizeRequest,
    DetokenizeResponse,
    ErrorResponse,
    InfoResponse,
    ModelsResponse,
    RequestBody,
    ScoreRequest,
    ScoreResponse,
    TokenizeRequest,
    TokenizeResponse,
    invalid,
)
from serve_app.tasks.classify import ClassifyRequest, ClassifyResponse
from serve_app.tasks.decisions import bodies
from serve_app.tasks.logprobs import LogprobsRequest, LogprobsResponse
from serve_app.tasks.remote_reward import RemoteRewardRequest, RemoteRewardResponse
from serve_app.tasks.rerank import RerankRequest, RerankResponse
from serve_app.tasks.systemone import AnswerLine, AnswersEnd, AnyQuestion, SystemOneRequest, SystemOneResponse

LONGEST_WAIT_S = 30.0
"""Most seconds between two attempts, whatever Retry-After says."""

_BACKOFF = wait_exponential_jitter(multiplier=0.25, jitter=0.25, max=LONGEST_WAIT_S)
_OVERLOADED = (429, 502, 503)
"""Statuses, of the service or of a proxy in front of it, that mean overload."""
_FRONT_END_DIED = 500
"""Status, without the service's own body, that Serve's proxy sends when the request's front end dies."""

SHARED_BY_THREADS = httpx.Limits(max_connections=None, max_keepalive_connections=None)
"""Limits of a client that many threads share. With a limit on connections, httpcore 1.0 may close one that it has just
given to another thread: ``httpx.ReadError: [Errno 9] Bad file descriptor``."""

R = TypeVar("R", bound=BaseModel)
Q = TypeVar("Q", bound=RequestBody)


class _NestedError(BaseModel):
    """An error of the routes that answer in another service's shape."""

    error: ErrorResponse


_ERROR: TypeAdapter[ErrorResponse | _NestedError] = TypeAdapter(ErrorResponse | _NestedError)
_LINE: TypeAdapter[AnswerLine | AnswersEnd | _NestedError] = TypeAdapter(AnswerLine | AnswersEnd | _NestedError)


class ScoreClient:
    """Sends requests to a running service. Threads may share a client. Close it, or use it in a ``with`` statement.

    A request is retried if the service is overloaded or unreachable, or its front end dies. The wait grows
    exponentially, and is at least what ``Retry-After`` says. Scoring has no side effects, so it may run twice.

    Args:
        base_url: the service's address, such as ``http://127.0.0.1:8000``.
        model: the served name that requests send.
        api_key: the API key that requests send.
        timeout_s: time limit of one attempt, in seconds.
        attempts: number of attempts, at least 1.
        transport: replaces the network, for tests.

    All methods that send a request raise:
        InvalidRequestError: the request is invalid; some faults are found before it is sent.
        AuthenticationError: the API key is missing or invalid.
        NotFoundError: the service has no such model.
        TooLargeError: the request is over the service's limits (``info``).
        OverloadedError: the service was overloaded or unreachable in every attempt.
        DeadlineExceededError: there was no answer in time.
        InternalError: the service has a fault.
    """

    def __init__(
        self,
        base_url: str,
        *,
        model: str = "default",
        api_key: str | None = None,
        timeout_s: float = 600.0,
        attempts: int = 5,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        headers = {} if api_key is None else {"authorization": f"Bearer {api_key}"}
        self._http = httpx.Client(
            base_url=base_url,
            headers=headers,
            timeout=timeout_s,
            transport=transport,
            limits=SHARED_BY_THREADS,
        )
        self._model = model
        self._timeout_s = timeout_s
        self._attempts = attempts

    @overload
    def ask(self, request: ScoreRequest) -> ScoreResponse: ...

    @overload
    def ask(self, request: SystemOneRequest) -> SystemOneResponse: ...

    @overload
    def ask(self, request: LogprobsRequest) -> LogprobsResponse: ...

    def ask(
        self, request: ScoreRequest | SystemOneRequest | LogprobsRequest
    ) -> ScoreResponse | SystemOneResponse | LogprobsResponse:
        """Send a request as it is, with its own ``model``. ``stream`` is ignored, and the answer is JSON."""
        if isinstance(request, LogprobsRequest):
            return self._ask(LogprobsResponse, "POST", "/v1/logprobs", request.model_copy(update={"format": "json"}))
        request = request.model_copy(update={"stream": False})
        if isinstance(request, SystemOneRequest):
            return self._ask(SystemOneResponse, "POST", SYSTEM_ONE, request)
        return self._ask(ScoreResponse, "POST", "/v1/score", request)

    def score(
        self,
        query: str | list[int] | None,
        items: str | list[str] | list[list[int]],
        *,
        messages: Sequence[Mapping[str, str]] | None = None,
        label_token_ids: list[int] | list[list[int]] | None = None,
        labels: list[str] | list[list[str]] | None = None,
        length_normalize: bool = False,
        apply_softmax: bool = False,
        item_first: bool = False,
        temperature: float = 1.0,
        return_token_logprobs: bool = False,
        return_label_mass: bool = False,
        return_prompt_token_ids: bool = False,
        add_special_tokens: bool = True,
        truncate: Literal["error", "item"] = "error",
        on_error: Literal["fail", "item"] = "fail",
        timeout_s: float | None = None,
    ) -> ScoreResponse:
        """Score each item by its labels or classes. The arguments are the fields of ``ScoreRequest``."""
        request = _checked(
            ScoreRequest,
            query=query,
            messages=None if messages is None else list(messages),
            items=items,
            label_token_ids=label_token_ids,
            labels=labels,
            length_normalize=length_normalize,
            apply_softmax=apply_softmax,
            item_first=item_first,
            temperature=temperature,
            return_token_logprobs=return_token_logprobs,
            return_label_mass=return_label_mass,
            return_prompt_token_ids=return_prompt_token_ids,
            add_special_tokens=add_special_tokens,
            truncate=truncate,
            on_error=on_error,
            timeout_s=timeout_s,
            model=self._model,
        )
        return self.ask(request)

    def decide(
        self,
        state: Any,
        questions: Mapping[str, AnyQuestion | Mapping[str, Any]],
        *,
        permutations: int = 1,
        cache_salt: str | None = None,
        on_error: Literal["fail", "item"] = "fail",
        timeout_s: float | None = None,
    ) -> SystemOneResponse:
        """Decide typed questions about a state. The arguments are the fields of ``SystemOneRequest``.

        For example ``decide(text, {"urgent": {"type": "noul", "instructions": "Is it urgent?"}})``.
        """
        return self.ask(
            self._asked(
                state=state,
                questions=dict(questions),
                permutations=permutations,
                cache_salt=cache_salt,
                on_error=on_error,
                timeout_s=timeout_s,
            )
        )

    def decide_each(
        self,
        state: Any,
        questions: Mapping[str, AnyQuestion | Mapping[str, Any]],
        *,
        permutations: int = 1,
        cache_salt: str | None = None,
        on_error: Literal["fail", "item"] = "fail",
        timeout_s: float | None = None,
    ) -> Generator[AnswerLine | AnswersEnd]:
        """Decide like ``decide``, and yield each question's answer as soon as it is read, and then the usage.

        Answers come in any order. A request is not retried once an answer has come: what fails it then is raised.
        """
        return self._lines(
            self._asked(
                state=state,
                questions=dict(questions),
                permutations=permutations,
                cache_salt=cache_salt,
                on_error=on_error,
                timeout_s=timeout_s,
                stream=True,
            )
        )

    def _asked(self, **fields: Any) -> SystemOneRequest:
        fields |= {"model": self._model}
        try:
            return SystemOneRequest.model_validate(fields)
        except ValidationError as error:
            raise bodies.invalid(error, fields) from None

    def _lines(self, request: SystemOneRequest) -> Generator[AnswerLine | AnswersEnd]:
        with closing(self._retrying()(self._open, "POST", SYSTEM_ONE, request)) as response, self._reached():
            for line in _split(response.iter_bytes()):
                answered = _LINE.validate_json(line)
                if isinstance(answered, _NestedError):
                    flat = answered.error
                    raise _kind(flat.code)(flat.message, param=flat.param)
                yield answered
                if isinstance(answered, AnswersEnd):
                    return
        raise OverloadedError(f"{self._http.base_url} ended its answer too early; ask again")

    def classify(
        self,
        input: str | list[str] | list[int] | list[list[int]] | None = None,
        *,
        messages: Sequence[Mapping[str, str]] | None = None,
        use_activation: bool | None = None,
        add_special_tokens: bool | None = None,
        add_generation_prompt: bool | None = None,
        cache_salt: str | None = None,
        on_error: Literal["fail", "item"] = "fail",
        timeout_s: float | None = None,
    ) -> ClassifyResponse:
        """Return the probabilities or logits of each text's classes. The arguments are the fields of
        ``ClassifyRequest``."""
        request = _checked(
            ClassifyRequest,
            input=input,
            messages=None if messages is None else list(messages),
            use_activation=use_activation,
            add_special_tokens=add_special_tokens,
            add_generation_prompt=add_generation_prompt,
            cache_salt=cache_salt,
            on_error=on_error,
            timeout_s=timeout_s,
            model=self._model,
        )
        return self._ask(ClassifyResponse, "POST", "/classify", request)

    def rewards(self, texts: list[str], *, cache_salt: str | None = None) -> list[float]:
        """Return one reward for each text, a whole prompt with its answer, see ``RemoteRewardRequest``."""
        request = _checked(RemoteRewardRequest, query=texts, cache_salt=cache_salt, model=self._model)
        answer = self._ask(RemoteRewardResponse, "POST", "/get_reward", request)
        return [reward for reward in answer.rewards if reward is not None]

    def logprobs(
        self,
        input: str | list[str] | list[int] | list[list[int]],
        *,
        start: int | list[int] = 1,
        top: int = 0,
        candidates: list[list[list[int]]] | None = None,
        temperature: float = 1.0,
        add_special_tokens: bool = True,
        cache_salt: str | None = None,
        timeout_s: float | None = None,
    ) -> LogprobsResponse:
        """Return the logprobs of every token of sequences. The arguments are the fields of ``LogprobsRequest``."""
        return self.ask(
            _checked(
                LogprobsRequest,
                input=input,
                start=start,
                top=top,
                candidates=candidates,
                temperature=temperature,
                add_special_tokens=add_special_tokens,
                cache_salt=cache_salt,
                timeout_s=timeout_s,
                model=self._model,
            )
        )

    def rerank(
        self,
        query: str,
        documents: list[str],
        *,
        top_n: int | None = None,
        instruct: str | None = None,
        raw_scores: bool = False,
    ) -> RerankResponse:
        """Rank documents by their relevance to a query. The arguments are the fields of ``RerankRequest``."""
        request = _checked(
            RerankRequest,
            query=query,
            documents=documents,
            top_n=top_n,
            instruct=instruct,
            raw_scores=raw_scores,
            model=self._model,
        )
        return self._ask(RerankResponse, "POST", "/v1/rerank", request)

    def tokenize(
        self,
        prompt: str | list[str] | None = None,
        *,
        messages: Sequence[Mapping[str, str]] | None = None,
        add_special_tokens: bool | None = None,
    ) -> TokenizeResponse:
        """Turn text, or a conversation, into token ids and pieces, as the model sees it."""
        request = _checked(
            TokenizeRequest,
            prompt=prompt,
            messages=None if messages is None else list(messages),
            add_special_tokens=add_special_tokens,
            model=self._model,
        )
        return self._ask(TokenizeResponse, "POST", "/tokenize", request)

    def detokenize(self, tokens: list[int]) -> str:
        """Turn token ids into text."""
        request = _checked(DetokenizeRequest, tokens=tokens, model=self._model)
        return self._ask(DetokenizeResponse, "POST", "/detokenize", request).prompt

    def models(self) -> ModelsResponse:
        """List the served names."""
        return self._ask(ModelsResponse, "GET", "/v1/models")

    def info(self) -> InfoResponse:
        """Describe this client's ``model`` and the limits of a request."""
        return self._ask(InfoResponse, "GET", f"/v1/info?{urlencode({'model': self._model})}")

    def health(self) -> bool:
        """Whether a front end is alive. Does not retry."""
        return self._is_ok("/health")

    def ready(self) -> bool:
        """Whether the service can score. Does not retry."""
        return self._is_ok("/ready")

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _is_ok(self, path: str) -> bool:
        try:
            return self._http.get(path).is_success
        except httpx.TransportError:
            return False

    def _ask(self, answer: type[R], method: str, path: str, request: RequestBody | None = None) -> R:
        return answer.model_validate_json(self._retrying()(self._send, method, path, request))

    def _retrying(self) -> Retrying:
        return Retrying(
            retry=retry_if_exception_type(OverloadedError),
            stop=stop_after_attempt(self._attempts),
            wait=wait,
            reraise=True,
        )

    def _send(self, method: str, path: str, request: RequestBody | None) -> bytes:
        with closing(self._open(method, path, request)) as response, self._reached():
            return response.read()

    def _open(self, method: str, path: str, request: RequestBody | None) -> httpx.Response:
        """Send a request, and return its response, whose body is still to be read."""
        content = None if request is None else request.model_dump_json(exclude_none=True)
        headers = {} if request is None else {"content-type": "application/json"}
        with self._reached():
            built = self._http.build_request(method, path, content=content, headers=headers)
            response = self._http.send(built, stream=True)
            if response.is_success:
                return response
            with closing(response):
                response.read()
        raise _error(response)

    @contextmanager
    def _reached(self) -> Generator[None]:
        """Give a failure of the network its class."""
        try:
            yield
        except httpx.ReadTimeout as error:
            raise DeadlineExceededError(
                f"{self._http.base_url} gave no answer in {self._timeout_s:g} s; raise timeout_s or send fewer items"
            ) from error
        except httpx.TransportError as error:
            raise OverloadedError(
                f"{self._http.base_url} cannot be reached: {error or type(error).__name__}; is the service running?"
            ) from error


def _checked(model: type[Q], /, **fields: Any) -> Q:
    try:
        return model(**fields)
    except ValidationError as error:
        raise invalid(error, model) from None


def wait(state: RetryCallState) -> float:
    """Seconds until the next attempt: exponential, and at least what the service asks for."""
    error = state.outcome.exception() if state.outcome else None
    asked = error.retry_after_s if isinstance(error, OverloadedError) else None
    return max(_BACKOFF(state), min(asked or 0, LONGEST_WAIT_S))


def _split(pieces: Iterator[bytes]) -> Iterator[bytes]:
    """The lines of a body; in JSON only a newline ends one."""
    rest = b""
    for piece in pieces:
        *lines, rest = (rest + piece).split(b"\n")
        yield from lines


def _kind(status: int) -> type[ScoringError]:
    if status in _OVERLOADED:
        return BY_STATUS.get(status, OverloadedError)
    return BY_STATUS.get(status, InvalidRequestError if status < 500 else InternalError)


def _error(response: httpx.Response) -> ScoringError:
    """The error of a response: the service's own by its body, a proxy's by its status."""
    status = response.status_code
    kind = _kind(status)
    retry_after = response.headers.get("retry-after", "")
    try:
        found = _ERROR.validate_json(response.content)
        flat = found.error if isinstance(found, _NestedError) else found
    except ValidationError:
        kind = OverloadedError if status == _FRONT_END_DIED else kind
        flat = ErrorResponse(message=f"HTTP {status}: {response.text[:200]}", type="", param=None, code=status)
    return kind(
        flat.message,
        param=flat.param,
        retry_after_s=int(retry_after) if retry_after.isdecimal() else None,
    )
