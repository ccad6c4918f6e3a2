"""Timing of requests: the ``Server-Timing`` header, and spans inside those of Ray Serve's tracing."""

from __future__ import annotations

import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar

from opentelemetry import trace
from opentelemetry.util.types import AttributeValue

TOKENISE, QUEUE, DEVICE = "tokenise", "queue", "device"
"""Stages of a request: its prompts are built, its jobs wait at the replicas, the device computes them."""

_tracer = trace.get_tracer("score-serve")
"""The tracer. It has no effect in a process where Serve has not set up tracing."""


_OPERATIONS = {"completions": "text_completion"}
"""Operations of OpenTelemetry's GenAI conventions, by a task's name; the others have the task's own name."""


class Timings:
    """The seconds spent in one request's stages, counted from its creation.

    Attributes:
        input_tokens: tokens of its prompts.
    """

    def __init__(self) -> None:
        self._begun = time.perf_counter()
        self.seconds: dict[str, float] = {}
        self.input_tokens = 0

    def add(self, stage: str, seconds: float) -> None:
        """Add ``seconds`` to a stage."""
        self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds

    @property
    def total(self) -> float:
        """Seconds since the request arrived."""
        return time.perf_counter() - self._begun

    def header(self) -> str:
        """The value of ``Server-Timing``, in milliseconds: the stages reached, and the total so far.

        Source: https://www.w3.org/TR/server-timing/
        """
        return ", ".join(f"{stage};dur={1e3 * seconds:.1f}" for stage, seconds in self._all())

    def _all(self) -> list[tuple[str, float]]:
        return [*self.seconds.items(), ("total", self.total)]


_timings: ContextVar[Timings] = ContextVar("timings")


def begin() -> Timings:
    """Start the timings of the request that this task, and the tasks it starts, work on."""
    timings = Timings()
    _timings.set(timings)
    return timings


def current() -> Timings:
    """The timings of this task's request. Outside a request they are new ones, which are dropped."""
    return _timings.get(None) or Timings()


@contextmanager
def inference(task: str, model: str, tenant: str) -> Generator[None]:
    """Make a span of a request, from its admission to its answer, with the attributes of OpenTelemetry's GenAI
    conventions.

    Args:
        model: the served name.
        tenant: the name of the API key; empty: none.

    Source: https://opentelemetry.io/docs/specs/semconv/gen-ai/gen-ai-spans/
    """
    operation = _OPERATIONS.get(task, task)
    span = _tracer.start_span(f"{operation} {model}")
    span.set_attributes(
        {
            "gen_ai.operation.name": operation,
            "gen_ai.provider.name": "score-serve",
            "gen_ai.request.model": model,
            **({"score_serve.tenant": tenant} if tenant else {}),
        }
    )
    try:
        yield
    except BaseException as error:
        span.set_attribute("error.type", type(error).__name__)
        raise
    finally:
        span.set_attributes({"gen_ai.usage.input_tokens": current().input_tokens, "gen_ai.usage.output_tokens": 0})
        span.end()


@contextmanager
def tokenising() -> Generator[None]:
    """Time the building of prompts, including the wait for a thread."""
    started = time.perf_counter()
    with _tracer.start_as_current_span(TOKENISE):
        yield
    current().add(TOKENISE, time.perf_counter() - started)


def record_job(request_id: str, arrived: float, queue_seconds: float, device_seconds: float, sequences: int) -> None:
    """Record two spans of a job just answered: its wait for the device, and its time there until now.

    Args:
        arrived: Unix time in seconds.
        device_seconds: time in device batches; the span is longer if other jobs' batches came in between.
    """
    begun = arrived + queue_seconds
    what = {"request_id": request_id, "sequences": sequences}
    _record(QUEUE, arrived, begun, what)
    _record(DEVICE, begun, max(begun, time.time()), what | {"device_seconds": device_seconds})


def _record(name: str, start: float, end: float, what: Mapping[str, AttributeValue]) -> None:
    """Record a span between two Unix times in seconds, inside the current span."""
    _tracer.start_span(name, start_time=int(start * 1e9), attributes=what).end(int(end * 1e9))
