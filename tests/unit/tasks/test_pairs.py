"""Pairs of texts for encoders: what is cut of them, as the tokenizers library cuts, and which tokenizers have pairs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from serve_app.errors import InvalidRequestError
from serve_app.scorer.fake_engine import FakeEngine
from serve_app.settings import ModelSettings
from serve_app.tasks.model_facts import ModelFacts
from serve_app.tasks.pairs import Pairs, shortened
from serve_app.tasks.rerank import RERANK
from serve_app.tasks.template_choice import ENCODER_TYPES, choose
from serve_app.tasks.tokenizer import TextTokenizer
from tests.tiny import write_json


def tokenizer(pair: str | None = "[C] $A [S] $B:1 [S]:1") -> Tokenizer:
    made = Tokenizer(models.WordLevel({word: id for id, word in enumerate(("a", "b", "[C]", "[S]", "[U]"))}, "[U]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens(["[C]", "[S]"])
    if pair:
        made.post_processor = processors.TemplateProcessing(
            single="[C] $A [S]", pair=pair, special_tokens=[("[C]", 2), ("[S]", 3)]
        )
    return made


@given(st.integers(0, 40), st.integers(0, 40), st.integers(2, 50))
def test_the_longer_text_is_cut_as_by_the_tokenizers_library(first: int, second: int, room: int) -> None:
    reference = tokenizer()
    reference.enable_truncation(room + 3, strategy="longest_first")
    kept = reference.encode("a " * first, "b " * second).ids
    assert shortened(first, second, room) == (kept.count(0), kept.count(1))


@pytest.mark.parametrize(
    ("pair", "last", "expected"),
    [
        ("[C] $A [S] $B:1 [S]:1", False, [2, 0, 0, 3, 6, 8]),
        ("[C] $A [S] $B:1 [S]:1", True, [2, 1, 3, 5, 5, 8]),
        ("$A [S] [S] $B", False, [0, 0, 3, 3, 1]),
        (None, False, [0, 0, 6]),
    ],
)
def test_a_pair_is_put_together_as_the_tokenizer_does(pair: str | None, last: bool, expected: list[int]) -> None:
    """Tokens of the second type are as much higher as the vocabulary is large."""
    info = FakeEngine(5, 64, classes=1, token_types=2).info
    pairs = Pairs(TextTokenizer(tokenizer(pair), None), info, "a a", "query", "items", last=last)
    assert pairs.together(pairs.shared, next(pairs.each(["b"]))).tolist() == expected
    start, stop = pairs.span(len(expected))
    assert [id % 5 for id in expected[start:stop]] == [1]


def test_a_model_without_token_types_has_none() -> None:
    info = FakeEngine(5, 64, classes=1, token_types=1).info
    pairs = Pairs(TextTokenizer(tokenizer(), None), info, "a", "query", "items")
    assert pairs.together([0], [1]).tolist() == [2, 0, 3, 1, 3]


@pytest.mark.parametrize("pair", ["[C] $B [S] $A [S]"])
def test_a_tokenizer_with_texts_in_another_order_has_no_pairs(pair: str) -> None:
    with pytest.raises(InvalidRequestError, match="no template for pairs"):
        _ = TextTokenizer(tokenizer(pair), None).pair


def test_encoders_are_known_by_their_model_type(tmp_path: Path) -> None:
    from model.families.registry import ENCODERS

    assert {family.model_type for family in ENCODERS.values()} == ENCODER_TYPES
    for kind in ENCODER_TYPES:
        write_json(tmp_path / "config.json", {"model_type": kind})
        assert str(choose(ModelSettings(model="m"), tmp_path)) == (
            f"/v1/rerank uses the template pair (config.json says {kind}: it reads two texts as a pair)"
        )


def test_an_encoder_takes_no_rerank_template() -> None:
    settings: Any = ModelSettings(model="m", rerank_template="plain-v2")
    facts = ModelFacts.of(settings, TextTokenizer(tokenizer(), None), FakeEngine(5, 64, classes=1, token_types=1).info)
    with pytest.raises(ValueError, match="rerank_template: the model is an encoder"):
        RERANK.builder(facts)
