"""Tokenizers made from older files: the ids are those of the libraries that made the files."""

from __future__ import annotations

import base64
import io
import json
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import sentencepiece
import tiktoken
from sentencepiece import sentencepiece_model_pb2 as messages
from tokenizers import pre_tokenizers

from serve_app.errors import InvalidRequestError
from serve_app.tasks.plain_text import original
from serve_app.tasks.token_texts import BYTES, TokenReader
from serve_app.tasks.tokenizer import TextTokenizer
from serve_app.tasks.tokenizer_conversion import OLD_SPECIAL_TOKENS
from tests.unit.tasks.test_tokenizer_files import (
    CORPUS,
    SHAPES,
    SPECIALS,
    TEXTS,
    byte_level,
    in_file,
    put,
    refusal,
    split,
    write,
)

PARTS = [
    "a", "b", "aa", "ab", "x", "A", " ", "  ", "▁", "the", " the", "\n", "\t", "\r\n", "e\u0301", "\u00e9", "\ufb01",
    "½", "火", "🪐", "\u200b", "\u00a0", "\x00", "\ufdd0", "1", "24", ".", "'s", "//", "AB", "Ab",
    "<", "<0x0A>", "0x", "A>", "<x>", "<b>", "</", "[INST", "<start_of_turn", "<table>",
]  # fmt: skip
"""Parts of awkward texts, without whole control tokens."""


def awkward(count: int) -> list[str]:
    chosen = random.Random(0)
    return ["".join(chosen.choices(PARTS, k=chosen.randint(1, 14))) for _ in range(count)]


SPECIAL = ("<unk>", "<s>", "</s>", "<bos>", "[INST]", "[/INST]")
AWKWARD = [text for text in [*TEXTS, *awkward(1000)] if not any(token in text for token in SPECIAL)]

# SentencePiece

GEMMA = ["<start_of_turn>", "<end_of_turn>", "▁▁", "▁▁▁", "▁▁▁▁", "\n", "\n\n", "\n\n\n", "<b>", "</b>", "<table>"]
KINDS: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Gemma": {
        "add_dummy_prefix": False,
        "user_defined_symbols": GEMMA,
        "pad_id": 0,
        "eos_id": 1,
        "bos_id": 2,
        "unk_id": 3,
        "bos_piece": "<bos>",
    },
    "Mistral v0.3": {"control_symbols": ["[INST]", "[/INST]"]},
    "words of its own": {"user_defined_symbols": ["<x>", "<|im_end|>", "▁▁"]},
    "no bytes": {"byte_fallback": False},
    "NFKC": {"normalization_rule_name": "nfkc"},
    "SentencePiece's defaults": {"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True},
    "unigram": {"model_type": "unigram"},
    "unigram, SentencePiece's defaults": {
        "model_type": "unigram",
        "byte_fallback": False,
        "normalization_rule_name": "nmt_nfkc",
        "remove_extra_whitespaces": True,
    },
}


def trained(kind: str, **more: Any) -> bytes:
    """A file as SentencePiece writes it, with the settings of Llama 2's but for those of the kind."""
    sentences = [
        *(CORPUS * 3),
        *(character for text in TEXTS for character in text if character.strip()),
        *(["aaa aab abab aaaa", "xxyx yxx xyxy", "ein Füchslein, 12345 Ⅷ ½ don't we've"] * 3),
    ]
    settings = {
        "model_type": "bpe",
        "byte_fallback": True,
        "character_coverage": 0.98,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "split_digits": True,
        "allow_whitespace_only_pieces": True,
        "vocab_size": 420,
        "hard_vocab_limit": False,
        "minloglevel": 2,
    }
    made = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text for text in sentences if text.strip()),
        model_writer=made,
        **{**settings, **KINDS.get(kind, {}), **more},
    )
    return made.getvalue()


