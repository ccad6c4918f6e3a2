"""How far a job is, on standard error: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Generator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

LINE_S = 10.0
"""Between two lines, where there is no terminal."""


class Progress:
    """Told of rows as they are done."""

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
        """While the block runs.

        Args:
            total: rows.
            before: of them, done in earlier runs.
        """
        self._total, self._done, self._before = total, before, before
        self._started = self._said = time.monotonic()
        if before:
            self._console.print(f"going on: {before:,} of {total:,} rows are done")
        self._bar.update(self._task, total=total, completed=before)
        with self._bar:
            yield

    def advance(self, rows: int) -> None:
        """So many more rows are done."""
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
