"""The shared part of a query is tokenised once, with the same tokens as in each joined string."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from serve_app import model_source
from serve_app.tasks import shared_query
from serve_app.tasks.tokenizer import TextTokenizer
from tests.local import save_tokenizer

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QUERIES = (
    "Does the document answer the query? Answer Yes or No. Query: how do I renew a passport abroad?\nDocument: ",
    "Ist das relevant? Bitte antworte nur mit Ja oder Nein. Straße, Größe, Übermut, naïve Äußerung: ",
    "这段文字是否回答了问题?请用是或否回答。问题:法国的首都是哪里?文档:",
    "이 문서가 질문에 답합니까? 예 또는 아니오로 대답하세요. 질문: 한국의 수도는 어디입니까? ",
    "क्या यह दस्तावेज़ प्रश्न का उत्तर देता है? हाँ या नहीं में उत्तर दें। ",
    "هل يجيب المستند عن السؤال؟ أجب بنعم أو لا. ",
    "👩‍👩‍👧‍👦🇫🇷 emoji 😡🔥 and ZWJ ‍ sequences é é ",
    "def f(x):\n\treturn x  +   1\n\n\n    # comment 12345 67 8\r\n",
    "we're they'll I'd don't it's 's 't ",
    "<|im_start|>system\nYou judge.<|im_end|>\n<|im_start|>user\n",
    "     \n\n   \t  \u00a0\u3000 ",
    "a" * 80 + "1" * 80 + " " * 80,
)
ENDS = (
    "",
    " ",
    "  ",
    "\n",
    "'",
    "'l",
    "don",
    " 12",
    "<|im_",
    "<|im_start|>",
    "e",
    "\u0301",
    "\u200d",
    "👩",
    "्",
    "…",
    "a" * 90,
)
STARTS = (*ENDS, "s", "ll", "'s the", "34", "start|>", "|>", "\u0301x", "\u200d👧", " next word", "\n\nnew", "ु", "어")


def texts(shortest: int, longest: int) -> st.SearchStrategy[str]:
    return st.text(st.characters(exclude_categories=["Cs"]), min_size=shortest, max_size=longest)


@pytest.fixture(scope="module")
def llama3() -> TextTokenizer:
    """The demo's vocabulary with Llama 3's word pattern."""
    backend = Tokenizer.from_file(str(model_source.resolve("demo") / "tokenizer.json"))
    split = pre_tokenizers.Split(pattern=_regex(LLAMA3), behavior="isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    return TextTokenizer(backend, None)


def _regex(pattern: str) -> object:
    from tokenizers import Regex

    return Regex(pattern)


@pytest.fixture(scope="module")
def demo() -> TextTokenizer:
    return TextTokenizer.load(model_source.resolve("demo"))


@pytest.mark.demo
@pytest.mark.parametrize("kind", ["demo", "llama3", "qwen"])
@pytest.mark.parametrize("query", QUERIES)
def test_nasty_joins_equal_the_joined_strings(request: pytest.FixtureRequest, kind: str, query: str) -> None:
    tokenizer: TextTokenizer = request.getfixturevalue(kind)
    assert shared_query.is_local(tokenizer.backend)
    for end in ENDS:
        long = (query * (600 // len(query) + 1)) + end
        items = list(STARTS)
        assert (
            shared_query.safe_cut(tokenizer.backend, long, shared_query.ids(tokenizer.backend, long)) > 0
            or query.isspace()
        )
        assert tokenizer.encode_joined(long, items) == tokenizer.encode([long + item for item in items])


@pytest.mark.demo
@settings(max_examples=120)
@given(query=texts(200, 700), items=st.lists(texts(0, 40), min_size=2, max_size=4))
def test_any_text_equals_the_joined_strings(demo: TextTokenizer, query: str, items: list[str]) -> None:
    assert demo.encode_joined(query, items) == demo.encode([query + item for item in items])


@pytest.mark.demo
def test_a_long_query_is_cut_near_its_end(demo: TextTokenizer) -> None:
    query = "The quick brown fox jumps over the lazy dog. " * 200
    assert (
        len(query) - shared_query.safe_cut(demo.backend, query, shared_query.ids(demo.backend, query))
        < 2 * shared_query.MARGIN
    )


@pytest.fixture(scope="module")
def qwen() -> TextTokenizer:
    """The demo's vocabulary with Qwen's normaliser and word pattern."""
    backend = Tokenizer.from_file(str(model_source.resolve("demo") / "tokenizer.json"))
    backend.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(pattern=_regex(LLAMA3.replace("{1,3}", "")), behavior="isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    return TextTokenizer(backend, None)


@pytest.mark.demo
@pytest.mark.parametrize("kind", ["demo", "llama3", "qwen"])
@pytest.mark.parametrize("query", QUERIES)
def test_words_after_a_long_text_are_tokenised_by_its_end(
    request: pytest.FixtureRequest, kind: str, query: str
) -> None:
    tokenizer: TextTokenizer = request.getfixturevalue(kind)
    used = 0
    for end in ENDS:
        text = (query * (1_500 // len(query) + 1)) + end
        (ids,) = tokenizer.encode([text])
        ending = tokenizer.ending(text, ids, add_special_tokens=True)
        if ending is not None:
            used += 1
            assert len(ending.text) < len(text) // 2
            assert list(ending.followed_by(STARTS)) == tokenizer.encode([text + word for word in STARTS])
    assert used or query.isspace()


@pytest.mark.demo
@settings(max_examples=100)
@given(text=texts(300, 700), words=st.lists(texts(0, 40), min_size=2, max_size=4))
def test_words_after_any_text(qwen: TextTokenizer, demo: TextTokenizer, text: str, words: list[str]) -> None:
    for tokenizer in (qwen, demo):
        (ids,) = tokenizer.encode([text])
        if ending := tokenizer.ending(text, ids, add_special_tokens=True):
            assert list(ending.followed_by(words)) == tokenizer.encode([text + word for word in words])
        assert tokenizer.encode_joined(text, words) == tokenizer.encode([text + word for word in words])


def test_bos_stays_once_at_the_front(tmp_path: Path) -> None:
    tokenizer = TextTokenizer.load(save_tokenizer(tmp_path, adds_bos=True))
    query = "a long query of plain words " * 20
    assert tokenizer.encode_joined(query, ["x", "y"]) == tokenizer.encode([query + "x", query + "y"])
    for front in ("<s>", "<s><s>", "<s><s><s>"):
        joined = [front + query + item for item in "xy"]
        assert tokenizer.encode_joined(front + query, ["x", "y"]) == tokenizer.encode(joined)


def _bpe() -> Tokenizer:
    return Tokenizer(models.BPE(vocab={"a": 0}, merges=[]))


@pytest.mark.parametrize(
    "change",
    [
        lambda t: setattr(t, "normalizer", normalizers.NFKC()),
        lambda t: setattr(t, "pre_tokenizer", pre_tokenizers.Metaspace()),
        lambda t: setattr(t, "pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=True)),
        lambda t: setattr(t, "pre_tokenizer", pre_tokenizers.Split(_regex(r"(?<=a)b"), "isolated")),
        lambda t: setattr(t, "pre_tokenizer", pre_tokenizers.Split(_regex("a"), "merged_with_previous")),
        lambda t: setattr(t, "model", models.WordLevel({"a": 0}, "a")),
    ],
)
def test_tokenizers_of_other_kinds_are_not_trusted(change: object) -> None:
    backend = _bpe()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert shared_query.is_local(backend)
    change(backend)  # type: ignore[operator]
    assert not shared_query.is_local(backend)