def in_folder(folder: Path, name: str, content: bytes, config: Mapping[str, Any], model_type: str = "llama") -> Path:
    (folder / name).write_bytes(content)
    put(folder, "tokenizer_config.json", config)
    put(folder, "config.json", {"model_type": model_type})
    return folder


def as_trained(kind: str, folder: Path, **config: Any) -> tuple[TextTokenizer, sentencepiece.SentencePieceProcessor]:
    """The service's tokenizer, and SentencePiece itself."""
    content = trained(kind)
    named = {"tokenizer_class": "GemmaTokenizer" if kind == "Gemma" else "LlamaTokenizer", **config}
    loaded = TextTokenizer.load(in_folder(folder, "tokenizer.model", content, named))
    return loaded, sentencepiece.SentencePieceProcessor(model_proto=content)


def without_prefix() -> sentencepiece.SentencePieceProcessor:
    """SentencePiece with the kind Llama, but that it puts no space in front of a text."""
    proto = messages.ModelProto.FromString(trained("Llama"))
    proto.normalizer_spec.add_dummy_prefix = False
    return sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())


def own_ids(loaded: TextTokenizer, texts: Sequence[str]) -> list[list[int]]:
    return loaded.encode(texts, add_special_tokens=False)


class TestSentencePiece:
    @pytest.mark.parametrize("kind", KINDS)
    def test_ids_are_those_of_sentencepiece(self, kind: str, tmp_path: Path):
        loaded, wanted = as_trained(kind, tmp_path)
        assert own_ids(loaded, AWKWARD) == [wanted.encode(text) for text in AWKWARD]
        assert loaded.encode(AWKWARD) == [[wanted.bos_id(), *wanted.encode(text)] for text in AWKWARD]

    @pytest.mark.parametrize("kind", ["Llama", "Gemma", "Mistral v0.3", "words of its own", "NFKC", "unigram"])
    def test_ids_of_one_text_do_not_depend_on_legacy(self, kind: str, tmp_path: Path):
        loaded, wanted = as_trained(kind, tmp_path, legacy=False)
        assert own_ids(loaded, AWKWARD) == [wanted.encode(text) for text in AWKWARD]

    @pytest.mark.parametrize("legacy", [True, False, None])
    def test_a_space_in_front_of_what_follows_a_special_token(self, legacy: bool | None, tmp_path: Path):
        loaded, wanted = as_trained("Llama", tmp_path, legacy=legacy)
        behind = without_prefix() if legacy is False else wanted
        assert own_ids(loaded, ["the</s>\n yes"]) == [[*wanted.encode("the"), 2, *behind.encode("\n yes")]]
        assert own_ids(loaded, ["</s>the</s></s>"]) == [[2, *behind.encode("the"), 2, 2]]

    def test_add_prefix_space_false(self, tmp_path: Path):
        loaded, _ = as_trained("Llama", tmp_path, add_prefix_space=False)
        wanted = without_prefix()
        assert own_ids(loaded, AWKWARD) == [wanted.encode(text) for text in AWKWARD]

    @pytest.mark.parametrize(
        ("config", "front", "behind"),
        [
            ({}, [1], []),
            ({"add_bos_token": True, "add_eos_token": True}, [1], [2]),
            ({"add_bos_token": False}, [], []),
            ({"add_bos_token": False, "add_eos_token": True}, [], [2]),
            ({"bos_token": "", "eos_token": "", "unk_token": ""}, [1], []),
            ({"bos_token": {"__type": "AddedToken", "content": "</s>"}}, [2], []),
        ],
    )
    def test_what_is_added_around_a_text(
        self, config: dict[str, Any], front: list[int], behind: list[int], tmp_path: Path
    ):
        loaded, wanted = as_trained("Llama", tmp_path, **config)
        assert loaded.encode(["the yes"]) == [[*front, *wanted.encode("the yes"), *behind]]
        if front:
            assert loaded.encode([loaded.decode(front) + "the"]) == loaded.encode(["the"])

    def test_special_tokens_are_named_though_no_other_file_names_them(self, tmp_path: Path):
        (tmp_path / "tokenizer.model").write_bytes(trained("Gemma"))
        loaded = TextTokenizer.load(tmp_path)
        assert (loaded.facts.bos_token, loaded.facts.eos_token, loaded.facts.unk_token) == ("<bos>", "</s>", "<unk>")
        assert loaded.encode(["the"])[0][0] == 2

    @pytest.mark.parametrize("kind", ["Gemma", "Mistral v0.3"])
    def test_control_tokens_are_known(self, kind: str, tmp_path: Path):
        loaded, wanted = as_trained(kind, tmp_path)
        special = ["<start_of_turn>", "<end_of_turn>"] if kind == "Gemma" else ["[INST]", "[/INST]"]
        ids = [wanted.piece_to_id(token) for token in special]
        assert [loaded.plain.control[token] for token in special] == ids
        assert own_ids(loaded, special) == [[id] for id in ids]
        assert "<b>" not in loaded.plain.control

    def test_tokens_that_other_files_add_and_rename(self, tmp_path: Path):
        size = len(messages.ModelProto.FromString(trained("Llama")).pieces)
        decoder = {
            "2": {"content": "<|im_end|>", "special": True, "normalized": False},
            str(size): {"content": "<pad>", "special": True, "normalized": False},
        }
        loaded, _ = as_trained(
            "Llama", tmp_path, added_tokens_decoder=decoder, eos_token="<|im_end|>", pad_token="<pad>"
        )
        assert own_ids(loaded, ["<|im_end|>", "<pad>"]) == [[2], [size]]
        assert loaded.backend.token_to_id("</s>") is None

    @pytest.mark.parametrize("decoder", [True, False])
    def test_a_token_that_takes_the_space_after_it(self, decoder: bool, tmp_path: Path):
        token = {"content": "</s>", "rstrip": True, "normalized": False}
        named = {"added_tokens_decoder": {"2": token}, "eos_token": "</s>"} if decoder else {"eos_token": token}
        loaded, _ = as_trained("Llama", tmp_path, **named)
        assert own_ids(loaded, ["the</s> \n the"]) == own_ids(loaded, ["the</s>the"])

    def test_scores_and_not_ids_rank_what_is_joined(self, tmp_path: Path):
        proto = messages.ModelProto.FromString(trained("Llama"))
        words = [piece for piece in proto.pieces if piece.type == messages.ModelProto.SentencePiece.NORMAL]
        scores = random.Random(0).sample([piece.score for piece in words], len(words))
        for piece, score in zip(words, scores, strict=True):
            piece.score = score
        content = proto.SerializeToString()
        loaded = TextTokenizer.load(in_folder(tmp_path, "tokenizer.model", content, {}))
        wanted = sentencepiece.SentencePieceProcessor(model_proto=content)
        assert own_ids(loaded, AWKWARD) == [wanted.encode(text) for text in AWKWARD]

    @pytest.mark.parametrize(
        ("more", "config", "words"),
        [
            ({}, {"tokenizer_class": "XLNetTokenizer"}, ["XLNetTokenizer", "LlamaTokenizer, CodeLlamaTokenizer"]),
            ({"treat_whitespace_as_suffix": True}, {}, ["treat_whitespace_as_suffix"]),
            ({"model_type": "word"}, {}, ["model_type other than UNIGRAM and BPE"]),
            ({"remove_extra_whitespaces": True}, {"legacy": False}, ["remove_extra_whitespaces with legacy: false"]),
            ({"escape_whitespaces": False}, {}, ["escape_whitespaces: false"]),
            ({"unused": True}, {}, ["pieces of type UNUSED"]),
        ],
    )
    def test_what_is_not_converted_is_named(
        self, more: dict[str, Any], config: dict[str, Any], words: list[str], tmp_path: Path
    ):
        if "escape_whitespaces" in more or "unused" in more:  # no option of the trainer's
            proto = messages.ModelProto.FromString(trained("Llama"))
            proto.normalizer_spec.escape_whitespaces = "unused" in more
            proto.pieces[-1].type = proto.pieces[-1].UNUSED if "unused" in more else proto.pieces[-1].type
            content = proto.SerializeToString()
        else:
            content = trained("", **more, **({"byte_fallback": False} if more.get("model_type") == "word" else {}))
        said = refusal(in_folder(tmp_path, "tokenizer.model", content, config))
        for word in (*words, str(tmp_path / "tokenizer.model"), "Copy tokenizer.json"):
            assert word in said

    @pytest.mark.parametrize(
        ("content", "words"),
        [
            (b"", ["has no tokens", "copy or download it again"]),
            (b"\x0etext", ["is not SentencePiece's", "copy or download it again"]),
            (b"IQ== 0\nIg== 1\n", ["tiktoken's format", "copy tokenizer.json"]),
        ],
    )
    def test_another_file(self, content: bytes, words: list[str], tmp_path: Path):
        said = refusal(in_folder(tmp_path, "tokenizer.model", content, {}))
        assert all(word in said for word in [*words, str(tmp_path / "tokenizer.model")])


