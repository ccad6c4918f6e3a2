"""The HTTP suite's client: on the fake in this process, or on a running service (``--service-url``)."""

from __future__ import annotations

import gc
import warnings
from collections.abc import AsyncIterator, Iterator

import httpx
import pytest

from serve_app.frontend.models import Models
from serve_app.frontend.routes import create_app
from serve_app.frontend.service import ModelService
from tests.boundary.asking import Http
from tests.local import no_metrics


@pytest.fixture
def connections_closed() -> Iterator[None]:
    """Close connections of clients that leave this to the garbage collector, which would warn in a later test."""
    yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


@pytest.fixture
async def http(request: pytest.FixtureRequest, service: ModelService) -> AsyncIterator[Http]:
    url = request.config.getoption("--service-url")
    models = Models(service)
    transport = None if url else httpx.ASGITransport(create_app(lambda: models, metrics=no_metrics))
    async with httpx.AsyncClient(base_url=url or "http://fake", transport=transport, timeout=120) as client:
        info = (await client.get("/v1/info")).json()
        yield Http(client, info)
