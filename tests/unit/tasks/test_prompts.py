"""Joining, tokenising, and the rules that need the model or the limits."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, normalizers

from serve_app.contract import TokenBatch
from serve_app.errors import InvalidRequestError, TooLargeError
from serve_app.schemas import ScoreRequest
from serve_app.scorer.fake_engine import FakeEngine
from serve_app.settings import Limits
from serve_app.tasks import labels
from serve_app.tasks import tokenizer as tokenizer_module
from serve_app.tasks.model_facts import ModelFacts
from serve_app.tasks.prompts import PreparedItems, PromptBuilder
from serve_app.tasks.steps import finish
from serve_app.tasks.tokenizer import TextTokenizer
from tests.local import CONTEXT, VOCAB_SIZE

INFO = FakeEngine(VOCAB_SIZE, CONTEXT).info
BOS = 0


def prepared(tokenizer: TextTokenizer, limits: Limits | None = None, **fields: Any) -> PreparedItems:
    labels = {} if "labels" in fields else {"label_token_ids": [1, 2]}
    return finish(
        PromptBuilder(ScoreRequest(**labels | fields), ModelFacts("m", tokenizer, INFO, limits or Limits())).rest()
    )


def prepare(tokenizer: TextTokenizer, limits: Limits | None = None, **fields: Any) -> TokenBatch:
    return prepared(tokenizer, limits, **fields).batch


def sequences(batch: TokenBatch) -> list[list[int]]:
    bounds = batch.offsets.tolist()
    return [batch.tokens[a:b].tolist() for a, b in pairwise(bounds)]


def test_labels_after_long_prompts_have_a_bound(tokenizer: TextTokenizer, monkeypatch: pytest.MonkeyPatch):
    """Some tokenizers need the whole prompt to find the tokens of each label."""
    backend = Tokenizer.from_str(tokenizer.backend.to_str())
    backend.normalizer = normalizers.NFKC()
    whole = TextTokenizer(backend, None)
    monkeypatch.setattr("serve_app.tasks.prompts.LABEL_CHARACTERS", 5_000)
    fields: dict[str, Any] = {"query": "the quick brown fox " * 20, "labels": [" yes", " no"]}
    assert len(prepared(whole, items=["a"] * 4, **fields).prompts) == 4
    for on_error in ("fail", "item"):
        with pytest.raises(TooLargeError, match="labels: more than 5,000 characters") as refused:
            prepared(whole, items=["a"] * 9, on_error=on_error, **fields)
        assert refused.value.param == "labels"
    assert len(prepared(tokenizer, items=["a"] * 20, **fields).prompts) == 20


class TestBatch:
    def test_is_packed_as_the_contract_says(self, tokenizer: TextTokenizer):
        batch = prepare(tokenizer, query=[4, 5], items=[[6], [7, 8]], label_token_ids=[9, 10, 11])
        assert sequences(batch) == [[4, 5, 6], [4, 5, 7, 8]]
        assert batch.read_sequences.tolist() == [0, 1]
        assert batch.read_positions.tolist() == [2, 3]
        assert batch.targets.tolist() == [9, 10, 11, 9, 10, 11]
        assert batch.target_offsets.tolist() == [0, 3, 6]
        for name, dtype in {
            "tokens": np.int32,
            "offsets": np.int64,
            "read_sequences": np.int32,
            "read_positions": np.int32,
            "targets": np.int32,
            "target_offsets": np.int64,
        }.items():
            assert getattr(batch, name).dtype == dtype, name

    def test_labels_per_item(self, tokenizer: TextTokenizer):
        batch = prepare(tokenizer, query=[4], items=[[6], [7]], label_token_ids=[[1], [2, 3]])
        assert batch.targets.tolist() == [1, 2, 3]
        assert batch.target_offsets.tolist() == [0, 1, 3]
        assert (batch.targets.dtype, batch.target_offsets.dtype) == (np.int32, np.int64)

    def test_empty(self, tokenizer: TextTokenizer):
        batch = prepare(tokenizer, query="q", items=[])
        assert (batch.num_sequences, len(batch.tokens), len(batch.targets)) == (0, 0, 0)
        assert batch.offsets.tolist() == batch.target_offsets.tolist() == [0]

    @pytest.mark.parametrize(
        ("fields", "vocab"),
        [
            ({}, True),
            ({"apply_softmax": True}, False),
            ({"apply_softmax": True, "return_token_logprobs": True}, True),
        ],
    )
    def test_the_vocabulary_is_asked_for_only_where_needed(
        self, tokenizer: TextTokenizer, fields: dict[str, Any], vocab: bool
    ):
        assert prepare(tokenizer, items=["a"], **fields).vocab_logprobs is vocab


class TestText:
    @settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(query=st.text(max_size=20), items=st.lists(st.text(min_size=1, max_size=20), min_size=1, max_size=5))
    @pytest.mark.parametrize("item_first", [False, True])
    def test_is_joined_then_tokenised(self, tokenizer: TextTokenizer, query: str, items: list[str], item_first: bool):
        batch = prepare(tokenizer, query=query, items=items, item_first=item_first)
        joined = [item + query if item_first else query + item for item in items]
        assert sequences(batch) == tokenizer.encode(joined)
        assert [tokenizer.decode(ids) for ids in sequences(batch)] == joined

    def test_chunks_change_nothing(self, tokenizer: TextTokenizer, monkeypatch: pytest.MonkeyPatch):
        items = [f"item number {i}" for i in range(20)]
        whole = prepare(tokenizer, query="the quick ", items=items)
        for characters in (1, 50, 22 * 20):
            monkeypatch.setattr(tokenizer_module, "_CHUNK_CHARACTERS", characters)
            assert sequences(prepare(tokenizer, query="the quick ", items=items)) == sequences(whole)

    def test_a_prompt_that_is_too_long_ends_the_tokenising(
        self, tokenizer: TextTokenizer, monkeypatch: pytest.MonkeyPatch
    ):
        calls: list[int] = []
        encode = tokenizer.encode
        monkeypatch.setattr(
            tokenizer, "encode", lambda texts, **options: calls.append(len(texts)) or encode(texts, **options)
        )
        with pytest.raises(InvalidRequestError, match=r"items\[0\]: the prompt has"):
            prepare(tokenizer, query="x " * 2**17, items=["a"] * 1000)
        assert len(calls) == 1
        assert calls[0] <= 2

    @pytest.mark.parametrize("item_first", [False, True])
    def test_bos_once_at_the_front(self, bos_tokenizer: TextTokenizer, item_first: bool):
        for query, item in (("the ", "fox"), ("<s>the ", "fox"), ("the", "<s>fox"), ("<s><s>", "<s>")):
            [ids] = sequences(prepare(bos_tokenizer, query=query, items=[item], item_first=item_first))
            assert ids[0] == BOS
            assert ids[1:2] != [BOS]
        [ids] = sequences(prepare(bos_tokenizer, query="", items=[""]))
        assert ids == [BOS]

    def test_no_bos_before_ids(self, bos_tokenizer: TextTokenizer):
        assert sequences(prepare(bos_tokenizer, query=[5], items=[[6]])) == [[5, 6]]

    def test_a_tokenizer_that_adds_no_bos_leaves_the_text_alone(self, tokenizer: TextTokenizer):
        assert tokenizer.encode(["<s><s>a"])[0][:2] == [BOS, BOS]

    def test_without_special_tokens(self, bos_tokenizer: TextTokenizer):
        assert bos_tokenizer.encode(["<s><s>a"], add_special_tokens=False)[0][:2] == [BOS, BOS]
        assert bos_tokenizer.encode([""], add_special_tokens=False) == [[]]

    def test_no_token_at_all(self, tokenizer: TextTokenizer):
        with pytest.raises(InvalidRequestError, match=r"items\[1\] and the query are both empty") as caught:
            prepare(tokenizer, query="", items=["a", ""])
        assert (caught.value.param, caught.value.index) == ("items", 1)


def counted(tokenizer: TextTokenizer, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Collect every text that is tokenised after this call."""
    seen: list[str] = []
    backend = tokenizer.backend

    class Counting:
        def __getattr__(self, name: str) -> Any:
            return getattr(backend, name)

        def encode(self, text: str, **options: Any) -> Any:
            seen.append(text)
            return backend.encode(text, **options)

        def encode_batch_fast(self, texts: list[str], **options: Any) -> Any:
            seen.extend(texts)
            return backend.encode_batch_fast(texts, **options)

    monkeypatch.setattr(tokenizer, "backend", Counting())
    return seen


