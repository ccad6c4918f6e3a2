"""The front end: HTTP routes over ``Services``, and the Serve deployment that holds them.

Neither this module nor anything that it imports loads jax or the model package.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import re
import uuid
from collections.abc import Callable, Coroutine, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

import ray
from fastapi import FastAPI, Request, Response
from fastapi.routing import APIRoute
from grpc import StatusCode
from grpc.aio import AioRpcError
from pydantic import BaseModel
from ray import serve
from ray.exceptions import RayError, RayTaskError, TaskCancelledError
from ray.serve.exceptions import BackPressureError, RayServeException, RequestCancelledError
from ray.serve.handle import DeploymentHandle
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_app import compat, timing
from serve_app.contract import JobResult, ModelInfo, ScoreJob
from serve_app.errors import (
    BY_STATUS,
    COMPLETIONS,
    AuthenticationError,
    InternalError,
    InvalidRequestError,
    MethodNotAllowedError,
    NotFoundError,
    OverloadedError,
    ScoringError,
)
from serve_app.frontend import auth, bodies, browsers, pages
from serve_app.frontend.models import Services
from serve_app.frontend.parsing import parse_large
from serve_app.frontend.router import running_replicas
from serve_app.frontend.service import ScoringService
from serve_app.frontend.streaming import PIECE_VALUES, LinesResponse, json_lines, json_pieces
from serve_app.metrics import REPORT_S, FrontMetrics, scrape
from serve_app.schemas import (
    DetokenizeRequest,
    DetokenizeResponse,
    ErrorResponse,
    InfoResponse,
    ModelCard,
    ModelsResponse,
    ScoreRequest,
    ScoreResponse,
    StatusResponse,
    TokenizeRequest,
    TokenizeResponse,
    TokenizerInfo,
)
from serve_app.settings import DEFAULT_NAME, Settings, check_names
from serve_app.tasks import tei
from serve_app.tasks.completions import CompletionRequest, CompletionResponse, OpenAIErrorResponse
from serve_app.tasks.generative import GenerativeScoringRequest, GenerativeScoringResponse
from serve_app.tasks.rerank import RerankRequest, RerankResponse
from serve_app.tasks.template_choice import choose
from serve_app.tasks.tokenizer import TextTokenizer
from serve_app.tpu import Tpu

logger = logging.getLogger("ray.serve")

RETRY_AFTER_S = 1
"""What a 503 says when nothing better is known."""

TIMEOUT_HEADER = "x-request-timeout-seconds"
"""Serve's proxy knows it, too, and says 408 in words of its own when that time is over."""
AHEAD_OF_PROXY_S = 0.25
"""How much earlier the service gives up, at most, so that its own answer comes through."""

CLIENT_GONE = 499
"""Nobody reads it but the access log."""

_SHOWN_PATH = 200
"""Characters of a path that an error repeats."""

T = TypeVar("T")

_LINES = (
    "With stream: a line of JSON for each item as it is finished, {index, scores, ...} with the fields of the whole "
    "answer, or {index, error} with on_error: item; then {object: scoring, model, usage}, or an error object."
)
TRIES = 3
"""For a job whose replica is lost. The second may meet another on the same lost host, of which nobody knows yet. Not
more, since a job may be what kills them."""
RETRY_PAUSE_S = 0.5
CANCELLED_BY_S = 0.5
"""When a client leaves, Serve cancels its calls to the scorers and the request itself, in no order. Only a call whose
request still stands after this long was cancelled by a replica that is leaving."""

WATCH_S = 5.0
"""Between two looks at the cluster's chips."""

_MAX_REQUEST_ID = 128
_NOT_IN_REQUEST_ID = re.compile(r"[^A-Za-z0-9._:@/+=-]")


