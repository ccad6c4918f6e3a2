"""How text is cut before the merges, by ``tokenizer.ggml.pre``.

Source: the names and patterns of llama.cpp's ``src/llama-vocab.cpp``. Where its comments have the pattern of the
model's own ``tokenizer.json``, that one is taken: llama.cpp's engine lacks case folding and classes such as
``\\p{Lu}``, and its stand-ins cut other scripts otherwise.
"""

from dataclasses import dataclass

from tokenizers import Regex, pre_tokenizers

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"


def _words(numbers: str, *, contractions: str = rf"{_CONTRACTIONS}|", letters: str = r"\p{L}", marks: str = "") -> str:
    """The pattern of cl100k and its kin: a word with the character before it, a number, signs, white space."""
    signs = rf" ?[^\s\p{{L}}{marks}\p{{N}}]+[\r\n]*"
    return rf"{contractions}[^\r\n\p{{L}}\p{{N}}]?{letters}+|{numbers}|{signs}|{_SPACES}"


def _cased(numbers: str, contractions: str = "") -> str:
    """The pattern of o200k and its kin: a word ends where lower case turns to upper."""
    before = r"[^\r\n\p{L}\p{N}]?"
    words = rf"{before}{_UPPER}*{_LOWER}+{contractions}|{before}{_UPPER}+{_LOWER}*{contractions}"
    return rf"{words}|{numbers}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"


_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_THREE = r"\p{N}{1,3}"
_DIGIT = r"\p{N}"
_HAN = r"[一-龥ࠀ-一가-퟿]+"
_CASED_LETTERS = (
    r"A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝ"
    "\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec"
    "\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d"
    "\u212f-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗ\uff21-\uff3a\uff41-\uff5a𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃"
)
_SIGNS = "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+"
_DEEPSEEK_V3 = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_SPACES}"
)


@dataclass(frozen=True)
class Pre:
    """One way of cutting.

    Attributes:
        patterns: each cuts the pieces that the one before left: what it matches, and what lies between.
        composed: text is first brought into Unicode's form NFC, as those tokenizers do; llama.cpp does not.
        ignore_merges: a piece that is a token as a whole is taken at once.
        add_bos: what holds when the file does not say.
    """

    patterns: tuple[str, ...]
    composed: bool = False
    ignore_merges: bool = False
    add_bos: bool = False

    def steps(self) -> pre_tokenizers.PreTokenizer:
        """The pre-tokenizer of ``tokenizer.json``."""
        return pre_tokenizers.Sequence(
            [
                *(pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in self.patterns),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )


_KINDS: dict[str, Pre] = {
    # The names that are used where the file has none, see ``tokenizer.pre_of``.
    "default": Pre((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
    "gpt-2 phi-2 olmo mpt jais trillion gigachat mellum a.x-4.0 exaone4 modern-bert granite-docling": Pre((_GPT2,)),
    "smollm starcoder refact command-r codeshell exaone minerva-7b mellum2": Pre((_DIGIT, _GPT2)),
    "falcon": Pre((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]")),
    "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2": Pre(
        (_words(_THREE),), ignore_merges=True, add_bos=True
    ),
    "dbrx smaug-bpe chatglm-bpe glm4": Pre((_words(_THREE),)),
    "qwen2 megrez kormo f2llmv2 stablelm2": Pre((_words(_DIGIT),), composed=True),
    "deepseek-r1-qwen hunyuan solar-open grok-2": Pre((_words(_DIGIT),)),
    "qwen35": Pre((_words(_DIGIT, letters=r"[\p{L}\p{M}]", marks=r"\p{M}"),), composed=True),
    "ufakzeka": Pre((_words(_DIGIT, contractions=""),)),
    "minicpm5": Pre((_THREE, _words(r"\p{N}+")), ignore_merges=True),
    "seed-coder": Pre(
        (rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_SPACES}",)
    ),
    "tekken": Pre((_cased(_DIGIT),), ignore_merges=True, add_bos=True),
    "gpt-4o llama4 kanana2 talkie minimax-m2": Pre((_cased(_THREE, rf"{_CONTRACTIONS}?"),)),
    "deepseek-llm": Pre((r"[\r\n]", rf"\s?[{_CASED_LETTERS}]+", _SIGNS, r"\s+$", _HAN, r"\p{N}+")),
    "deepseek-coder": Pre((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _HAN, _DIGIT)),
    "deepseek-v3 hunyuan-dense joyai-llm": Pre((_THREE, "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+", _DEEPSEEK_V3)),
    "superbpe": Pre((r"\p{N}+", r"(?=(\d{3})+(?!\d))")),
}
"""The ways by all names that have them."""

PRES = {name: pre for names, pre in _KINDS.items() for name in names.split()}
