"""Connections with more than plain requests, through the HTTP protocol that Serve's servers use here."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator

import pytest

from serve_app.contract import JobResult, ScoreJob
from serve_app.frontend.models import Models
from serve_app.frontend.routes import create_app
from serve_app.frontend.service import ModelService
from serve_app.scorer.fake_engine import FakeEngine
from serve_app.settings import ModelSettings
from serve_app.tasks.tokenizer import TextTokenizer
from tests.local import CONTEXT, VOCAB_SIZE, DirectReplicas
from tests.served import Served, serving
from tests.wire import SPLITS, UPGRADES, connected, post, upgrade_is_ignored


@pytest.fixture
def served(fake_service: ModelService) -> Iterator[Served]:
    models = Models(fake_service)
    with serving(create_app(lambda: models)) as running:
        yield running


@pytest.mark.parametrize("upgrade", UPGRADES)
@pytest.mark.parametrize("split", SPLITS)
def test_a_request_to_upgrade_is_served_with_its_body_and_the_connection_goes_on(
    served: Served, upgrade: str, split: str
):
    upgrade_is_ignored(served.url, upgrade, SPLITS[split])


@pytest.mark.parametrize("upgrade", UPGRADES)
def test_a_request_to_upgrade_loses_only_its_upgrade_headers(served: Served, upgrade: str):
    with connected(served.url) as wire:
        wire.send(*post(*UPGRADES[upgrade], "X-Request-Timeout-Seconds: never"))
        status, answer = wire.answer()
        assert (status, answer["message"].split()[0]) == (400, "x-request-timeout-seconds")


def test_requests_in_one_packet_are_each_answered_whichever_wants_to_upgrade(served: Served):
    plain, wishing = b"".join(post()), b"".join(post(*UPGRADES["h2c"]))
    with connected(served.url) as wire:
        wire.send(plain + wishing + wishing + b"".join(post("Connection: close")))
        received = b"".join(iter(lambda: wire.socket.recv(2**16), b""))
        assert received.count(b"HTTP/1.1 200 OK") == received.count(b"HTTP/1.1") == 4


def test_connect_and_invalid_http_are_refused(served: Served):
    for wrong in (b"CONNECT here:80 HTTP/1.1\r\nHost: here\r\n\r\n", b"nonsense\r\n\r\n"):
        with connected(served.url) as wire:
            wire.send(wrong)
            assert wire.socket.recv(2**16).startswith(b"HTTP/1.1 400 ")


@pytest.mark.parametrize("upgrade", [(), UPGRADES["h2c"]])
def test_a_client_that_sends_no_more_gets_its_answer(served: Served, upgrade: tuple[str, ...]):
    with connected(served.url) as wire:
        wire.send(b"".join(post(*upgrade)))
        wire.socket.shutdown(socket.SHUT_WR)
        status, answer = wire.answer()
        assert (status, len(answer["scores"])) == (200, 2)
        assert wire.ends()


class Holding(DirectReplicas):
    """Replicas that answer when the test says so, and notice when a caller stops waiting."""

    def __init__(self) -> None:
        super().__init__(FakeEngine(VOCAB_SIZE, CONTEXT))
        self.begun, self.left, self.may_answer = threading.Event(), threading.Event(), threading.Event()

    async def score(self, job: ScoreJob) -> JobResult:
        self.begun.set()
        try:
            while not self.may_answer.is_set():  # noqa: ASYNC110 - set by another thread
                await asyncio.sleep(0.01)
        except asyncio.CancelledError:
            self.left.set()
            raise
        return await super().score(job)


@pytest.fixture
def held(tokenizer: TextTokenizer) -> Iterator[tuple[Holding, Served]]:
    replicas = Holding()
    service = ModelService(ModelSettings(engine="fake"), tokenizer, replicas.engine.info, replicas)
    models = Models(service)
    with serving(create_app(lambda: models)) as running:
        yield replicas, running
    service.close()


def test_a_waiting_client_that_is_still_there_gets_its_answer(held: tuple[Holding, Served]):
    replicas, served = held
    with connected(served.url) as wire:
        wire.send(b"".join(post()))
        wire.socket.shutdown(socket.SHUT_WR)
        asked = b"HTTP/1.1 100 Continue\r\n\r\n"
        assert [wire.socket.recv(len(asked), socket.MSG_WAITALL) for _ in range(3)] == [asked] * 3
        replicas.may_answer.set()
        assert wire.answer()[0] == 200
    assert not replicas.left.is_set()


@pytest.mark.parametrize("version", ["1.1", "1.0"])
def test_a_client_that_has_left_ends_its_work(held: tuple[Holding, Served], version: str):
    replicas, served = held
    with connected(served.url) as wire:
        wire.send(b"".join(post(version=version)))
        assert replicas.begun.wait(60)
    assert replicas.left.wait(60)


def test_half_a_request_is_not_answered(served: Served):
    with connected(served.url) as wire:
        head, body = post()
        wire.send(head + body[:5])
        wire.socket.shutdown(socket.SHUT_WR)
        assert wire.ends()
