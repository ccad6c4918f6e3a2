"""Measures how soon a streamed answer begins: the time to the first row as a share of the time to the last.

It then sends the same request without streaming; the scores must be equal.
"""

from __future__ import annotations

import json
import time
from typing import Annotated, Any

import httpx
import typer

BOUND = 0.05


def measure(
    url: Annotated[str, typer.Option(help="Address of a running service.")] = "http://127.0.0.1:8000",
    items: Annotated[int, typer.Option(min=1)] = 5_000,
) -> None:
    """Print the times; exit 1 if the first row comes after 5% of the time, or an answer differs."""
    ask: dict[str, Any] = {
        "query": "Is the number even or odd? The number is",
        "items": [f" {number}. It is" for number in range(items)],
        "labels": [" even", " odd"],
    }
    with httpx.Client(base_url=url, timeout=600) as client:
        client.post("/v1/score", json=ask | {"items": ask["items"][:1]}).raise_for_status()
        started = time.perf_counter()
        with client.stream("POST", "/v1/score", json=ask | {"stream": True}) as answer:
            answer.raise_for_status()
            lines = answer.iter_lines()
            rows = [json.loads(next(lines))]
            first = time.perf_counter() - started
            rows += [json.loads(line) for line in lines]
        whole = time.perf_counter() - started
        unstreamed = client.post("/v1/score", json=ask).raise_for_status().json()["scores"]
    *scored, _ = rows
    streamed = [row["scores"] for row in sorted(scored, key=lambda row: row["index"])]
    pairs = zip(streamed, unstreamed, strict=True)
    gap = max(abs(a / b - 1) for own, other in pairs for a, b in zip(own, other, strict=True))
    typer.echo(
        f"{items:,} items: first row after {first * 1e3:.0f} ms, last after {whole:.1f} s ({first / whole:.1%}); "
        f"largest relative difference from the unstreamed scores {gap:.1e}"
    )
    if first > BOUND * whole or gap > 1e-4:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(measure)
