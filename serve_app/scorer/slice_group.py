"""A replica that spans hosts: one process on each host of a slice of TPUs, in step, behind one ``Engine``.

The process that holds this engine, the leader, is none of them and loads no jax: when a process dies, jax ends the
others and can join no new one in their place. The leader outlives that, starts all of them anew, and lets them compute
once more what was on its way.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections.abc import Sequence
from typing import Any, cast

import ray
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup, placement_group_table
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
from ray.util.tpu import SlicePlacementGroup

from serve_app.batches import Brief
from serve_app.contract import BatchResult, EngineStats, ModelInfo, Progress, TokenBatch
from serve_app.scorer.slice_worker import ASIDE, Answer, LoadPart, Place, SliceWorker
from serve_app.settings import ModelSettings
from serve_app.tpu import CHIP_LABEL, CHIPS_OF_A_SLICES_HOST, NUMBER_LABEL, RESOURCE, Tpu

logger = logging.getLogger("ray.serve")

TRIES = 2
"""Of a batch. One that ends the processes twice is likely to be the reason."""
RESERVE_S = 60.0
"""The log says so when a slice was waited for this long."""
POLL_S = 0.5
PAUSE_S = 1.0
"""Before a start that failed is tried again."""

COUNTERS = [field.name for field in dataclasses.fields(EngineStats)][:6]
"""Those of ``EngineStats`` that only rise."""


class GroupLostError(Exception):
    """The processes are not in step any more, and have to be started anew."""


class _Group:
    """The processes of a slice, from their start until one of them is lost.

    Args:
        workers: ``SliceWorker`` actors by their numbers.
        info: of the model that they have loaded.
    """

    def __init__(self, workers: Sequence[Any], info: ModelInfo) -> None:
        self._workers = workers
        self.info = info
        self.stats = EngineStats()
        self._sequence = 0
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
        """The batch on all hosts.

        Raises:
            ValueError: the engine refuses the batch.
            GroupLostError: a process died, failed, took too long, or did something else than the others.
        """
        brief = Brief.of(batch)
        with self._sending:
            sequence, self._sequence = self._sequence, self._sequence + 1
            calls = [worker.score.remote(sequence, brief) for worker in self._workers]
        try:
            answers: list[Answer] = ray.get(calls, timeout=timeout_s)
        except TimeoutError as error:
            raise GroupLostError(f"batch {sequence} took longer than {timeout_s:.0f} s") from error
        except RayError as error:
            raise GroupLostError(f"batch {sequence}: {error}") from error
        answer = agreed(answers)
        self.stats = answer.stats
        if answer.result is None:
            raise ValueError(answer.refusal)
        return answer.result

    def wait_for_death(self) -> None:
        """Return when a process has died, by itself or by ``kill``."""
        ray.wait(self._watched, num_returns=1)

    def kill(self) -> None:
        _kill(self._workers)


class SliceGroup:
    """``contract.Engine`` over the hosts of a slice. The constructor waits for a slice, and loads the model.

    Args:
        settings: whose ``tpu`` spans several hosts.
        load: makes each host's part.
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
        """Counted by groups that were lost."""
        self._lost_at: float | None = None
        self._progress: Progress | None = None
        self._keeper = threading.Thread(target=self._keep, name="slice", daemon=True)

    @property
    def stats(self) -> EngineStats:
        """Host 0's, after the last batch; the counters go on when the processes are started anew."""
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
        """See ``Engine.score``. If processes are lost with the batch, it is computed once more by new ones."""
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

    def limit(self, stall_s: float) -> None:
        """See ``Engine.limit``. What computes a batch is ended with it, and started anew."""
        self._stall_s = stall_s

    def check(self) -> None:
        """See ``Engine.check``."""
        if not self._keeper.is_alive():
            raise RuntimeError("nobody watches the slice's processes")
        lost_at = self._lost_at
        if lost_at is not None and (waited := time.monotonic() - lost_at) > self._settings.rebuild_s:
            raise RuntimeError(
                f"the slice's processes have been starting for {waited:.0f} s; rebuild_s is {self._settings.rebuild_s}"
            )

    def _other_than(self, lost: Sequence[_Group]) -> _Group:
        """The group that runs, when one runs that is not lost."""
        with self._changed:
            if not self._changed.wait_for(
                lambda: self._group is not None and self._group not in lost, self._settings.rebuild_s
            ):
                raise RuntimeError(f"the slice's processes did not start within {self._settings.rebuild_s} s")
            assert self._group
            return self._group

    def _keep(self) -> None:
        """Start the processes anew whenever one has died."""
        while True:
            lost = self._group
            assert lost
            lost.wait_for_death()
            with self._changed:
                self._lost_at, self._group = time.monotonic(), None
                self._before = EngineStats(**_added(self._before, lost.stats))
            logger.warning("a process of the slice has died; all are started anew")
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
            except Exception:  # whatever it was, the next try may find another slice; ``check`` knows how long it takes
                logger.exception("the slice's processes did not start")
                time.sleep(PAUSE_S)

    def _start(self) -> _Group:
        """One process on each host, with the model loaded."""
        if self._slice is not None and not _is_placed(self._slice):
            self._slice.shutdown()
            self._slice = None
        if self._slice is None:
            self._slice = reserve(self._tpu, self._settings.scorer_cpus)
        actor = cast(Any, ray.remote)(
            num_cpus=self._settings.scorer_cpus,
            resources={RESOURCE: CHIPS_OF_A_SLICES_HOST},
            concurrency_groups={ASIDE: 2},
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
            addresses = self._all([worker.address.remote() for worker in workers])
            places = [Place(addresses[0], len(workers), number) for number in range(len(workers))]
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
        """What all calls return, or the first failure. A host that is lost before its process runs fails no call."""
        waiting = list(calls)
        while waiting:
            done, waiting = ray.wait(waiting, num_returns=1, timeout=POLL_S)
            ray.get(done)
            if not done and self._slice and not _is_placed(self._slice):
                raise GroupLostError("a host of the slice is gone")
        return ray.get(list(calls))


def reserve(tpu: Tpu, cpus: float) -> SlicePlacementGroup:
    """A whole slice, one bundle for each host, in the order of the hosts' numbers. Waits until there is one.

    Args:
        cpus: on each host, besides its chips.
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
            "no whole slice of %s in topology %s was free for %.0f s: %s",
            tpu.chip,
            tpu.topology,
            RESERVE_S,
            tpu.lacking(1, ray.nodes()) or "others use those that there are",
        )


def agreed(answers: Sequence[Answer]) -> Answer:
    """Host 0's answer, if all hosts did the same.

    Raises:
        GroupLostError: one did not.
    """
    first = answers[0]
    for number, other in enumerate(answers):
        if dataclasses.replace(other, result=first.result) != first:
            raise GroupLostError(f"host {number} did otherwise than host 0: {other}, not {first}")
    return first


def _bundles(found: SlicePlacementGroup) -> PlacementGroup:
    return cast(PlacementGroup, found.placement_group)


def _is_placed(found: SlicePlacementGroup) -> bool:
    """All its hosts are there."""
    return placement_group_table(_bundles(found))["state"] == "CREATED"


def _kill(workers: Sequence[Any]) -> None:
    for worker in workers:
        ray.kill(worker)


def _added(one: EngineStats, other: EngineStats) -> dict[str, int]:
    """The sums of the counters."""
    return {name: getattr(one, name) + getattr(other, name) for name in COUNTERS}
