"""The tokenizer that runs is the one in ``tokenizer.json``, and what is not usable is refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

from serve_app import model_source
from serve_app.model_source import ModelSourceError
from serve_app.tasks.tokenizer import TextTokenizer

TEXTS = [
    "the yes no",
    " the",
    "  two  spaces ",
    "a  2024",
    "\n\n1. first\n\n2. second",
    "123 4567 1,000.50 ½ Ⅷ",
    "the</s>\n yes",
    "<|im_start|>user\nhi<|im_end|>\n",
    "e\N{COMBINING ACUTE ACCENT} \N{LATIN SMALL LETTER E WITH ACUTE} \N{LATIN SMALL LIGATURE FI}",
    "I'LL don't we'Ve",
    "\tx = 1\r\n\r\n    return  x;",
    "火星 🪐 👩‍🚀",
    "\N{ZERO WIDTH SPACE}\N{NO-BREAK SPACE}|--|--|",
    "▁the ▁",
    "",
]
CORPUS = [*TEXTS, "the first and the second of the two, yes or no", "  return x\n", "2024 2025 100 200"] * 3

QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CL100K = QWEN.replace(r"\p{N}|", r"\p{N}{1,3}|")
SPECIALS = ("<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>")


def split(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def digits() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )


def byte_level(
    steps: pre_tokenizers.PreTokenizer, normalizer: normalizers.Normalizer | None = None, *, bos: bool = False
) -> Tokenizer:
    """A byte-level BPE, as models derived from GPT-2 have it."""
    made = Tokenizer(models.BPE())
    made.normalizer = normalizer  # pyright: ignore[reportAttributeAccessIssue]
    made.pre_tokenizer = steps
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=list(SPECIALS), initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(CORPUS, trainer)
    return with_bos(made) if bos else made


def spaced(
    normalizer: normalizers.Normalizer | None,
    steps: pre_tokenizers.PreTokenizer | None = None,
    *,
    bos: bool = True,
    rstrip: bool = False,
) -> Tokenizer:
    """A BPE with byte fallback and a symbol for the space, as SentencePiece makes them."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=300, show_progress=False))
    model = json.loads(trained.to_str())["model"]
    tokens = [*SPECIALS, *(f"<0x{byte:02X}>" for byte in range(256)), *model["vocab"]]
    made = Tokenizer(
        models.BPE(
            vocab={token: id for id, token in enumerate(tokens)},
            merges=[tuple(pair) for pair in model["merges"]],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    made.normalizer = normalizer  # pyright: ignore[reportAttributeAccessIssue]
    made.pre_tokenizer = steps  # pyright: ignore[reportAttributeAccessIssue]
    made.add_special_tokens([AddedToken(token, normalized=False, rstrip=rstrip) for token in SPECIALS])
    return with_bos(made) if bos else made


def with_bos(made: Tokenizer) -> Tokenizer:
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return made


def prefixed() -> normalizers.Normalizer:
    return normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])


def replaced() -> normalizers.Normalizer:
    return normalizers.Replace(" ", "▁")


class Shape(NamedTuple):
    """A kind of published checkpoint: what is in its tokenizer.json, and which class its other files name."""

    make: Callable[[], Tokenizer]
    tokenizer_class: str | None
    model_type: str
    more: Mapping[str, Any] = MappingProxyType({})


SHAPES = {
    "SmolLM2 from the hub": Shape(lambda: byte_level(digits()), "GPT2Tokenizer", "llama", {"add_prefix_space": False}),
    "SmolLM2 of a GGUF": Shape(lambda: byte_level(digits()), "PreTrainedTokenizerFast", "llama"),
    "granite-code": Shape(lambda: byte_level(split(CL100K)), "GPT2Tokenizer", "llama"),
    "OLMo 2": Shape(lambda: byte_level(split(CL100K)), "GPT2Tokenizer", "olmo2"),
    "Llama 3": Shape(lambda: byte_level(split(CL100K), bos=True), "PreTrainedTokenizerFast", "llama"),
    "R1-Distill-Llama": Shape(
        lambda: byte_level(split(CL100K), bos=True), "LlamaTokenizerFast", "llama", {"add_bos_token": True}
    ),
    "R1-Distill-Qwen": Shape(
        lambda: byte_level(split(QWEN), bos=True), "LlamaTokenizerFast", "qwen2", {"add_bos_token": True}
    ),
    "Qwen2.5": Shape(
        lambda: byte_level(split(QWEN), normalizers.NFC()), "Qwen2Tokenizer", "qwen2", {"add_bos_token": False}
    ),
    "qwen2 with another split": Shape(lambda: byte_level(digits()), "PreTrainedTokenizerFast", "qwen2"),
    "qwen3 with another split": Shape(lambda: byte_level(split(CL100K)), "Qwen2TokenizerFast", "qwen3"),
    "deepseek-llm": Shape(lambda: byte_level(digits(), bos=True), "LlamaTokenizerFast", "llama"),
    "Yi-1.5": Shape(lambda: spaced(replaced(), bos=False), "LlamaTokenizer", "llama", {"legacy": True}),
    "Llama 2": Shape(lambda: spaced(prefixed()), "LlamaTokenizer", "llama", {"legacy": False}),
    "TinyLlama": Shape(lambda: spaced(prefixed()), "LlamaTokenizerFast", "llama"),
    "Vicuna": Shape(lambda: spaced(prefixed()), "LlamaTokenizer", "llama", {"legacy": True, "add_bos_token": True}),
    "CodeLlama": Shape(lambda: spaced(prefixed()), "CodeLlamaTokenizer", "llama"),
    "Phi-3": Shape(lambda: spaced(prefixed(), rstrip=True), "LlamaTokenizer", "phi3", {"legacy": False}),
    "Mistral v0.3": Shape(
        lambda: spaced(None, pre_tokenizers.Metaspace(prepend_scheme="first", split=False)), "LlamaTokenizer", "mistral"
    ),
    "Gemma 2": Shape(
        lambda: spaced(replaced(), pre_tokenizers.Split(" ", "merged_with_previous")), "GemmaTokenizer", "gemma2"
    ),
    "no class named": Shape(lambda: byte_level(digits()), None, "llama"),
}