def create_app(
    get_services: Callable[[], Services],
    *,
    keys: auth.ApiKeys | None = None,
    cors_origins: Sequence[str] = (),
    echo_request_id: bool = True,
) -> FastAPI:
    """The HTTP side of the service, free of Serve.

    Args:
        get_services: called in every request.
        keys: of which a request must have one, if there are any.
        cors_origins: whose pages may ask from a browser.
        echo_request_id: put ``x-request-id`` into responses. False behind Serve's proxy, which does it itself and
            would put it there twice.
    """
    app = FastAPI(title="score-serve", redirect_slashes=False, docs_url=None, redoc_url=None)
    pages.add_pages(app)
    app.add_middleware(browsers.HeadAsGet)
    if keys:
        app.add_middleware(auth.RequireKey, keys=keys)
        auth.document(app)
    app.add_middleware(_RequestContext, echo=echo_request_id)
    if cors_origins:
        browsers.allow(app, cors_origins)
    app.add_exception_handler(ScoringError, _on_scoring_error)
    app.add_exception_handler(HTTPException, _on_http_exception)

    async def body(request: Request) -> bytes:
        return await bodies.read(request, get_services().max_body_bytes)

    @app.post("/v1/score", **_documented(ScoreResponse, ScoreRequest, 503, 504, lines=_LINES))
    async def score(request: Request) -> Response:
        """The labels' probabilities as the continuation of query + item, for every item.

        The header ``x-request-timeout-seconds`` shortens the service's own time limit for this request.
        """
        asked = await parse_large(ScoreRequest, await body(request))
        service = get_services().of(asked.model)
        request_id: str = request.state.request_id
        limit = _timeout_s(request)
        if not asked.stream:
            work = service.score(asked, request_id=request_id, timeout_s=limit)
            return await _json(await _unless_gone(request, work))
        lines = json_lines(service.stream(asked, request_id=request_id, timeout_s=limit), request_id)
        return LinesResponse(await _unless_gone(request, anext(lines)), lines)

    @app.post("/v1/rerank", **_documented(RerankResponse, RerankRequest, 503, 504))
    @app.post("/v2/rerank", **_documented(RerankResponse, RerankRequest, 503, 504))
    @app.post("/rerank", **_documented(RerankResponse, RerankRequest, 503, 504))
    async def rerank(request: Request) -> Response:
        """The documents by their relevance to the query, best first.

        With ``texts`` in place of ``documents`` the answer is a list, as text-embeddings-inference gives it.
        """
        sent = await body(request)
        is_tei = tei.is_meant(sent)
        if is_tei:
            asked = tei.as_rerank_request(await parse_large(tei.TeiRerankRequest, sent))
        else:
            asked = await parse_large(RerankRequest, sent)
        work = (
            get_services()
            .of(asked.model)
            .rerank(asked, request_id=request.state.request_id, timeout_s=_timeout_s(request))
        )
        answer = await _unless_gone(request, work)
        return await _json(tei.as_ranks(answer) if is_tei else answer)

    @app.post(COMPLETIONS, **_documented(CompletionResponse, CompletionRequest, 503, 504, error=OpenAIErrorResponse))
    async def completions(request: Request) -> Response:
        """Logprobs of the prompts' own tokens, and the likeliest next ones."""
        asked = await parse_large(CompletionRequest, await body(request))
        work = (
            get_services()
            .of(asked.model)
            .complete(asked, request_id=request.state.request_id, timeout_s=_timeout_s(request))
        )
        return await _json(await _unless_gone(request, work))

    @app.post("/generative_scoring", **_documented(GenerativeScoringResponse, GenerativeScoringRequest, 503, 504))
    async def generative_scoring(request: Request) -> Response:
        """The first label's probability for every item, in vLLM's shape."""
        asked = await parse_large(GenerativeScoringRequest, await body(request))
        service = get_services().of(asked.model or DEFAULT_NAME)
        work = service.generative_scoring(asked, request_id=request.state.request_id, timeout_s=_timeout_s(request))
        return await _json(await _unless_gone(request, work))

    @app.post("/tokenize", **_documented(TokenizeResponse, TokenizeRequest, 504))
    async def tokenize(request: Request) -> Response:
        """Ids and pieces of text, as the model would see it."""
        asked = await parse_large(TokenizeRequest, await body(request))
        return await _json(await _unless_gone(request, get_services().of(asked.model).tokenize(asked)))

    @app.post("/detokenize", **_documented(DetokenizeResponse, DetokenizeRequest, 504))
    async def detokenize(request: Request) -> Response:
        """The text of ids."""
        asked = await parse_large(DetokenizeRequest, await body(request))
        return await _json(await _unless_gone(request, get_services().of(asked.model).detokenize(asked)))

    @app.get("/v1/models", **_documented(ModelsResponse))
    async def models() -> Response:
        """The names under which the models answer."""
        return await _json(get_services().models())

    @app.get("/v1/models/{name:path}", **_documented(ModelCard, None, 404))
    async def model_card(name: str) -> Response:
        """One of the names under which the models answer."""
        if not name:
            raise HTTPException(NotFoundError.status)
        return await _json(get_services().model(name))

    @app.get("/tokenizer_info", **_documented(TokenizerInfo, None, 404))
    async def tokenizer_info(model: str = DEFAULT_NAME) -> Response:
        """The tokenizer's special tokens and chat template, as vLLM tells them: null is none."""
        told = get_services().of(model).tokenizer_info()
        return Response(told.model_dump_json(), media_type="application/json")

    @app.get("/v1/info", **_documented(InfoResponse, None, 404))
    async def info(model: str = DEFAULT_NAME) -> Response:
        """What is served, and the limits of a request."""
        return await _json(get_services().info(model))

    @app.get("/metrics", response_class=PlainTextResponse, responses=_errors(500, 503))
    async def metrics() -> Response:
        """The scorers' counters, for Prometheus."""
        return PlainTextResponse(await get_services().metrics(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/health", **_documented(StatusResponse))
    async def health() -> Response:
        """This front end is alive."""
        return await _json(StatusResponse())

    @app.get("/ready", **_documented(StatusResponse, None, 404, 503))
    async def ready(model: str | None = None) -> Response:
        """Able to score: a known prompt was, rightly, by this model, or by all."""
        await get_services().ready(model)
        return await _json(StatusResponse())

    # FastAPI keeps the handlers; the names are only read by it.
    del score, rerank, completions, generative_scoring, tokenize, detokenize, models, model_card, tokenizer_info, info
    del metrics, health, ready
    return app


@serve.deployment  # pyright: ignore[reportUnknownMemberType]
@serve.ingress()  # pyright: ignore[reportUnknownMemberType, reportUntypedClassDecorator]
class Ingress:
    """The Serve deployment: the HTTP routes, and the same over handles for Ray jobs.

    Args:
        settings: of the whole service.
        scorers: for each model the handle of the deployment that holds its engines; its ``info()`` is waited for.

    Raises:
        ApiKeyError: at start-up: the file of API keys is unusable.
    """

    async def __init__(self, settings: Settings, *scorers: DeploymentHandle[Any]) -> None:
        self._settings = settings.each_model
        self._cors_origins = settings.cors_origins
        self._keys = auth.ApiKeys(settings.api_keys_file)
        if not self._keys:
            logger.warning("there is no API key: everyone who reaches this service may use it")
        self._watching = [
            asyncio.create_task(_watch_chips(tpu, replicas)) for tpu, replicas in settings.replicas_on_chips().items()
        ]
        # While the scorers warm up.
        local, infos = await asyncio.gather(
            asyncio.to_thread(load_tokenizers, settings), asyncio.gather(*map(_info, scorers))
        )
        self._metrics = FrontMetrics()
        self._services = Services(
            *(
                ScoringService(
                    model,
                    tokenizer,
                    info,
                    ScorerReplicas(scorer),
                    settings.ingress_replicas,
                    partial(self._metrics.answered, model.name),
                    folder,
                )
                for model, (folder, tokenizer), info, scorer in zip(
                    settings.each_model, local, infos, scorers, strict=True
                )
            )
        )
        self._reporting = asyncio.create_task(self._report())

    def __serve_build_asgi_app__(self) -> FastAPI:
        return create_app(
            lambda: self._services, keys=self._keys, cors_origins=self._cors_origins, echo_request_id=False
        )

    async def score(self, request: ScoreRequest) -> ScoreResponse:
        """As ``POST /v1/score``, for callers inside the Ray cluster. The answer comes whole, whatever ``stream`` says.

        Raises:
            ScoringError: as ``ScoringService.score``.
        """
        timing.begin()
        return await self._services.of(request.model).score(request, request_id=uuid.uuid4().hex)

    async def info(self, model: str = DEFAULT_NAME) -> InfoResponse:
        """As ``GET /v1/info``, for callers inside the Ray cluster."""
        return self._services.info(model)

    async def reconfigure(self, user_config: Mapping[str, Mapping[str, Any]] | None, rank: object) -> None:  # noqa: ARG002
        """As ``Scorer.reconfigure``, by the model's served name."""
        changes = user_config or {}
        names = [each.name for each in self._settings]
        try:
            if unknown := sorted(changes.keys() - set(names)):
                raise ValueError(f"{', '.join(unknown)}: no such model; the served names are {', '.join(names)}")
            settings = [each.live(changes.get(each.name) or {}) for each in self._settings]
            check_names(settings)
        except ValueError as error:
            logger.error("user_config is refused, and nothing changes: %s", error)
            return
        self._services.reconfigure(settings)

    async def check_health(self) -> None:
        """Raise when no request can be prepared any more; Serve then replaces this front end."""
        self._services.check_health()

    async def _report(self) -> None:
        while True:
            self._metrics.update(self._services.outcomes, self._services.items)
            await asyncio.sleep(REPORT_S)


def load_tokenizers(settings: Settings) -> list[tuple[Path, TextTokenizer]]:
    """The folder and tokenizer of each model, one after the other: transformers cannot be imported by two threads."""
    from serve_app import model_source

    loaded: list[tuple[Path, TextTokenizer]] = []
    for each in settings.each_model:
        folder = model_source.resolve(each.model, each.revision, say=logger.info)
        loaded.append((folder, TextTokenizer.load(folder)))
        choice = choose(each, folder)
        logger.info("%s: %s", each.name, choice)
        if choice.doubt:
            logger.warning("%s: %s", each.name, choice.doubt)
    return loaded


async def _watch_chips(tpu: Tpu, replicas: int) -> None:
    """Say what the cluster lacks, whenever that changes: Ray waits in silence for nodes that may never come."""
    said = None
    while True:
        try:
            lacking = tpu.lacking(replicas, await asyncio.to_thread(ray.nodes))
        except Exception:
            logger.exception("the cluster's nodes cannot be listed")
        else:
            if lacking != said:
                logger.warning("TPU chips: %s", lacking or "there are enough now")
            said = lacking
        await asyncio.sleep(WATCH_S)


async def _info(scorer: DeploymentHandle[Any]) -> ModelInfo:
    """Of the loaded model; comes when the first replica is warm."""
    return await cast(Any, scorer).info.remote()


NO_ANSWER = (RayError, RayServeException, AioRpcError)
"""What a handle's call raises when its other end is lost."""


def cause_of(error: Exception) -> object:
    """What a call's other end raised, or an error of ``NO_ANSWER``. Actor calls wrap the first, gRPC does not."""
    return cast(Any, error).cause if isinstance(error, RayTaskError) else error


class ScorerReplicas:
    """``service.Replicas`` over a Serve handle: Ray's failures become the service's errors.

    Args:
        scorer: its ``score`` takes a ``ScoreJob`` and returns a ``JobResult``; its router is a ``PrefixRouter``.
    """

    def __init__(self, scorer: DeploymentHandle[Any]) -> None:
        self._scorer: Any = scorer

    @property
    def count(self) -> int:
        """Replicas that run now. They come and go with autoscaling, faults and deploys."""
        return running_replicas(self._scorer)

    async def score(self, job: ScoreJob) -> JobResult:
        """Compute ``job``, again if its replica was lost: scoring has no effects.

        Raises:
            ScoringError: what the replica raised; no room; no replica left.
        """
        for lost in range(TRIES):
            if lost > 1:  # the second try comes at once
                await asyncio.sleep(RETRY_PAUSE_S)
            try:
                return await self._score(job)
            except _ReplicaLostError as error:
                if error.cancelled:
                    await asyncio.sleep(CANCELLED_BY_S)
                logger.warning("request %s: a replica was lost: %s", job.request_id, error)
        raise OverloadedError("no healthy replica answered; try again shortly", retry_after_s=RETRY_AFTER_S)

    async def metrics(self) -> str:
        """All replicas' counters, as Prometheus reads them; some seconds old."""
        return await scrape()

    async def _score(self, job: ScoreJob) -> JobResult:
        response = self._scorer.score.remote(job)
        try:
            return await response
        except asyncio.CancelledError as error:
            if not cast(asyncio.Task[Any], asyncio.current_task()).cancelling():  # a replica's, which is leaving
                raise _ReplicaLostError("it cancelled the call", cancelled=True) from error
            response.cancel()
            raise
        except BackPressureError as error:
            wait = max(1, round(error.retry_after_s or RETRY_AFTER_S))
            raise OverloadedError(f"all replicas are full; try again in {wait} s", retry_after_s=wait) from error
        except Exception as error:
            cause = cause_of(error)
            if isinstance(cause, ScoringError):
                raise cause from None
            if isinstance(cause, NO_ANSWER):
                raise _ReplicaLostError(str(cause), cancelled=_is_cancellation(cause)) from error
            raise InternalError("the scorer failed on this request; the server's log has more") from error


class _ReplicaLostError(Exception):
    """The replica died, or left, with the job.

    Args:
        cancelled: the call was, which may also be since its request is over.
    """

    def __init__(self, message: str, *, cancelled: bool = False) -> None:
        super().__init__(message)
        self.cancelled = cancelled


def _is_cancellation(cause: object) -> bool:
    """Whether a call's other end says that it was cancelled: actor calls by Ray's errors, gRPC by a status."""
    if isinstance(cause, AioRpcError):
        return cause.code() is StatusCode.CANCELLED
    return isinstance(cause, TaskCancelledError | RequestCancelledError)


class _RequestContext:
    """Gives every request its id and its timings, and every error that no route caught its flat body. Plain ASGI."""

    def __init__(self, app: ASGIApp, *, echo: bool) -> None:
        self._app = app
        self._echo = echo

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = _request_id(scope)
        scope.setdefault("state", {})["request_id"] = request_id
        timings = timing.begin()
        started = False

        async def tracked(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                message["headers"] = [*message["headers"], (b"server-timing", timings.header().encode())]
                if self._echo:
                    message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode())]
            await send(message)

        try:
            await self._app(scope, receive, tracked)
        except (ClientDisconnect, TaskCancelledError):  # the second from Serve's proxy, of a body that will not come
            await Response(status_code=CLIENT_GONE)(scope, receive, tracked)
        except ScoringError as refusal:
            await _error_response(refusal, scope["path"])(scope, receive, tracked)
        except Exception:
            logger.exception("request %s: a fault of ours", request_id)
            if started:
                raise
            fault = InternalError(f"the server failed on this request; its log names it by {request_id}")
            await _error_response(fault, scope["path"])(scope, receive, tracked)


def _request_id(scope: Scope) -> str:
    """The caller's ``x-request-id``, freed of what could harm a log or a header, or a new one."""
    given = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"")
    return _NOT_IN_REQUEST_ID.sub("", given.decode("latin-1"))[:_MAX_REQUEST_ID] or uuid.uuid4().hex


