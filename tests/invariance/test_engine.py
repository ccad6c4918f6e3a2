"""A sequence's values depend only on its own tokens: not on its batch, place, the cache, the chunks or the shapes."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from model import loading
from model.contract import PAGE_TOKENS
from model.engine import Engine
from serve_app.batches import cut
from serve_app.scorer.queued_job import AHEAD_TOKENS
from tests.batches import label_batch, reads_batch
from tests.invariance.rows import BFLOAT16_TOLERANCE, BITS, LABELS, TOLERANCE, VOCAB, make_model, prompts, values
from tests.tiny import make_llama


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def scorer(folder: Path) -> Engine:
    return loading.load(folder, max_segment_tokens=64, call_tokens=128)


def test_alone_equals_among_500(scorer: Engine) -> None:
    sequences = prompts(500, query=40)
    together = values(scorer, sequences)
    alone = np.concatenate([values(scorer, [sequence]) for sequence in sequences[::25]])
    np.testing.assert_allclose(alone, together[::25], rtol=0, atol=BITS)


def test_bfloat16_values_vary_by_its_rounding_alone(scorer: Engine, folder: Path) -> None:
    """Alone, among 500 in any order, in other shapes, and in chunks after a prefix that is cold, then warm."""
    rounded = loading.load(folder, dtype="bfloat16", max_segment_tokens=64, call_tokens=128)
    other = loading.load(folder, dtype="bfloat16", max_segment_tokens=32, call_tokens=96, chunks=(17,))
    sequences = prompts(500, seed=8, query=40)
    order = np.random.default_rng(9).permutation(500)
    together = values(rounded, sequences)
    shuffled = values(rounded, [sequences[i] for i in order])
    alone = np.concatenate([values(rounded, [sequence]) for sequence in sequences[::25]])
    long = prompts(8, seed=10, query=300, longest=200)
    seen = [
        (alone, together[::25]),
        (shuffled, together[order]),
        (values(other, sequences[:100]), together[:100]),
        (values(other, long), values(rounded, long)),
        (values(other, long), values(rounded, long)),
    ]
    worst = max(float(np.abs(one - same).max()) for one, same in seen)
    assert worst <= BFLOAT16_TOLERANCE
    assert worst < np.abs(together - values(scorer, sequences)).max()  # the batch changes less than the dtype does


def test_order_does_not_matter(scorer: Engine) -> None:
    sequences = prompts(60, seed=1, query=150)
    order = np.random.default_rng(2).permutation(60)
    shuffled = values(scorer, [sequences[i] for i in order])
    np.testing.assert_allclose(shuffled, values(scorer, sequences)[order], rtol=0, atol=BITS)


@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_batch_sizes_agree(scorer: Engine, count: int) -> None:
    sequences = prompts(8, seed=3)
    batched = [values(scorer, sequences[at : at + count]) for at in range(0, 8, count)]
    np.testing.assert_allclose(np.concatenate(batched), values(scorer, sequences), rtol=0, atol=BITS)


@pytest.mark.parametrize(
    ("implementation", "widest", "call"),
    [
        ("native", 16, 16),
        ("native", 32, 96),
        ("native", 128, 128),
        pytest.param("paged", 128, 128, marks=pytest.mark.slow),
        pytest.param("paged", 16, 16, marks=pytest.mark.slow),
        pytest.param("paged", 32, 96, marks=pytest.mark.slow),
    ],
)
def test_any_buckets_and_chunks_agree(
    scorer: Engine, folder: Path, implementation: str, widest: int, call: int
) -> None:
    """They agree within one implementation of attention. Two of them sum in other orders: 1.05e-5 was seen here."""
    if implementation == "paged":
        scorer = loading.load(folder, implementation=implementation, max_segment_tokens=64, call_tokens=128)
    other = loading.load(folder, implementation=implementation, max_segment_tokens=widest, call_tokens=call)
    sequences = [*prompts(12, seed=4, query=70), *prompts(2, seed=5, query=300, longest=300)]
    np.testing.assert_allclose(values(other, sequences), values(scorer, sequences), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("chunk", [17, 64, 256])
def test_chunked_prefill_agrees_with_one_long_segment(folder: Path, chunk: int) -> None:
    """The same prompts in one segment of up to 1,024 tokens, and cut into chunks that end anywhere in a page."""
    whole = loading.load(folder, max_segment_tokens=1024, call_tokens=1024)
    chunked = loading.load(folder, max_segment_tokens=32, call_tokens=64, chunks=(chunk,))
    sequences = [prompt for seed in (70, 71) for prompt in prompts(1, seed=seed, query=700, longest=300)]
    np.testing.assert_allclose(values(chunked, sequences), values(whole, sequences), rtol=0, atol=BITS)
    shared = prompts(4, seed=72, query=300, longest=40)
    np.testing.assert_allclose(values(chunked, shared), values(whole, shared), rtol=0, atol=BITS)


@pytest.mark.parametrize("implementation", ["native", "paged"])
def test_one_launch_a_layer_and_one_a_model_agree(scorer: Engine, folder: Path, implementation: str) -> None:
    looped = loading.load(folder, implementation=implementation, by_layer=False, max_segment_tokens=64, call_tokens=128)
    sequences = [*prompts(20, seed=73, query=150), *prompts(1, seed=74, query=400, longest=300)]
    np.testing.assert_allclose(values(looped, sequences), values(scorer, sequences), rtol=0, atol=TOLERANCE)


def test_a_prompt_that_comes_alone_is_kept_the_second_time(folder: Path) -> None:
    scorer = loading.load(folder, max_segment_tokens=512, call_tokens=512)
    query, items = prompts(1, seed=75, query=300, longest=1)[0], prompts(4, seed=76, longest=20)
    computed = [int(scorer.score(label_batch([query + item], [LABELS])).computed_tokens.sum()) for item in items]
    lengths = [len(query + item) for item in items]
    assert computed == [lengths[0], lengths[1], lengths[2] - 2 * PAGE_TOKENS, lengths[3] - 2 * PAGE_TOKENS]
    got = np.concatenate([values(scorer, [query + item]) for item in items])
    wanted = values(loading.load(folder, max_segment_tokens=512, call_tokens=512), [query + item for item in items])
    np.testing.assert_allclose(got, wanted, rtol=0, atol=BITS)


def test_a_prefix_of_items_in_several_batches_is_computed_once(folder: Path) -> None:
    """A request in three batches begins with two pages and four tokens, which 20 items alone would not share."""
    scorer = loading.load(folder)
    sequences = prompts(60, seed=77, query=2 * PAGE_TOKENS + 4, longest=12)
    whole = label_batch(sequences, [LABELS] * 60)
    parts = [
        cut(replace(whole, common=np.tile(np.int32([2 * PAGE_TOKENS + 4, 60]), (60, 1))), at, at + 20)
        for at in (0, 20, 40)
    ]
    results = [scorer.score(part) for part in parts]
    own = [sum(len(sequence) - 2 * PAGE_TOKENS - 4 for sequence in sequences[at : at + 20]) for at in (0, 20, 40)]
    assert [int(result.computed_tokens.sum()) for result in results] == [2 * PAGE_TOKENS + 4 + own[0], *own[1:]]
    together = loading.load(folder).score(whole).values
    np.testing.assert_allclose(np.concatenate([result.values for result in results]), together, rtol=0, atol=BITS)


def test_two_threads_get_what_one_gets(folder: Path) -> None:
    """The cache is small: both evict pages that the other reads."""
    shared = loading.load(folder, max_segment_tokens=64, call_tokens=64, prefix_cache_bytes=0)
    batches = [prompts(5, seed=seed, query=250 + 100 * (seed % 3), longest=40) for seed in range(80, 92)]
    wanted = [values(loading.load(folder, max_segment_tokens=64, call_tokens=64), batch) for batch in batches[:3]]
    with ThreadPoolExecutor(2) as threads:
        got = list(threads.map(lambda batch: values(shared, batch), batches * 2))
    for number, one in enumerate(got):
        np.testing.assert_allclose(one, got[number % len(batches)], rtol=0, atol=BITS)
    for one, right in zip(got, wanted, strict=False):
        np.testing.assert_allclose(one, right, rtol=0, atol=BITS)


def test_cold_warm_and_evicted_prefixes_agree(folder: Path) -> None:
    scorer = loading.load(folder, max_segment_tokens=64, call_tokens=64, prefix_cache_bytes=0)
    sequences = prompts(6, seed=6, query=3 * PAGE_TOKENS)
    cold = values(scorer, sequences)
    hits = scorer.cache_stats.hit_tokens
    warm = values(scorer, sequences)
    assert scorer.cache_stats.hit_tokens == hits + 3 * PAGE_TOKENS
    for seed in range(7, 12):
        values(scorer, prompts(3, seed=seed, query=600))
    assert scorer.cache_stats.evicted_pages > 0
    evicted = values(scorer, sequences)
    assert scorer.cache_stats.hit_tokens == hits + 3 * PAGE_TOKENS
    np.testing.assert_array_equal(warm, cold)
    np.testing.assert_array_equal(evicted, cold)


def test_prefixes_that_evict_each_other_within_a_batch_agree(scorer: Engine, folder: Path) -> None:
    """Seven queries of three pages use a cache of twelve: pages are rewritten while earlier calls may still run."""
    small = loading.load(folder, max_segment_tokens=64, call_tokens=64, prefix_cache_bytes=0)
    sequences = [prompt for seed in range(40, 47) for prompt in prompts(3, seed=seed, query=380, longest=20)]
    np.testing.assert_allclose(values(small, sequences), values(scorer, sequences), rtol=0, atol=BITS)
    assert small.cache_stats.evicted_pages > 0


def test_requests_with_queries_of_their_own_share_calls(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Six requests are one prefill and one call of segments; each is answered as alone, cold and warm."""
    sizes: dict[str, Any] = {"implementation": "native", "max_segment_tokens": 64, "call_tokens": 512}
    scorer = loading.load(folder, chunks=(64, 1024), **sizes)
    lengths = (130, 200, 150, 140, 256, 130)
    requests = [prompts(4, seed=90 + number, query=query, longest=20) for number, query in enumerate(lengths)]
    alone = [values(loading.load(folder, **sizes), request) for request in requests]
    programs, launched = scorer._programs, [0, 0]  # pyright: ignore[reportPrivateUsage]

    def counted(number: int, run: Callable[..., Any]) -> Callable[..., Any]:
        def count(*arguments: Any) -> Any:
            launched[number] += 1
            return run(*arguments)

        return count

    monkeypatch.setattr(programs.layers, "prefill", counted(0, programs.layers.prefill))
    monkeypatch.setattr(programs.layers, "segments", counted(1, programs.layers.segments))
    together = [prompt for request in requests for prompt in request]
    cold = values(scorer, together)
    assert launched == [1, 1]
    np.testing.assert_allclose(cold, np.concatenate(alone), rtol=0, atol=BITS)
    np.testing.assert_array_equal(values(scorer, together), cold)
    assert launched == [1, 2]