class TestWork:
    """Texts are bounded before they are tokenised, and no more text is tokenised than necessary."""

    def model(self, tokenizer: TextTokenizer, context: int = 64 * CONTEXT, **limits: int) -> ModelFacts:
        return ModelFacts("m", tokenizer, FakeEngine(VOCAB_SIZE, context).info, Limits(**limits))

    @pytest.mark.parametrize("item_first", [False, True])
    def test_with_labels_only_the_end_of_a_prompt_is_tokenised_again(
        self, tokenizer: TextTokenizer, monkeypatch: pytest.MonkeyPatch, item_first: bool
    ):
        words = [f" {number}" for number in range(300)]
        item = "the quick brown fox jumps over the lazy dog. " * 100
        seen = counted(tokenizer, monkeypatch)
        request = ScoreRequest(query="\nAnswer:", items=[item] * 3, labels=words, item_first=item_first)
        finish(PromptBuilder(request, self.model(tokenizer)).rest())
        assert sum(map(len, seen)) < 3 * (4 * len(item) + 200 * len(words))

    @pytest.mark.parametrize("on_error", ["fail", "item"])
    def test_a_prompt_that_is_too_long_is_tokenised_once_whatever_its_labels(
        self, bos_tokenizer: TextTokenizer, monkeypatch: pytest.MonkeyPatch, on_error: str
    ):
        words = [f" {number}" for number in range(300)]
        item = "the quick brown fox jumps over the lazy dog. " * 1000
        seen = counted(bos_tokenizer, monkeypatch)
        request = ScoreRequest(items=[item], labels=words, on_error=on_error)  # type: ignore[arg-type]
        model = self.model(bos_tokenizer, CONTEXT)
        if on_error == "fail":
            with pytest.raises(InvalidRequestError, match=r"items\[0\]: the prompt has"):
                finish(PromptBuilder(request, model).rest())
        else:
            assert len(finish(PromptBuilder(request, model).rest()).errors) == 1
        assert sum(map(len, seen)) == len(item)

    def test_a_label_that_is_too_long_is_refused_before_it_is_laid_out(
        self, tokenizer: TextTokenizer, monkeypatch: pytest.MonkeyPatch
    ):
        monkeypatch.setattr(labels, "of_words", None)
        request = ScoreRequest(items=["a"], labels=[" x" * 9_000, " no"])
        with pytest.raises(
            InvalidRequestError, match=r"a label adds \d+ before its last; this model reads at most 256"
        ):
            finish(PromptBuilder(request, self.model(tokenizer, CONTEXT)).rest())

    @pytest.mark.parametrize(
        "fields",
        [
            {"items": ["a", "x" * 2**19 + "y"]},
            {"items": ["a", "x" * 2**18], "query": "y" * 2**18},
            {"items": ["a", "a"], "labels": [["b"], ["x" * 2**19 + "y"]]},
        ],
    )
    def test_a_text_beyond_all_bounds_is_refused_untokenised(
        self, tokenizer: TextTokenizer, monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any]
    ):
        seen = counted(tokenizer, monkeypatch)
        request = ScoreRequest(**{"labels": [" yes"]} | fields)
        model = self.model(tokenizer, CONTEXT)
        with pytest.raises(InvalidRequestError, match="characters; this service tokenises at most 524,288") as caught:
            finish(PromptBuilder(request, model).rest())
        assert (caught.value.param, caught.value.index) == ("items", 1)
        assert not seen
        prepared = finish(PromptBuilder(request.model_copy(update={"on_error": "item", "query": ""}), model).rest())
        assert [error.index for error in prepared.errors] == [1]
        assert [prompt.index for prompt in prepared.prompts] == [0]

    def test_all_texts_together_are_bounded_too(self, tokenizer: TextTokenizer, monkeypatch: pytest.MonkeyPatch):
        seen = counted(tokenizer, monkeypatch)
        model = self.model(tokenizer, max_request_tokens=1000)
        for fields in ({"query": "x" * 6_400, "items": ["a"] * 10}, {"items": ["a"] * 1000, "labels": ["b" * 64]}):
            with pytest.raises(TooLargeError, match="would have to be tokenised"):
                finish(PromptBuilder(ScoreRequest(**{"labels": [" yes"]} | fields), model).rest())
        assert not seen

    def test_long_items_are_tokenised_in_steps(self, tokenizer: TextTokenizer):
        items = ["the quick brown fox. " * 20] * 500
        builder = PromptBuilder(ScoreRequest(items=items, labels=[" yes", " no"]), self.model(tokenizer))
        steps = builder.rest()
        count = sum(1 for _ in steps)
        assert count >= 500

    @pytest.mark.parametrize("item", ["a", [1]])
    def test_many_short_items_are_several_steps(self, tokenizer: TextTokenizer, item: Any):
        request = ScoreRequest(items=[item] * 5000, label_token_ids=[1])
        steps = PromptBuilder(request, self.model(tokenizer)).rest()
        assert 4 <= sum(1 for _ in steps) < 50