def write(folder: Path, shape: Shape, backend: Tokenizer | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    backend = backend or shape.make()
    backend.save(str(folder / "tokenizer.json"))
    config: dict[str, Any] = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", **shape.more}
    if shape.tokenizer_class:
        config["tokenizer_class"] = shape.tokenizer_class
    put(folder, "tokenizer_config.json", config)
    put(folder, "config.json", {"model_type": shape.model_type, "vocab_size": backend.get_vocab_size()})
    return folder


def put(folder: Path, name: str, content: object) -> None:
    (folder / name).write_text(json.dumps(content), encoding="utf-8")


def refusal(folder: Path) -> str:
    with pytest.raises(ModelSourceError) as caught:
        TextTokenizer.load(folder)
    return str(caught.value)


def in_file(folder: Path) -> Tokenizer:
    """The reference: ``tokenizers`` itself, which reads this file and no other."""
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


class TestShapes:
    @pytest.mark.parametrize("name", SHAPES)
    def test_ids_are_those_of_the_file(self, name: str, tmp_path: Path):
        folder = write(tmp_path, SHAPES[name])
        loaded, wanted = TextTokenizer.load(folder), in_file(folder)
        for special in (True, False):
            made = loaded.encode(TEXTS, add_special_tokens=special)
            assert made == [wanted.encode(text, add_special_tokens=special).ids for text in TEXTS]

    def test_the_demo_and_the_same_model_from_the_hub(self, tmp_path: Path):
        demo = model_source.resolve("demo")
        for name in ("tokenizer.json", "config.json"):
            shutil.copy(demo / name, tmp_path)
        named = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "unk_token": "<|endoftext|>"}
        put(tmp_path, "tokenizer_config.json", {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": False, **named})
        assert TextTokenizer.load(tmp_path).encode(TEXTS) == TextTokenizer.load(demo).encode(TEXTS)


class TestOtherFiles:
    """Settings that tokenizer.json lacks and tokenizer_config.json has."""

    @pytest.mark.parametrize(
        "token", ["<s>", {"__type": "AddedToken", "content": "<s>", "normalized": False}], ids=["text", "object"]
    )
    def test_bos_stands_once(self, token: object, tmp_path: Path):
        shape = SHAPES["TinyLlama"]
        folder = write(tmp_path, shape._replace(more={"bos_token": token}))
        loaded = TextTokenizer.load(folder)
        assert loaded.encode(["<s>the"]) == loaded.encode(["the"])

    def test_bos_of_a_folder_without_tokenizer_config(self, tmp_path: Path):
        folder = write(tmp_path, SHAPES["Llama 3"])
        (folder / "tokenizer_config.json").unlink()
        put(folder, "config.json", {"bos_token_id": 1})
        loaded = TextTokenizer.load(folder)
        assert loaded.encode(["<s>the"]) == loaded.encode(["the"])

    @pytest.mark.parametrize("legacy", [False, True])
    def test_tokens_that_another_file_adds(self, legacy: bool, tmp_path: Path):
        folder = write(tmp_path, SHAPES["SmolLM2 from the hub"])
        size = in_file(folder).get_vocab_size()
        if legacy:
            put(folder, "added_tokens.json", {"<pad>": size, "<tool>": size + 1})
            put(folder, "special_tokens_map.json", {"pad_token": "<pad>"})
        else:
            decoder = {str(size + 1): {"content": "<tool>", "special": False}, str(size): {"content": "<pad>"}}
            shape = SHAPES["SmolLM2 from the hub"]
            write(folder, shape._replace(more={"added_tokens_decoder": decoder, "pad_token": "<pad>"}))
        loaded = TextTokenizer.load(folder)
        assert loaded.encode(["<pad>", "<tool>"]) == [[size], [size + 1]]
        assert loaded.backend.get_added_tokens_decoder()[size].special
        assert not loaded.backend.get_added_tokens_decoder()[size + 1].special
        assert loaded.encode(TEXTS) == [in_file(folder).encode(text).ids for text in TEXTS]

    def test_a_special_token_of_the_vocabulary_that_only_tokenizer_config_names(self, tmp_path: Path):
        folder = write(tmp_path, SHAPES["Llama 2"])
        content = json.loads((folder / "tokenizer.json").read_text())
        content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] != "</s>"]
        put(folder, "tokenizer.json", content)
        assert in_file(folder).encode("the</s>", add_special_tokens=False).ids[-1] != 2
        assert TextTokenizer.load(folder).encode(["the</s>"])[0][-1] == 2

    def test_ids_that_contradict_it(self, tmp_path: Path):
        folder = write(
            tmp_path, SHAPES["Llama 2"]._replace(more={"added_tokens_decoder": {"9000": {"content": "<x>"}}})
        )
        for word in ("'<x>'", "9000", str(in_file(folder).get_vocab_size()), "save the tokenizer again"):
            assert word in refusal(folder)

    @pytest.mark.parametrize(
        ("flags", "said"),
        [
            ({"add_bos_token": False}, "add_bos_token: false, but tokenizer.json adds one"),
            ({"add_eos_token": True}, "add_eos_token: true, but tokenizer.json adds none"),
            ({"add_bos_token": True, "add_eos_token": False}, None),
        ],
    )
    def test_flags_that_contradict_it_are_logged(
        self, flags: dict[str, bool], said: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ):
        folder = write(tmp_path, SHAPES["Llama 3"]._replace(more=flags))
        caplog.set_level("WARNING", logger="ray.serve")
        assert TextTokenizer.load(folder).encode(TEXTS) == [in_file(folder).encode(text).ids for text in TEXTS]
        assert [said in record.getMessage() for record in caplog.records if said] == [True] * bool(said)
        assert bool(caplog.records) == bool(said)


