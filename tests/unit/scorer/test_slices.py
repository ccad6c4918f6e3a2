"""The hosts of a slice stay in step; without Ray."""

from __future__ import annotations

import dataclasses
import pickle
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from serve_app.batches import DeltaBatch, cut, join
from serve_app.contract import BatchResult, EngineStats, TokenBatch
from serve_app.scorer.engines import load_part
from serve_app.scorer.fake_engine import FakeEngine
from serve_app.scorer.queued_job import QueuedJob
from serve_app.scorer.scheduler import IN_ENGINE
from serve_app.scorer.slice_group import GroupLostError, agreed, check_versions
from serve_app.scorer.slice_worker import Answer, Host, HostFailedError, OutOfStepError, Place, SliceWorker
from serve_app.settings import ModelSettings
from tests.batches import label_batch

BATCH = label_batch([[1, 2, 3], [1, 2, 4]], [[1, 2]] * 2)


def worker(number: int) -> SliceWorker:
    made = SliceWorker(number)
    made.load(load_part, ModelSettings(engine="fake"), Place("nowhere", 4, number))
    return made


def test_hosts_with_other_packages_are_named_before_anything_is_loaded():
    same = Host("10.0.0.1:1", {"jax": "0.10.2", "libtpu": "0.0.42.1"})
    check_versions([same, Host("10.0.0.2:1", dict(same.versions))])
    other = Host("10.0.0.3:1", {"jax": "0.11.0"})
    with pytest.raises(RuntimeError) as caught:
        check_versions([same, same, other])
    assert str(caught.value) == (
        "host 2 of the slice, 10.0.0.3:1, has jax 0.11.0, libtpu (none), and host 0, 10.0.0.1:1, has jax 0.10.2, "
        "libtpu 0.0.42.1; give all hosts one image"
    )


def test_only_the_first_host_sends_its_values():
    answers = [worker(number).score(0, DeltaBatch.of(BATCH)) for number in range(4)]
    result = agreed(answers).result
    assert result
    np.testing.assert_array_equal(result.values, FakeEngine().score(BATCH).values)
    assert [answer.result for answer in answers[1:]] == [None] * 3


def test_a_batch_out_of_turn_is_refused_by_the_host():
    host = worker(3)
    host.score(0, DeltaBatch.of(BATCH))
    for sequence in (0, 1 + IN_ENGINE):
        with pytest.raises(OutOfStepError, match=f"host 3 was sent batch {sequence}; its next is 1"):
            host.score(sequence, DeltaBatch.of(BATCH))
    assert host.score(1, DeltaBatch.of(BATCH)).sequence == 1


def test_a_host_plans_a_batch_while_its_devices_compute_the_one_before():
    """Batches start in their order, however they arrive, and each answer counts what was started up to its batch."""
    started: list[int] = []
    second = threading.Event()

    class Devices(FakeEngine):
        def launch(self, batch: TokenBatch) -> Callable[[], BatchResult]:
            started.append(batch.num_sequences)
            result = self.score(batch)
            if len(started) == 2:
                second.set()

            def finish() -> BatchResult:
                assert second.wait(20), "the second batch was not started while the first was computed"
                return result

            return finish

    host = SliceWorker(0)
    host.load(lambda *_: Devices(), ModelSettings(engine="fake"), Place("nowhere", 1, 0))
    batches = [label_batch([[1, 2, 3]] * count, [[1]] * count) for count in (1, 2)]
    with ThreadPoolExecutor(IN_ENGINE) as threads:
        later = threads.submit(host.score, 1, DeltaBatch.of(batches[1]))
        first = threads.submit(host.score, 0, DeltaBatch.of(batches[0]))
        answers = [first.result(), later.result()]
    assert started == [1, 2]
    assert [answer.stats.computed_tokens for answer in answers] == [3, 7]
    for answer, batch in zip(answers, batches, strict=True):
        assert answer.result is not None
        np.testing.assert_array_equal(answer.result.values, FakeEngine().score(batch).values)


def test_a_batch_that_all_hosts_refuse_leaves_them_in_step():
    refused = label_batch([[1] * 100_000], [[1]])
    hosts = [worker(number) for number in range(2)]
    answer = agreed([host.score(0, DeltaBatch.of(refused)) for host in hosts])
    assert answer.result is None
    assert "this engine reads 1 to" in (answer.refusal or "")
    assert agreed([host.score(1, DeltaBatch.of(BATCH)) for host in hosts]).result


def test_the_leader_gets_a_failure_without_the_exceptions_class():
    import jax

    class Failing(FakeEngine):
        def score(self, *_: Any) -> BatchResult:
            raise jax.errors.JaxRuntimeError("all-reduce failed")

    host = SliceWorker(0)
    host.load(lambda *_: Failing(), ModelSettings(engine="fake"), Place("nowhere", 1, 0))
    with pytest.raises(HostFailedError, match="JaxRuntimeError: all-reduce failed") as caught:
        host.score(0, DeltaBatch.of(BATCH))
    assert b"jax" not in pickle.dumps(caught.value)


@pytest.mark.parametrize(
    "rows",
    [
        [[1]],
        [[7] * 50, [7] * 50, [7] * 49, [8]],
        [[*range(300), n] for n in range(9)],
        [[3, 4], [5], [3, 4, 5, 6], [3, 4]],
    ],
    ids=["one", "equal", "query", "mixed"],
)
def test_a_delta_batch_becomes_the_whole_one_again(rows: list[list[int]]):
    batch = label_batch(rows, [[1, 2]] * len(rows))
    delta = DeltaBatch.of(batch)
    whole = delta.whole()
    for name in ("tokens", "offsets", "read_sequences", "read_positions", "targets", "target_offsets"):
        np.testing.assert_array_equal(getattr(whole, name), getattr(batch, name))
        assert getattr(whole, name).dtype == getattr(batch, name).dtype
    assert len(delta.batch.tokens) + delta.shared.sum() == len(batch.tokens)


def test_a_query_is_sent_once():
    batch = label_batch([[*range(300), n] for n in range(100)], [[1]] * 100)
    assert len(DeltaBatch.of(batch).batch.tokens) == 301 + 99
    requests = [QueuedJob(cut(batch, start, start + 25)).batch for start in range(0, 100, 25)]
    assert len(DeltaBatch.of(join(requests)).batch.tokens) == 301 + 99


@pytest.mark.parametrize(
    "other", [{"sequence": 1}, {"stats": EngineStats(prefix_hit_tokens=1)}, {"refusal": "too long"}], ids=str
)
def test_hosts_that_did_not_do_the_same_are_not_believed(other: dict[str, Any]):
    first = Answer(0, EngineStats(), FakeEngine().score(BATCH))
    same = Answer(0, EngineStats())
    assert agreed([first, same, same]) is first
    with pytest.raises(GroupLostError, match="host 2 differs from host 0"):
        agreed([first, same, dataclasses.replace(same, **other)])
