"""Streamed answers: the rows of unstreamed ones as they finish, with bounded work ahead of the reader."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from serve_app.errors import OverloadedError
from serve_app.frontend.models import Models
from serve_app.frontend.routes import create_app
from serve_app.frontend.service import PIECES_AT_ONCE, ModelService, Replicas
from serve_app.jobs.local_replicas import LocalReplicas
from serve_app.schemas import ScoreEnd, ScoreRequest, ScoreRow
from serve_app.scorer.fake_engine import FakeEngine
from serve_app.settings import ModelSettings
from serve_app.tasks.score import SCORE
from serve_app.tasks.tokenizer import TextTokenizer
from tests.boundary.asking import Http
from tests.boundary.test_faults import scope, serving
from tests.local import CONTEXT, VOCAB_SIZE, DirectReplicas
from tests.stubs import FailsLater

ASK: dict[str, Any] = {"query": "the ", "items": [f"fox {i}" for i in range(60)], "label_token_ids": [5, 7]}
FAKE = ModelSettings(model="fake-judge", engine="fake", max_batch_tokens=128)
PLURALS = ("scores", "token_logprobs", "label_tokens", "label_mass", "prompt_token_ids", "truncated")


async def streamed(http: Http, **ask: Any) -> list[dict[str, Any]]:
    response = await http.client.post("/v1/score", json=ask | {"stream": True})
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "application/x-ndjson"
    assert response.text.endswith("\n")
    return [json.loads(line) for line in response.text.splitlines()]


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"apply_softmax": True, "temperature": 0.5, "item_first": True},
        {"items": [], "on_error": "item"},
        {"items": "fox"},
        {"query": [1], "items": [[2], [], [3], [VOCAB_SIZE * 1000]], "on_error": "item", "return_token_logprobs": True},
        {
            "label_token_ids": None,
            "labels": [" yes", " zzqq"],
            "return_token_logprobs": True,
            "return_label_mass": True,
            "return_prompt_token_ids": True,
            "truncate": "item",
        },
        {"label_token_ids": [[i] for i in range(60)]},
    ],
)
async def test_a_streamed_answer_is_the_unstreamed_one(http: Http, fields: dict[str, Any]):
    ask = ASK | fields
    whole = await http.score(**ask)
    *rows, end = await streamed(http, **ask)
    assert set(end) == {"object", "model", "usage"}
    assert (end["object"], end["model"]) == (whole["object"], whole["model"])
    for count in ("prompt_tokens", "completion_tokens", "total_tokens", "reasoning_tokens"):
        assert end["usage"][count] == whole["usage"][count]
    rows.sort(key=lambda row: row["index"])
    assert [row["index"] for row in rows] == list(range(len(whole["scores"])))
    for name in PLURALS:
        assert (name in whole) is (name == "scores" or any(name in row for row in rows))
        for row, other in zip(rows, whole.get(name, []), strict=False):
            if name in ("scores", "token_logprobs") and other is not None:
                assert row[name] == pytest.approx(other, rel=1e-5, abs=1e-30)
            elif name == "label_mass":
                assert row[name] == pytest.approx(other, rel=1e-5)
            else:
                assert row.get(name) == other
    assert [row["error"] for row in rows if "error" in row] == whole.get("errors", [])
    assert all(set(row) == {"index", "error"} for row in rows if "error" in row)


@pytest.mark.parametrize(
    "fields",
    [
        {"label_token_ids": []},
        {"items": ["a", "b"], "label_token_ids": [[1]]},
        {"query": [1], "items": [*[[1]] * 1000, [VOCAB_SIZE * 1000]]},
        {"timeout_s": 1e9},
        {"model": "none"},
    ],
)
async def test_an_error_of_the_request_has_a_status(http: Http, fields: dict[str, Any]):
    response = await http.client.post("/v1/score", json=ASK | fields | {"stream": True})
    http.flat(response, 404 if "model" in fields else 400)


async def test_an_error_after_the_first_row_is_the_last_line(tokenizer: TextTokenizer):
    ask: dict[str, Any] = {"items": [*[[3]] * 40, [4]], "label_token_ids": [5, 6]}
    async with serving(tokenizer, DirectReplicas(FakeEngine(VOCAB_SIZE, CONTEXT, nan_token=4)), FAKE) as http:
        *rows, last = await streamed(http, **ask)
        assert rows
        assert all("scores" in row for row in rows)
        assert (last["object"], last["code"]) == ("error", 500)
        assert "items[40]" in last["message"]
        *rows, end = await streamed(http, **ask | {"on_error": "item"})
        assert [row["index"] for row in rows if "error" in row] == [40]
        assert rows[-1]["error"]["code"] == 500
        assert (len(rows), end["object"]) == (41, "scoring")


async def test_faults_and_deadlines_after_the_first_row(tokenizer: TextTokenizer, caplog: Any):
    cases: list[tuple[Exception | None, float, int, str]] = [
        (OverloadedError("full", retry_after_s=7), 60, 503, "full"),
        (None, 2, 504, "2 s"),
        (RuntimeError("secret"), 60, 500, "find-me"),
    ]
    for error, timeout_s, status, said in cases:
        async with serving(tokenizer, FailsLater(2, error), FAKE) as http:
            body = json.dumps(ASK | {"stream": True, "timeout_s": timeout_s})
            response = await http.post(body, x_request_id="find-me")
            *rows, last = [json.loads(line) for line in response.text.splitlines()]
            assert len(rows) == 3
            assert (last["object"], last["code"]) == ("error", status)
            assert said in last["message"]
            assert "secret" not in response.text
    assert "secret" in caplog.text
    assert len(asyncio.all_tasks()) == 1


async def test_faults_and_deadlines_before_the_first_row(tokenizer: TextTokenizer):
    async with serving(tokenizer, FailsLater(0, OverloadedError("full", retry_after_s=7)), FAKE) as http:
        response = await http.post(json.dumps(ASK | {"stream": True}))
        assert http.flat(response, 503)["message"] == "full"
        assert response.headers["retry-after"] == "7"
    async with serving(tokenizer, FailsLater(0, None), FAKE) as http:
        error = await http.refused(status=504, **ASK, stream=True, timeout_s=0.05)
        assert "0.05 s" in error["message"]
        assert "raise timeout_s (to 600 at most)" in error["message"]


@pytest.mark.parametrize("good", [0, 2])
async def test_a_client_that_leaves_stops_the_work(tokenizer: TextTokenizer, good: int):
    replicas = FailsLater(good, None)
    service = ModelService(FAKE, tokenizer, replicas.engine.info, replicas)
    asked = False

    async def receive() -> dict[str, Any]:
        nonlocal asked
        if not asked:
            asked = True
            return {"type": "http.request", "body": json.dumps(ASK | {"stream": True}).encode(), "more_body": False}
        await replicas.hanging.started.wait()
        return {"type": "http.disconnect"}

    async def send(_message: Any) -> None:
        pass

    before = asyncio.all_tasks()
    models = Models(service)
    await create_app(lambda: models)(scope("/v1/score"), receive, send)
    assert replicas.hanging.cancelled.is_set()
    assert asyncio.all_tasks() == before
    service.close()


def stream(
    tokenizer: TextTokenizer, replicas: Replicas, settings: ModelSettings, request: ScoreRequest
) -> AsyncIterator[list[ScoreRow] | list[ScoreEnd]]:
    service = ModelService(settings, tokenizer, FakeEngine(VOCAB_SIZE, CONTEXT).info, replicas)
    return service.stream(SCORE, request, request_id="r")  # type: ignore[return-value]


@pytest.mark.parametrize("words", [2, 60])
async def test_the_first_rows_come_after_a_small_part_of_the_work(tokenizer: TextTokenizer, words: int):
    replicas = DirectReplicas(FakeEngine(VOCAB_SIZE, CONTEXT))
    items = ["fox " * words] * (5_000 // words)
    request = ScoreRequest(query="the quick ", items=items, label_token_ids=[1, 2])
    events = stream(tokenizer, replicas, ModelSettings(engine="fake", max_batch_tokens=512), request)
    rows = await anext(events)
    assert rows
    done = sum(job.batch.num_sequences for job in replicas.jobs)
    assert done < 0.05 * len(items)
    # No more is read, so no more work starts.
    for _ in range(200):
        await asyncio.sleep(0.001)
    assert len(replicas.jobs) <= PIECES_AT_ONCE
    await events.aclose()


async def test_pieces_are_device_batches_and_go_to_all_replicas(tokenizer: TextTokenizer):
    settings = ModelSettings(engine="fake", max_batch_tokens=512)
    replicas = DirectReplicas(FakeEngine(VOCAB_SIZE, CONTEXT), count=2)
    items = [[3 + i % 100] * 10 for i in range(400)]
    request = ScoreRequest(query=[1] * 130, items=items, label_token_ids=[1, 2])
    rows = [row async for event in stream(tokenizer, replicas, settings, request) for row in event]
    assert sorted(row.index for row in rows if isinstance(row, ScoreRow)) == list(range(400))
    sizes = [int((job.batch.lengths - 130).sum()) for job in replicas.jobs]
    assert sizes[0] == 10
    assert max(sizes) <= 512
    assert len(replicas.jobs) < 4000 / 256 + 10
    parts = [job.affinity.part for job in replicas.jobs if job.affinity]
    assert sorted(parts) == list(range(len(replicas.jobs)))
    assert len({job.affinity.key for job in replicas.jobs if job.affinity}) == 1


async def test_streams_through_the_queue(tokenizer: TextTokenizer):
    replicas = LocalReplicas(FakeEngine(VOCAB_SIZE, CONTEXT), FAKE)
    async with serving(tokenizer, replicas, FAKE) as http:
        both = await asyncio.gather(*(streamed(http, **ASK) for _ in range(3)))
        assert all(len(lines) == 61 for lines in both)
    await replicas.queue.close()
