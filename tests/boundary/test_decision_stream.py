"""Streamed answers of ``POST /v1/systemone``: those of a whole answer, each as soon as it is read."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from serve_app.errors import OverloadedError
from serve_app.frontend.models import Models
from serve_app.frontend.routes import create_app
from serve_app.frontend.service import PIECES_AT_ONCE, ModelService
from serve_app.scorer.fake_engine import FakeEngine
from serve_app.settings import ModelSettings
from serve_app.tasks.systemone import SYSTEMONE, AnswerLine, SystemOneRequest
from serve_app.tasks.tokenizer import TextTokenizer
from tests.boundary.asking import Http
from tests.boundary.test_decisions import DECISIONS, SYSTEM_ONE
from tests.boundary.test_faults import scope, serving
from tests.local import CONTEXT, VOCAB_SIZE, DirectReplicas
from tests.stubs import FailsLater

FAKE = ModelSettings(model="fake-judge", engine="fake", max_batch_tokens=256)
MANY: dict[str, Any] = {
    "state": "lost",
    "questions": {f"q {number}": {"type": "noul", "instructions": f"is it {number}"} for number in range(40)},
}
LONG = {"type": "noul", "instructions": "long " * 200}


async def streamed(http: Http, **ask: Any) -> list[dict[str, Any]]:
    response = await http.client.post("/v1/systemone", json=ask | {"stream": True})
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "application/x-ndjson"
    assert response.text.endswith("\n")
    return [json.loads(line) for line in response.text[:-1].split("\n")]


@pytest.mark.parametrize(
    "ask",
    [
        SYSTEM_ONE,
        SYSTEM_ONE | {"permutations": 3},
        MANY,
        MANY | {"state": {"text": ""}, "questions": MANY["questions"] | {"\u2028 ": SYSTEM_ONE["questions"]["team"]}},
        MANY | {"questions": MANY["questions"] | {"long": LONG}, "on_error": "item"},
        MANY | {"questions": {"long": LONG, "longer": LONG}, "on_error": "item"},
    ],
)
async def test_a_streamed_answer_is_the_whole_one(http: Http, ask: dict[str, Any]):
    whole = (await http.client.post("/v1/systemone", json=ask)).json()
    *lines, end = await streamed(http, **ask)
    assert all(set(line) == {"id", "answer"} for line in lines)
    assert sorted(line["id"] for line in lines) == sorted(ask["questions"])
    assert {line["id"]: line["answer"] for line in lines} == whole["answers"]
    assert set(end) == set(whole) - {"answers"}
    assert (end["model"], end["usage"]) == (whole["model"], whole["usage"])


@pytest.mark.parametrize(
    "fields",
    [
        {"questions": {}},
        {"questions": {"long": LONG}},
        {"questions": {"empty": {"type": "noul"}}},
        {"timeout_s": 1e9},
        {"stream": "yes"},
        {"model": "none"},
    ],
)
async def test_an_error_of_the_request_has_a_status(http: Http, fields: dict[str, Any]):
    response = await http.client.post("/v1/systemone", json=MANY | {"stream": True} | fields)
    http.typesafe(response, 404 if "model" in fields else 422)


async def test_a_question_without_an_answer_ends_the_lines(http: Http):
    *lines, last = await streamed(http, **MANY | {"questions": MANY["questions"] | {"long": LONG}})
    assert lines
    assert all(set(line) == {"id", "answer"} for line in lines)
    assert last["detail"][0]["loc"] == ["body", "questions", "long"]
    assert last["error"]["code"] == 422


async def test_openais_route_refuses_it(http: Http):
    response = await http.client.post("/v1/decisions", json=DECISIONS | {"stream": True})
    assert "stream" in http.nested(response, 400)["message"]


async def test_faults_and_deadlines_after_the_first_answer(tokenizer: TextTokenizer):
    cases: list[tuple[Exception | None, float, int, str]] = [
        (OverloadedError("full"), 60, 503, "full"),
        (None, 2, 504, "2 s"),
        (RuntimeError("secret"), 60, 500, "look for"),
    ]
    for error, timeout_s, status, said in cases:
        async with serving(tokenizer, FailsLater(2, error), FAKE) as http:
            *lines, last = await streamed(http, **MANY, timeout_s=timeout_s)
            assert len(lines) == 3
            assert said in last["detail"]["message"]
            assert last["error"]["code"] == status
            assert "secret" not in json.dumps(last)
    assert len(asyncio.all_tasks()) == 1


@pytest.mark.parametrize("good", [0, 2])
async def test_a_client_that_leaves_stops_the_work(tokenizer: TextTokenizer, good: int):
    replicas = FailsLater(good, None)
    service = ModelService(FAKE, tokenizer, replicas.engine.info, replicas)
    body = json.dumps(MANY | {"stream": True}).encode()
    asked = False

    async def receive() -> dict[str, Any]:
        nonlocal asked
        if not asked:
            asked = True
            return {"type": "http.request", "body": body, "more_body": False}
        await replicas.hanging.started.wait()
        return {"type": "http.disconnect"}

    async def send(_message: Any) -> None:
        pass

    before = asyncio.all_tasks()
    models = Models(service)
    await create_app(lambda: models)(scope("/v1/systemone"), receive, send)
    assert replicas.hanging.cancelled.is_set()
    assert asyncio.all_tasks() == before
    service.close()


async def test_the_first_answer_comes_after_a_small_part_of_the_work(tokenizer: TextTokenizer):
    replicas = DirectReplicas(FakeEngine(VOCAB_SIZE, CONTEXT))
    questions = {str(number): {"type": "noul", "instructions": f"is it {number}"} for number in range(400)}
    request = SystemOneRequest.model_validate({"state": "the quick ", "questions": questions})
    service = ModelService(FAKE, tokenizer, replicas.engine.info, replicas)
    events = service.stream(SYSTEMONE, request, request_id="r")
    (first,) = await anext(events)
    assert isinstance(first, AnswerLine)
    assert first.id == "0"
    assert sum(job.batch.num_sequences for job in replicas.jobs) < 40
    # No more is read, so no more work starts.
    for _ in range(200):
        await asyncio.sleep(0.001)
    assert len(replicas.jobs) <= PIECES_AT_ONCE
    await events.aclose()
    assert service.items < 40
    service.close()
