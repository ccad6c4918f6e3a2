"""The door of a front end that stops: requests inside are answered, later ones are refused."""

from __future__ import annotations

import asyncio

import httpx
import pytest
from starlette.types import Receive, Scope, Send

from serve_app.errors import OverloadedError
from serve_app.frontend.door import Door
from serve_app.frontend.models import Models
from serve_app.frontend.routes import create_app
from serve_app.frontend.service import ModelService

HTTP: Scope = {"type": "http", "path": "/v1/score"}


async def nothing() -> dict[str, str]:
    return {}


async def nowhere(_: object) -> None:
    pass


async def test_a_closed_door_waits_for_those_inside_and_lets_no_more_in():
    answered: list[int] = []
    go_on = asyncio.Event()

    async def app(_scope: Scope, _receive: Receive, _send: Send) -> None:
        await go_on.wait()
        answered.append(1)

    door = Door()
    enter = door.before(app)
    inside = [asyncio.create_task(enter(HTTP, nothing, nowhere)) for _ in range(2)]
    await asyncio.sleep(0)
    closing = asyncio.create_task(door.close())
    await asyncio.sleep(0)
    with pytest.raises(OverloadedError, match="shutting down") as late:
        await enter(HTTP, nothing, nowhere)
    assert late.value.retry_after_s
    assert not closing.done()
    go_on.set()
    await closing
    assert answered == [1, 1]
    await asyncio.gather(*inside)


@pytest.mark.parametrize("end", [asyncio.CancelledError, RuntimeError])
async def test_a_request_that_is_cancelled_or_fails_is_outside(end: type[BaseException]):
    async def app(_scope: Scope, _receive: Receive, _send: Send) -> None:
        raise end

    door = Door()
    with pytest.raises(end):
        await door.before(app)(HTTP, nothing, nowhere)
    await door.close()


async def test_the_lifespan_goes_through_a_closed_door():
    passed: list[str] = []

    async def app(scope: Scope, _receive: Receive, _send: Send) -> None:
        passed.append(scope["type"])

    door = Door()
    await door.close()
    await door.before(app)({"type": "lifespan"}, nothing, nowhere)
    assert passed == ["lifespan"]


@pytest.mark.parametrize("prefix", ["", "/judge"])
async def test_with_a_closed_door_the_front_end_is_alive_but_not_ready(fake_service: ModelService, prefix: str):
    door = Door()
    transport = httpx.ASGITransport(create_app(lambda: Models(fake_service), door=door), root_path=prefix)
    async with httpx.AsyncClient(base_url=f"http://fake{prefix}", transport=transport) as client:
        assert (await client.get("/ready")).status_code == 200
        await door.close()
        for method in ("GET", "HEAD"):
            assert (await client.request(method, "/health")).status_code == 200
            assert (await client.request(method, "/ready")).status_code == 503
        refused = await client.post("/v1/score", json={"items": [[1]], "label_token_ids": [1]})
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