class TestRefusals:
    @pytest.mark.parametrize("named", ["LlamaTokenizer", "GPT2Tokenizer", "Qwen2Tokenizer", "GemmaTokenizer"])
    def test_no_vocabulary(self, named: str, tmp_path: Path):
        folder = write(tmp_path, SHAPES["Llama 2"]._replace(tokenizer_class=named))
        (folder / "tokenizer.json").unlink()
        for word in (str(folder), "no tokenizer.json", "copy tokenizer.json from where the model came from"):
            assert word in refusal(folder)

    def test_a_vocabulary_that_is_far_too_small(self, tmp_path: Path):
        folder = write(tmp_path, SHAPES["Llama 2"])
        size = in_file(folder).get_vocab_size()
        put(folder, "config.json", {"vocab_size": 2 * size + 1})
        for word in (f"has {size} tokens", f"vocabulary has {2 * size + 1}", "copy the tokenizer's files"):
            assert word in refusal(folder)
        put(folder, "config.json", {"vocab_size": 2 * size})
        TextTokenizer.load(folder)

    @pytest.mark.parametrize("unknown", [None, "<unk>"])
    def test_an_empty_vocabulary(self, unknown: str | None, tmp_path: Path):
        empty = Tokenizer(models.BPE(vocab={"<unk>": 0} if unknown else {}, merges=[], unk_token=unknown))
        empty.add_special_tokens(list(SPECIALS))
        folder = write(tmp_path, SHAPES["Llama 2"], with_bos(empty))
        for word in ("makes no tokens of the text", "except special ones", "copy the tokenizer's files"):
            assert word in refusal(folder)

    def test_older_files_beside_it_are_not_read(self, tmp_path: Path):
        folder = write(tmp_path, SHAPES["Mistral v0.3"])
        for name in ("tekken.json", "tokenizer.model", "vocab.json", "merges.txt"):
            put(folder, name, {})
        assert TextTokenizer.load(folder).encode(TEXTS) == [in_file(folder).encode(text).ids for text in TEXTS]

    def test_code_of_its_own(self, tmp_path: Path):
        folder = write(tmp_path, SHAPES["Llama 2"]._replace(more={"auto_map": {"AutoTokenizer": ["t.Slow", "t.Fast"]}}))
        TextTokenizer.load(folder)
        (folder / "tokenizer.json").unlink()
        for word in ("code of its own", "t.Fast", "never run", "backend_tokenizer.save"):
            assert word in refusal(folder)
        put(folder, "tokenizer_config.json", {"auto_map": {"AutoProcessor": "p.Processor"}})
        assert "code of its own" not in refusal(folder)

    @pytest.mark.parametrize("content", ["{", "[]", "", '{"model": {"type": "New"}}'])
    @pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "config.json"])
    def test_a_file_that_cannot_be_read(self, name: str, content: str, tmp_path: Path):
        folder = write(tmp_path, SHAPES["Llama 2"])
        (folder / name).write_text(content)
        if content.startswith('{"model"') and name != "tokenizer.json":
            TextTokenizer.load(folder)
        else:
            assert str(folder / name) in refusal(folder)
            assert "copy or download it again" in refusal(folder)