# Tekken

TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LISTED = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "<pad>"]
COUNT = 30
"""Ids of special tokens, most of which have no name of their own."""


def tekken(listed: Sequence[str] | None) -> tuple[dict[str, Any], list[bytes]]:
    """A small tekken.json, which has five tokens more than the model; and the model's own."""
    ids = byte_level(split(TEKKEN)).get_vocab()
    learned = [
        bytes(BYTES[own] for own in token) for token in sorted(ids, key=ids.__getitem__) if token not in SPECIALS
    ]
    words = [*(bytes([byte]) for byte in range(256)), *(word for word in learned if len(word) > 1)]
    content = {
        "config": {
            "pattern": TEKKEN,
            "num_vocab_tokens": len(words),
            "default_vocab_size": COUNT + len(words) - 5,
            "default_num_special_tokens": COUNT,
            "version": "v11" if listed else "v3",
        },
        "vocab": [{"rank": rank, "token_bytes": base64.b64encode(word).decode()} for rank, word in enumerate(words)],
    }
    if listed:
        content["special_tokens"] = [{"rank": rank, "token_str": token} for rank, token in enumerate(listed)]
    return content, words[:-5]


def in_tiktoken(words: Sequence[bytes]) -> tiktoken.Encoding:
    ranks = {word: rank for rank, word in enumerate(words)}
    return tiktoken.Encoding("tekken", pat_str=TEKKEN, mergeable_ranks=ranks, special_tokens={})