def test_a_call_that_failed_fails_no_later_batch(folder: Path) -> None:
    """On a CPU each call waits for the one before it."""
    scorer = loading.load(folder, max_segment_tokens=64, call_tokens=64)
    sequences = prompts(3, seed=51)
    wanted = values(scorer, sequences)

    class Failed:
        def block_until_ready(self) -> None:
            raise RuntimeError("the device is gone")

    scorer._launched = Failed()  # pyright: ignore[reportPrivateUsage]
    with pytest.raises(RuntimeError, match="gone"):
        values(scorer, sequences)
    np.testing.assert_array_equal(values(scorer, sequences), wanted)


def test_pages_that_could_not_be_written_are_not_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = loading.load(folder, max_segment_tokens=64, call_tokens=64)
    sequences = prompts(3, seed=50, query=300)

    def failing(*_: object) -> None:
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(scorer._programs, "write", failing)  # pyright: ignore[reportPrivateUsage]
    with pytest.raises(RuntimeError, match="gone"):
        values(scorer, sequences)
    assert scorer.cache_stats.pages_used == 0
    monkeypatch.undo()
    alone = np.concatenate([values(scorer, [sequence]) for sequence in sequences])
    np.testing.assert_allclose(values(scorer, sequences), alone, rtol=0, atol=BITS)


