"""The served models by name."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict

from serve_app.errors import NotFoundError
from serve_app.frontend.info import info
from serve_app.frontend.readiness import SelfTest
from serve_app.frontend.service import ModelService
from serve_app.schemas import InfoResponse, ModelCard, ModelMetadata, ModelsResponse, TokenizerInfo
from serve_app.settings import DEFAULT_NAME, ModelSettings

_SHOWN = 60
"""Characters of an unknown name that an error shows."""

NO_MODEL = ""
"""Key of the outcomes of requests that name no served model."""


class Models:
    """One ``ModelService`` for each served model. The first is also named ``default``.

    Args:
        services: at least one; no two share a name.
    """

    def __init__(self, *services: ModelService) -> None:
        self._services = services
        self._self_tests = {service: SelfTest(service) for service in services}
        self._by_name = _by_name(services)
        self._started = int(time.time())
        self._unknown: Counter[str] = Counter()

    def reconfigure(self, settings: Sequence[ModelSettings]) -> None:
        """See ``ModelService.reconfigure``.

        Args:
            settings: each model's, in the order of the services.
        """
        for service, own in zip(self._services, settings, strict=True):
            service.reconfigure(own)
        self._by_name = _by_name(self._services)

    @property
    def max_body_bytes(self) -> int:
        """The largest body of a request, the same for all models."""
        return self._services[0].settings.limits.max_body_bytes

    @property
    def outcomes(self) -> Mapping[str, Mapping[str, int]]:
        """``ModelService.outcomes`` by the model's name."""
        return {service.settings.name: service.outcomes for service in self._services} | {NO_MODEL: self._unknown}

    @property
    def items(self) -> Mapping[str, int]:
        """``ModelService.items`` by the model's name."""
        return {service.settings.name: service.items for service in self._services}

    @property
    def tenant_outcomes(self) -> Mapping[str, Mapping[str, Mapping[str, int]]]:
        """``ModelService.tenant_outcomes`` by the model's name."""
        return {service.settings.name: service.tenant_outcomes for service in self._services}

    @property
    def tenant_tokens(self) -> Mapping[str, Mapping[str, int]]:
        """``ModelService.tenant_tokens`` by the model's name."""
        return {service.settings.name: service.tenant_tokens for service in self._services}

    def of(self, name: str, aliases: Collection[str] = ()) -> ModelService:
        """Return the service of the model that a request names.

        Args:
            aliases: names that mean the default model, where no model has them.

        Raises:
            NotFoundError: no model has this name; the message lists the names.
        """
        service = self._by_name.get(name) or self._of_pair(name)
        if service is None and name in aliases:
            service = self._by_name[DEFAULT_NAME]
        if service is None:
            self._unknown["invalid"] += 1
            shown = name if len(name) <= _SHOWN else name[:_SHOWN] + "..."
            raise NotFoundError(
                f"model {shown!r} is not served here; the names are {', '.join(self._by_name)}", param="model"
            )
        return service

    def _of_pair(self, name: str) -> ModelService | None:
        """The service of a name like MODEL:ADAPTER."""
        model = name.rpartition(":")[0]
        service = self._by_name.get(model)
        return service if service and service.adapter(name) and not service.adapter(model) else None

    def models(self) -> ModelsResponse:
        """List the names that requests may use, except ``default``."""
        names = [name for name in self._by_name if name != DEFAULT_NAME]
        return ModelsResponse(
            data=[self.model(name) for name in names], models=[self._metadata(name) for name in names]
        )

    def model(self, name: str) -> ModelCard:
        """Describe one name that requests may use.

        Raises:
            NotFoundError: no model has this name.
        """
        service = self.of(name)
        most, parent = service.model.max_prompt_tokens, service.settings.name if service.adapter(name) else None
        return ModelCard(id=name, created=self._started, owned_by="score-serve", max_model_len=most, parent=parent)

    def _metadata(self, name: str) -> ModelMetadata:
        service = self.of(name)
        facts = service.model
        return ModelMetadata(
            name=name,
            description=f"{service.settings.name}: {facts.info.architecture}, {facts.max_prompt_tokens} tokens",
            release_date=time.strftime("%Y-%m-%d", time.gmtime(self._started)),
        )

    def info(self, name: str) -> InfoResponse:
        """Describe the model with this name, and the limits of its requests.

        Raises:
            NotFoundError: no model has this name.
        """
        service = self.of(name)
        adapters = service.settings.adapters
        return info(service, [each for each, own in self._by_name.items() if own is service and each not in adapters])

    def tokenizer_info(self, name: str) -> TokenizerInfo:
        """Return the special tokens and chat template of a model's tokenizer.

        Raises:
            NotFoundError: no model has this name.
        """
        model = self.of(name).model
        facts = asdict(model.tokenizer.facts)
        return TokenizerInfo.model_validate(facts | {"model_max_length": model.max_prompt_tokens})

    def check_health(self) -> None:
        """Raise if ``ModelService.check_health`` raises for any model."""
        for service in self._services:
            service.check_health()

    async def ready(self, name: str | None) -> None:
        """Return once this model, or every model, has passed its self-test.

        Raises:
            NotFoundError: no model has this name.
            SelfTestError: a model failed.
            OverloadedError: a model cannot score yet; the message says why.
        """
        services = self._services if name is None else [self.of(name)]
        await asyncio.gather(*(self._self_tests[service].passed() for service in services))


def _by_name(services: Sequence[ModelService]) -> dict[str, ModelService]:
    found = {name: service for service in services for name in (*service.settings.names, *service.settings.adapters)}
    return {**found, DEFAULT_NAME: found.get(DEFAULT_NAME, services[0])}