class TestTekken:
    @pytest.mark.parametrize("listed", [LISTED, None], ids=["Devstral 2507", "Devstral 2505 and Nemo"])
    def test_ids_are_those_of_tiktoken_behind_a_bos(self, listed: list[str] | None, tmp_path: Path):
        content, words = tekken(listed)
        put(tmp_path, "tekken.json", content)
        loaded = TextTokenizer.load(tmp_path)
        wanted = in_tiktoken(words)
        assert loaded.encode(AWKWARD) == [[1, *(COUNT + id for id in wanted.encode(text))] for text in AWKWARD]
        special = [*(listed or OLD_SPECIAL_TOKENS)]
        special += [f"<SPECIAL_{rank}>" for rank in range(len(special), COUNT)]
        assert own_ids(loaded, special) == [[rank] for rank in range(COUNT)]
        assert {*special} == {*loaded.plain.control}
        assert loaded.backend.get_vocab_size() == COUNT + len(words)
        assert (loaded.facts.bos_token, loaded.facts.eos_token, loaded.facts.pad_token) == ("<s>", "</s>", "<pad>")
        assert loaded.encode(["<s>the"]) == loaded.encode(["the"])

    @pytest.mark.parametrize(
        ("change", "word"),
        [
            (lambda content: content.pop("config"), "config"),
            (lambda content: content["vocab"].append(content["vocab"][300]) or content.pop("config"), "config"),
            (lambda content: content["config"].pop("pattern"), "pattern"),
            (lambda content: content["vocab"][1].update(token_bytes="IQ=="), "twice"),
            (lambda content: content["vocab"][1].update(token_bytes="!"), "cannot be read"),
        ],
    )
    def test_a_damaged_file(self, change: Any, word: str, tmp_path: Path):
        content, _ = tekken(LISTED)
        change(content)
        put(tmp_path, "tekken.json", content)
        for each in (word, str(tmp_path / "tekken.json"), "copy or download it again"):
            assert each in refusal(tmp_path)

    def test_a_bos_that_is_no_token(self, tmp_path: Path):
        put(tmp_path, "tekken.json", tekken(["<unk>", "[INST]"])[0])
        for word in ("bos_token", "no such token", '"add_bos_token": false'):
            assert word in refusal(tmp_path)
        put(tmp_path, "tokenizer_config.json", {"add_bos_token": False})
        assert TextTokenizer.load(tmp_path).encode(["the"])[0][0] >= COUNT


