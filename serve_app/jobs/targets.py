"""What scores a job's rows: a service by its address, one in the same Ray cluster, or an engine in each worker."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from threading import Thread
from typing import Any, Protocol, TypeVar, cast

from ray import serve
from ray.serve.exceptions import RayServeException
from tenacity import Retrying, retry_if_exception_type, stop_after_delay

from serve_app import model_source
from serve_app.app import scorer_resources
from serve_app.client import ScoreClient, wait
from serve_app.errors import OverloadedError, ScoringError
from serve_app.frontend.replicas import NO_ANSWER, cause_of
from serve_app.frontend.service import ModelService
from serve_app.jobs.local_replicas import LocalReplicas
from serve_app.schemas import InfoResponse, RequestBody
from serve_app.scorer.engines import load_engine
from serve_app.settings import ModelSettings
from serve_app.tasks.logprobs import LOGPROBS
from serve_app.tasks.score import SCORE
from serve_app.tasks.systemone import SYSTEMONE
from serve_app.tasks.task import Task
from serve_app.tasks.tokenizer import TextTokenizer

PATIENCE_S = 600.0
"""How long to retry while the service is overloaded or unreachable, in seconds."""

LIGHT_CPUS = 0.25
"""CPUs of a worker that only sends requests."""

R = TypeVar("R", bound=RequestBody)
A = TypeVar("A")
Ask = Callable[[R], A]
"""Sends a request and returns the answer; threads may share it. Raises ``ScoringError``."""

_METHODS = {SCORE.name: "score", SYSTEMONE.name: "decide", LOGPROBS.name: "logprobs"}
"""The method of a Serve application's handle for each task."""


class Target(Protocol):
    """What scores the rows; pickled to the workers."""

    @property
    def resources(self) -> dict[str, Any]:
        """Ray's resource options for each worker."""
        ...

    def identity(self, model: str, *more: str) -> dict[str, Any]:
        """What identifies the model, for ``job.json``.

        Args:
            more: names of other facts that the answers depend on.

        Raises:
            ScoringError: the service cannot be reached, or has no such model.
        """
        ...

    def connect(self, task: Task[R, A]) -> Ask[R, A]:
        """Connect, once in each worker."""
        ...


@dataclass(frozen=True)
class Service:
    """A running service.

    Attributes:
        url: its address, which must be reachable from all workers.
        key: the API key, if it requires one.
    """

    url: str
    key: str | None = field(default=None, repr=False)

    @property
    def resources(self) -> dict[str, Any]:
        return {"num_cpus": LIGHT_CPUS}

    def identity(self, model: str, *more: str) -> dict[str, Any]:
        with ScoreClient(self.url, model=model, api_key=self.key, attempts=1) as client:
            return _identity(client.info(), more)

    def connect(self, task: Task[R, A]) -> Ask[R, A]:  # noqa: ARG002 - the client sees it by the request
        return _patient(cast(Ask[R, A], ScoreClient(self.url, api_key=self.key, attempts=1).ask))


@dataclass(frozen=True)
class App:
    """A Serve application in the job's own Ray cluster, called by its handle."""

    name: str

    @property
    def resources(self) -> dict[str, Any]:
        return {"num_cpus": LIGHT_CPUS}

    def identity(self, model: str, *more: str) -> dict[str, Any]:
        return _identity(_result(self._handle().info.remote(model)), more)

    def connect(self, task: Task[R, A]) -> Ask[R, A]:
        method = getattr(self._handle(), _METHODS[task.name])
        return _patient(lambda request: _result(method.remote(request)))

    def _handle(self) -> Any:
        try:
            handle = serve.get_app_handle(self.name)
        except RayServeException as error:
            raise OverloadedError(
                f"this Ray cluster has no application {self.name!r}: {error}; 'serve status' lists them"
            ) from error
        if not handle.is_initialized:
            # In a cluster with RAY_SERVE_THROUGHPUT_OPTIMIZED handles work in coroutines alone by default.
            handle._init(_run_router_in_separate_loop=True)  # pyright: ignore[reportPrivateUsage]
        return handle


@dataclass(frozen=True)
class Engines:
    """An engine in each worker; no service is needed.

    Attributes:
        settings: the model's settings.
    """

    settings: ModelSettings

    @property
    def resources(self) -> dict[str, Any]:
        return scorer_resources(self.settings)

    def identity(self, model: str, *more: str) -> dict[str, Any]:  # noqa: ARG002 - there is one model
        facts = {"model", "revision", "base", "dtype", "quantization", "engine", *more}
        if self.settings.trust_config:
            facts.add("trust_config")
        return self.settings.model_dump(include=facts)

    def connect(self, task: Task[R, A]) -> Ask[R, A]:
        loop = asyncio.new_event_loop()
        service = loop.run_until_complete(self._service())
        Thread(target=loop.run_forever, name="requests", daemon=True).start()

        def ask(request: R) -> A:
            return asyncio.run_coroutine_threadsafe(service.answer(task, request, request_id="dataset"), loop).result()

        return ask

    async def _service(self) -> ModelService:
        settings = self.settings
        engine = load_engine(settings)
        folder = model_source.resolve(settings.model, settings.revision, settings.base)
        tokenizer = TextTokenizer.load(folder)
        return ModelService(settings, tokenizer, engine.info, LocalReplicas(engine, settings), folder=folder)


def _identity(info: InfoResponse, more: Iterable[str]) -> dict[str, Any]:
    return info.model_dump(include={"model", "architecture", "dtype", "vocab_size", "classes", "context_length", *more})


def _patient(ask: Ask[R, A]) -> Ask[R, A]:
    """Retry for ``PATIENCE_S`` while the service is overloaded or unreachable."""
    retrying = Retrying(
        retry=retry_if_exception_type(OverloadedError), stop=stop_after_delay(PATIENCE_S), wait=wait, reraise=True
    )
    return lambda request: retrying(ask, request)


def _result(response: Any) -> Any:
    """The result of a handle's call; failures of Ray become the service's errors."""
    try:
        return response.result()
    except NO_ANSWER as error:
        cause = cause_of(error)
        if isinstance(cause, ScoringError):
            raise cause from None
        raise OverloadedError(f"the service is unreachable: {cause}") from error
