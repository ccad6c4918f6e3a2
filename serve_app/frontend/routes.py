"""The HTTP routes over ``Models``, free of Serve.

Neither this module nor anything that it imports loads jax or the model package.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.routing import APIRoute
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import PlainTextResponse
from starlette.routing import request_response

from serve_app.errors import InvalidRequestError, NotFoundError, ScoringError
from serve_app.frontend import auth, bodies, browsers, pages
from serve_app.frontend.door import Door
from serve_app.frontend.middleware import RequestContext, on_http_exception, on_scoring_error
from serve_app.frontend.models import Models
from serve_app.frontend.openapi import documented, errors_of, share_parts
from serve_app.frontend.parsing import parse_large
from serve_app.frontend.streaming import PIECE_VALUES, LinesResponse, json_lines, json_pieces
from serve_app.frontend.tenants import Tenants
from serve_app.metrics import scrape
from serve_app.schemas import InfoResponse, ModelCard, ModelsResponse, StatusResponse, TokenizerInfo
from serve_app.settings import DEFAULT_NAME
from serve_app.tasks.table import TASKS
from serve_app.tasks.task import AnyTask, Binary

TIMEOUT_HEADER = "x-request-timeout-seconds"
"""Serve's proxy reads this header, too, and answers with a plain-text 408 when the time has passed."""
AHEAD_OF_PROXY_S = 0.25
"""Seconds by which, at most, the service gives up before the proxy, so that its own answer reaches the client."""

T = TypeVar("T")


