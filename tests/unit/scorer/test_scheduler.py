"""The scheduler alone, without an engine or a clock: which jobs go to the device next."""

from collections import deque
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve_app.batches import join, shared_with_previous
from serve_app.contract import EVERYONE, Share, TokenBatch
from serve_app.scorer.lines import PASSED_AT_MOST, TURNS_PER_BATCH
from serve_app.scorer.queued_job import QueuedJob
from serve_app.scorer.scheduler import LEAD_S, PATIENCE, DeviceBatch, Scheduler
from serve_app.scorer.speed import Speed
from tests.batches import batch_of, label_batch
from tests.batches import sequences_of as sequences_in

Batch = DeviceBatch[QueuedJob]


A, B = Share("a"), Share("b")
HIGH, LOW = Share("high", priority=0), Share("low", priority=2)


def job_of(sequences: Sequence[Sequence[int]], *, vocab: bool = True, share: Share = EVERYONE) -> QueuedJob:
    return QueuedJob(batch_of(sequences, vocab_logprobs=vocab), share)


def flood(share: Share, jobs: int = 16, sequences: int = 200) -> list[QueuedJob]:
    """More work than a test computes."""
    return [job_of([[1_000 * j + i] for i in range(sequences)], share=share) for j in range(jobs)]


def tokens_of(batches: Sequence[Batch], share: Share) -> int:
    return sum(part.cost for batch in batches for part in batch.parts if part.job.share == share)


def scheduler_of(*jobs: QueuedJob, budget: int = 64, tokens_per_s: float = 0.0) -> Scheduler[QueuedJob]:
    scheduler = Scheduler[QueuedJob](budget, Speed(tokens_per_s))
    for job in jobs:
        scheduler.add(job)
    return scheduler


def held(budget: int = 64) -> tuple[Scheduler[QueuedJob], Batch]:
    """A scheduler, and the batch that it has on the device."""
    scheduler = scheduler_of(job_of([[9]]), budget=budget)
    return scheduler, due(scheduler)


def due(scheduler: Scheduler[QueuedJob], now: float = 0.0) -> Batch:
    batch = scheduler.next_batch(now)
    assert batch
    return batch


def run(scheduler: Scheduler[QueuedJob], *in_engine: Batch, count: int = 10_000) -> list[Batch]:
    """Form batches, at most ``count``, while they leave the engine in the order in which they came."""
    formed: list[Batch] = []
    running = deque(in_engine)
    while len(formed) < count:
        if batch := scheduler.next_batch(0.0):
            formed.append(batch)
            running.append(batch)
        elif running:
            scheduler.finish(running.popleft(), 0.0)
        else:
            break
    return formed


def packed(batch: Batch) -> TokenBatch:
    return join([part.batch() for part in batch.parts])


def sequences_of(batch: Batch) -> list[list[int]]:
    return sequences_in(packed(batch))


def lengths_of(batch: Batch) -> list[int]:
    return packed(batch).lengths.tolist()


def test_a_batch_holds_several_jobs_and_keeps_their_order_within_the_budget():
    jobs = [job_of([[100 * j, 1, 2, 3, i] for i in range(30)]) for j in range(3)]
    batches = run(scheduler_of(*jobs))
    assert len({sequence[0] for sequence in sequences_of(batches[0])}) > 1
    for batch in map(packed, batches):
        assert (batch.lengths - shared_with_previous(batch)).sum() <= 64
    for j in range(3):
        seen = [s for batch in batches for s in sequences_of(batch) if s[0] == 100 * j]
        assert seen == [[100 * j, 1, 2, 3, i] for i in range(30)]


def test_shared_tokens_are_measured_only_if_the_job_does_not_have_them():
    batch = label_batch([[1, 2, 3], [1, 2, 4], [1, 2, 5, 6]], [[1]] * 3)
    assert QueuedJob(batch).costs == [3, 1, 2]
    assert QueuedJob(replace(batch, shared=np.array([0, 1, 1], np.int64))).costs == [3, 2, 3]
    [whole] = due(scheduler_of(QueuedJob(batch))).parts
    np.testing.assert_array_equal(whole.batch().shared, [0, 2, 2])


def test_a_small_job_goes_with_the_next_batch_whatever_came_before():
    scheduler, busy = held()
    scheduler.add(big := job_of([[i, 1, 2] for i in range(1_000, 6_000)]))
    due(scheduler)
    scheduler.add(job_of([[7, 7, 7]]))
    scheduler.finish(busy, 0.0)
    assert [7, 7, 7] in sequences_of(due(scheduler))
    assert not big.exhausted


