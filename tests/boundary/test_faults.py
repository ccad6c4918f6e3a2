"""HTTP answers when the service is at its limits or broken, on the fake in this process."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import httpx
import numpy as np
import pytest

from serve_app.contract import BatchResult, JobResult, ModelInfo, ScoreJob, TokenBatch
from serve_app.errors import OverloadedError
from serve_app.frontend.models import Models
from serve_app.frontend.routes import create_app
from serve_app.frontend.service import ModelService, Replicas
from serve_app.scorer.fake_engine import FakeEngine
from serve_app.settings import Limits, ModelSettings
from serve_app.tasks.tokenizer import TextTokenizer
from tests.boundary.asking import Http
from tests.local import CONTEXT, VOCAB_SIZE, DirectReplicas
from tests.stubs import HangingReplicas

ASK: dict[str, Any] = {"query": [1, 2], "items": [[3], [4]], "label_token_ids": [5, 6]}
INFO: ModelInfo = FakeEngine(VOCAB_SIZE, CONTEXT).info
FAKE = ModelSettings(model="fake-judge", engine="fake")


class Failing:
    """Replicas that raise a given error."""

    count = 1

    def __init__(self, error: Exception) -> None:
        self.error = error

    async def score(self, _job: ScoreJob) -> JobResult:
        raise self.error


class Mixing(FakeEngine):
    """An engine that mixes up sequences: each gets the first values of its batch."""

    def score(self, batch: TokenBatch) -> BatchResult:
        result = super().score(batch)
        return replace(result, values=np.resize(result.values[:2], len(result.values)))


@asynccontextmanager
async def serving(tokenizer: TextTokenizer, replicas: Replicas, settings: ModelSettings = FAKE) -> AsyncIterator[Http]:
    service = ModelService(settings, tokenizer, INFO, replicas)
    models = Models(service)
    transport = httpx.ASGITransport(create_app(lambda: models))
    async with httpx.AsyncClient(base_url="http://fake", transport=transport) as client:
        yield Http(client, Models(service).info("default").model_dump())
    service.close()


@pytest.fixture
def replicas() -> DirectReplicas:
    return DirectReplicas(FakeEngine(VOCAB_SIZE, CONTEXT))


class TestLimits:
    async def test_items(self, tokenizer: TextTokenizer, replicas: DirectReplicas):
        settings = ModelSettings(engine="fake", limits=Limits(max_items=3))
        async with serving(tokenizer, replicas, settings) as http:
            await http.score(items=["a"] * 3, label_token_ids=[1])
            error = await http.refused(status=413, items=["a"] * 4, label_token_ids=[1])
            assert "4" in error["message"]
            assert "at most 3" in error["message"]
            assert error["param"] == "items"
            assert "at most 3" in (await http.refused("/tokenize", status=413, prompt=["a"] * 4))["message"]

    async def test_labels(self, tokenizer: TextTokenizer, replicas: DirectReplicas):
        async with serving(tokenizer, replicas, ModelSettings(engine="fake", limits=Limits(max_labels=2))) as http:
            await http.score(items=["a"], label_token_ids=[1, 2])
            for labels in ([1, 2, 3], [[1, 2, 3]]):
                error = await http.refused(items=["a"], label_token_ids=labels)
                assert "at most 2" in error["message"]
                assert error["param"] == "label_token_ids"

    async def test_prompt_tokens(self, tokenizer: TextTokenizer, replicas: DirectReplicas):
        async with serving(
            tokenizer, replicas, ModelSettings(engine="fake", limits=Limits(max_prompt_tokens=4))
        ) as http:
            await http.score(query=[1, 2], items=[[3, 4]], label_token_ids=[1])
            error = await http.refused(query=[1, 2], items=[[3], [3, 4, 5]], label_token_ids=[1])
            assert "items[1]: the prompt has 5 tokens; this model reads at most 4" in error["message"]
            assert http.info["limits"]["max_prompt_tokens"] == 4

    async def test_request_tokens(self, tokenizer: TextTokenizer, replicas: DirectReplicas):
        async with serving(
            tokenizer, replicas, ModelSettings(engine="fake", limits=Limits(max_request_tokens=9))
        ) as http:
            await http.score(query=[1, 2], items=[[3]] * 3, label_token_ids=[1])
            error = await http.refused(status=413, query=[1, 2], items=[[3]] * 4, label_token_ids=[1])
            assert "at most 9" in error["message"]

    async def test_body(self, tokenizer: TextTokenizer, replicas: DirectReplicas):
        async with serving(
            tokenizer, replicas, ModelSettings(engine="fake", limits=Limits(max_body_bytes=1024))
        ) as http:
            body = json.dumps({"items": ["a"], "label_token_ids": [1]})
            assert (await http.post(body.ljust(1024))).status_code == 200
            assert "1024 bytes" in http.flat(await http.post(body.ljust(1025)), 413)["message"]

    async def test_body_of_unknown_length_is_not_read_to_its_end(
        self, tokenizer: TextTokenizer, replicas: DirectReplicas
    ):
        sent = 0

        async def endless() -> AsyncIterator[bytes]:
            nonlocal sent
            while True:
                sent += 100
                yield b" " * 100

        async with serving(
            tokenizer, replicas, ModelSettings(engine="fake", limits=Limits(max_body_bytes=1024))
        ) as http:
            response = await http.client.post(
                "/v1/score", content=endless(), headers={"content-type": "application/json"}
            )
            assert "1024 bytes" in http.flat(response, 413)["message"]
            assert sent == 1100

    async def test_a_declared_length_is_refused_before_a_byte_is_read(
        self, tokenizer: TextTokenizer, replicas: DirectReplicas
    ):
        service = ModelService(FAKE, tokenizer, INFO, replicas)
        sent: list[dict[str, Any]] = []
        length = b"%d" % (Models(service).max_body_bytes + 1)

        async def receive() -> dict[str, Any]:
            raise AssertionError("the body was read")

        async def send(message: Any) -> None:
            sent.append(message)

        models = Models(service)
        await create_app(lambda: models)(scope("/v1/score", (b"content-length", length)), receive, send)
        assert sent[0]["status"] == 413
        service.close()


class TestFaults:
    async def test_an_internal_fault_gives_its_request_id_and_nothing_else(self, tokenizer: TextTokenizer, caplog: Any):
        async with serving(tokenizer, Failing(RuntimeError("secret /some/path"))) as http:
            response = await http.post(json.dumps(ASK), x_request_id="find-me")
            error = http.flat(response, 500)
            assert error["type"] == "InternalServerError"
            assert "find-me" in error["message"]
            assert "secret" not in response.text
            assert "Traceback" not in response.text
            assert response.headers["x-request-id"] == "find-me"
        assert "find-me" in caplog.text
        assert "secret" in caplog.text

    async def test_overload(self, tokenizer: TextTokenizer):
        async with serving(tokenizer, Failing(OverloadedError("full", retry_after_s=7))) as http:
            response = await http.post(json.dumps(ASK))
            assert http.flat(response, 503)["message"] == "full"
            assert response.headers["retry-after"] == "7"
        async with serving(tokenizer, Failing(OverloadedError("full"))) as http:
            assert (await http.post(json.dumps(ASK))).headers["retry-after"] == "1"

    async def test_output_that_is_not_finite_names_the_item(self, tokenizer: TextTokenizer):
        replicas = DirectReplicas(FakeEngine(VOCAB_SIZE, CONTEXT, nan_token=4))
        async with serving(tokenizer, replicas) as http:
            error = await http.refused(status=500, **ASK)
            assert error["type"] == "InternalServerError"
            assert "items[1]" in error["message"]
            await http.score(**ASK | {"items": [[3]]})

    async def test_requests_that_wait_for_a_hanging_tokenizer_fail_when_it_is_noticed(
        self, tokenizer: TextTokenizer, replicas: DirectReplicas
    ):
        settings = FAKE.model_copy(update={"stall_s": 0.05, "tokenizer_threads": 1})
        service, gate = ModelService(settings, tokenizer, INFO, replicas), threading.Event()
        Models(service).check_health()
        hanging = asyncio.create_task(service._threads.run(gate.wait))
        models = Models(service)
        transport = httpx.ASGITransport(create_app(lambda: models))
        async with httpx.AsyncClient(base_url="http://fake", transport=transport) as client:
            asked = asyncio.create_task(client.post("/v1/score", json=ASK))
            await asyncio.sleep(0.1)
            assert not asked.done()
            with pytest.raises(RuntimeError, match="stall_s"):
                Models(service).check_health()
            answers = [await asked, await client.post("/v1/score", json=ASK)]
        for answer in answers:
            assert (answer.status_code, answer.headers["retry-after"]) == (503, "2")
            assert "will be replaced" in answer.json()["message"]
        with pytest.raises(OverloadedError):
            await hanging
        gate.set()
        service.close()

    async def test_new_limits_hold_for_later_requests(self, tokenizer: TextTokenizer, replicas: DirectReplicas):
        service = ModelService(FAKE, tokenizer, INFO, replicas)
        services = Models(service)
        transport = httpx.ASGITransport(create_app(lambda: services))
        async with httpx.AsyncClient(base_url="http://fake", transport=transport) as client:
            services.reconfigure([FAKE.live({"limits": {"max_items": 1}, "aliases": ["judge"], "timeout_s": 9})])
            assert (await client.post("/v1/score", json=ASK)).status_code == 413
            one = {**ASK, "items": [[3]]}
            assert (await client.post("/v1/score", json={**one, "model": "judge"})).status_code == 200
            assert "at most" in (await client.post("/v1/score", json={**one, "timeout_s": 10})).json()["message"]
            assert (await client.get("/v1/info?model=judge")).json()["limits"]["max_items"] == 1
            services.reconfigure([FAKE])
            assert (await client.post("/v1/score", json=ASK)).status_code == 200
            assert (await client.post("/v1/score", json={**one, "model": "judge"})).status_code == 404
        service.close()

    async def test_deadline(self, tokenizer: TextTokenizer):
        replicas = HangingReplicas()
        async with serving(tokenizer, replicas, ModelSettings(engine="fake", timeout_s=0.05)) as http:
            error = await http.refused(status=504, **ASK)
            assert "0.05 s" in error["message"]
            assert replicas.cancelled.is_set()

    async def test_the_callers_own_deadline(self, tokenizer: TextTokenizer):
        replicas = HangingReplicas()
        async with serving(tokenizer, replicas) as http:
            response = await http.post(json.dumps(ASK), x_request_timeout_seconds="0.1")
            assert "0.075 s" in http.flat(response, 504)["message"]
            assert replicas.cancelled.is_set()

    @pytest.mark.parametrize("given", ["soon", "0", "-1", "nan", ""])
    async def test_an_invalid_deadline(self, tokenizer: TextTokenizer, replicas: DirectReplicas, given: str):
        async with serving(tokenizer, replicas) as http:
            response = await http.post(json.dumps(ASK), x_request_timeout_seconds=given)
            assert f"x-request-timeout-seconds is {given!r}" in http.flat(response, 400)["message"]
            assert not replicas.jobs

    async def test_a_client_that_leaves_cancels_its_work(self, tokenizer: TextTokenizer):
        replicas = HangingReplicas()
        service = ModelService(FAKE, tokenizer, INFO, replicas)
        sent: list[dict[str, Any]] = []
        asked = False

        async def receive() -> dict[str, Any]:
            nonlocal asked
            if not asked:
                asked = True
                return {"type": "http.request", "body": json.dumps(ASK).encode(), "more_body": False}
            await replicas.started.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            sent.append(message)

        models = Models(service)
        await create_app(lambda: models)(scope("/v1/score"), receive, send)
        assert replicas.cancelled.is_set()
        assert sent[0]["status"] == 499
        service.close()

    async def test_a_client_that_leaves_while_sending(self, tokenizer: TextTokenizer, caplog: Any):
        service = ModelService(FAKE, tokenizer, INFO, HangingReplicas())
        sent: list[dict[str, Any]] = []

        async def receive() -> dict[str, Any]:
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            sent.append(message)

        models = Models(service)
        await create_app(lambda: models)(scope("/v1/score"), receive, send)
        assert sent[0]["status"] == 499
        assert not caplog.records
        service.close()


class TestReady:
    async def test_once_a_known_answer_came_back(self, tokenizer: TextTokenizer, replicas: DirectReplicas):
        failing = Failing(OverloadedError("no healthy replica"))
        async with serving(tokenizer, failing) as http:
            for _ in range(2):
                response = await http.client.get("/ready")
                assert "no healthy replica" in http.flat(response, 503)["message"]
                assert response.headers["retry-after"] == "1"
            assert (await http.client.get("/health")).status_code == 200
        async with serving(tokenizer, replicas) as http:
            assert (await http.client.get("/ready")).status_code == 200
            asked = len(replicas.jobs)
            assert (await http.client.get("/ready")).status_code == 200
            assert len(replicas.jobs) == asked > 0

    async def test_not_with_an_answer_that_depends_on_the_batch(self, tokenizer: TextTokenizer):
        async with serving(tokenizer, DirectReplicas(Mixing(VOCAB_SIZE, CONTEXT))) as http:
            assert "in a batch" in http.flat(await http.client.get("/ready"), 503)["message"]

    async def test_not_with_output_that_is_not_finite(self, tokenizer: TextTokenizer):
        replicas = DirectReplicas(FakeEngine(VOCAB_SIZE, CONTEXT, nan_token=(VOCAB_SIZE - 1) // 2))
        async with serving(tokenizer, replicas) as http:
            assert "not finite" in http.flat(await http.client.get("/ready"), 503)["message"]


class TestRequestId:
    @pytest.mark.parametrize(
        ("given", "kept"),
        [('a b\tc;d"<é>', "abcd"), ("x" * 500, "x" * 128), ("ok/1:2.3_4@5=6+7-8", "ok/1:2.3_4@5=6+7-8")],
    )
    async def test_characters_that_could_harm_a_log_are_removed(
        self, tokenizer: TextTokenizer, replicas: DirectReplicas, given: str, kept: str
    ):
        async with serving(tokenizer, replicas) as http:
            response = await http.client.get("/health", headers=[(b"x-request-id", given.encode())])
            assert response.headers["x-request-id"] == kept

    async def test_is_left_to_serves_proxy(self, tokenizer: TextTokenizer, replicas: DirectReplicas):
        service = ModelService(FAKE, tokenizer, INFO, replicas)
        models = Models(service)
        transport = httpx.ASGITransport(create_app(lambda: models, echo_request_id=False))
        async with httpx.AsyncClient(base_url="http://fake", transport=transport) as client:
            assert "x-request-id" not in (await client.get("/health")).headers
        service.close()


def scope(path: str, *headers: tuple[bytes, bytes]) -> dict[str, Any]:
    return {
        "type": "http",
        "method": "POST",
        "path": path,
        "query_string": b"",
        "headers": [(b"content-type", b"application/json"), *headers],
        "server": ("fake", 80),
        "scheme": "http",
    }