class _PlainRoute(APIRoute):
    """A route that OpenAPI describes, and that Starlette runs: FastAPI would look for parameters in each request."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.app = request_response(self.endpoint)


def create_app(
    get_models: Callable[[], Models],
    *,
    keys: auth.ApiKeys | None = None,
    tenants: Tenants | None = None,
    cors_origins: Sequence[str] = (),
    echo_request_id: bool = True,
    metrics: Callable[[], Awaitable[str]] = scrape,
    door: Door | None = None,
) -> FastAPI:
    """Make the HTTP application of the service.

    Args:
        get_models: called in every request.
        keys: if there are any, a request must have one of them.
        tenants: what holds for each key; None: the same for all.
        cors_origins: web pages of these origins may call from a browser.
        echo_request_id: put ``x-request-id`` into responses. False under Serve's proxy, which does this itself.
        metrics: returns all metrics in Prometheus' text format, or raises OverloadedError if an agent does not answer.
        door: counts the requests inside, and can be closed; None: the application is never asked to stop.
    """
    app = FastAPI(title="score-serve", redirect_slashes=False, docs_url=None, redoc_url=None)
    app.add_middleware(browsers.HeadAsGet)
    if keys:
        app.add_middleware(auth.RequireKey, keys=keys)
        auth.document(app)
    if door:
        app.add_middleware(door.before)
    app.add_middleware(RequestContext, echo=echo_request_id)
    if cors_origins:
        browsers.allow(app, cors_origins)
    app.add_exception_handler(ScoringError, on_scoring_error)
    app.add_exception_handler(HTTPException, on_http_exception)
    # A request is compared with the routes in this order, by Serve, too.
    for path in dict.fromkeys(path for task in TASKS for path in task.paths):
        _add_route(app, path, [task for task in TASKS if path in task.paths], get_models, tenants or Tenants())
    _add_facts(app, get_models, metrics)
    pages.add_pages(app)
    share_parts(app)
    return app


def _add_route(
    app: FastAPI, path: str, tasks: Sequence[AnyTask], get_models: Callable[[], Models], tenants: Tenants
) -> None:
    """Add a route for one task, or for several that differ in their bodies; OpenAPI describes the last."""

    async def handle(request: Request) -> Response:
        sent = await bodies.read(request, get_models().max_body_bytes)
        task = next(each for each in tasks if each.matches is None or each.matches(sent))
        asked = await parse_large(task.request, sent, task.parse)
        service = get_models().of(asked.model or DEFAULT_NAME, task.aliases)
        request_id: str = request.state.request_id
        limit, tenant = _timeout_s(request), tenants.of(getattr(request.state, "tenant", ""))
        if task.lines and asked.stream:
            stream = service.stream(task, asked, request_id=request_id, timeout_s=limit, tenant=tenant)
            lines = json_lines(stream, request_id, path)
            return LinesResponse(await _unless_gone(request, anext(lines)), lines)
        work = service.answer(task, asked, request_id=request_id, timeout_s=limit, tenant=tenant, size=len(sent))
        return await _json(await _unless_gone(request, work))

    task = tasks[-1]
    statuses = (503, 504) if task.scores else (504,)
    invalid, _ = InvalidRequestError("").answer_on(path)
    lines = ("application/x-ndjson", task.lines.description) if task.lines else None
    options = documented(
        task.response,
        task.request,
        *statuses,
        example=task.example,
        error=task.error,
        others=dict(filter(None, (lines, task.binary))),
        invalid=invalid,
    )
    about: dict[str, Any] = {"methods": ["POST"], "name": task.name, "description": task.description, **options}
    app.router.add_api_route(path, handle, route_class_override=_PlainRoute, **about)


def _add_facts(app: FastAPI, get_models: Callable[[], Models], scraped: Callable[[], Awaitable[str]]) -> None:
    """Add the routes that describe the service and its models."""

    @app.get("/v1/models", **documented(ModelsResponse))
    async def models() -> Response:
        """List the names of the served models."""
        return await _json(get_models().models())

    @app.get("/v1/models/{name:path}", **documented(ModelCard, None, 404))
    async def model_card(name: str) -> Response:
        """Describe one name of a served model."""
        if not name:
            raise HTTPException(NotFoundError.status)
        return await _json(get_models().model(name))

    @app.get("/tokenizer_info", **documented(TokenizerInfo, None, 404))
    async def tokenizer_info(model: str = DEFAULT_NAME) -> Response:
        """The tokenizer's special tokens and chat template, in vLLM's format; null means that there is none."""
        return Response(get_models().tokenizer_info(model).model_dump_json(), media_type="application/json")

    @app.get("/v1/info", **documented(InfoResponse, None, 404))
    async def info(model: str = DEFAULT_NAME) -> Response:
        """Describe a served model and the limits of its requests."""
        return await _json(get_models().info(model))

    @app.get("/metrics", response_class=PlainTextResponse, responses=errors_of(500, 503))
    async def metrics() -> Response:
        """The metrics of all front ends and scorers, for Prometheus."""
        return PlainTextResponse(await scraped(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/health", **documented(StatusResponse))
    async def health() -> Response:
        """This front end is alive."""
        return await _json(StatusResponse())

    @app.get("/ready", **documented(StatusResponse, None, 404, 503))
    async def ready(model: str | None = None) -> Response:
        """Ready: this model, or every model, passed a self-test."""
        await get_models().ready(model)
        return await _json(StatusResponse())

    # FastAPI keeps the handlers; the names are only read by it.
    del models, model_card, tokenizer_info, info, metrics, health, ready


def _timeout_s(request: Request) -> float:
    """The caller's time limit for this request, in seconds; infinite if there is none.

    Raises:
        InvalidRequestError: the header is not a positive number.
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


async def _unless_gone(request: Request, work: Awaitable[T]) -> T:
    """Return the result of ``work``, or cancel it if the client leaves first."""
    here = asyncio.timeout(None)

    def leave(gone: asyncio.Task[None]) -> None:
        if not gone.cancelled():
            here.reschedule(0)

    gone = asyncio.create_task(_disconnected(request))
    try:
        async with here:
            gone.add_done_callback(leave)
            try:
                return await work
            finally:
                gone.remove_done_callback(leave)
    except TimeoutError:
        if here.expired():
            raise ClientDisconnect from None
        raise
    finally:
        gone.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _json(answer: BaseModel | list[Any] | Binary) -> Response:
    """Make a response, in pieces: a huge answer takes seconds, and the event loop must go on."""
    if isinstance(answer, Binary):
        return Response(answer.content, media_type=answer.media_type)
    content = bytearray()
    for piece in json_pieces(answer):
        content += piece
        if len(piece) > PIECE_VALUES:
            await asyncio.sleep(0)
    return Response(bytes(content), media_type="application/json")