def test_a_small_job_waits_for_one_batch_however_many_large_ones_wait():
    large = [job_of([[1_000 * j + i, 1, 2] for i in range(100)]) for j in range(1, 31)]
    scheduler = scheduler_of(*large)
    batches = run(scheduler, count=31)
    assert all(job.taken for job in large)
    for j in range(3):
        scheduler.add(job_of([[7, 7, j]]))
    [following] = run(scheduler, *batches[-2:], count=1)
    assert [7, 7, 2] in sequences_of(following)
    assert not all(job.exhausted for job in large)


def test_long_sequences_do_not_pass_a_small_job_two_in_a_row():
    scheduler, busy = held()
    scheduler.add(job_of([[i] * 500 for i in range(10)]))
    first = due(scheduler)
    scheduler.add(job_of([[7]]))
    lengths = [lengths_of(batch) for batch in [first, *run(scheduler, busy, first)]]
    assert lengths.index([1]) <= 2


def test_new_jobs_do_not_pass_a_sequence_that_fills_a_batch_twice_in_a_row():
    scheduler = scheduler_of(big := job_of([[1_000 + i] * 60 for i in range(6)]))
    taken: list[int] = []
    for _ in range(10):
        for _ in range(20):
            scheduler.add(job_of([[1, 2, 3, 4]]))
        scheduler.finish(due(scheduler), 0.0)
        taken.append(big.taken)
    assert taken == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5]


def test_new_jobs_share_what_a_turn_leaves_and_a_batch_that_leaves_one_out_is_not_filled():
    scheduler = scheduler_of(large := job_of([[i] for i in range(1_000)]))
    first = due(scheduler)
    for i in range(10):
        scheduler.add(job_of([[i] * 8]))
    scheduler.finish(first, 0.0)
    batch = due(scheduler)
    # A turn of the large job is one sequence and a quarter of the batch.
    assert [(part.job is large, part.cost) for part in batch.parts] == [(True, 17), *[(False, 8)] * 5]


def test_a_job_of_another_kind_waits_for_one_more_batch_that_is_half_as_large():
    scheduler, busy = held()
    for j in range(1, 5):
        scheduler.add(job_of([[j, i] for i in range(200)]))
    first = due(scheduler)
    scheduler.add(job_of([[7]], vocab=False))
    batches = [first, *run(scheduler, busy, first)]
    assert [packed(batch).vocab_logprobs for batch in batches].index(False) <= 2
    assert sum(part.cost for part in batches[0].parts) > 32
    assert sum(part.cost for part in batches[1].parts) <= 32


def test_a_batch_is_about_a_second_at_the_measured_speed_and_at_most_the_budget():
    assert scheduler_of(budget=8_192).piece == 8_192
    assert scheduler_of(budget=8_192, tokens_per_s=1e6).piece == 8_192
    assert scheduler_of(budget=8_192, tokens_per_s=1e-3).piece == 64
    scheduler = scheduler_of(job_of([[i, 1] for i in range(5_000)]), budget=8_192, tokens_per_s=200)
    batch = due(scheduler)
    assert sum(lengths_of(batch)) == 200
    assert batch.expected == 1.0


def test_the_second_batch_is_formed_late_so_that_it_holds_new_jobs():
    scheduler = scheduler_of(job_of([[1_000 + i, 1] for i in range(5_000)]), budget=8_192, tokens_per_s=2_000)
    due(scheduler, now=10.0)
    assert scheduler.next_batch(10.2) is None
    assert scheduler.next_due_in(10.2) == pytest.approx(0.8 - LEAD_S)
    scheduler.add(job_of([[7]]))
    assert [7] in sequences_of(due(scheduler, now=11.0 - LEAD_S / 2))
    assert scheduler.next_due_in(20.0) is None  # two are in the engine


def test_the_second_batch_is_formed_only_when_half_a_batch_waits():
    scheduler, _ = held()
    scheduler.add(job_of([[i] for i in range(31)]))
    assert scheduler.next_due_in(0.0) is None
    assert scheduler.next_batch(0.0) is None
    scheduler.add(job_of([[i] for i in range(100, 200)]))
    assert sum(lengths_of(due(scheduler))) == 64
    assert scheduler.queued_tokens == 31 + 100 - 64
    assert scheduler.next_batch(0.0) is None


