"""The end of a process that started Ray: soon, and with nothing left running, even where Ray's own processes are gone.

A signal to a whole process group or control group (``timeout``, a terminal that closes, systemd) ends Ray's processes
together with ours. Calls to them then wait for a minute, in C++, where no exception interrupts them.
So a thread watches.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress

import psutil

STOP_S = 5.0
"""What an end may take where there is no request to wait for."""

INTERRUPTED = 130
"""Exit code of a command that was stopped before it was done."""

_POLL_S = 0.2
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_RAY = ("gcs_server", "raylet")
"""Ray's processes that the others cannot do without."""
_LOST = (
    "Ray's own processes have ended, and the service with them; the kernel does that when memory is short: "
    "see the logs in /tmp/ray/session_latest/logs, and start again"
)
_SET_CHILD_SUBREAPER = 36
"""An option of prctl: a process with a dead parent becomes our child."""


class Ending:
    """Ends this process where it does not end by itself; ``watched`` makes one.

    Attributes:
        patient: requests may be in flight; a signal then sets no time limit.
        code: exit code after a signal.
        at_end: called before a forced end.
    """

    def __init__(self) -> None:
        self.patient = False
        self.code = INTERRUPTED
        self.at_end: list[Callable[[], object]] = []
        self._ray: dict[psutil.Process, str] = {}
        self._asked = self._stopping = False
        self._over = threading.Event()
        self._signals, self._signalled = socket.socketpair()
        self._thread = threading.Thread(target=self._watch, name="ending", daemon=True)

    def start(self) -> None:
        """Watch from now on; in the main thread."""
        with suppress(OSError, AttributeError):  # without it, processes left behind by a dead Ray end by themselves
            ctypes.CDLL(None).prctl(_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        for each in (self._signals, self._signalled):
            each.setblocking(False)
        # Written to by the C handler: the main thread may be in a call that runs no Python for a minute.
        signal.set_wakeup_fd(self._signalled.fileno(), warn_on_full_buffer=False)
        self._thread.start()

    def watch_ray(self) -> None:
        """Ray has been started by this process, and is to live until ``stopping``."""
        self._ray = {child: child.name() for child in psutil.Process().children()}

    def stopping(self) -> None:
        """Ray is being stopped, if it has not ended."""
        self._stopping = not self._lost()

    @property
    def asked(self) -> bool:
        """A signal told this process to end."""
        with suppress(BlockingIOError):
            self._asked = self._asked or any(number in _SIGNALS for number in self._signals.recv(4096))
        return self._asked

    def stop(self) -> None:
        """Watch no longer, and leave no process."""
        self._over.set()
        self._thread.join()
        signal.set_wakeup_fd(-1)
        self._signals.close()
        self._signalled.close()
        _end_children()

    def _watch(self) -> None:
        since = None
        while not self._over.wait(_POLL_S):
            if self._stopping or (self.asked and not self.patient):
                since = since or time.monotonic()
            lost = not self._stopping and self._lost()
            if lost or (since and time.monotonic() - since > STOP_S):
                self._force(lost=lost)

    def _lost(self) -> bool:
        """Ray cannot go on; after a signal, one of its processes that has ended tells of the others."""
        return any((name in _RAY or self.asked) and not _alive(process) for process, name in self._ray.items())

    def _force(self, *, lost: bool) -> None:
        for call in self.at_end:
            with suppress(Exception):
                call()
        with suppress(OSError):
            if lost and not self.asked:
                self.code = 1
                print(f"error: {_LOST}", file=sys.stderr, flush=True)
            elif lost and self.patient:
                print("stopped; the signal reached Ray, too: no request was waited for", file=sys.stderr, flush=True)
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())  # Ray complains of its own end
        _end_children()
        os._exit(self.code)


@contextmanager
def watched() -> Generator[Ending]:
    """While the block runs, see that this process ends when it should, and that nothing it started is left after it.

    Raises:
        KeyboardInterrupt: for whatever fails after a signal, since Ray's processes may have had it, too.
    """
    ending = Ending()
    ending.start()
    try:
        yield ending
    except Exception:
        if not ending.asked:
            raise
        if not ending.patient:
            raise KeyboardInterrupt from None
    finally:
        ending.stop()


def _alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _end_children() -> None:
    """Kill all that this process started. Several rounds: processes whose parent was killed become its children."""
    until = time.monotonic() + STOP_S / 2
    while (children := psutil.Process().children(recursive=True)) and time.monotonic() < until:
        for child in children:
            with suppress(psutil.NoSuchProcess):
                child.kill()
        psutil.wait_procs(children, timeout=0.5)