class TestQueryTokens:
    """The query's tokens that another request may share."""

    @pytest.mark.parametrize(
        ("fields", "tokens"),
        [
            ({"query": [1, 2, 3], "items": [[4]]}, 3),
            ({"query": [1, 2, 3], "items": [[4, 5], [4, 6]]}, 3),  # as many as in a request with other items
            ({"query": [1, 2, 3], "items": [[4]], "item_first": True}, 0),
            ({"items": [[1, 2, 3], [1, 2, 4, 5]]}, 0),
            ({"items": []}, 0),
            ({"items": ["a", "b"]}, 0),
            ({"query": "the ", "items": []}, 0),
            ({"query": "the", "items": [" fox"], "item_first": True}, 0),
        ],
    )
    def test_ids_are_shared_whole(self, tokenizer: TextTokenizer, fields: dict[str, Any], tokens: int):
        assert prepared(tokenizer, **fields).query_tokens == tokens

    @pytest.mark.parametrize("query", ["the quick brown f", "the quick brown fox jumps over a dog " * 10 + " brown f"])
    @pytest.mark.parametrize("items", [["jumps"], [" yes", " no"], ["ox"], ["ox", " yes", ""]])
    def test_tokens_of_text_end_where_the_join_begins(self, bos_tokenizer: TextTokenizer, query: str, items: list[str]):
        made = prepared(bos_tokenizer, query=query, items=items)
        [whole] = bos_tokenizer.encode([query])
        common = 0
        while whole[: common + 1] == sequences(made.batch)[0][: common + 1] and common < len(whole):
            common += 1
        assert made.query_tokens == common
        assert (common < len(whole)) is items[0].startswith("ox")

    def test_no_query_is_tokenised_more_than_once(self, tokenizer: TextTokenizer, monkeypatch: pytest.MonkeyPatch):
        seen = counted(tokenizer, monkeypatch)
        query = "the quick brown fox jumps over the lazy dog. " * 50
        model = ModelFacts("m", tokenizer, FakeEngine(VOCAB_SIZE, 10 * CONTEXT).info, Limits())
        for items in (["a"], ["a", "b", "c"]):
            seen.clear()
            finish(PromptBuilder(ScoreRequest(query=query, items=items, label_token_ids=[1]), model).rest())
            assert len(query) <= sum(map(len, seen)) < 1.5 * len(query)


