"""The control groups of this process, which limit a container or a systemd unit; only Linux has them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

GROUPS = Path("/sys/fs/cgroup")


def folders(controller: str) -> Iterator[Path]:
    """Yield the folder of this process's group, and of those around it, with the files of a controller.

    Args:
        controller: such as ``pids``; in version 2 all share their folders.
    """
    with suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, kinds, path = line.split(":", 2)
            if kinds in ("", controller):
                base = GROUPS / kinds
                folder = base / path.lstrip("/")
                while folder.is_relative_to(base):
                    yield folder
                    folder = folder.parent