# Byte-level


def with_merges(folder: Path, shape: str, *, keep: bool = False) -> Path:
    """The folder of a shape with its vocabulary and merges in place of tokenizer.json."""
    write(folder, SHAPES[shape])
    content = json.loads((folder / "tokenizer.json").read_text())
    added = {token["content"] for token in content["added_tokens"]}
    words = {token: id for token, id in content["model"]["vocab"].items() if keep or token not in added}
    put(folder, "vocab.json", words)
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(map(" ".join, content["model"]["merges"])))
    return folder


class TestByteLevel:
    @pytest.mark.parametrize("named", [True, False])
    def test_qwen(self, named: bool, tmp_path: Path):
        folder = with_merges(tmp_path, "Qwen2.5", keep=True)
        if not named:
            put(folder, "tokenizer_config.json", {"eos_token": "</s>", "additional_special_tokens": list(SPECIALS)})
        else:
            config = json.loads((folder / "tokenizer_config.json").read_text())
            put(folder, "tokenizer_config.json", config | {"additional_special_tokens": list(SPECIALS)})
        wanted = in_file(folder)
        (folder / "tokenizer.json").unlink()
        loaded = TextTokenizer.load(folder)
        assert loaded.encode([*TEXTS, *AWKWARD]) == [wanted.encode(text).ids for text in [*TEXTS, *AWKWARD]]

    @pytest.mark.parametrize("bos", [True, False])
    def test_gpt2(self, bos: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture):
        folder = with_merges(tmp_path, "SmolLM2 from the hub", keep=True)
        config = {"tokenizer_class": "GPT2Tokenizer", "bos_token": "<s>", "add_bos_token": bos}
        put(folder, "tokenizer_config.json", config | {"additional_special_tokens": list(SPECIALS)})
        wanted = in_file(folder)
        wanted.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        (folder / "tokenizer.json").unlink()
        caplog.set_level("WARNING", logger="ray.serve")
        loaded = TextTokenizer.load(folder)
        front = [1] if bos else []
        assert loaded.encode(AWKWARD) == [front + wanted.encode(text).ids for text in AWKWARD]
        (record,) = caplog.records
        assert "text is cut as GPT-2's" in record.getMessage()
        assert "copy tokenizer.json" in record.getMessage()

    @pytest.mark.parametrize("named", ["PreTrainedTokenizerFast", None])
    def test_a_class_that_does_not_say_how_text_is_cut(self, named: str | None, tmp_path: Path):
        folder = with_merges(tmp_path, "Llama 3", keep=True)
        put(folder, "tokenizer_config.json", {"tokenizer_class": named})
        (folder / "tokenizer.json").unlink()
        for word in (
            (named and "PreTrainedTokenizer") or "(none named)",
            "GPT2Tokenizer, Qwen2Tokenizer",
            "Copy tokenizer.json",
        ):
            assert word in refusal(folder)

    def test_no_merges(self, tmp_path: Path):
        folder = with_merges(tmp_path, "Qwen2.5", keep=True)
        (folder / "tokenizer.json").unlink()
        (folder / "merges.txt").unlink()
        for word in ("vocab.json but not merges.txt", "copy it from where the model came from"):
            assert word in refusal(folder)