class TestRefused:
    @pytest.mark.parametrize(
        ("fields", "place", "index"),
        [
            ({"items": [[1], [2, VOCAB_SIZE]]}, "items[1][1]", 1),
            ({"items": [*[[1]] * 417, [1, 2, -1], *[[1]] * 82]}, "items[417][2]", 417),
            ({"query": [-1], "items": [[1]]}, "query[0]", None),
            ({"items": [[1]], "label_token_ids": [1, 10**30]}, "label_token_ids[1]", None),
            ({"items": [[1], [2]], "label_token_ids": [[3], [-(10**12)]]}, "label_token_ids[1][0]", 1),
        ],
    )
    def test_ids_out_of_the_vocabulary(
        self, tokenizer: TextTokenizer, fields: dict[str, Any], place: str, index: int | None
    ):
        with pytest.raises(InvalidRequestError, match=rf"is out of vocabulary \(vocab size: {VOCAB_SIZE}\)$") as caught:
            prepare(tokenizer, **fields)
        assert caught.value.message.startswith(f"{place}: Token ID ")
        assert (caught.value.param, caught.value.index) == (place.partition("[")[0], index)

    def test_an_id_of_a_thousand_digits_is_shortened(self, tokenizer: TextTokenizer):
        with pytest.raises(InvalidRequestError, match=r"Token ID 1{20}\.\.\. \(1000 digits\)"):
            prepare(tokenizer, items=[[int("1" * 1000)]])

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"label_token_ids": []}, "label_token_ids is empty"),
            ({"label_token_ids": [[1], []]}, r"label_token_ids\[1\] is empty"),
            ({"label_token_ids": [4, 7, 4]}, "label_token_ids names 4 more than once"),
            ({"label_token_ids": [[1], [7, 7]]}, r"label_token_ids\[1\] names 7 more than once"),
            ({"label_token_ids": [[1]]}, "1 lists for 2 items"),
            ({"temperature": 2.0}, "temperature is 2.0, which needs apply_softmax"),
            ({"query": [1]}, "Invalid combination of query/items types for score_request."),
        ],
    )
    def test_fields(self, tokenizer: TextTokenizer, fields: dict[str, Any], message: str):
        with pytest.raises(InvalidRequestError, match=message):
            prepare(tokenizer, **{"items": ["a", "b"]} | fields)

    def test_limits(self, tokenizer: TextTokenizer):
        limits = Limits(max_items=2, max_labels=2, max_prompt_tokens=3, max_request_tokens=5)
        prepare(tokenizer, limits, query=[1], items=[[2], [3, 4]])
        for fields, kind, message in (
            ({"items": [[1]] * 3}, TooLargeError, "items has 3 entries; this service takes at most 2"),
            ({"label_token_ids": [1, 2, 3]}, InvalidRequestError, "has 3 labels; this service takes at most 2"),
            ({"items": [[1, 2, 3]]}, InvalidRequestError, "has 4 tokens; this model reads at most 3"),
            ({"items": [[1, 2], [3, 4]]}, TooLargeError, "6 tokens; a request may have at most 5"),
        ):
            with pytest.raises(kind, match=message):
                prepare(tokenizer, limits, **{"query": [1], "items": [[2]]} | fields)

    def test_the_models_own_limit_holds_whatever_the_setting(self, tokenizer: TextTokenizer):
        assert ModelFacts("m", tokenizer, INFO, Limits()).max_prompt_tokens == CONTEXT
        assert ModelFacts("m", tokenizer, INFO, Limits(max_prompt_tokens=10 * CONTEXT)).max_prompt_tokens == CONTEXT


class TestLoading:
    def test_truncation_and_padding_are_off(self, tokenizer: TextTokenizer):
        lengths = [len(ids) for ids in tokenizer.encode(["a", "the fox " * 5000])]
        assert lengths[0] == 1
        assert lengths[1] > 5000

    def test_added_tokens_are_one_token(self, tokenizer: TextTokenizer):
        [[special]] = tokenizer.encode(["<|im_end|>"])
        assert tokenizer.pieces([special]) == ["<|im_end|>"]
        assert tokenizer.decode([special]) == "<|im_end|>"

    def test_an_id_without_a_token_is_no_text(self, tokenizer: TextTokenizer):
        assert tokenizer.pieces([VOCAB_SIZE - 1]) == [""]
        assert tokenizer.decode([VOCAB_SIZE - 1]) == ""

    def test_a_folder_without_a_tokenizer(self, tmp_path: Path):
        with pytest.raises(ValueError, match=f"no tokenizer can be loaded from {tmp_path}"):
            TextTokenizer.load(tmp_path)