def test_sequences_with_early_reads_or_shared_tokens_are_not_prefilled_ahead():
    def ahead(job: QueuedJob) -> list[TokenBatch]:
        scheduler = scheduler_of(job, budget=8_192, tokens_per_s=1_100)
        batches = [packed(batch) for batch in run(scheduler)]
        assert scheduler.queued_tokens == 0
        return [batch for batch in batches if batch.keep]

    tokens = [i % 500 for i in range(6_000)]
    early = replace(label_batch([tokens], [[1, 2]]), read_positions=np.array([3], np.int32))
    assert not ahead(QueuedJob(early))
    thrice = ahead(job_of([[*tokens, i] for i in range(3)]))
    assert [len(batch.tokens) for batch in thrice] == [1_024 * (i + 1) for i in range(5)]
    pieces = [
        (batch.tokens[-1], len(batch.tokens))
        for batch in ahead(job_of([[*tokens[:3_000], *[i] * 3_000] for i in (1, 2)]))
    ]
    assert [length for _, length in pieces if length <= 3_000] == [1_024, 2_048]  # once for both
    assert [length for token, length in pieces if token == 1 and length > 3_000] == [3_072, 4_096, 5_120]
    assert [length for token, length in pieces if token == 2 and length > 3_000] == [3_072, 4_096, 5_120]


def test_small_jobs_go_between_the_pieces_of_a_long_sequence():
    scheduler = scheduler_of(job_of([[i % 500 for i in range(8_000)]]), budget=8_192, tokens_per_s=1_100)
    first = due(scheduler)
    scheduler.add(job_of([[7]]))
    batches = [first, *run(scheduler, first)]
    assert [sum(lengths_of(batch)) for batch in batches] == [1_024, 1, *(1_024 * i for i in range(2, 8)), 8_000]


def test_a_batchs_expected_time_is_no_standstill():
    scheduler = scheduler_of(job_of([[1] * 100]), tokens_per_s=50)  # two seconds at that speed
    batch = due(scheduler, now=5.0)
    assert scheduler.overdue(5.1) == 0.0
    assert scheduler.overdue(5.0 + 2 * PATIENCE) == 0.0
    assert scheduler.overdue(5.0 + 2 * PATIENCE + 3) == 3.0
    scheduler.finish(batch, 30.0)
    assert scheduler.overdue(100.0) == 0.0


def test_a_second_batchs_standstill_counts_from_when_the_device_is_free():
    scheduler, first = held()
    scheduler.add(job_of([[1] * 40]))
    second = due(scheduler)
    assert (first.begun, second.begun) == (0.0, None)
    assert second.overdue(1_000.0) == 0.0
    scheduler.finish(first, 5.0)
    assert second.begun == 5.0
    assert scheduler.overdue(7.0) == 2.0  # no speed is known, so all its time counts


def test_a_job_with_a_long_prefix_gets_a_whole_turn_for_it():
    # A turn that ended with the prefix would compute the prefix again for every sequence.
    prefix = [*range(20)]
    scheduler, _ = held(budget=100)
    for j in range(8):
        scheduler.add(job_of([[j, *prefix, i] for i in range(50)]))
    first = sequences_of(due(scheduler))
    assert len([sequence for sequence in first if sequence[0] == 0]) >= 50 // TURNS_PER_BATCH


def test_a_job_with_a_prefix_that_fills_the_batch_still_gets_a_turn():
    batches = run(scheduler_of(job_of([[*range(64), i] for i in range(100)])))
    assert len(batches) <= 1 + 100 // (32 // TURNS_PER_BATCH)
    assert len(sequences_of(batches[0])) == 1 + 64 // TURNS_PER_BATCH


def test_an_item_above_the_budget_goes_alone():
    scheduler, busy = held()
    for sequence in ([1], [2] * 500, [3]):
        scheduler.add(job_of([sequence]))
    assert [500] in [lengths_of(batch) for batch in run(scheduler, busy)]


def test_jobs_that_did_not_fit_open_the_next_batches_in_the_order_in_which_they_came():
    scheduler, busy = held()
    for i in range(4):
        scheduler.add(job_of([[i] * 40]))
    assert [sequences_of(batch)[0][0] for batch in run(scheduler, busy)] == [0, 1, 2, 3]


def test_nothing_more_is_handed_out_of_a_job_that_was_discarded():
    jobs = [job_of([[j, i] for i in range(100)]) for j in range(3)]
    scheduler = scheduler_of(*jobs)
    batches = run(scheduler, count=2)
    scheduler.discard(jobs[:2])
    assert scheduler.queued_tokens == jobs[2].waiting_tokens
    assert {sequence[0] for batch in run(scheduler, *batches) for sequence in sequences_of(batch)} == {2}


