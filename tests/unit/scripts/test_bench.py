"""The benchmark's own arithmetic, on which its results depend."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from scripts.benchmarks.decisions import probabilities
from scripts.benchmarks.report import Measured, References, show
from scripts.benchmarks.work import Request, Sizes, Variant, floor_flops, load, tokenizer


def request(query: int, *items: int) -> Request:
    return Request([1] * query, [[2] * item for item in items], "", [], [7, 8])


def test_floor_counts_each_token_once_and_the_last_layer_and_head_only_where_read() -> None:
    # One head of width 1, one feature, two layers: a multiply-add is two operations, so a token's key and value take
    # 4, its query, output and three MLP projections 2 * (2 + 3 * 3) = 22, an attended key 4, a vocabulary row 2.
    sizes = Sizes(width=1, layers=2, heads=1, kv_heads=1, head_width=1, ff_width=3, vocab=10)
    # A query of 2 and items of 1 and 3: six tokens, two of them read. The query's tokens see 1 + 2 keys, the first
    # item's 3, the second's 3 + 4 + 5; the reads see 3 and 5.
    first_layer = 6 * (4 + 22) + 4 * (1 + 2 + 3 + 3 + 4 + 5)
    last_layer = 6 * 4 + 2 * 22 + 4 * (3 + 5)
    assert floor_flops(Variant([request(2, 1, 3)], None), sizes) == first_layer + last_layer + 2 * 10 * 2
    two = Variant([request(2, 1, 3), request(2, 1, 3)], None)
    assert floor_flops(two, sizes) == 2 * (first_layer + last_layer + 2 * 10 * 2)
    # In the first layer tokens see two keys, except the query's first; in the last layer the reads see three.
    windowed = replace(sizes, windows=(2, 3))
    fewer = 4 * (1 + 2 + 2 + 2 + 2 + 2 + 3 + 3) - 4 * (1 + 2 + 3 + 3 + 4 + 5 + 3 + 5)
    assert floor_flops(two, windowed) - floor_flops(two, sizes) == 2 * fewer


@pytest.mark.demo
@pytest.mark.parametrize(
    ("workload", "query", "items", "shortest", "longest"), [("W6", 128, 200, 4, 300), ("W7", 2000, 500, 20, 20)]
)
def test_cut_workloads_have_their_lengths_and_their_texts_are_their_ids(
    workload: str, query: int, items: int, shortest: int, longest: int
) -> None:
    first, second = load(workload, most=2)
    (one,) = first.requests
    lengths = [len(item) for item in one.items_ids]
    assert (len(one.query_ids), len(lengths)) == (query, items)
    assert shortest <= min(lengths) <= max(lengths) <= longest
    assert len(set(map(tuple, one.items_ids))) > 0.9 * items
    assert one.query_ids != second.requests[0].query_ids
    for prompt, text in list(zip(one.prompts, one.items_text, strict=True))[:200]:
        assert tokenizer().encode(one.query_text + text, add_special_tokens=False).ids == prompt


@pytest.mark.demo
@pytest.mark.parametrize(("workload", "clients", "state", "questions"), [("D1", 1, 300, 5), ("D2", 1, 2_000, 50)])
def test_decisions_have_their_lengths(workload: str, clients: int, state: int, questions: int) -> None:
    first, second = load(workload, most=2)
    assert len(first.requests) == clients
    (one,) = first.requests
    assert one.decision
    assert len(one.decision["questions"]) == len(one.items_ids) == questions
    assert len(one.query_ids) == pytest.approx(state, abs=3)
    assert [len(item) for item in one.items_ids] == pytest.approx([60] * questions, abs=3)
    assert one.query_ids != second.requests[0].query_ids


def test_the_options_of_a_question_are_compared_by_their_normalised_sums() -> None:
    labels = [0.1, 0.2, 0.05, 0.05, 0.1, 0.0, 0.0, 0.0]
    (options,) = probabilities([[math.log(label) if label else -math.inf for label in labels]])
    assert [math.exp(option) for option in options] == pytest.approx([0.6, 0.2, 0.2, 0])


def test_the_table_is_whole_on_any_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    measured = Measured("W1", "hf-naive", "float32", 100, 6e11, [5.0, 4.0, 8.0], [0.25, 0.75], 1234)
    result = measured.result(gflops=150.0) | {"dtype": "bfloat16", "peak_mib": 12345, "items_per_s": 1234.5}
    show({"machine": "CPU, no bfloat16 instructions", "gemm_gflops": {"bfloat16": 99.6}, "results": [result]})
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 100
    assert "…" not in printed
    assert "bfloat16 100" in printed
    assert "emulated" in printed


def test_differences_cover_what_a_system_answered() -> None:
    known = Variant([request(2, 1, 1)], [[[-1.0, -2.0], [-3.0, -4.0]]])
    unknown = Variant(known.requests, None)
    references = References()
    assert references.differences("W1", 1, known, [[[-1.5, -2.0]]]) == [0.5, 0.0]
    assert references.differences("W1", 1, known, [[[-1.0], [-3.25]]]) == [0.0, 0.25]
    assert references.differences("W7", 1, unknown, [[[-1.0]]]) == []
    references.add("W7", 1, [[[-1.0, -2.0], [-3.0, -4.0]]])
    assert references.differences("W7", 1, unknown, [[[-1.0, -4.0]]]) == [0.0, 2.0]
    assert references.differences("W7", 2, unknown, [[[-1.0]]]) == []
