"""The front end as a Serve deployment: the HTTP routes, and the same calls over handles for Ray jobs.

Neither this module nor anything that it imports loads jax or the model package.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

from fastapi import FastAPI
from ray import serve
from ray.serve.handle import DeploymentHandle

from serve_app import timing
from serve_app.contract import ModelInfo
from serve_app.frontend import auth
from serve_app.frontend.chips import watch_chips
from serve_app.frontend.door import Door
from serve_app.frontend.models import Models
from serve_app.frontend.replicas import ScorerReplicas
from serve_app.frontend.routes import create_app
from serve_app.frontend.service import ModelService
from serve_app.frontend.tenants import Tenants
from serve_app.local_ray import keep_calls_on_loopback
from serve_app.metrics import REPORT_S, FrontMetrics
from serve_app.schemas import InfoResponse, ScoreRequest, ScoreResponse
from serve_app.settings import DEFAULT_NAME, ModelSettings, ServiceSettings, check_names
from serve_app.tasks.chat import ChatTemplate
from serve_app.tasks.logprobs import LOGPROBS, LogprobsRequest, LogprobsResponse
from serve_app.tasks.profile_choice import applying, choose_profile
from serve_app.tasks.score import SCORE
from serve_app.tasks.systemone import SYSTEMONE, SystemOneRequest, SystemOneResponse
from serve_app.tasks.task import Binary
from serve_app.tasks.template_choice import choose
from serve_app.tasks.tokenizer import TextTokenizer

logger = logging.getLogger("ray.serve")


@serve.deployment  # pyright: ignore[reportUnknownMemberType]
@serve.ingress()  # pyright: ignore[reportUnknownMemberType, reportUntypedClassDecorator]
class Ingress:
    """The Serve deployment: the HTTP routes, and the same over handles for Ray jobs.

    Args:
        settings: the whole service's.
        scorers: for each model the handle of its scorers; the constructor waits for their ``info()``.

    Raises:
        ApiKeyError: at start-up, if the API keys are unusable.
    """

    async def __init__(self, settings: ServiceSettings, *scorers: DeploymentHandle[Any]) -> None:
        keep_calls_on_loopback()
        self._settings = settings.models
        self._service = settings
        self._keys = auth.ApiKeys(settings.api_keys_file)
        if not self._keys:
            logger.warning("no API key is set: everyone who can reach this service may use it")
        if unknown := sorted(settings.tenants.keys() - self._keys.names):
            logger.warning("tenants: no API key has the name %s", ", ".join(unknown))
        self._watching = [
            asyncio.create_task(watch_chips(tpu, replicas)) for tpu, replicas in settings.replicas_on_chips().items()
        ]
        # The scorers warm up meanwhile.
        local, infos = await asyncio.gather(
            asyncio.to_thread(load_tokenizers, settings.models), asyncio.gather(*map(_info, scorers))
        )
        self._metrics = FrontMetrics()
        self._models = Models(
            *(
                ModelService(
                    model,
                    tokenizer,
                    info,
                    ScorerReplicas(scorer),
                    settings.ingress_replicas,
                    partial(self._metrics.answered, model.name),
                    folder,
                )
                for model, (folder, tokenizer), info, scorer in zip(settings.models, local, infos, scorers, strict=True)
            )
        )
        self._door = Door()
        self._reporting = asyncio.create_task(self._report())

    def __serve_build_asgi_app__(self) -> FastAPI:
        return create_app(
            lambda: self._models,
            keys=self._keys,
            tenants=Tenants(
                self._service.tenants,
                salted=self._service.salt_by_api_key,
                front_ends=self._service.ingress_replicas,
            ),
            cors_origins=self._service.cors_origins,
            echo_request_id=False,
            door=self._door,
        )

    async def close(self) -> None:
        """Refuse later HTTP requests, and return when those inside are answered.

        They still need the scorers, which Serve would stop at once.
        """
        await self._door.close()

    async def score(self, request: ScoreRequest) -> ScoreResponse:
        """Score like ``POST /v1/score``, for callers inside the Ray cluster. ``stream`` is ignored.

        Raises:
            ScoringError: see ``ModelService.answer``.
        """
        timing.begin()
        return await self._models.of(request.model).answer(SCORE, request, request_id=uuid.uuid4().hex)

    async def decide(self, request: SystemOneRequest) -> SystemOneResponse:
        """Decide like ``POST /v1/systemone``, for callers inside the Ray cluster. ``stream`` is ignored.

        Raises:
            ScoringError: see ``ModelService.answer``.
        """
        timing.begin()
        return await self._models.of(request.model).answer(SYSTEMONE, request, request_id=uuid.uuid4().hex)

    async def logprobs(self, request: LogprobsRequest) -> LogprobsResponse | Binary:
        """Compute logprobs like ``POST /v1/logprobs``, for callers inside the Ray cluster.

        Raises:
            ScoringError: see ``ModelService.answer``.
        """
        timing.begin()
        return await self._models.of(request.model).answer(LOGPROBS, request, request_id=uuid.uuid4().hex)

    async def info(self, model: str = DEFAULT_NAME) -> InfoResponse:
        """Answer like ``GET /v1/info``, for callers inside the Ray cluster."""
        return self._models.info(model)

    async def reconfigure(self, user_config: Mapping[str, Mapping[str, Any]] | None, rank: object) -> None:  # noqa: ARG002
        """Change settings like ``Scorer.reconfigure``; ``user_config`` has the changes for each served name."""
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
        self._models.reconfigure(settings)

    async def check_health(self) -> None:
        """Raise when no request can be prepared any more; Serve then replaces this front end."""
        self._models.check_health()

    async def _report(self) -> None:
        while True:
            self._metrics.update(self._models.outcomes, self._models.items)
            self._metrics.update_tenants(self._models.tenant_outcomes, self._models.tenant_tokens)
            await asyncio.sleep(REPORT_S)


def load_tokenizers(models: Iterable[ModelSettings]) -> list[tuple[Path, TextTokenizer]]:
    """Load each model's folder and tokenizer, one after the other: two threads cannot import transformers at once."""
    from serve_app import model_source

    loaded: list[tuple[Path, TextTokenizer]] = []
    for each in models:
        folder = model_source.resolve(each.model, each.revision, each.base, say=logger.info)
        tokenizer = TextTokenizer.load(folder)
        loaded.append((folder, tokenizer))
        template, profile = choose(each, folder), choose_profile(each, tokenizer, ChatTemplate.load(tokenizer), folder)
        for choice, doubt in applying(template, profile):
            logger.info("%s: %s", each.name, choice)
            if doubt:
                logger.warning("%s: %s", each.name, doubt)
    return loaded


async def _info(scorer: DeploymentHandle[Any]) -> ModelInfo:
    """Facts about the loaded model. They come when the first replica is warm."""
    return await cast(Any, scorer).info.remote()