class TestTenants:
    """The jobs of one tenant take the turns that the tests above describe; several tenants share the batches."""

    @pytest.mark.parametrize("share", [B, replace(B, weight=0.2), HIGH])
    def test_a_tenant_that_asks_for_little_goes_with_the_next_batch_however_much_another_waits_for(self, share: Share):
        scheduler = scheduler_of(*flood(A, jobs=32))
        batches = run(scheduler, count=20)
        for j in range(10):
            for job in flood(A, jobs=10, sequences=1):  # new ones, which arrived first
                scheduler.add(job)
            scheduler.add(small := job_of([[7, 7, j], [7, 8, j]], share=share))
            batches += run(scheduler, *batches[-2:], count=1)
            assert small.exhausted
            assert tokens_of(batches[-1:], A) == 0  # nor does it wait for the flood's part of its batch
            batches += run(scheduler, *batches[-2:], count=3)

    def test_a_tenant_that_comes_back_has_a_batch_to_itself_if_it_needs_one(self):
        scheduler = scheduler_of(*flood(A))
        batches = run(scheduler, count=20)
        scheduler.add(job_of([[i] for i in range(500)], share=B))
        batches = run(scheduler, *batches[-2:], count=5)
        assert tokens_of(batches[:1], B) == 64
        assert tokens_of(batches[1:], B) == pytest.approx(2 * 64, abs=64 // TURNS_PER_BATCH)  # its part from then on

    def test_tenants_share_the_device_by_weight_however_many_jobs_they_have(self):
        one, three = replace(A, weight=1.0), replace(B, weight=3.0)
        batches = run(scheduler_of(*flood(one), *flood(three, jobs=1, sequences=2_500)), count=40)
        assert sum(part.cost for batch in batches for part in batch.parts) == 40 * 64
        assert tokens_of(batches, three) / tokens_of(batches, one) == pytest.approx(3, rel=0.05)

    def test_every_other_batch_is_filled_however_many_small_jobs_another_sends(self):
        scheduler = scheduler_of(*flood(A))
        batches = run(scheduler, count=10)
        for j in range(10):
            scheduler.add(job_of([[7, 7, j]], share=B))
            batches += run(scheduler, *batches[-2:], count=1)
        assert [tokens_of([batch], A) for batch in batches[10:]] == [0, 61] * 5

    def test_a_tenant_that_waits_for_little_shares_its_batch_with_others_who_wait_for_little(self):
        scheduler = scheduler_of(*flood(A))
        batches = run(scheduler, count=10)
        for share, tokens in ((B, 12), (Share("c"), 16), (Share("d"), 17)):
            scheduler.add(job_of([[i] for i in range(tokens)], share=share))
        batches = run(scheduler, *batches[-2:], count=1)
        assert {part.job.share.tenant: part.cost for part in batches[0].parts} == {"b": 12, "c": 16}

    def test_what_one_tenant_does_not_need_goes_to_the_others(self):
        [batch] = run(scheduler_of(*flood(A), job_of([[1], [2]], share=B)), count=1)
        assert (tokens_of([batch], A), tokens_of([batch], B)) == (62, 2)

    def test_jobs_of_one_tenant_do_not_wait_longer_for_a_turn_because_another_has_more_of_them(self):
        mine = [job_of([[10_000 + j, i] for i in range(9)], share=B) for j in range(4)]
        scheduler = scheduler_of(*flood(A), *mine)
        run(scheduler, count=6)
        assert all(job.taken for job in mine)

    def test_a_long_sequence_of_one_tenant_is_charged_to_it(self):
        long = job_of([[i % 500 for i in range(8_000)]], share=A)
        scheduler = scheduler_of(long, budget=8_192, tokens_per_s=1_100)
        first = due(scheduler)
        scheduler.add(job_of([[9_000 + i, 1] for i in range(2_000)], share=B))
        batches = run(scheduler, first, count=4)
        assert [tokens_of([batch], A) for batch in batches] == [0, 1_024, 0, 1_024]

    def test_an_earlier_class_goes_first_and_a_later_one_gets_a_turn_in_every_eighth_batch(self):
        scheduler = scheduler_of(*flood(LOW, jobs=3), *flood(A, jobs=3), *flood(HIGH))
        batches = run(scheduler, count=4 * (PASSED_AT_MOST + 1))
        turn = 1 + 64 // TURNS_PER_BATCH
        for late in (A, LOW):
            assert [tokens_of([batch], late) for batch in batches] == [*[0] * PASSED_AT_MOST, turn] * 4
        assert tokens_of(batches, HIGH) == sum(len(packed(batch).tokens) for batch in batches) - 8 * turn

    def test_the_tenants_of_a_class_that_was_passed_over_take_its_turns_by_weight(self):
        late = [Share("x", priority=2), Share("y", weight=2.0, priority=2)]
        scheduler = scheduler_of(
            *flood(HIGH, jobs=1, sequences=6_200), *flood(late[0], jobs=2), *flood(late[1], jobs=2)
        )
        batches = run(scheduler, count=12 * (PASSED_AT_MOST + 1))
        assert tokens_of(batches, late[1]) == 2 * tokens_of(batches, late[0]) > 0

    def test_nobody_has_to_make_up_for_what_was_used_while_nobody_else_wanted_it(self):
        scheduler = scheduler_of(*flood(A))
        batches = run(scheduler, count=40)
        scheduler.discard([part.job for batch in batches for part in batch.parts])
        for job in [*flood(B), *flood(A)]:
            scheduler.add(job)
        batches = run(scheduler, *batches[-2:], count=10)
        assert tokens_of(batches, A) == pytest.approx(tokens_of(batches, B), abs=2 * 64)


rows = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=6), min_size=1, max_size=8)