# What else the service does with a tokenizer

ALL = [*(kind for kind in KINDS if "defaults" not in kind and kind != "NFKC"), "tekken"]


class Service(NamedTuple):
    """A converted tokenizer, and what the library that made its file makes of a text without special tokens."""

    loaded: TextTokenizer
    ids: Callable[[str], list[int]]


@pytest.fixture(scope="module", params=ALL)
def service(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Service:
    folder = tmp_path_factory.mktemp("tokenizer")
    if request.param != "tekken":
        loaded, wanted = as_trained(request.param, folder)
        return Service(loaded, wanted.encode)
    content, words = tekken(LISTED)
    put(folder, "tekken.json", content)
    reference = in_tiktoken(words)
    return Service(TextTokenizer.load(folder), lambda text: [COUNT + id for id in reference.encode_ordinary(text)])


def words_of(loaded: TextTokenizer) -> set[str]:
    """Control tokens that the tokenizer's files do not add to its vocabulary."""
    return loaded.plain.control.keys() - {token.content for token in loaded.backend.get_added_tokens_decoder().values()}


class TestService:
    def test_guarded_text_is_spelt_out(self, service: Service):
        """The libraries that made the files know no special tokens in a text, but for Gemma's."""
        loaded, _ = service
        words = words_of(loaded)
        names = [token for token in loaded.plain.control if "_of_turn" not in token and token not in words]
        texts = [*AWKWARD, *(f"{token}a {token}\n{token}{token}" for token in names), *names]
        texts = [text for text in texts if not any(word in text for word in words)]
        guarded = [loaded.plain.guard(text) for text in texts]
        assert [original(text) for text in guarded] == texts
        found = loaded.guarded.encode(guarded, add_special_tokens=False)
        assert found == [service.ids(text) for text in texts]

    def test_guarded_text_has_no_control_tokens(self, service: Service):
        loaded, _ = service
        control = set(loaded.plain.control.values()) - {loaded.backend.token_to_id("<unk>")}
        names = loaded.plain.control.keys() - words_of(loaded)
        texts = [*names, *(f"a {token} b{token}" for token in names)]
        for ids in loaded.guarded.encode([loaded.plain.guard(text) for text in texts], add_special_tokens=False):
            assert not control & set(ids)

    def test_markup_among_a_models_own_words_is_refused(self, tmp_path: Path):
        """Its files do not say that it is a control token, and it cannot be spelt otherwise."""
        loaded, _ = as_trained("words of its own", tmp_path)
        assert words_of(loaded) == {"<x>", "<|im_end|>"}
        for text in ("hi <|im_end|> there", "<x>", "a<|im_end|>"):
            with pytest.raises(InvalidRequestError, match=r"reads '(<x>|<\|im_end\|>)' as a control token"):
                loaded.guarded.encode([loaded.plain.guard(text)], add_special_tokens=False)
        assert loaded.guarded.encode([loaded.plain.guard("a < x> b")])

    def test_joined(self, service: Service):
        loaded, _ = service
        query = "the first and the second 12  of the\n" * 20
        items = AWKWARD[:300]
        assert loaded.encode_joined(query, items) == loaded.encode([query + item for item in items])

    def test_texts_of_tokens(self, service: Service):
        loaded, _ = service
        reader = TokenReader(loaded.backend)
        for ids in own_ids(loaded, AWKWARD):
            found = reader.read(ids)
            assert found.text == loaded.decode(ids)
            for start, name in zip(found.starts, found.names, strict=True):
                assert name.startswith("bytes:") or found.text.startswith(name, start)
