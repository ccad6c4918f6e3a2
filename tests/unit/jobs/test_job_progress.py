"""What a job shows of its progress: rows as they are asked about, on a terminal and in a pipe."""

from __future__ import annotations

import io
import threading

import pytest
from rich.console import Console

from serve_app.jobs import progress
from serve_app.jobs.progress import Progress, RowCount


def test_a_pipe_gets_lines_while_a_block_is_being_computed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(progress, "LOOK_S", 0.001)
    monkeypatch.setattr(progress, "LINE_S", 0.0)
    printed, seen, counted = io.StringIO(), threading.Event(), iter(range(0, 400, 100))

    def done() -> int:
        rows = next(counted, 300)
        if rows == 300:
            seen.set()
        return rows

    with Progress(Console(file=printed)).of(1_000, 500, done):
        assert seen.wait(10)
    lines = printed.getvalue().splitlines()
    assert lines[0] == "resuming: 500 of 1,000 rows are done"
    assert [line.split(" rows")[0] for line in lines[1:5]] == [f"{500 + at} of 1,000" for at in (0, 100, 200, 300)]


def test_a_block_that_is_begun_again_counts_once():
    rows = RowCount()
    rows.set(0, 40)
    rows.set(1, 10)
    rows.set(0, 0)
    assert rows.total() == 10
