"""A replica that spans hosts: one ``Engine`` that leads one process on each host of a TPU slice, in step.

The leader, which holds this engine, is a separate process and loads no jax. When a host's process dies, jax ends the
others, and no new process can take its place. The leader survives that, restarts all of them, and lets them compute
the current batch again.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import ray
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup, placement_group_table
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
from ray.util.tpu import SlicePlacementGroup

from serve_app.batches import DeltaBatch
from serve_app.contract import BatchResult, EngineStats, ModelInfo, Progress, TokenBatch
from serve_app.scorer.scheduler import IN_ENGINE
from serve_app.scorer.slice_worker import SIDE_CALLS, Answer, Host, LoadPart, Place, SliceWorker
from serve_app.settings import ModelSettings
from serve_app.tpu import CHIP_LABEL, CHIPS_OF_A_SLICES_HOST, NUMBER_LABEL, RESOURCE, Tpu

logger = logging.getLogger("ray.serve")

TRIES = 2
"""Tries for a batch. If the processes end twice, the batch is probably the reason."""
RESERVE_S = 60.0
"""Seconds between two log lines that say that the replica waits for a slice."""
POLL_S = 0.5
PAUSE_S = 1.0
"""Seconds before a failed start is tried again."""

COUNTERS = [field.name for field in dataclasses.fields(EngineStats)][:6]
"""The fields of ``EngineStats`` that only increase."""


class GroupLostError(Exception):
    """The processes are no longer in step and have to be restarted."""


class _Group:
    """The processes of a slice, from their start until one of them is lost.

    Args:
        workers: ``SliceWorker`` actors, in the order of their numbers.
        info: facts about the model that they have loaded.
    """

    def __init__(self, workers: Sequence[Any], info: ModelInfo) -> None:
        self._workers = workers
        self.info = info
        self.stats = EngineStats()
        self._sequence = self._counted = 0
        self._sending = threading.Lock()
        self._watched = [worker.until_death.remote() for worker in workers]

    def warmup(self, progress: Progress | None) -> None:
        """See ``Engine.warmup``.

        Raises:
            RayError: a process died or failed.
        """
        waiting = [worker.warmup.remote() for worker in self._workers]
        told = 0
        while waiting:
            done, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=POLL_S)
            self.stats = next(iter(ray.get(done)), self.stats)
            state = ray.get(self._workers[0].progress.remote())
            if progress is not None and state[0] > told:
                told = state[0]
                progress(*state)

    def score(self, batch: TokenBatch, timeout_s: float) -> BatchResult:
        """Compute the batch on all hosts.

        Raises:
            ValueError: the engine refuses the batch.
            GroupLostError: a process died, failed, took too long, or differed from the others.
        """
        delta = DeltaBatch.of(batch)
        with self._sending:
            sequence, self._sequence = self._sequence, self._sequence + 1
            calls = [worker.score.remote(sequence, delta) for worker in self._workers]
        try:
            answers: list[Answer] = ray.get(calls, timeout=timeout_s)
        except TimeoutError as error:
            raise GroupLostError(f"batch {sequence} took longer than {timeout_s:.0f} s") from error
        except RayError as error:
            raise GroupLostError(f"batch {sequence}: {error}") from error
        answer = agreed(answers)
        with self._sending:
            if sequence >= self._counted:  # an earlier batch may end later
                self._counted, self.stats = sequence, answer.stats
        if answer.result is None:
            raise ValueError(answer.refusal)
        return answer.result

    def wait_for_death(self) -> None:
        """Return when a process has died, by itself or by ``kill``."""
        ray.wait(self._watched, num_returns=1)

    def kill(self) -> None:
        _kill(self._workers)


class SliceGroup:
    """A ``contract.Engine`` over the hosts of a slice. The constructor waits for a slice and loads the model.

    Args:
        settings: the model's; their ``tpu`` spans several hosts.
        load: makes each host's part of the engine.
    """

    def __init__(self, settings: ModelSettings, load: LoadPart) -> None:
        assert settings.tpu is not None
        self._settings = settings
        self._tpu = settings.tpu
        self._load = load
        self._stall_s = settings.stall_s
        self._slice: SlicePlacementGroup | None = None
        self._changed = threading.Condition()
        self._group: _Group | None = self._start()
        self.info = self._group.info
        self._before = EngineStats()
        """The counters of groups that were lost, summed."""
        self._lost_at: float | None = None
        self._progress: Progress | None = None
        self._keeper = threading.Thread(target=self._keep, name="slice", daemon=True)

    @property
    def stats(self) -> EngineStats:
        """Host 0's counters after the last batch. They continue when the processes are restarted."""
        with self._changed:
            now = self._group.stats if self._group else EngineStats()
            return dataclasses.replace(now, **_added(self._before, now))

    def warmup(self, progress: Progress | None = None) -> None:
        """See ``Engine.warmup``."""
        assert self._group
        self._progress = progress
        self._group.warmup(progress)
        self._keeper.start()

    def score(self, batch: TokenBatch) -> BatchResult:
        """See ``Engine.score``. If the processes are lost during the batch, new ones compute it again."""
        lost: list[_Group] = []
        for _ in range(TRIES):
            group = self._other_than(lost)
            try:
                return group.score(batch, self._stall_s)
            except GroupLostError as error:
                logger.warning("the slice is lost: %s", error)
                group.kill()
                lost.append(group)
        raise RuntimeError(f"the slice was lost {TRIES} times with this batch")

    def load_adapter(self, number: int, folder: Path) -> str:
        """Raise ValueError: the settings refuse adapters on slices."""
        raise ValueError(f"adapters are not implemented on slices of several hosts ({folder} in slot {number})")

    def set_batch_timeout(self, stall_s: float) -> None:
        """See ``Engine.set_batch_timeout``. Processes that take longer for a batch are ended and restarted."""
        self._stall_s = stall_s

    def check_health(self) -> None:
        """See ``Engine.check_health``."""
        if not self._keeper.is_alive():
            raise RuntimeError("the thread that watches the slice's processes has ended")
        lost_at = self._lost_at
        if lost_at is not None and (waited := time.monotonic() - lost_at) > self._settings.rebuild_s:
            raise RuntimeError(
                f"the slice's processes have been starting for {waited:.0f} s; rebuild_s is {self._settings.rebuild_s}"
            )

    def _other_than(self, lost: Sequence[_Group]) -> _Group:
        """Wait for a running group that is not one of ``lost``."""
        with self._changed:
            if not self._changed.wait_for(
                lambda: self._group is not None and self._group not in lost, self._settings.rebuild_s
            ):
                raise RuntimeError(f"the slice's processes did not start within {self._settings.rebuild_s} s")
            assert self._group
            return self._group

    def _keep(self) -> None:
        """Restart the processes whenever one has died."""
        while True:
            lost = self._group
            assert lost
            lost.wait_for_death()
            with self._changed:
                self._lost_at, self._group = time.monotonic(), None
                self._before = EngineStats(**_added(self._before, lost.stats))
            logger.warning("a process of the slice has died; all are restarted")
            lost.kill()
            group = self._restarted()
            with self._changed:
                self._lost_at, self._group = None, group
                self._changed.notify_all()

    def _restarted(self) -> _Group:
        while True:
            try:
                group = self._start()
                try:
                    group.warmup(self._progress)
                except BaseException:
                    group.kill()
                    raise
                return group
            except Exception:  # the next try may find another slice; ``check_health`` gives up after ``rebuild_s``
                logger.exception("the slice's processes did not start; trying again in %.0f s", PAUSE_S)
                time.sleep(PAUSE_S)

    def _start(self) -> _Group:
        """Start one process on each host, and load the model."""
        if self._slice is not None and not _is_placed(self._slice):
            self._slice.shutdown()
            self._slice = None
        if self._slice is None:
            self._slice = reserve(self._tpu, self._settings.scorer_cpus)
        actor = cast(Any, ray.remote)(
            num_cpus=self._settings.scorer_cpus,
            resources={RESOURCE: CHIPS_OF_A_SLICES_HOST},
            max_concurrency=IN_ENGINE,
            concurrency_groups={SIDE_CALLS: 2},
        )(SliceWorker)
        workers = [
            actor.options(
                scheduling_strategy=PlacementGroupSchedulingStrategy(
                    _bundles(self._slice), placement_group_bundle_index=number
                )
            ).remote(number)
            for number in range(self._tpu.hosts)
        ]
        try:
            hosts: list[Host] = self._all([worker.introduce.remote() for worker in workers])
            check_versions(hosts)
            places = [Place(hosts[0].address, len(workers), number) for number in range(len(workers))]
            infos = self._all(
                [
                    worker.load.remote(self._load, self._settings, place)
                    for worker, place in zip(workers, places, strict=True)
                ]
            )
            return _Group(workers, infos[0])
        except BaseException:
            _kill(workers)
            raise

    def _all(self, calls: Sequence[Any]) -> list[Any]:
        """Return the results of all calls, or raise the first failure.

        If a host is lost before its process runs, no call fails, so the slice is watched, too.
        """
        waiting = list(calls)
        while waiting:
            done, waiting = ray.wait(waiting, num_returns=1, timeout=POLL_S)
            ray.get(done)
            if not done and self._slice and not _is_placed(self._slice):
                raise GroupLostError("a host of the slice was lost")
        return ray.get(list(calls))


