"""Tokenizers there and back: what a GGUF file keeps of a ``tokenizer.json`` gives the same ids on hard texts.

The originals are trained here, with the steps that the published files of each kind have. Their GGUF files have what
llama.cpp's converter writes: tokens, kinds of tokens, merges or scores, and names.
"""

# ruff: noqa: RUF001 - letters that look alike are what these texts are for

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from model.gguf.files import GgufError, read
from model.gguf.pre_tokenizers import PRES
from model.gguf.tokenizer import pre_of, tokenizer_of
from tests.tiny import SPECIALS

TEXTS = (
    "",
    " ",
    "a",
    "Hello, world!  It's 12345 o'clock;\tI'LL say: \"we've 3.14\" (sic).\n\n\n  x += 1_000;\r\n\r\n",
    "camelCaseWords HTTPServer2024 iPhone15 ÉCOLE straße ǅ ʼn Ǆungla",
    "e\u0301clair vs éclair, Å vs A\u030a, ﬁ ligature, ½ ² Ⅷ ٣٤٥ १२३",
    "你好，世界。1314151天～ 日本語テキスト 한국어 문장 ภาษาไทย កាន់តែ हिन्दी বাংলা",
    "🚀🚀 😶\u200d🌫️ ✅ -- ======= ''''''```````\"\"\"\"......!!!!!!??????",
    "нещо на Български, Ελληνικά, עברית, العربية؟",
    "   leading, trailing   \n \n  \t mixed \t\n\x0b\x0c\x85\xa0\u2003spaces  ",
    "a <|im_start|>user\n the<|im_end|> in<|im_end|>\n\n b<|endoftext|>",
    "$100 + 7% = ~107^2 | `code` <tag/> {json: [1, 22, 333, 4444, 55555, 666666, 7777777]}",
    "\x00\x01\x7f\ufffd\ufeff Z͑ͫ̓a̴l͖g̛o don't DON'T 'tis rock'n'roll l'école",
)
WORDS = ["the", "then", "there", "in", "inside", "12", "123", "1234", "she's", "we'll", "aaaa", "aaa", "aa"]
TRAINING = [*TEXTS * 3, *WORDS] * 2

BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
GPT2 = BYTE_LEVEL | {"use_regex": True}


def split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}NUMBERS| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+ENDING"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*ENDING"
    r"|\p{N}NUMBERS| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3 = [split(CL100K.replace("NUMBERS", "{1,3}")), BYTE_LEVEL]
