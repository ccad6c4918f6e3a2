"""This host's free memory, and who has been promised some of it: several scorers may start at the same time."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock

from serve_app import control_groups

RAYS_SHARE = 0.05
"""Ray ends processes when less than this share of a host's memory, or of a container's, is left."""

PROMISES = Path(tempfile.gettempdir()) / f"score-serve-memory-{os.getuid()}"


@dataclass(frozen=True, slots=True)
class Promise:
    """What a running scorer may take.

    Attributes:
        service: the process that started it, one for all scorers of a service on this host.
        model: what it has loaded, and how.
        bytes: of memory.
        context: tokens of the longest prompt.
    """

    service: int
    model: str
    bytes: int
    context: int


class Promises:
    """The promises of the other scorers on this host. Nobody else decides while it is open (``opened``)."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.others: list[Promise] = []
        self.outstanding = 0
        """Bytes that were promised and are not taken yet."""
        for file in folder.glob("*.json"):
            if (promise := self._kept(file)) is not None:
                self.others.append(promise)

    def make(self, promise: Promise) -> None:
        """Promise memory to this process, until it ends."""
        (self._folder / f"{os.getpid()}.json").write_text(
            json.dumps([_started(os.getpid()), promise.service, promise.model, promise.bytes, promise.context])
        )

    def _kept(self, file: Path) -> Promise | None:
        """The promise in a file; None, and the file is removed, if its process has ended."""
        if file.stem == str(os.getpid()):
            return None
        with suppress(psutil.Error, ValueError, OSError):
            started, *fields = json.loads(file.read_text())
            process = psutil.Process(int(file.stem))
            if _started(process.pid) == started:
                promise = Promise(*fields)
                self.outstanding += max(0, promise.bytes - _taken(process))
                return promise
        file.unlink(missing_ok=True)
        return None


def _taken(process: psutil.Process) -> int:
    """A process's memory without the files that it maps, such as weights while they are read: these count as free."""
    memory = process.memory_info()
    return memory.rss - getattr(memory, "shared", 0)


def _started(process: int) -> float:
    """When a process started. On Linux in ticks since the boot: a step of the clock changes psutil's time of it."""
    with suppress(FileNotFoundError):
        return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19])
    return psutil.Process(process).create_time()


@contextmanager
def opened(folder: Path) -> Generator[Promises]:
    """Read the promises, while no other process does."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with FileLock(folder / "lock"):
        yield Promises(folder)


def free_bytes() -> int:
    """Memory that processes may still take here before the kernel, or Ray, ends some."""
    host = psutil.virtual_memory()
    rooms = [(host.available, host.total), *_of_groups()]
    return max(0, min(int(room - RAYS_SHARE * total) for room, total in rooms))


def _of_groups() -> Iterator[tuple[int, int]]:
    """Yield (what is left, the limit) of each control group that has a limit."""
    for folder in control_groups.folders("memory"):
        for limit_file, used_file, prefix in (
            ("memory.max", "memory.current", ""),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
        ):
            with suppress(OSError, ValueError):  # no such file, or "max"
                limit, used = (int((folder / name).read_text()) for name in (limit_file, used_file))
                yield limit - used + _cached_files(folder, prefix), limit


def _cached_files(folder: Path, prefix: str) -> int:
    """Bytes of a group's memory that the kernel gives back when they are needed."""
    lines: Any = (line.split() for line in (folder / "memory.stat").read_text().splitlines())
    found = {name: int(value) for name, value in lines}
    return found[f"{prefix}inactive_file"] + found[f"{prefix}active_file"]
