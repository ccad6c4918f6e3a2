"""Shows a job's progress on standard error: a bar on a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import time
from collections.abc import Generator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

LINE_S = 10.0
"""Seconds between two lines without a terminal."""


class Progress:
    """Shows how many rows are done, how fast, and how long the rest will take."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True, highlight=False)
        self._bar = Bar(
            TextColumn("rows"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]:,.0f} rows/s"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task("", total=None, rate=0.0)
        self._total = self._done = self._before = 0
        self._started = self._said = 0.0

    @contextmanager
    def of(self, total: int, before: int) -> Generator[None]:
        """Show progress inside the ``with`` block.

        Args:
            total: the job's rows.
            before: how many of them earlier runs have done.
        """
        self._total, self._done, self._before = total, before, before
        self._started = self._said = time.monotonic()
        if before:
            self._console.print(f"resuming: {before:,} of {total:,} rows are done")
        self._bar.update(self._task, total=total, completed=before)
        with self._bar:
            yield

    def advance(self, rows: int) -> None:
        """Count more rows as done."""
        self._done += rows
        now = time.monotonic()
        rate = (self._done - self._before) / max(now - self._started, 1e-9)
        self._bar.update(self._task, completed=self._done, rate=rate)
        if not self._console.is_terminal and now - self._said >= LINE_S:
            self._said = now
            left = (self._total - self._done) / max(rate, 1e-9)
            self._console.print(
                f"{self._done:,} of {self._total:,} rows, {rate:,.0f} rows/s, {left:,.0f} s left", soft_wrap=True
            )
