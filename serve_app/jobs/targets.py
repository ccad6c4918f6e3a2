"""What a job's workers ask: a service by its address, one in the same Ray cluster, or an engine of their own."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

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
from serve_app.schemas import InfoResponse, ScoreRequest, ScoreResponse
from serve_app.scorer.engines import load_engine
from serve_app.settings import ModelSettings
from serve_app.tasks.score import SCORE
from serve_app.tasks.tokenizer import TextTokenizer

PATIENCE_S = 600.0
"""With a service that is full, or gone for a while."""

LIGHT_CPUS = 0.25
"""Processors of a worker that only asks."""

Ask = Callable[[ScoreRequest], ScoreResponse]
"""Raises ``ScoringError``."""


class Target(Protocol):
    """Goes to the workers by pickle."""

    @property
    def resources(self) -> dict[str, Any]:
        """Ray's options for each worker."""
        ...

    def identity(self, model: str) -> dict[str, Any]:
        """What tells the model that is asked from another one.

        Raises:
            ScoringError: it cannot be asked.
        """
        ...

    def connect(self) -> Ask:
        """Called once in each worker."""
        ...


@dataclass(frozen=True)
class Service:
    """A running service.

    Attributes:
        url: of its front; workers on other hosts ask it, too.
        key: of its API, if it wants one.
    """

    url: str
    key: str | None = field(default=None, repr=False)

    @property
    def resources(self) -> dict[str, Any]:
        return {"num_cpus": LIGHT_CPUS}

    def identity(self, model: str) -> dict[str, Any]:
        with ScoreClient(self.url, model=model, api_key=self.key, attempts=1) as client:
            return _identity(client.info())

    def connect(self) -> Ask:
        return _patient(ScoreClient(self.url, api_key=self.key, attempts=1).ask)


@dataclass(frozen=True)
class App:
    """A Serve application in the Ray cluster that the job runs in."""

    name: str

    @property
    def resources(self) -> dict[str, Any]:
        return {"num_cpus": LIGHT_CPUS}

    def identity(self, model: str) -> dict[str, Any]:
        return _identity(_result(self._handle().info.remote(model)))

    def connect(self) -> Ask:
        handle = self._handle()
        return _patient(lambda request: _result(handle.score.remote(request)))

    def _handle(self) -> Any:
        try:
            return serve.get_app_handle(self.name)
        except RayServeException as error:
            raise OverloadedError(f"there is no application {self.name!r} in this Ray cluster: {error}") from error


@dataclass(frozen=True)
class Engines:
    """An engine in each worker; no service needs to run.

    Attributes:
        settings: of the model.
    """

    settings: ModelSettings

    @property
    def resources(self) -> dict[str, Any]:
        return scorer_resources(self.settings)

    def identity(self, model: str) -> dict[str, Any]:  # noqa: ARG002 - there is one model
        return self.settings.model_dump(include={"model", "revision", "dtype", "quantization", "engine"})

    def connect(self) -> Ask:
        loop = asyncio.new_event_loop()
        service = loop.run_until_complete(self._service())
        return lambda request: loop.run_until_complete(service.answer(SCORE, request, request_id="dataset"))

    async def _service(self) -> ModelService:
        settings = self.settings
        engine = load_engine(settings)
        tokenizer = TextTokenizer.load(model_source.resolve(settings.model, settings.revision))
        return ModelService(settings, tokenizer, engine.info, LocalReplicas(engine, settings))


def _identity(info: InfoResponse) -> dict[str, Any]:
    return info.model_dump(include={"model", "architecture", "dtype", "vocab_size", "classes", "context_length"})


def _patient(ask: Ask) -> Ask:
    """Again and again while there is no room, or nobody answers."""
    retrying = Retrying(
        retry=retry_if_exception_type(OverloadedError), stop=stop_after_delay(PATIENCE_S), wait=wait, reraise=True
    )
    return lambda request: retrying(ask, request)


def _result(response: Any) -> Any:
    """The answer of a handle's call; Ray's failures become the service's errors."""
    try:
        return response.result()
    except NO_ANSWER as error:
        cause = cause_of(error)
        if isinstance(cause, ScoringError):
            raise cause from None
        raise OverloadedError(f"the service does not answer: {cause}") from error
