"""Layouts of labels, compared with asking for every token by itself; and truncation."""

from __future__ import annotations

import math
import tracemalloc
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.contract import BatchResult
from serve_app.errors import InvalidRequestError
from serve_app.schemas import ScoreRequest
from serve_app.scorer.fake_engine import FakeEngine
from serve_app.settings import Limits
from serve_app.tasks import labels, scores
from serve_app.tasks.labels import Words
from serve_app.tasks.model_facts import ModelFacts
from serve_app.tasks.prompts import PreparedItems, PromptBuilder
from serve_app.tasks.steps import finish
from serve_app.tasks.tokenizer import TextTokenizer
from serve_app.tasks.truncation import item_span, shortened
from tests.batches import label_batch
from tests.local import CONTEXT, VOCAB_SIZE

ENGINE = FakeEngine(VOCAB_SIZE, CONTEXT)
BOS = 0

token_lists = st.lists(
    st.lists(st.integers(0, 3), min_size=1, max_size=5).map(tuple), min_size=1, max_size=8, unique=True
)


@given(words=token_lists)
def test_every_token_of_every_label_is_read_once_in_its_context(words: list[tuple[int, ...]]):
    layout = labels.of_words(words)
    bounds = np.cumsum([0, *layout.target_counts]).tolist()
    read: dict[tuple[int, ...], list[int]] = {}
    for number, depth, (start, stop) in zip(layout.read_sequences, layout.read_depths, pairwise(bounds), strict=True):
        context = layout.continuations[number][:depth]
        assert context not in read
        read[context] = layout.targets[start:stop].tolist()
        assert len(set(read[context])) == stop - start
    # Reads are ordered by sequence, then by position; no sequence is a prefix of another.
    order = list(zip(layout.read_sequences, layout.read_depths, strict=True))
    assert order == sorted(order)
    assert {number for number, _ in order} == set(range(len(layout.continuations)))
    assert layout.depth == max(map(len, words)) - 1
    # The parts lead each label back to its tokens, in their contexts.
    flat = [(context, token) for context, tokens in read.items() for token in tokens]
    wanted = [(word[:at], word[at]) for word in words for at in range(len(word))]
    assert [flat[part] for part in layout.parts] == wanted
    assert layout.lengths.tolist() == [len(word) for word in words]
    assert set(flat) == set(wanted)
    fronts = [number for number, word in enumerate(words) if not any(word[:at] in words for at in range(1, len(word)))]
    assert list(layout.disjoint) == fronts


def test_labels_of_one_token_need_one_sequence():
    for layout in (labels.of_words([(5,), (7,)]), labels.of_tokens([5, 7])):
        assert layout.continuations == ((),)
        assert (layout.targets.tolist(), layout.target_counts.tolist()) == ([5, 7], [2])
        assert (layout.parts.tolist(), layout.lengths.tolist(), layout.depth) == ([0, 1], [1, 1], 0)


def test_a_long_label_takes_memory_in_proportion_to_its_tokens():
    """All its prefixes together would take 3.2 GB at 40,000 tokens."""
    peaks: list[int] = []
    for length in (2_000, 40_000):
        tracemalloc.start()
        layout = labels.of_words([tuple(range(length)), (1, 2)])
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert layout.depth == length - 1
        assert layout.lengths.tolist() == [length, 2]
    assert peaks[1] < 30 * peaks[0]


def prepare(tokenizer: TextTokenizer, **fields: Any) -> PreparedItems:
    return finish(PromptBuilder(ScoreRequest(**fields), ModelFacts("m", tokenizer, ENGINE.info, Limits())).rest())


def sequences(prepared: PreparedItems) -> list[list[int]]:
    batch = prepared.batch
    return [batch.tokens[a:b].tolist() for a, b in pairwise(batch.offsets.tolist())]


