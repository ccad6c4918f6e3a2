"""The served models by name."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Mapping, Sequence

from serve_app.errors import NotFoundError
from serve_app.frontend.service import ScoringService
from serve_app.schemas import InfoResponse, ModelCard, ModelsResponse
from serve_app.settings import DEFAULT_NAME, ModelSettings

_SHOWN = 60
"""Characters of an unknown name that an error repeats."""

NO_MODEL = ""
"""Among the outcomes, of requests that name no served model."""


class Services:
    """One ``ScoringService`` for each served model. The first is ``default``, too.

    Args:
        services: at least one; no two with the same name.
    """

    def __init__(self, *services: ScoringService) -> None:
        self._services = services
        self._by_name = _by_name(services)
        self._started = int(time.time())
        self._unknown: Counter[str] = Counter()

    def reconfigure(self, settings: Sequence[ModelSettings]) -> None:
        """See ``ScoringService.reconfigure``.

        Args:
            settings: of each model, in their order.
        """
        for service, own in zip(self._services, settings, strict=True):
            service.reconfigure(own)
        self._by_name = _by_name(self._services)

    @property
    def max_body_bytes(self) -> int:
        """Of a request to any of them."""
        return self._services[0].settings.limits.max_body_bytes

    @property
    def outcomes(self) -> Mapping[str, Mapping[str, int]]:
        """By the model's name, its ``ScoringService.outcomes``."""
        return {service.settings.name: service.outcomes for service in self._services} | {NO_MODEL: self._unknown}

    @property
    def items(self) -> Mapping[str, int]:
        """By the model's name, its ``ScoringService.items``."""
        return {service.settings.name: service.items for service in self._services}

    def of(self, name: str) -> ScoringService:
        """The service of the model that a request names.

        Raises:
            NotFoundError: there is none; the message lists the names.
        """
        service = self._by_name.get(name)
        if service is None:
            self._unknown["invalid"] += 1
            shown = name if len(name) <= _SHOWN else name[:_SHOWN] + "..."
            raise NotFoundError(
                f"model {shown!r} is not served here; the names are {', '.join(self._by_name)}", param="model"
            )
        return service

    def models(self) -> ModelsResponse:
        """The names that requests may use, ``default`` aside."""
        return ModelsResponse(data=[self.model(name) for name in self._by_name if name != DEFAULT_NAME])

    def model(self, name: str) -> ModelCard:
        """One name that requests may use.

        Raises:
            NotFoundError: they may not.
        """
        most = self.of(name).max_prompt_tokens
        return ModelCard(id=name, created=self._started, owned_by="score-serve", max_model_len=most)

    def info(self, name: str) -> InfoResponse:
        """What is served under this name, and the limits.

        Raises:
            NotFoundError: nothing is.
        """
        service = self.of(name)
        return service.info([each for each, own in self._by_name.items() if own is service])

    def check_health(self) -> None:
        """See ``ScoringService.check_health``; one that fails is enough."""
        for service in self._services:
            service.check_health()

    async def metrics(self) -> str:
        """See ``Replicas.metrics``, which has those of all models."""
        return await self._services[0].metrics()

    async def ready(self, name: str | None) -> None:
        """Return when this model, or all, answered a known prompt rightly. See ``ScoringService.ready``.

        Raises:
            NotFoundError: there is no such model.
            OverloadedError: a model is not able to score, with the reason.
        """
        services = self._services if name is None else [self.of(name)]
        await asyncio.gather(*(service.ready() for service in services))


def _by_name(services: Sequence[ScoringService]) -> dict[str, ScoringService]:
    found = {name: service for service in services for name in service.settings.names}
    return {**found, DEFAULT_NAME: found.get(DEFAULT_NAME, services[0])}
