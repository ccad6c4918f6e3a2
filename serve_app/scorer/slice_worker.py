"""One host's process of a replica that spans hosts. It loads jax; its calls and answers need none."""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import ray.util

from serve_app.batches import DeltaBatch
from serve_app.contract import BatchResult, EngineStats, LaunchingEngine, ModelInfo
from serve_app.scorer.scheduler import IN_ENGINE
from serve_app.settings import ModelSettings

logger = logging.getLogger(__name__)

SIDE_CALLS = "side_calls"
"""The concurrency group, in Ray's words, of the calls that are answered while a batch is computed."""


@dataclass(frozen=True, slots=True)
class Place:
    """A host's place in its slice.

    Attributes:
        coordinator: address and port at which host 0 brings the processes together.
        hosts: number of hosts in the slice.
        number: this host's number, from 0.
    """

    coordinator: str
    hosts: int
    number: int


@dataclass(frozen=True, slots=True)
class Host:
    """A host of a slice before it has loaded anything.

    Attributes:
        address: a free address and port on it, at which the processes can meet.
        versions: of the packages that decide what its chips compute.
    """

    address: str
    versions: Mapping[str, str]


LoadPart = Callable[[ModelSettings, Place], LaunchingEngine]
"""Makes one host's part of an engine. It runs on every host, and returns when all parts have found each other."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A host's answer to one batch.

    Attributes:
        sequence: the batch's number.
        stats: the engine's counters when it was started. Each host plans on its own: equal counters show that they are
            in step.
        result: host 0's result; None from the other hosts, which have the same, and for a batch that was refused.
        refusal: the message of the engine's ValueError.
    """

    sequence: int
    stats: EngineStats
    result: BatchResult | None = None
    refusal: str | None = None


class OutOfStepError(Exception):
    """This host was sent a batch that is not its next one."""


class HostFailedError(Exception):
    """A failure on a host, as text: to unpickle an exception of jax, the leader would have to load jax."""


@contextmanager
def _in_words() -> Generator[None]:
    """Turn an exception into ``HostFailedError``."""
    try:
        yield
    except Exception as error:
        logger.exception("this host of the slice failed")
        raise HostFailedError(f"{type(error).__name__}: {error}") from None


class SliceWorker:
    """The class of the actor. ``IN_ENGINE`` of its calls run at once, and ``SIDE_CALLS`` beside them.

    Args:
        number: the host's number, from 0.
    """

    def __init__(self, number: int) -> None:
        self._number = number
        self._next = 0
        """The next batch to be started."""
        self._starting = threading.Condition()
        self._engine: LaunchingEngine
        self._progress = (0, 0, "")

    def introduce(self) -> Host:
        """What the leader has to know of this host before anything is loaded."""
        from model.versions import versions

        host = ray.util.get_node_ip_address()
        with socket.socket() as probe:
            probe.bind((host, 0))
            return Host(f"{host}:{probe.getsockname()[1]}", versions())

    def load(self, load: LoadPart, settings: ModelSettings, place: Place) -> ModelInfo:
        """Load this host's part of the model.

        Raises:
            HostFailedError: ``load`` failed.
        """
        with _in_words():
            self._engine = load(settings, place)
            return self._engine.info

    def warmup(self) -> EngineStats:
        """Compile everything; see ``progress``.

        Raises:
            HostFailedError: the engine failed.
        """

        def keep(done: int, total: int, what: str) -> None:
            self._progress = (done, total, what)

        with _in_words():
            self._engine.warmup(keep)
            return self._engine.stats

    def score(self, sequence: int, delta: DeltaBatch) -> Answer:
        """Compute the next batch, or the one after it once that is started.

        Raises:
            OutOfStepError: ``sequence`` is not its number; nothing was computed.
            HostFailedError: the engine failed. A refused batch is no failure.
        """
        batch = delta.whole()
        with self._turn(sequence), _in_words():
            try:
                finish = self._engine.launch(batch)
            except ValueError as error:
                return Answer(sequence, self._engine.stats, refusal=str(error))
            stats = self._engine.stats
        with _in_words():
            result = finish()
        return Answer(sequence, stats, result if self._number == 0 else None)

    @contextmanager
    def _turn(self, sequence: int) -> Generator[None]:
        """Wait until the batches before this one are started, as on all hosts; the next one waits for this one.

        Raises:
            OutOfStepError: there is a batch between them that no one has sent.
        """
        with self._starting:
            if not self._next <= sequence < self._next + IN_ENGINE:
                raise OutOfStepError(f"host {self._number} was sent batch {sequence}; its next is {self._next}")
            self._starting.wait_for(lambda: self._next == sequence)
            try:
                yield
            finally:
                self._next += 1
                self._starting.notify_all()

    @ray.method(concurrency_group=SIDE_CALLS)
    def progress(self) -> tuple[int, int, str]:
        """The last report of ``Engine.warmup``."""
        return self._progress

    @ray.method(concurrency_group=SIDE_CALLS)
    def until_death(self) -> None:
        """Never return. The call fails when the process ends, so the caller learns of it at once."""
        threading.Event().wait()