@given(data=st.data())
def test_label_logprobs_are_sums_over_tokens_asked_for_alone(tokenizer: TextTokenizer, data: st.DataObject):
    words = st.lists(
        st.sampled_from([" yes", " no", " zz", " zzq", " zzqx", " zzqy", " yes no", " the fox", "\n", "!"]),
        min_size=1,
        max_size=5,
        unique=True,
    )
    items = data.draw(st.lists(st.sampled_from([" a", " the fox", " is lazy"]), min_size=1, max_size=4))
    own = [data.draw(words) for _ in items]
    normal = data.draw(st.booleans())
    request = ScoreRequest(
        query="the quick", items=items, labels=own, length_normalize=normal, return_token_logprobs=True
    )
    prepared = finish(PromptBuilder(request, ModelFacts("m", tokenizer, ENGINE.info, Limits())).rest())
    answered = scores.rows(request, prepared, ENGINE.score(prepared.batch))
    for item, chosen, row in zip(items, own, answered, strict=True):
        [prompt, *whole] = tokenizer.encode(["the quick" + item, *("the quick" + item + word for word in chosen)])
        assert row.token_logprobs is not None
        for ids, value in zip(whole, row.token_logprobs, strict=True):
            contexts = [ids[:at] for at in range(len(prompt), len(ids))]
            alone = ENGINE.score(label_batch(contexts, [[ids[len(context)]] for context in contexts])).values
            total = math.fsum(alone.tolist()) / (len(alone) if normal else 1)
            assert value == pytest.approx(total, abs=1e-5)


def test_vocabulary_logprobs_are_needed_for_sums_and_for_the_mass(tokenizer: TextTokenizer):
    ask: dict[str, Any] = {"query": "the", "items": [" fox"], "apply_softmax": True}
    assert not prepare(tokenizer, **ask, labels=[" yes", " no"]).batch.vocab_logprobs
    assert prepare(tokenizer, **ask, labels=[" yes", " zz"]).batch.vocab_logprobs
    assert prepare(tokenizer, **ask, labels=[" yes"], return_label_mass=True).batch.vocab_logprobs


def test_a_label_that_begins_with_another_is_part_of_its_mass(tokenizer: TextTokenizer):
    request = ScoreRequest(
        query="the",
        items=[" fox"],
        labels=[" yes", " yes no", " no"],
        length_normalize=True,
        apply_softmax=True,
        return_label_mass=True,
    )
    prepared = finish(PromptBuilder(request, ModelFacts("m", tokenizer, ENGINE.info, Limits())).rest())
    values = np.full(len(prepared.batch.targets), math.log(0.4), np.float32)
    [row] = scores.rows(request, prepared, BatchResult(values, np.ones(1, np.int32)))
    assert row.label_mass == pytest.approx(0.8, rel=1e-6)  # " yes" and " no"; " yes no" has 0.16 of the former
    assert row.scores == pytest.approx([1 / 3] * 3, rel=1e-6)


def test_sequences_are_prompts_and_their_continuations(tokenizer: TextTokenizer):
    one = prepare(tokenizer, query="the", items=[" fox", " dog"], labels=[" yes", " no"])
    assert sequences(one) == tokenizer.encode(["the fox", "the dog"])
    several = prepare(tokenizer, query="the", items=[" fox"], labels=[" yes", " zzqx", " zzqy", " zz"])
    assert sequences(several) == tokenizer.encode(["the fox zzq"])


def test_special_tokens(bos_tokenizer: TextTokenizer):
    ask: dict[str, Any] = {"query": "the", "items": [" fox"], "labels": [" yes", " zz"]}
    [bare] = bos_tokenizer.encode(["the fox"], add_special_tokens=False)
    for item_first in (False, True):
        fields = ask | ({"query": " fox", "items": ["the"], "item_first": True} if item_first else {})
        assert sequences(prepare(bos_tokenizer, **fields))[0][: len(bare) + 1] == [BOS, *bare]
        without = prepare(bos_tokenizer, **fields, add_special_tokens=False)
        assert sequences(without)[0][: len(bare)] == bare
    long = "the quick brown fox jumps over the lazy dog " * 8
    for special in (False, True):
        made = prepare(bos_tokenizer, query=long, items=["a", " b"], label_token_ids=[1], add_special_tokens=special)
        assert sequences(made) == bos_tokenizer.encode([long + "a", long + " b"], add_special_tokens=special)