def _timeout_s(request: Request) -> float:
    """The time that the caller gives this request, in seconds; infinite if it does not say.

    Raises:
        InvalidRequestError: the header is no positive number.
    """
    given = request.headers.get(TIMEOUT_HEADER)
    if given is None:
        return math.inf
    try:
        seconds = float(given)
    except ValueError:
        seconds = math.nan
    if not seconds > 0:
        raise InvalidRequestError(f"{TIMEOUT_HEADER} is {given[:60]!r}; send a number of seconds above 0")
    return seconds - min(AHEAD_OF_PROXY_S, seconds / 4)


async def _unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of ``work``; a client that leaves before cancels it."""
    task = asyncio.create_task(work)
    gone = asyncio.create_task(_disconnected(request))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientDisconnect
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.wait((task, gone))


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _json(answer: BaseModel | list[Any]) -> Response:
    """In pieces: a huge answer takes seconds, and the event loop must go on."""
    content = bytearray()
    for piece in json_pieces(answer):
        content += piece
        if len(piece) > PIECE_VALUES:
            await asyncio.sleep(0)
    return Response(bytes(content), media_type="application/json")


def _error_response(error: ScoringError, path: str, headers: dict[str, str] | None = None) -> Response:
    headers = dict(headers or {})
    if error.status == OverloadedError.status:
        headers["retry-after"] = str(error.retry_after_s or RETRY_AFTER_S)
    if error.status == AuthenticationError.status:
        headers["www-authenticate"] = "Bearer"
    return Response(json.dumps(error.body_on(path)), error.status, headers, media_type="application/json")


async def _on_scoring_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ScoringError)
    if error.status == InternalError.status:
        logger.error("request %s: %s", request.state.request_id, error.message, exc_info=error)
    return _error_response(error, request.url.path)


async def _on_http_exception(request: Request, error: Exception) -> Response:
    """Starlette's own 404 and 405, flat, with the right route."""
    assert isinstance(error, HTTPException)
    path = request.url.path
    shown = path[:_SHOWN_PATH]
    if error.status_code == MethodNotAllowedError.status:
        allowed = (error.headers or {}).get("Allow", "")
        flat: ScoringError = MethodNotAllowedError(f"{shown} does not take {request.method}; send {allowed}")
    elif error.status_code == NotFoundError.status:
        routes = {each.path: each.methods or () for each in request.app.routes if isinstance(each, APIRoute)}
        routes = {path: methods for path, methods in routes.items() if "{" not in path}
        flat = NotFoundError(f"there is no route {shown}; {compat.instead_of(shown, routes)}")
    else:
        flat = BY_STATUS.get(error.status_code, InternalError)(str(error.detail))
    return _error_response(flat, path, dict(error.headers or {}))


def _errors(*codes: int, error: type[BaseModel] = ErrorResponse) -> dict[int | str, dict[str, Any]]:
    return {code: {"model": error, "description": BY_STATUS[code].__doc__} for code in codes}


def _documented(
    answer: type[BaseModel],
    asked: type[BaseModel] | None = None,
    *statuses: int,
    error: type[BaseModel] = ErrorResponse,
    lines: str | None = None,
) -> dict[str, Any]:
    """What OpenAPI says of a route whose handler reads the body and writes the response itself.

    Args:
        error: the shape of its errors.
        lines: of a route that also streams, what is on them.
    """
    codes = ([400, 404, 413, 415] if asked else []) + [500, *statuses]
    options: dict[str, Any] = {"response_model": answer, "responses": _errors(*codes, error=error)}
    if lines:
        content = {"application/x-ndjson": {"schema": {"type": "string", "description": lines}}}
        options["responses"][200] = {"content": content}
    if asked:
        content = {"application/json": {"schema": asked.model_json_schema()}}
        options["openapi_extra"] = {"requestBody": {"required": True, "content": content}}
    return options
