"""Shows a job's progress on standard error: a bar on a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

LINE_S = 5.0
"""Seconds between two lines without a terminal."""
LOOK_S = 0.5
"""Seconds between two looks at what the workers have done."""


class RowCount:
    """What the workers have done of each block: an actor that all of them tell."""

    def __init__(self) -> None:
        self._blocks: dict[int, int] = {}

    def set(self, block: int, rows: int) -> None:
        """Set the block's rows that are done; fewer than before if another worker begins it again."""
        self._blocks[block] = rows

    def total(self) -> int:
        """The rows of all blocks."""
        return sum(self._blocks.values())


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
    def of(self, total: int, before: int, done: Callable[[], int]) -> Generator[None]:
        """Show progress inside the ``with`` block.

        Args:
            total: the job's rows.
            before: how many of them earlier runs have done.
            done: returns how many this run has done; called by a thread.
        """
        self._total, self._done, self._before = total, before, before
        self._started = self._said = time.monotonic()
        if before:
            self._console.print(f"resuming: {before:,} of {total:,} rows are done")
        self._bar.update(self._task, total=total, completed=before)
        over = threading.Event()

        def look() -> None:
            while not over.wait(LOOK_S):
                self._show(done())

        looking = threading.Thread(target=look, name="progress", daemon=True)
        with self._bar:
            looking.start()
            try:
                yield
                self._show(done())
            finally:
                over.set()
                looking.join(LOOK_S)

    def _show(self, rows: int) -> None:
        self._done = self._before + rows
        now = time.monotonic()
        rate = (self._done - self._before) / max(now - self._started, 1e-9)
        self._bar.update(self._task, completed=self._done, rate=rate)
        if not self._console.is_terminal and now - self._said >= LINE_S:
            self._said = now
            speed = f", {rate:,.1f} rows/s, {(self._total - self._done) / rate:,.0f} s left" if rate else ""
            self._console.print(f"{self._done:,} of {self._total:,} rows{speed}", soft_wrap=True)
