"""Load the tokenizer of a model's folder, and refuse one that cannot be the model's.

The model was trained with ``tokenizer.json``, so this file is read as it is. transformers 5 would take only its
vocabulary and build the rest from the class that ``tokenizer_config.json`` names. Older files are converted.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import AddedToken, Tokenizer, processors

from serve_app.model_source import ModelSourceError
from serve_app.tasks import tokenizer_conversion

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
    model_max_length: int | None = None


class LoadedTokenizer(NamedTuple):
    """A tokenizer loaded from a folder, with the id of its begin-of-sequence token or None, and other facts.

    Attributes:
        words: tokens that text is split at although they are none of ``backend``'s added ones.
    """

    backend: Tokenizer
    bos_id: int | None
    facts: TokenizerFacts = TokenizerFacts()
    words: Collection[str] = ()


def load(folder: Path) -> LoadedTokenizer:
    """Load the tokenizer of a local folder, from ``tokenizer.json`` if there is one.

    Raises:
        ModelSourceError: there is no tokenizer, it cannot be read, or it does not fit the model's ``config.json``.
    """
    declared = _object(folder, "special_tokens_map.json") | _object(folder, "tokenizer_config.json")
    config = _object(folder, "config.json")
    converted = None
    if (folder / "tokenizer.json").is_file():
        backend = _from_file(folder)
    else:
        converted = _from_older_files(folder, declared | {"model_type": config.get("model_type")})
        backend = converted.backend
        declared = {**converted.named, **{name: value for name, value in declared.items() if _says(name, value)}}
    _add_tokens(folder, backend, declared)
    backend.encode_special_tokens = bool(declared.get("split_special_tokens"))
    if converted:
        _add_ends(folder, backend, declared, converted.adds_bos)
    else:
        _warn_of_flags(folder, backend, declared)
    _check(folder, backend)
    bos = _content(declared.get("bos_token"))
    bos_id = backend.token_to_id(bos) if bos else config.get("bos_token_id")
    words = converted.words if converted else ()
    return LoadedTokenizer(backend, bos_id if isinstance(bos_id, int) else None, _facts(folder, declared), words)


def _says(name: str, value: Any) -> bool:
    """Whether a field names a token, if it is one for that. Some files have "" where a class knew the token."""
    return name not in SPECIAL_NAMES or _content(value) is not None


def _facts(folder: Path, declared: dict[str, Any]) -> TokenizerFacts:
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
        model_max_length=longest if isinstance(longest := declared.get("model_max_length"), int) else None,
    )


def _from_file(folder: Path) -> Tokenizer:
    try:
        return Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # the library raises nothing more precise
        raise ModelSourceError(
            f"{folder / 'tokenizer.json'} cannot be read ({error}); copy or download it again"
        ) from error


def _add_tokens(folder: Path, backend: Tokenizer, declared: dict[str, Any]) -> None:
    """Add the tokens that only the other files, not the tokenizer's own, declare, as transformers does."""
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
                f"{folder}: the token {content!r} has the id {given} in the tokenizer's own file, but {id} in the "
                "other files (tokenizer_config.json, added_tokens.json); save the tokenizer again, so that they agree"
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


def _from_older_files(folder: Path, declared: dict[str, Any]) -> tokenizer_conversion.Converted:
    code = declared.get("auto_map")
    if named := code.get("AutoTokenizer") if isinstance(code, dict) else code:
        names = " or ".join(each for each in named if each) if isinstance(named, list) else named
        raise ModelSourceError(
            f"no tokenizer can be loaded from {folder}: its tokenizer is code of its own ({names}), which is never "
            "run. Copy tokenizer.json from where the model came from; or, if you trust the code, make it yourself: "
            'python -c "from transformers import AutoTokenizer; '
            f"AutoTokenizer.from_pretrained('{folder}', trust_remote_code=True)"
            f".backend_tokenizer.save('{folder}/tokenizer.json')\""
        )
    if converted := tokenizer_conversion.convert(folder, declared):
        if converted.hint:
            logger.warning("%s: %s", folder, converted.hint)
        return converted
    raise ModelSourceError(
        f"no tokenizer can be loaded from {folder}: it has no tokenizer.json, nor "
        f"{' or '.join(tokenizer_conversion.READERS)}; copy tokenizer.json from where the model came from"
    )


def _add_ends(folder: Path, backend: Tokenizer, declared: dict[str, Any], adds_bos: bool) -> None:
    """Let BOS and EOS be added around each text where the files say so, as transformers does with older files."""
    ends: dict[str, list[tuple[str, int]]] = {"bos_token": [], "eos_token": []}
    for name, flag, default in (("bos_token", "add_bos_token", adds_bos), ("eos_token", "add_eos_token", False)):
        said = declared.get(flag)
        token = _content(declared.get(name))
        if said if isinstance(said, bool) else default:
            if token is None or (id := backend.token_to_id(token)) is None:
                raise ModelSourceError(
                    f"{folder}: a text gets a {name}, but the tokenizer has no such token ({token!r}); name it in "
                    f'tokenizer_config.json, or say "{flag}": false there'
                )
            ends[name].append((token, id))
    front, behind = ends.values()
    if front or behind:
        single = [*(token for token, _ in front), "$A", *(token for token, _ in behind)]
        backend.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
            single=single, special_tokens=[*front, *behind]
        )


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
