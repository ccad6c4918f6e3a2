"""Load the tokenizer of a model's folder, and refuse one that cannot be the model's.

The model was trained with ``tokenizer.json``, so this file is read as it is. transformers 5 would take only its
vocabulary and build the rest from the class that ``tokenizer_config.json`` names.
"""

from __future__ import annotations

import importlib.util
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import AddedToken, Tokenizer

from serve_app.model_source import ModelSourceError

logger = logging.getLogger("ray.serve")

SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
SPECIAL_LISTS = ("additional_special_tokens", "extra_special_tokens")
_FLAGS = ("lstrip", "rstrip", "single_word", "normalized", "special")

LEAST_SHARE = 0.5
"""The least share of the model's vocabulary that its tokenizer must have. Padded rows leave it far above this."""

_SAMPLE = "a b yes no 1, 2."


@dataclass(frozen=True, slots=True)
class TokenizerFacts:
    """Facts from a tokenizer's files, under their names there. They do not change how text becomes tokens."""

    tokenizer_class: str | None = None
    bos_token: str | None = None
    eos_token: str | None = None
    pad_token: str | None = None
    unk_token: str | None = None
    chat_template: str | None = None


class LoadedTokenizer(NamedTuple):
    """A tokenizer loaded from a folder, with the id of its begin-of-sequence token or None, and other facts."""

    backend: Tokenizer
    bos_id: int | None
    facts: TokenizerFacts = TokenizerFacts()


def load(folder: Path) -> LoadedTokenizer:
    """Load the tokenizer of a local folder, from ``tokenizer.json`` if there is one.

    Raises:
        ModelSourceError: there is no tokenizer, it cannot be read, or it does not fit the model's ``config.json``.
    """
    loaded = _from_file(folder) if (folder / "tokenizer.json").is_file() else _from_parts(folder)
    _check(folder, loaded.backend)
    return loaded._replace(facts=_facts(folder))


def _facts(folder: Path) -> TokenizerFacts:
    declared = _object(folder, "special_tokens_map.json") | _object(folder, "tokenizer_config.json")
    template, beside = declared.get("chat_template"), folder / "chat_template.jinja"
    if beside.is_file():
        template = beside.read_text(encoding="utf-8")
    elif isinstance(template, list):  # named templates: one for chats, others for tools and documents
        named: list[Any] = [each for each in template if isinstance(each, dict)]
        template = next((each.get("template") for each in named if each.get("name") == "default"), None)
    template = template or _object(folder, "chat_template.json").get("chat_template")  # a processor's file
    return TokenizerFacts(
        tokenizer_class=_content(declared.get("tokenizer_class")),
        bos_token=_content(declared.get("bos_token")),
        eos_token=_content(declared.get("eos_token")),
        pad_token=_content(declared.get("pad_token")),
        unk_token=_content(declared.get("unk_token")),
        chat_template=_content(template),
    )


def _from_file(folder: Path) -> LoadedTokenizer:
    try:
        backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # the library raises nothing more precise
        raise ModelSourceError(
            f"{folder / 'tokenizer.json'} cannot be read ({error}); copy or download it again"
        ) from error
    declared = _object(folder, "special_tokens_map.json") | _object(folder, "tokenizer_config.json")
    _add_tokens(folder, backend, declared)
    backend.encode_special_tokens = bool(declared.get("split_special_tokens"))
    _warn_of_flags(folder, backend, declared)
    bos = _content(declared.get("bos_token"))
    bos_id = backend.token_to_id(bos) if bos else _object(folder, "config.json").get("bos_token_id")
    return LoadedTokenizer(backend, bos_id if isinstance(bos_id, int) else None)


def _add_tokens(folder: Path, backend: Tokenizer, declared: dict[str, Any]) -> None:
    """Add the tokens that only the other files, not ``tokenizer.json``, declare, as transformers does."""
    decoder: dict[str, Any] = declared.get("added_tokens_decoder") or {}
    ids = {decoder[id]["content"]: int(id) for id in decoder} or _object(folder, "added_tokens.json")
    flags = {token["content"]: {flag: token[flag] for flag in _FLAGS if flag in token} for token in decoder.values()}
    special = _special_tokens(declared)
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    missing = [
        content for content in dict.fromkeys([*sorted(ids, key=ids.__getitem__), *special]) if content not in known
    ]
    backend.add_tokens(
        [AddedToken(content, **({"special": content in special} | flags.get(content, {}))) for content in missing]
    )
    for content, id in ids.items():
        if (given := backend.token_to_id(content)) != id:
            raise ModelSourceError(
                f"{folder}: the token {content!r} has the id {given} in tokenizer.json, but {id} in the other files "
                "(tokenizer_config.json, added_tokens.json); save the tokenizer again, so that they agree"
            )


def _special_tokens(declared: dict[str, Any]) -> list[str]:
    named: list[Any] = [declared.get(name) for name in SPECIAL_NAMES]
    for name in SPECIAL_LISTS:
        more: Any = declared.get(name) or []
        named += more.values() if isinstance(more, dict) else more
    return [content for token in named if (content := _content(token))]


