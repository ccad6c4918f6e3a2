"""The open-loop load: the times of its requests, and the report of their latencies."""

from __future__ import annotations

import asyncio

import httpx
import numpy as np
import pytest
import typer
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from scripts.benchmarks.load import Sent, arrivals, offer, parse_mix, summary


def test_arrivals_are_a_poisson_process() -> None:
    times = arrivals(50.0, 200.0, np.random.default_rng(1))
    gaps = np.diff(times)
    assert 0 <= times[0] <= times[-1] <= 200
    assert (gaps >= 0).all()
    # 10,000 arrivals expected, with a deviation of 100; gaps are exponential: their deviation is their mean.
    assert abs(len(times) - 10_000) < 400
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.05)
    assert len(arrivals(0.001, 1.0, np.random.default_rng(1))) == 0


def test_a_mix_sums_to_one_and_bad_ones_are_refused() -> None:
    assert parse_mix("W4=3,W1") == {"W4": 0.75, "W1": 0.25}
    for bad in ("W9", "W1=0", "W1=-1", "W1=much", "W1=nan", ""):
        with pytest.raises(typer.BadParameter):
            parse_mix(bad)


def test_percentiles_are_latencies_of_answered_requests() -> None:
    sent = [Sent("W4", "200", n / 1000, n / 10) for n in range(1, 101)]
    sent += [Sent("W4", "503", 9.0, 20.0), Sent("W4", "503", 9.0, 20.0), Sent("W4", "ReadTimeout", 9.0, 20.0)]
    found = summary(sent, seconds=10)
    assert found == {
        "sent": 103,
        "answered": 100,
        "answered_per_s": 5.0,  # the last one ended after 20 s
        "latency_ms": {"p50": 50.0, "p90": 90.0, "p95": 95.0, "p99": 99.0, "max": 100.0},
        "errors": {"503": 2, "ReadTimeout": 1},
    }


def test_without_an_answer_there_is_no_latency() -> None:
    assert summary([Sent("W4", "503", 0.1, 0.2)], seconds=4)["latency_ms"] is None
    assert summary([], seconds=4) == {
        "sent": 0,
        "answered": 0,
        "answered_per_s": 0.0,
        "latency_ms": None,
        "errors": {},
    }


async def test_requests_wait_for_no_answer_and_latency_counts_from_the_schedule() -> None:
    waiting = 0
    all_here = asyncio.Event()

    async def score(request: Request) -> Response:
        """Answer only when all four requests are here: a client that waits for answers never sends the fourth."""
        nonlocal waiting
        waiting += 1
        if waiting == 4:
            all_here.set()
        await all_here.wait()
        return Response(status_code=503 if await request.body() == b"refuse" else 200)

    app = Starlette(routes=[Route("/v1/score", score, methods=["POST"])])
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        # The first was due five seconds ago, as if the client had been late.
        schedule = [
            (-5.0, "W1", ("/v1/score", b"")),
            (0.0, "W4", ("/v1/score", b"")),
            (0.0, "W4", ("/v1/score", b"refuse")),
            (0.01, "W4", ("/v1/score", b"")),
        ]
        sent = await asyncio.wait_for(offer(client, schedule), 30)
    assert [(one.workload, one.outcome) for one in sent] == [("W1", "200"), ("W4", "200"), ("W4", "503"), ("W4", "200")]
    assert sent[0].latency >= 5.0
    assert all(one.finished - one.latency == pytest.approx(at) for one, (at, _, _) in zip(sent, schedule, strict=True))


async def test_a_failed_connection_is_an_outcome() -> None:
    def refuse(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused", request=request)

    async with httpx.AsyncClient(transport=httpx.MockTransport(refuse), base_url="http://test") as client:
        (one,) = await offer(client, [(0.0, "W4", ("/v1/score", b""))])
    assert one.outcome == "ConnectError"