def test_the_old_pool_is_gone_before_a_new_one_is_made(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes its share of the device's memory: there may be no room for two. What failed may still refer to it."""
    scorer = loading.load(folder, max_segment_tokens=64, call_tokens=64)
    sequences, programs = prompts(3, seed=52, query=300), scorer._programs  # pyright: ignore[reportPrivateUsage]
    wanted, held = values(scorer, sequences), list[jax.Array]()
    empty_pool = programs.empty_pool

    def failing(pool: jax.Array, *_: object) -> None:
        held.append(pool)
        raise RuntimeError("the device is gone")

    def after_the_old() -> jax.Array:
        assert [pool.is_deleted() for pool in held] == [True]
        return empty_pool()

    monkeypatch.setattr(programs, "write", failing)
    monkeypatch.setattr(programs, "empty_pool", after_the_old)
    with pytest.raises(RuntimeError, match="gone"):
        values(scorer, prompts(3, seed=53, query=300))
    monkeypatch.undo()
    np.testing.assert_array_equal(values(scorer, sequences), wanted)


@pytest.mark.parametrize("query", [PAGE_TOKENS - 1, PAGE_TOKENS, PAGE_TOKENS + 1, 2 * PAGE_TOKENS])
def test_prefixes_around_a_page_agree_with_no_sharing(scorer: Engine, query: int) -> None:
    sequences = prompts(4, seed=query, query=query, longest=20)
    alone = np.concatenate([values(scorer, [sequence]) for sequence in sequences])
    np.testing.assert_allclose(values(scorer, sequences), alone, rtol=0, atol=BITS)


def test_computed_tokens_count_each_token_of_the_tree_once(folder: Path) -> None:
    scorer = loading.load(folder, max_segment_tokens=64, call_tokens=128)
    sequences = prompts(10, seed=8, query=300)
    batch = label_batch(sequences, [LABELS] * 10)
    unique = 300 + sum(len(sequence) - 300 for sequence in sequences)
    assert scorer.score(batch).computed_tokens.sum() == unique
    assert scorer.score(batch).computed_tokens.sum() == unique - 300


def test_pad_and_eos_ids_are_tokens_like_any_other(scorer: Engine) -> None:
    """The engine pads with token 0; a prompt made of token 0 still counts with its own length."""
    sequences = [[7, *([0] * n)] for n in range(1, 40)]
    together = values(scorer, sequences)
    assert len(np.unique(together[:, 0].round(4))) > 30
    np.testing.assert_allclose(
        together[::7], np.concatenate([values(scorer, [s]) for s in sequences[::7]]), rtol=0, atol=BITS
    )


def test_label_counts_may_differ(scorer: Engine) -> None:
    sequences = prompts(9, seed=9)
    labels = [tuple(range(1 + i)) for i in range(9)]
    mixed = scorer.score(label_batch(sequences, labels)).values
    alone = [scorer.score(label_batch([s], [own])).values for s, own in zip(sequences, labels, strict=True)]
    np.testing.assert_allclose(mixed, np.concatenate(alone), rtol=0, atol=BITS)


def test_logits_without_the_vocabulary_give_the_same_label_softmax(scorer: Engine) -> None:
    sequences = prompts(7, seed=10)
    logprobs = values(scorer, sequences)
    logits = scorer.score(label_batch(sequences, [LABELS] * 7, vocab_logprobs=False)).values.reshape(7, -1)

    def relative(x: np.ndarray) -> np.ndarray:
        return x - x[:, :1]

    assert np.abs(logits - logprobs).max() > 1e-3
    np.testing.assert_allclose(relative(logits), relative(logprobs), rtol=0, atol=TOLERANCE)


def test_a_read_anywhere_equals_the_read_at_the_end_of_the_cut_prompt(scorer: Engine) -> None:
    sequence = prompts(1, seed=11, query=200, longest=150)[0]
    positions = [0, 1, 77, 127, 128, 199, 200, len(sequence) - 1]
    together = scorer.score(reads_batch([sequence], [[(p, LABELS) for p in positions]])).values
    cut = values(scorer, [sequence[: p + 1] for p in positions])
    np.testing.assert_allclose(together.reshape(cut.shape), cut, rtol=0, atol=BITS)


def test_all_labels_of_the_vocabulary_sum_to_one(scorer: Engine) -> None:
    result = scorer.score(label_batch(prompts(2, seed=12), [tuple(range(VOCAB))] * 2))
    np.testing.assert_allclose(np.exp(result.values.reshape(2, -1)).sum(axis=1), 1, atol=1e-5)


def test_a_prompt_with_broken_arithmetic_harms_only_itself(tmp_path: Path) -> None:
    """Token 5's embedding is NaN: every prompt with it is NaN, its neighbours in the same bins are finite."""
    whole = make_llama(tmp_path)
    clean = loading.load(whole, max_segment_tokens=64, call_tokens=64)
    sequences = [[token for token in sequence if token != 5] + [1] for sequence in prompts(12, seed=13, longest=20)]
    wanted = values(clean, sequences)
    tensors = load_file(whole / "model.safetensors")
    tensors["model.embed_tokens.weight"][5] = np.nan
    save_file(tensors, whole / "model.safetensors")
    broken = loading.load(whole, max_segment_tokens=64, call_tokens=64)
    poisoned = [list(sequence) for sequence in sequences]
    for index in (0, 4, 5):
        poisoned[index].insert(len(poisoned[index]) // 2, 5)
    got = values(broken, poisoned)
    bad = [0, 4, 5]
    assert np.isnan(got[bad]).all()
    good = [i for i in range(12) if i not in bad]
    np.testing.assert_allclose(got[good], wanted[good], rtol=0, atol=BITS)


def test_a_page_with_a_broken_tail_serves_the_prefix_before_it(tmp_path: Path) -> None:
    """A long prompt's NaN is in the page with the end of the query that thirty others share."""
    whole = make_llama(tmp_path, context=1024)
    rng = np.random.default_rng(60)
    query = [t if t != 5 else 6 for t in rng.integers(0, VOCAB, 200).tolist()]
    items = [[i + 6, *([7 + i] * 8)] for i in range(30)]
    long = [*query, 9, 5, 5, *([11] * 700)]
    tensors = load_file(whole / "model.safetensors")
    tensors["model.embed_tokens.weight"][5] = np.nan
    save_file(tensors, whole / "model.safetensors")
    broken = loading.load(whole, max_segment_tokens=64, call_tokens=64)
    got = values(broken, [*(query + item for item in items), long])
    assert np.isnan(got[-1]).all()
    alone = loading.load(whole, max_segment_tokens=64, call_tokens=64)
    wanted = values(alone, [query + item for item in items])
    np.testing.assert_allclose(got[:-1], wanted, rtol=0, atol=BITS)


def test_without_a_compiler_layers_are_xlas_or_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = values(loading.load(folder, max_segment_tokens=64, call_tokens=64), prompts(5))
    monkeypatch.setattr(loading.cpu_build, "load", lambda _: None)
    scorer = loading.load(folder, max_segment_tokens=64, call_tokens=64)
    assert "2x32" in scorer.info.buckets  # only XLA's layers have bins
    np.testing.assert_allclose(values(scorer, prompts(5)), wanted, rtol=0, atol=TOLERANCE)
    with pytest.raises(RuntimeError, match="'native' cannot be built here"):
        loading.load(folder, implementation="native")


def test_reads_out_of_order_are_refused(scorer: Engine) -> None:
    with pytest.raises(ValueError, match="not at ascending positions"):
        scorer.score(reads_batch([[1] * 20], [[(9, LABELS), (3, LABELS)]]))
    with pytest.raises(ValueError, match="not at ascending positions"):
        scorer.score(reads_batch([[1] * 20], [[(9, LABELS), (9, LABELS)]]))


def test_a_shorter_longest_prompt_needs_fewer_pages(folder: Path) -> None:
    small = loading.load(folder, prefix_cache_bytes=0, max_prompt_tokens=200)
    full = loading.load(folder, prefix_cache_bytes=0)
    assert small.cache_stats.pages < full.cache_stats.pages
    assert small.info.max_prompt_tokens == 200
    with pytest.raises(ValueError, match="201 tokens; this model reads 1 to 200"):
        values(small, [[1] * 201])


@pytest.mark.parametrize("implementation", ["native", pytest.param("paged", marks=pytest.mark.slow)])
def test_nothing_compiles_after_warmup(implementation: str, folder: Path) -> None:
    scorer = loading.load(folder, implementation=implementation, max_segment_tokens=32, call_tokens=64)
    told: list[tuple[int, int, str]] = []
    scorer.warmup(lambda *progress: told.append(progress))
    assert told[-1][0] == told[-1][1] == len(told) == scorer.compilations
    with jax.log_compiles(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax.stages.Lowered, "compile", _refuse)
        for seed in range(20, 26):
            sequences = prompts(1 + 17 * (seed % 3), seed=seed, query=97 * (seed % 4), longest=90)
            values(scorer, sequences)
            scorer.score(label_batch(sequences, [range(1 + i % 40) for i in range(len(sequences))]))
    assert scorer.compilations == told[-1][1]


def _refuse(*_: object, **__: object) -> None:
    raise AssertionError("a program was compiled in a request")


def test_lengths_out_of_range_are_refused(scorer: Engine) -> None:
    with pytest.raises(ValueError, match="sequence 0 has 1025 tokens; this model reads 1 to 1024"):
        values(scorer, [[1] * 1025])
    with pytest.raises(ValueError, match="sequence 1 has 0 tokens"):
        scorer.score(reads_batch([[1], []], [[(0, LABELS)], [(0, LABELS)]]))


def test_the_whole_context_fits(scorer: Engine) -> None:
    full = prompts(1, seed=30, query=1023, longest=1)
    assert len(full[0]) == 1024
    assert np.isfinite(values(scorer, full)).all()


def test_no_decode_exists() -> None:
    """The source has no step that feeds a token back; ``/v1/completions`` only answers the top-1 token.

    The check of a device tries attention on random numbers.
    """
    files = Path(loading.__file__).parent.rglob("*.py")
    sources = "".join(path.read_text() for path in files if path.name != "device_check.py")
    for word in ("generate(", "random", "multinomial", "categorical"):
        assert word not in sources


def test_a_prompt_prefilled_in_pieces_scores_as_at_once(folder: Path) -> None:
    """Pieces are kept in whole pages, and no prefix is computed again; the longest segment has 512 tokens."""
    scorer, other = loading.load(folder), loading.load(folder)
    [whole] = np.random.default_rng(3).integers(0, VOCAB, (1, 900)).tolist()
    computed: list[int] = []
    for length in (256, 300, 512):
        ahead = replace(reads_batch([whole[:length]], [[]]), keep=True)
        result = scorer.score(ahead)
        assert len(result.values) == 0
        computed += result.computed_tokens.tolist()
    assert computed == [256, 0, 256]
    batch = label_batch([whole], [LABELS])
    pieces = scorer.score(batch)
    assert pieces.computed_tokens.tolist() == [512]
    at_once = other.score(batch)
    assert at_once.computed_tokens.tolist() == [900]
    np.testing.assert_allclose(pieces.values, at_once.values, rtol=0, atol=BITS)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("step", [AHEAD_TOKENS, 2 * AHEAD_TOKENS])
def test_pieces_that_end_where_a_cpu_cuts_a_prompt_do_not_change_its_bits(
    dtype: Any, step: int, tmp_path: Path
) -> None:
    """With the sizes that are served: the longest segment divides the queue's pieces."""
    scorer = loading.load(make_llama(tmp_path, context=4096), dtype=dtype, implementation="native")
    [whole] = np.random.default_rng(3).integers(0, VOCAB, (1, 3000)).tolist()
    for upto in range(step, 2500, step):
        scorer.score(replace(reads_batch([whole[:upto]], [[]]), keep=True))
    in_pieces = scorer.score(label_batch([whole], [LABELS]))
    assert in_pieces.computed_tokens.tolist() == [3000 - 2048]
    at_once = loading.load(tmp_path, dtype=dtype, implementation="native").score(label_batch([whole], [LABELS]))
    assert at_once.computed_tokens.tolist() == [3000]
    np.testing.assert_array_equal(in_pieces.values, at_once.values)


def test_sequences_without_reads_cost_nothing_unless_they_are_to_be_kept(scorer: Engine) -> None:
    before = scorer.stats.computed_tokens
    assert scorer.score(reads_batch([[1] * 300], [[]])).computed_tokens.tolist() == [0]
    assert scorer.stats.computed_tokens == before
