"""The stages of a request: the sums of their times, and their spans."""

from __future__ import annotations

import asyncio
import time

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from serve_app import timing
from serve_app.errors import InvalidRequestError
from serve_app.frontend.service import ModelService
from serve_app.frontend.tenants import Tenant
from serve_app.schemas import ScoreRequest
from serve_app.tasks.completions import COMPLETIONS, CompletionRequest
from serve_app.tasks.score import SCORE


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> InMemorySpanExporter:
    """The spans that have ended."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(timing, "_tracer", provider.get_tracer("test"))
    return exporter


def seconds(span: ReadableSpan) -> tuple[float, float]:
    assert span.start_time is not None
    assert span.end_time is not None
    return span.start_time / 1e9, span.end_time / 1e9


async def test_times_that_a_requests_tasks_add_count_for_this_request_alone():
    async def request(stages: list[float]) -> timing.Timings:
        begun = timing.begin()

        async def part(value: float) -> None:
            await asyncio.sleep(0)
            timing.current().add(timing.QUEUE, value)

        async with asyncio.TaskGroup() as parts:
            for value in stages:
                parts.create_task(part(value))
        return begun

    one, other = await asyncio.gather(request([1.0, 2.0]), request([5.0]))
    assert (one.seconds, other.seconds) == ({"queue": 3.0}, {"queue": 5.0})
    assert one.header().startswith("queue;dur=3000.0, total;dur=")


def test_outside_of_a_request_no_time_is_counted():
    timing.current().add(timing.DEVICE, 1.0)
    assert timing.current().seconds == {}


async def test_tokenising_is_timed_and_a_span(spans: InMemorySpanExporter):
    begun = timing.begin()
    with timing.tokenising():
        await asyncio.sleep(0.02)
    (span,) = spans.get_finished_spans()
    assert span.name == "tokenise"
    start, end = seconds(span)
    assert end - start >= 0.02
    assert begun.seconds["tokenise"] >= 0.02


def test_a_jobs_wait_and_its_time_on_the_device_follow_each_other(spans: InMemorySpanExporter):
    arrived = time.time() - 2
    timing.record_job("abc", arrived, queue_seconds=0.5, device_seconds=0.25, sequences=7)
    queue, device = spans.get_finished_spans()
    assert (queue.name, device.name) == ("queue", "device")
    assert seconds(queue) == pytest.approx((arrived, arrived + 0.5), abs=1e-5)
    assert seconds(device)[0] == seconds(queue)[1]
    assert seconds(device)[1] >= arrived + 2 - 1e-5
    assert dict(queue.attributes or {}) == {"request_id": "abc", "sequences": 7}
    assert dict(device.attributes or {}) == {"request_id": "abc", "sequences": 7, "device_seconds": 0.25}


async def test_a_request_is_a_span_with_the_attributes_of_genai(spans: InMemorySpanExporter, service: ModelService):
    """Also of a stream, which has no text of the prompts either."""
    asked = ScoreRequest(query=[1, 2], items=[[3], [4, 5]], label_token_ids=[1])
    timing.begin()
    await service.answer(SCORE, asked, request_id="r", tenant=Tenant("alice"))
    timing.begin()
    await service.answer(COMPLETIONS, CompletionRequest(prompt=[7, 8, 9], max_tokens=1), request_id="r")
    timing.begin()
    async for _ in service.stream(SCORE, asked, request_id="r"):
        pass
    timing.begin()
    with pytest.raises(InvalidRequestError):
        await service.answer(SCORE, asked.model_copy(update={"items": [[]], "query": []}), request_id="r")
    found = [each for each in spans.get_finished_spans() if " " in each.name]
    assert [each.name for each in found] == [
        "score fake-judge", "text_completion fake-judge", "score fake-judge", "score fake-judge"
    ]  # fmt: skip
    shared = {"gen_ai.provider.name": "score-serve", "gen_ai.request.model": "fake-judge"}
    shared["gen_ai.usage.output_tokens"] = 0
    score = shared | {"gen_ai.operation.name": "score"}
    assert [dict(each.attributes or {}) for each in found] == [
        score | {"gen_ai.usage.input_tokens": 7, "score_serve.tenant": "alice"},
        shared | {"gen_ai.operation.name": "text_completion", "gen_ai.usage.input_tokens": 3},
        score | {"gen_ai.usage.input_tokens": 7},
        score | {"gen_ai.usage.input_tokens": 0, "error.type": "InvalidRequestError"},
    ]