QWEN2 = [split(CL100K.replace("NUMBERS", "")), BYTE_LEVEL]
DIGITS = {"type": "Digits", "individual_digits": True}
SMOLLM = [DIGITS, GPT2]
LLAMA_CPP = [
    split(r"[\p{P}$+<=>^~|]+"),
    split(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"),
    {"type": "Digits", "individual_digits": False},
    split("[0-9][0-9][0-9]"),
    BYTE_LEVEL,
]
"""What llama.cpp does where a file has no name."""
DEEPSEEK_CODER = [
    split("[\r\n]"),
    split(r"\s?\p{L}+"),
    split(r"\s?\p{P}+"),
    split("[一-龥ࠀ-一가-퟿]+"),
    DIGITS,
    BYTE_LEVEL,
]
NFC = {"type": "NFC"}

KINDS: dict[str, tuple[list[dict[str, Any]], dict[str, Any] | None, bool]] = {
    "gpt-2": ([GPT2], None, False),
    "olmo": ([GPT2], None, False),
    "smollm": (SMOLLM, None, False),
    "starcoder": (SMOLLM, None, False),
    "refact": (SMOLLM, None, False),
    "llama-bpe": (LLAMA3, None, True),
    "llama3": (LLAMA3, None, True),
    "llama-v3": (LLAMA3, None, True),
    "falcon3": (LLAMA3, None, True),
    "dbrx": (LLAMA3, None, False),
    "smaug-bpe": (LLAMA3, None, False),
    "qwen2": (QWEN2, NFC, False),
    "deepseek-r1-qwen": (QWEN2, None, False),
    "tekken": ([split(O200K.replace("NUMBERS", "").replace("ENDING", "")), BYTE_LEVEL], None, True),
    "gpt-4o": (
        [split(O200K.replace("NUMBERS", "{1,3}").replace("ENDING", "(?i:'s|'t|'re|'ve|'m|'ll|'d)?")), BYTE_LEVEL],
        None,
        False,
    ),
    "deepseek-coder": (DEEPSEEK_CODER, None, False),
}
"""By ``tokenizer.ggml.pre``: the steps, the normalizer, and whether whole pieces go before merges."""


def trained(steps: list[dict[str, Any]], normalizer: dict[str, Any] | None, ignore_merges: bool) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    content = json.loads(tokenizer.to_str())
    content |= {"normalizer": normalizer, "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps}}
    tokenizer = Tokenizer.from_str(json.dumps(content))
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=700, initial_alphabet=alphabet, special_tokens=list(SPECIALS), show_progress=False
    )
    tokenizer.train_from_iterator(TRAINING, trainer)
    content = json.loads(tokenizer.to_str())
    content["model"]["ignore_merges"] = ignore_merges
    content["model"]["merges"] = content["model"]["merges"][:-60]  # the last tokens are whole pieces, or nothing
    tokenizer = Tokenizer.from_str(json.dumps(content))
    tokenizer.add_tokens([AddedToken("rock'n'", normalized=False), AddedToken("  ", normalized=False)])
    return tokenizer


def written(path: Path, tokenizer: Tokenizer, *, architecture: str = "llama", **keys: Any) -> dict[str, Any]:
    """The keys of a GGUF file with this tokenizer, written and read."""
    content = json.loads(tokenizer.to_str())
    vocab: dict[str, int] = tokenizer.get_vocab(with_added_tokens=True)
    kinds = {token["id"]: token["special"] for token in content["added_tokens"]}
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_tokenizer_model(keys.pop("model", "gpt2"))
    writer.add_token_list([*sorted(vocab, key=lambda token: vocab[token]), "[PAD1]"])
    types = [
        gguf.TokenType.NORMAL
        if id not in kinds
        else gguf.TokenType.CONTROL
        if kinds[id]
        else gguf.TokenType.USER_DEFINED
        for id in range(len(vocab))
    ]
    writer.add_token_types(keys.pop("types", [*types, gguf.TokenType.UNUSED]))
    writer.add_token_merges([" ".join(pair) for pair in content["model"]["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for key, value in keys.items():
        if isinstance(value, bool):
            writer.add_bool(f"tokenizer.ggml.{key}", value)
        elif isinstance(value, str):
            writer.add_string(f"tokenizer.ggml.{key}" if key == "pre" else key, value)
        else:
            writer.add_array(f"tokenizer.ggml.{key}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return read(path)[0]


def same(found: Tokenizer, original: Tokenizer) -> None:
    for text in TEXTS:
        ids = found.encode(text, add_special_tokens=False).ids
        assert ids == original.encode(text, add_special_tokens=False).ids, text


@pytest.mark.parametrize("pre", KINDS)
def test_byte_level(tmp_path: Path, pre: str) -> None:
    original = trained(*KINDS[pre])
    tokenizer, config = tokenizer_of(written(tmp_path / "x.gguf", original, pre=pre))
    same(tokenizer, original)
    bos = [1] if pre in ("llama-bpe", "llama3", "llama-v3", "falcon3", "tekken") else []
    assert tokenizer.encode("the").ids == [*bos, *original.encode("the", add_special_tokens=False).ids]
    assert config["eos_token"] == SPECIALS[2]


def test_deepseek_llm() -> None:
    """Its class of signs has all of ASCII from the colon on, so that words are cut around other letters."""
    text = "Ünï你好wörld, 12 Ωmega\nЖук! ภาษา"
    pieces = [piece for piece, _ in PRES["deepseek-llm"].steps().pre_tokenize_str(text)]
    readable = [decoders.ByteLevel().decode([piece]) for piece in pieces]
    assert readable == [
        "Ü",
        "n",
        "ï",
        "你好",
        "w",
        "ö",
        "rld",
        ",",
        " ",
        "12",
        " Ω",
        "mega",
        "\n",
        "Жук",
        "!",
        " ",
        "ภาษา",
    ]


def test_a_file_of_before_pre_tokenizers_had_names(tmp_path: Path) -> None:
    original = trained(LLAMA_CPP, None, False)
    fields = written(tmp_path / "x.gguf", original)
    assert "tokenizer.ggml.pre" not in fields
    same(tokenizer_of(fields)[0], original)
    original = trained(*KINDS["qwen2"])
    same(tokenizer_of(written(tmp_path / "y.gguf", original, architecture="qwen2"))[0], original)
    assert pre_of({"tokenizer.ggml.pre": "default"}, ["<|begin_of_text|>"]) == "llama-bpe"
    assert pre_of({"tokenizer.ggml.pre": "default", "general.architecture": "olmo2"}, []) == "dbrx"


def test_an_unknown_name_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    fields = written(tmp_path / "x.gguf", trained(*KINDS["gpt-2"]), pre="kimi-k2")
    with pytest.raises(GgufError, match=r"'kimi-k2' is not converted; known: .*qwen2.*tekken"):
        tokenizer_of(fields)


# SentencePiece

REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
PREPEND = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, REPLACE]}
FIRST = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
CONTROLS = ("<unk>", "<s>", "</s>")


def spelled(
    normalizer: dict[str, Any] | None, pre_tokenizer: dict[str, Any] | None, added: list[AddedToken]
) -> tuple[Tokenizer, list[float], list[int]]:
    """A tokenizer as transformers makes it of a ``tokenizer.model``, with the scores and kinds that one holds."""
    from transformers.tokenization_utils_base import generate_merges

    tokenizer = Tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(vocab_size=600, show_progress=False)
    tokenizer.train_from_iterator([text.replace(" ", "▁") for text in TRAINING], trainer)
    pieces = sorted(tokenizer.get_vocab(with_added_tokens=False).items(), key=lambda piece: piece[1])
    tokens = [*CONTROLS, *(f"<0x{byte:02X}>" for byte in range(256)), *(piece for piece, _ in pieces)]
    vocab = {token: id for id, token in enumerate(tokens)}
    # As SentencePiece: the more often a piece was joined, the higher its score; characters come last.
    joined = [token for token in tokens[259:] if len(token) > 1]
    scores = {token: -1e6 if len(token) == 1 else -float(joined.index(token)) for token in tokens[259:]}
    content = json.loads(tokenizer.to_str())
    content["model"] |= {
        "vocab": vocab,
        "merges": generate_merges(vocab, scores),
        "unk_token": "<unk>",
        "fuse_unk": True,
        "byte_fallback": True,
    }
    content |= {"normalizer": normalizer, "pre_tokenizer": pre_tokenizer}
    tokenizer = Tokenizer.from_str(json.dumps(content))
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in CONTROLS])
    tokenizer.add_tokens(added)
    types = [gguf.TokenType.UNKNOWN, *[gguf.TokenType.CONTROL] * 2, *[gguf.TokenType.BYTE] * 256]
    types += [gguf.TokenType.NORMAL] * len(pieces)
    types += [gguf.TokenType.CONTROL if token.special else gguf.TokenType.USER_DEFINED for token in added]
    extra = len(added) + 1
    return tokenizer, [0.0] * 259 + list(scores.values()) + [-1000.0] * extra, [*types, gguf.TokenType.UNUSED]


@pytest.mark.parametrize(
    ("normalizer", "pre_tokenizer", "added", "keys"),
    [
        (PREPEND, None, [], {"add_space_prefix": True}),
        (PREPEND, None, [AddedToken("<|turn|>", special=True, normalized=False)], {}),
        (REPLACE, None, [AddedToken("  ", normalized=False)], {"add_space_prefix": False}),
        (REPLACE, None, [], {"architecture": "gemma2"}),
        (None, FIRST, [AddedToken("[INST]", special=True, normalized=False)], {}),
        (
            PREPEND,
            None,
            [AddedToken("<|user|>", special=True, normalized=False, rstrip=True)],
            {"general.name": "Phi 3.5 Mini phi-3"},
        ),
    ],
    ids=["Llama 2", "without the key", "no space", "Gemma without the key", "Mistral v3", "Phi-3"],
)
def test_sentencepiece(
    tmp_path: Path,
    normalizer: dict[str, Any] | None,
    pre_tokenizer: dict[str, Any] | None,
    added: list[AddedToken],
    keys: dict[str, Any],
) -> None:
    original, scores, types = spelled(normalizer, pre_tokenizer, added)
    if "general.name" in keys:  # Phi-3's other tokens take white space too, save three
        original.add_special_tokens([AddedToken("</s>", normalized=False, rstrip=True)])
    fields = written(tmp_path / "x.gguf", original, model="llama", scores=scores, types=types, **keys)
    tokenizer, config = tokenizer_of(fields)
    same(tokenizer, original)
    for text in (
        "[INST] the[INST]in",
        "a<|user|>\n  the<|turn|>\nin",
        "a</s> the</s>\n in  <s>  x",
        "<unk> in",
        "aaaaaaa      aaa",
    ):
        assert (
            tokenizer.encode(text, add_special_tokens=False).ids == original.encode(text, add_special_tokens=False).ids
        )
    assert tokenizer.encode("the").ids == [1, *original.encode("the", add_special_tokens=False).ids]
    assert (config["bos_token"], config["unk_token"]) == ("<s>", "<unk>")


def test_sentencepiece_with_merges(tmp_path: Path) -> None:
    """Gemma 3 converted without its tokenizer.model: a vocabulary of characters with merges."""
    original, _, types = spelled(REPLACE, None, [])
    fields = written(tmp_path / "x.gguf", original, architecture="gemma3", pre="default", types=types)
    same(tokenizer_of(fields)[0], original)


def test_the_turns_of_gemma_typed_as_text(tmp_path: Path) -> None:
    """Google's own quantised Gemma 3 has them so; a chat's prompt would be cut to pieces of its marks."""
    turns = [AddedToken(name, special=True, normalized=False) for name in ("<start_of_turn>", "<end_of_turn>")]
    original, scores, types = spelled(REPLACE, None, turns)
    types[-3:-1] = [gguf.TokenType.NORMAL] * 2
    fields = written(tmp_path / "x.gguf", original, architecture="gemma3", model="llama", scores=scores, types=types)
    text = "<start_of_turn>user\nthe<end_of_turn>\n"
    found = tokenizer_of(fields)[0].encode(text, add_special_tokens=False)
    assert found.ids == original.encode(text, add_special_tokens=False).ids
    assert found.tokens[0] == "<start_of_turn>"


def test_a_token_twice_is_refused(tmp_path: Path) -> None:
    fields = written(tmp_path / "x.gguf", trained(*KINDS["gpt-2"]), pre="gpt-2")
    fields["tokenizer.ggml.tokens"][5] = fields["tokenizer.ggml.tokens"][4]
    with pytest.raises(GgufError, match="1 tokens twice"):
        tokenizer_of(fields)