def reserve(tpu: Tpu, cpus: float) -> SlicePlacementGroup:
    """Reserve a whole slice, one bundle for each host in the order of their numbers. Waits until one is free.

    Args:
        cpus: reserved on each host, besides its chips.
    """
    while True:
        try:
            found = SlicePlacementGroup(
                topology=tpu.topology,
                accelerator_version=tpu.labels[CHIP_LABEL],
                resources_per_bundle={"CPU": cpus, RESOURCE: CHIPS_OF_A_SLICES_HOST},
                chips_per_vm=CHIPS_OF_A_SLICES_HOST,
                strategy="STRICT_SPREAD",
                bundle_label_selector=[{NUMBER_LABEL: str(number)} for number in range(tpu.hosts)],
                head_reservation_timeout_s=RESERVE_S,
            )
        except TimeoutError:
            pass
        else:
            # The reservation of host 0 stays: without it another replica would wait for the rest of this slice.
            if _bundles(found).wait(RESERVE_S):
                return found
            found.shutdown()
        logger.warning(
            "no complete slice of %s in topology %s has been free for %.0f s: %s",
            tpu.chip,
            tpu.topology,
            RESERVE_S,
            tpu.lacking(1, ray.nodes()) or "all are in use",
        )


def check_versions(hosts: Sequence[Host]) -> None:
    """Raise RuntimeError if a host has other packages than host 0: their programs would not meet, or differ."""
    first = hosts[0].versions
    for number, host in enumerate(hosts):
        names = sorted(name for name in {*first, *host.versions} if first.get(name) != host.versions.get(name))
        if names:
            own, wanted = (
                ", ".join(f"{name} {of.get(name, '(none)')}" for name in names) for of in (host.versions, first)
            )
            raise RuntimeError(
                f"host {number} of the slice, {host.address}, has {own}, and host 0, {hosts[0].address}, has {wanted}; "
                "give all hosts one image"
            )


def agreed(answers: Sequence[Answer]) -> Answer:
    """Return host 0's answer, if all hosts did the same.

    Raises:
        GroupLostError: a host differs from host 0.
    """
    first = answers[0]
    for number, other in enumerate(answers):
        if dataclasses.replace(other, result=first.result) != first:
            raise GroupLostError(f"host {number} differs from host 0: {other}, not {first}")
    return first


def _bundles(found: SlicePlacementGroup) -> PlacementGroup:
    return cast(PlacementGroup, found.placement_group)


def _is_placed(found: SlicePlacementGroup) -> bool:
    """True while all its hosts are alive."""
    return placement_group_table(_bundles(found))["state"] == "CREATED"


def _kill(workers: Sequence[Any]) -> None:
    for worker in workers:
        ray.kill(worker)


def _added(one: EngineStats, other: EngineStats) -> dict[str, int]:
    """The counters of both, summed."""
    return {name: getattr(one, name) + getattr(other, name) for name in COUNTERS}