def _warn_of_flags(folder: Path, backend: Tokenizer, declared: dict[str, Any]) -> None:
    """Warn if a flag contradicts ``tokenizer.json``. The flag has no effect, as in transformers 5."""
    bare, whole = (backend.encode("a", add_special_tokens=added).ids for added in (False, True))
    for flag, name, adds in (
        ("add_bos_token", "bos_token", whole[:1] != bare[:1]),
        ("add_eos_token", "eos_token", whole[-1:] != bare[-1:]),
    ):
        if isinstance(declared.get(flag), bool) and declared[flag] != adds and _content(declared.get(name)):
            does = "adds one" if adds else "adds none"
            logger.warning(
                "%s: tokenizer_config.json says %s: %s, but tokenizer.json %s; tokenizer.json is followed",
                folder,
                flag,
                str(declared[flag]).lower(),
                does,
            )


def _from_parts(folder: Path) -> LoadedTokenizer:
    """Load with transformers, which builds a tokenizer from older files."""
    if refusal := _unusable_parts(folder):
        raise ModelSourceError(f"no tokenizer can be loaded from {folder}: {refusal}")
    # The import takes seconds, and only this function needs it.
    from transformers import AutoTokenizer

    auto: Any = AutoTokenizer  # untyped upstream
    try:
        loaded: Any = auto.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # transformers raises many kinds
        raise ModelSourceError(
            f"no tokenizer can be loaded from {folder}: {error}; save one there as tokenizer.json"
        ) from error
    backend: object = getattr(loaded, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise ModelSourceError(f"{folder} has no fast tokenizer: save one there as tokenizer.json")
    return LoadedTokenizer(backend, loaded.bos_token_id)


def _unusable_parts(folder: Path) -> str | None:
    """Why a folder without ``tokenizer.json`` has no usable tokenizer, and the remedy; None if it may have one."""
    by_hand = f"from transformers import AutoTokenizer; AutoTokenizer.from_pretrained('{folder}'"
    if (folder / "tekken.json").is_file():
        return (
            "tekken.json is Mistral's own format, which is not supported (its prompts would lack <s>); copy "
            "tokenizer.json from the same model in Hugging Face layout, or from its base model"
        )
    if code := _object(folder, "tokenizer_config.json").get("auto_map"):
        named: Any = code.get("AutoTokenizer") if isinstance(code, dict) else code
        names = " or ".join(each for each in named if each) if isinstance(named, list) else named
        return (
            f"its tokenizer is code of its own ({names}), which is never run; if you trust it, make tokenizer.json: "
            f"python -c \"{by_hand}, trust_remote_code=True).backend_tokenizer.save('{folder}/tokenizer.json')\""
        )
    if (folder / "tokenizer.model").is_file():
        if importlib.util.find_spec("sentencepiece") is None:
            return (
                "it has only tokenizer.model, which needs the package sentencepiece; make tokenizer.json from it once: "
                "pip install sentencepiece protobuf, then "
                f"python -c \"{by_hand}).save_pretrained('{folder}')\""
            )
        return None
    if any((folder / name).is_file() for name in ("vocab.json", "vocab.txt")):
        return None
    return "it has no tokenizer.json and no other vocabulary file; copy tokenizer.json from where the model came from"


def _check(folder: Path, backend: Tokenizer) -> None:
    """Refuse a vocabulary that is not the model's: every prompt would be read as the same few tokens."""
    tokens, rows = backend.get_vocab_size(), _object(folder, "config.json").get("vocab_size")
    remedy = "copy the tokenizer's files, above all tokenizer.json, from where the model came from"
    if isinstance(rows, int) and tokens < LEAST_SHARE * rows:
        raise ModelSourceError(
            f"the tokenizer of {folder} has {tokens} tokens, but the model's vocabulary has {rows}: it is not the "
            f"model's tokenizer, or only a part of it; {remedy}"
        )
    special = {id for id, token in backend.get_added_tokens_decoder().items() if token.special}
    unknown = getattr(backend.model, "unk_token", None)
    if isinstance(unknown, str) and (id := backend.token_to_id(unknown)) is not None:
        special.add(id)
    if set(backend.encode(_SAMPLE).ids) <= special:
        raise ModelSourceError(
            f"the tokenizer of {folder} makes no tokens of the text {_SAMPLE!r} except special ones: its vocabulary is "
            f"missing; {remedy}"
        )


def _content(token: Any) -> str | None:
    """The text of a special token, which is a string or an object."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) and content else None


def _object(folder: Path, name: str) -> dict[str, Any]:
    """The JSON object in a file, empty if there is no such file.

    Raises:
        ModelSourceError: the file is not a JSON object.
    """
    path = folder / name
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelSourceError(f"{path} is not valid JSON ({error}); copy or download it again") from error
    if not isinstance(found, dict):
        raise ModelSourceError(f"{path} is not a JSON object; copy or download it again")
    return found