def spelled(ids: Any) -> list[str]:
    return [f"<{i}>" for i in ids]


@pytest.mark.parametrize(
    ("labelled", "said"),
    [
        (
            [[1, 2, 3, 9], [1, 5, 6]],
            '"b" changes the last tokens of the prompt of items[3]: alone it ends in "<2> <3>", ',
        ),
        ([[1, 2, 3, 9], [1, 5, 6, 7]], 'with the label in "<5> <6> <7>"'),
        ([[1, 2, 3, 4], [1, 2, 3]], '"b" changes the last tokens'),  # it adds nothing
        ([[1, 2, 3, 4], [1, 2]], '"b" changes the last tokens'),
        ([[1, 2, 3, 4, 5], [1, 2, 3, 4, 5]], '"a" and "b" add the same tokens after items[3]'),
        ([[1, 2, 3, 4], [1, 2, 3, 100]], "Token ID 100 is out of vocabulary"),
    ],
)
def test_words_that_cannot_be_labels(labelled: list[list[int]], said: str):
    words = Words(spelled, vocab_size=100)
    added = (words.added(3, [1, 2, 3], *each) for each in zip("ab", labelled, strict=True))
    with pytest.raises(InvalidRequestError) as caught:
        words.layout(3, ["a", "b"], tuple(added))
    assert said in caught.value.message
    assert (caught.value.param, caught.value.index) == ("labels", 3)
    if "alone" in said:
        assert 'with the label in "<5> <6>"' in caught.value.message


class TestTruncation:
    @pytest.mark.parametrize("fixture", ["tokenizer", "bos_tokenizer"])
    @pytest.mark.parametrize(
        ("query", "item"),
        [
            ("the ", "fox jumps"),
            ("the", " fox"),
            ("the qui", "ck brown"),
            ("", "the fox"),
            ("the ", ""),
            ("é", "🦊é🦊"),
        ],
    )
    @pytest.mark.parametrize("item_first", [False, True])
    def test_the_items_tokens_are_those_without_a_character_of_the_query(
        self, request: pytest.FixtureRequest, fixture: str, query: str, item: str, item_first: bool
    ):
        tokenizer: TextTokenizer = request.getfixturevalue(fixture)
        text = item + query if item_first else query + item
        ids, ends = tokenizer.encode_with_ends(text)
        assert ids == tokenizer.encode([text])[0]
        assert ends == sorted(ends)
        start, stop = item_span(ends, query, item, item_first=item_first)
        own = tokenizer.decode(ids[start:stop])
        assert own in item
        rest = tokenizer.decode(ids[:start] + ids[stop:]).removeprefix("<s>")
        assert query in rest
        assert len(rest) + len(own) == len(text)
        # Besides the query, only the token at the join may be left.
        assert len(tokenizer.encode([rest], add_special_tokens=False)[0]) <= len(tokenizer.encode([query])[0]) + 1

    def test_shortened(self):
        assert shortened([0, 1, 2, 3, 4, 5], 1, 4, room=5, index=0) == [0, 1, 2, 4, 5]
        assert shortened([0, 1, 2, 3, 4, 5], 1, 4, room=4, index=0) == [0, 1, 4, 5]
        with pytest.raises(
            InvalidRequestError, match=r"items\[7\]: the prompt has 6 tokens, 3 of them outside the item"
        ):
            shortened([0, 1, 2, 3, 4, 5], 1, 4, room=3, index=7)