shares = st.builds(Share, st.sampled_from("abc"), st.sampled_from([0.5, 1.0, 4.0]), st.integers(0, 2))


@given(st.lists(st.tuples(rows, st.booleans(), shares), min_size=1, max_size=6), st.integers(1, 20))
def test_every_sequence_is_handed_out_once_in_order_with_jobs_of_its_kind(
    jobs: list[tuple[list[list[int]], bool, Share]], budget: int
):
    queued = [job_of(sequences, vocab=vocab, share=share) for sequences, vocab, share in jobs]
    scheduler = scheduler_of(*queued, budget=budget)
    waiting = scheduler.queued_tokens
    assert sum(scheduler.held().values()) == waiting
    batches = run(scheduler)
    for job, (sequences, *_) in zip(queued, jobs, strict=True):
        parts = [part for batch in batches for part in batch.parts if part.job is job]
        assert [i for part in parts for i in range(part.start, part.stop)] == [*range(len(sequences))]
    for batch in batches:
        assert len({part.job.kind for part in batch.parts}) == 1
        costs = [part.cost for part in batch.parts]
        assert sum(costs) <= budget or len(costs) == 1
    assert sum(part.cost for batch in batches for part in batch.parts) == waiting
    assert scheduler.queued_tokens == 0


weights = st.sampled_from([1.0, 2.0, 5.0])


@settings(max_examples=50)
@given(st.lists(st.tuples(st.integers(1, 3), weights), min_size=2, max_size=4), st.integers(24, 64), st.integers(1, 9))
def test_tenants_with_work_have_had_their_parts_at_any_time(tenants: list[tuple[int, float]], budget: int, formed: int):
    """Over its weight, none has had more than another by more than a turn, and what the other could not use because its
    sequence did not fit into what was left of a batch."""
    lengths = {Share(str(i), weight): length for i, (length, weight) in enumerate(tenants)}
    jobs = [job_of([[i] * length for i in range(600 // length)], share=share) for share, length in lengths.items()]
    batches = run(scheduler_of(*jobs, budget=budget), count=formed)
    assert not any(job.exhausted for job in jobs)
    for one, own in lengths.items():
        for other, length in lengths.items():
            ahead = tokens_of(batches, one) / one.weight - tokens_of(batches, other) / other.weight
            assert ahead <= (own + max(own, budget // TURNS_PER_BATCH) + length) / one.weight


@settings(max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(1, 9), st.booleans()), min_size=1, max_size=4))
def test_no_class_is_passed_over_more_often_than_the_bound(tenants: list[tuple[int, int, bool]]):
    jobs = [
        job_of([[i] * length for i in range(450 // length)], vocab=vocab, share=Share(str(i), priority=priority))
        for i, (priority, length, vocab) in enumerate(tenants)
    ]
    batches = run(scheduler_of(*jobs, budget=16), count=25)
    assert not any(job.exhausted for job in jobs)
    for priority in {priority for priority, *_ in tenants}:
        served = [any(part.job.share.priority == priority for part in batch.parts) for batch in batches]
        passed = max(len(run) for run in "".join("+" if each else "-" for each in served).split("+"))
        assert passed <= PASSED_AT_MOST + 1  # two classes may be due at once, with jobs of two kinds
