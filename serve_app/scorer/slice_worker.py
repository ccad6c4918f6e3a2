"""One host's process of a replica that spans hosts. It loads jax; what it is asked, and answers, does not."""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass

import ray.util

from serve_app.batches import Brief
from serve_app.contract import BatchResult, Engine, EngineStats, ModelInfo
from serve_app.settings import ModelSettings

logger = logging.getLogger(__name__)

ASIDE = "aside"
"""Ray's name for the threads that answer while a batch is computed."""


@dataclass(frozen=True, slots=True)
class Place:
    """A host's place in its slice.

    Attributes:
        coordinator: address and port at which host 0 brings the processes together.
        hosts: of the slice.
        number: this host's, from 0.
    """

    coordinator: str
    hosts: int
    number: int


LoadPart = Callable[[ModelSettings, Place], Engine]
"""Makes one host's part of an engine; returns when all hosts' parts have found each other. It is run on every host."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a host says of one batch.

    Attributes:
        sequence: the batch's number.
        stats: after it. The hosts plan each by itself, so that they are in step if their counters are equal.
        result: None of all hosts but the first, which have the same; and of a batch that was refused.
        refusal: what the engine's ValueError said.
    """

    sequence: int
    stats: EngineStats
    result: BatchResult | None = None
    refusal: str | None = None


class OutOfStepError(Exception):
    """This host was sent another batch than the one that is next."""


class HostFailedError(Exception):
    """What went wrong on a host, in words: to unpickle an exception of jax's, the leader would have to load jax."""


@contextmanager
def _in_words() -> Generator[None]:
    try:
        yield
    except Exception as error:
        logger.exception("this host of the slice failed")
        raise HostFailedError(f"{type(error).__name__}: {error}") from None


class SliceWorker:
    """The class of the actor. Its calls run in order, one at a time, but for those aside.

    Args:
        number: the host's, from 0.
    """

    def __init__(self, number: int) -> None:
        self._number = number
        self._next = 0
        self._engine: Engine
        self._progress = (0, 0, "")

    def address(self) -> str:
        """Where the processes can meet, if this is host 0's."""
        host = ray.util.get_node_ip_address()
        with socket.socket() as probe:
            probe.bind((host, 0))
            return f"{host}:{probe.getsockname()[1]}"

    def load(self, load: LoadPart, settings: ModelSettings, place: Place) -> ModelInfo:
        """Load this host's part of the model.

        Raises:
            HostFailedError: of ``load``.
        """
        with _in_words():
            self._engine = load(settings, place)
            return self._engine.info

    def warmup(self) -> EngineStats:
        """Compile everything; see ``progress``.

        Raises:
            HostFailedError: of the engine.
        """

        def keep(done: int, total: int, what: str) -> None:
            self._progress = (done, total, what)

        with _in_words():
            self._engine.warmup(keep)
            return self._engine.stats

    def score(self, sequence: int, brief: Brief) -> Answer:
        """Compute the next batch.

        Raises:
            OutOfStepError: ``sequence`` is not its number; nothing was computed.
            HostFailedError: of the engine, which refused nothing.
        """
        if sequence != self._next:
            raise OutOfStepError(f"host {self._number} was sent batch {sequence}; its next is {self._next}")
        self._next += 1
        with _in_words():
            return self._answer(sequence, brief)

    @ray.method(concurrency_group=ASIDE)
    def progress(self) -> tuple[int, int, str]:
        """What ``Engine.warmup`` said last."""
        return self._progress

    @ray.method(concurrency_group=ASIDE)
    def until_death(self) -> None:
        """Never returns: that this call failed is how the other end learns of the process's end at once."""
        threading.Event().wait()

    def _answer(self, sequence: int, brief: Brief) -> Answer:
        try:
            result = self._engine.score(brief.whole())
        except ValueError as error:
            return Answer(sequence, self._engine.stats, refusal=str(error))
        return Answer(sequence, self._engine.stats, result if self._number == 0 else None)
