"""Choice of the profile by which a model answers typed questions."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple, cast

from pydantic import BaseModel, Field, ValidationError

from serve_app.decision_packages import KEV_FILE, LAYA_FILE
from serve_app.profiles.profile import (
    CHAT,
    DECIDER,
    DECISION2,
    KEV,
    LAYA,
    LLAMA_GUARD_3,
    NUMBERED,
    PLAIN,
    PROFILES,
    QWEN3_RERANKER,
    SHIELDGEMMA,
    Profile,
)
from serve_app.settings import ModelSettings
from serve_app.tasks import template_choice
from serve_app.tasks.chat import ChatTemplate
from serve_app.tasks.checkpoint_files import CheckpointFiles
from serve_app.tasks.decisions.proof import unproved
from serve_app.tasks.tokenizer import TextTokenizer
from serve_app.templates import MXBAI_RERANK
from serve_app.templates import QWEN3_RERANKER as QWEN3_RERANKER_TEMPLATE

_NAME, _PROMPT, _RERANK = "name", "prompt", "rerank"
"""Evidence beside files: the model's names, its chat template, and the rerank template that it was trained on."""

_HEAD = "reads its answers with a head of its own, which this service does not have"
_OWN_PROMPT = "was trained on a prompt of its own, for which this service has no profile"


class _Kind(NamedTuple):
    """A kind of checkpoint that was trained to answer questions its own way.

    Attributes:
        declared: what declares it, any of these: a file's name with a pattern of what it says, or with an empty one if
            the file alone says it; or one of the other kinds of evidence, with a pattern.
        profile: the profile's name; None: the decision routes refuse such a model.
        lacks: what this service lacks for it.
        model_type: ``model_type`` in its ``config.json``; a model with another type is not of this kind.
        own: reads the fields of the profile that the checkpoint has values of its own for.
    """

    declared: Mapping[str, str]
    profile: str | None = None
    lacks: str = ""
    model_type: str | None = None
    own: Callable[[CheckpointFiles], dict[str, Any]] = lambda _: {}


def _of_decider(files: CheckpointFiles) -> dict[str, Any]:
    said = files.object("decision_config.json")
    own = {"alphabet": said.get("codes"), "token_ids": said.get("token_ids") or ()}
    return own | _temperature(said.get("temperature"))


def _of_decision2(files: CheckpointFiles) -> dict[str, Any]:
    """Temperatures by type, and offsets by the number of levels, each in a file of its own if there are any."""
    offsets = files.object("score_bias.json").get("offsets")
    found = files.object("calibration.json").get("temperature_by_type")
    return ({"level_offsets": offsets} if offsets else {}) | ({"temperature": found} if found else {})


def _of_kev(files: CheckpointFiles) -> dict[str, Any]:
    return _temperature(files.object(KEV_FILE).get("temperature"))


class _LayaFile(BaseModel):
    """What is read of Laya's file."""

    head_max_len: Annotated[int, Field(ge=1)] = PROFILES[LAYA].window
    temperature: list[Any] = []
    temperature_by_options: dict[str, Any] = {}


def _of_laya(files: CheckpointFiles) -> dict[str, Any]:
    """The profile with the checkpoint's control tokens, window and temperatures."""
    said, profile = _LayaFile.model_validate(files.object(LAYA_FILE)), PROFILES[LAYA]
    declared = files.object("special_tokens_map.json") | files.object("tokenizer_config.json")
    names = {token: _content(declared.get(f"{token[1:-1].lower()}_token")) or token for token in profile.control}
    found: dict[str, Any] = {"window": said.head_max_len, "control": tuple(names.values())}
    for field in ("state", "question", "option", "closing"):
        text: str = getattr(profile, field)
        for token, own in names.items():
            text = text.replace(token, own)
        found[field] = text
    found["temperature"] = dict(zip(NUMBERED, map(_usable, said.temperature), strict=False))
    by_options = {name: _usable(each) for name, each in said.temperature_by_options.items()}
    return found | {"temperature_by_options": by_options}


def _content(token: Any) -> str | None:
    """The text of a token as a tokenizer's files declare it."""
    content = cast("dict[str, Any]", token).get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None


def _usable(temperature: Any) -> float:
    """A temperature as Laya takes it: within 0.5 and 5, since its files have some that would make a guess a certainty;
    1 if it is no number."""
    number = isinstance(temperature, int | float) and math.isfinite(temperature)
    return min(5.0, max(0.5, temperature)) if number else 1.0


def _temperature(every: Any) -> dict[str, Any]:
    return {} if every is None else {"temperature": dict.fromkeys(("noul", "choice", "score"), every)}


_KINDS = (
    # pplx-decider, some of Decision 3.0.
    _Kind(
        {"decision_config.json": r'"attention_mode":\s*"(?!causal")\w+"'},
        lacks="attends to the tokens that follow, too, which this service does not do",
    ),
    # Decision 3.0, pplx-decider, Jeff.
    _Kind(
        {"readout.safetensors": ""}, lacks="reads its answers from rows of its own, which this service does not load"
    ),
    # Decision 2.0; kev.
    _Kind({"decision_config.json": r'"prompt_version":\s*"decision2-[^"]*"'}, DECISION2, own=_of_decision2),
    _Kind({KEV_FILE: ""}, KEV, own=_of_kev),
    # Drex and any2jev; Strands Decider 1; Clef.
    _Kind({"head.pt": "", "head.safetensors": "", "slot_head.pt": "", "joint_head_config.json": ""}, lacks=_HEAD),
    _Kind({"config.json": r'"LayaDecisionModel"'}, LAYA, own=_of_laya),
    # What has only the file that a Laya checkpoint has.
    _Kind({LAYA_FILE: ""}, lacks=_HEAD),
    # Liquid D1, Bosun.
    _Kind(
        {"config.json": r'"AutoModel\w*":\s*"[^"]*\.(D1Model|BosunForDecision)"'},
        lacks="reads its answers with code of its own, which this service never executes",
    ),
    # lev; Nimble; Mapika's decider; Winnow.
    _Kind(
        {
            "lev_release.json": "",
            "schema_config.json": r"schema_candidate_classification\w*",
            "decider_config.json": "",
            "config.json": r'"decision_read_strategy":\s*"\w+"',
        },
        lacks=_OWN_PROMPT,
    ),
    _Kind({"decision_config.json": r'"codes"'}, DECIDER, own=_of_decider),
    _Kind(
        {_PROMPT: "Our safety principle is defined in the below", _NAME: r"shieldgemma"},
        SHIELDGEMMA,
        model_type="gemma2",
    ),
    # The 1B model's prompt has another byte, a space before <|eot_id|>.
    _Kind(
        {_PROMPT: r"ONLY THE LAST .*violated categories\.<\|eot_id\|>", _NAME: r"llama-?guard-?3-?8b"},
        LLAMA_GUARD_3,
        model_type="llama",
    ),
    # Llama Guard 1, 2 and 3-1B, Qwen3Guard.
    _Kind(
        {_PROMPT: "<BEGIN UNSAFE CONTENT CATEGORIES>", _NAME: r"llama-?guard\b|qwen3-?guard"},
        lacks=f"{_OWN_PROMPT}; send that prompt to /v1/score, with its words as labels",
    ),
    _Kind({_RERANK: QWEN3_RERANKER_TEMPLATE}, QWEN3_RERANKER),
    _Kind(
        {_RERANK: MXBAI_RERANK},
        lacks="was trained on a prompt whose parts are tokenised one by one; use it with /v1/rerank",
    ),
)


class ProfileChoice(NamedTuple):
    """The profile of the decision routes.

    Attributes:
        because: why it was chosen.
        problem: why the model cannot answer questions with it; None if it can.
    """

    profile: Profile
    because: str
    problem: str | None

    def __str__(self) -> str:
        if self.problem:
            return f"decisions are refused ({self.because})"
        return f"decisions use the profile {self.profile.name} ({self.because})"


def applying(template: template_choice.Choice, profile: ProfileChoice) -> list[tuple[object, str | None]]:
    """The choices for a model that its user should read, each with a doubt about it: a model with a decision head
    reranks nothing."""
    chosen: list[tuple[object, str | None]] = [(profile, profile.problem)]
    if not profile.profile.option or profile.problem:
        chosen.insert(0, (template, template.doubt))
    return chosen


def choose_profile(
    settings: ModelSettings, tokenizer: TextTokenizer, chat: ChatTemplate | None, folder: Path | None = None
) -> ProfileChoice:
    """Choose the profile that the settings name, else the one of the kind that the checkpoint declares, else a generic
    one.

    Args:
        folder: the folder with the model's files. None: its name alone may declare its kind.

    Raises:
        ValueError: the settings name a profile for chat models, and the model has no chat template.
    """
    profile, because, problem = _chosen(settings, chat, CheckpointFiles(settings.model, folder))
    if problem is None and profile.chat:
        problem = chat.problem if chat else f"{because}, but its files have no chat template, which that needs"
    return ProfileChoice(profile, because, problem or unproved(profile, chat, tokenizer))


def _chosen(settings: ModelSettings, chat: ChatTemplate | None, files: CheckpointFiles) -> ProfileChoice:
    if settings.decision_profile is not None:
        profile = PROFILES[settings.decision_profile]
        if profile.chat and chat is None:
            raise ValueError(
                f"decision_profile: {profile.name} is for chat models, and this one has no chat template; use {PLAIN}"
            )
        return ProfileChoice(profile, "named in the settings", None)
    for kind in _KINDS:
        if None not in (kind.model_type, files.model_type) and kind.model_type != files.model_type:
            continue
        for where, pattern in kind.declared.items():
            if because := _evidence(files, where, pattern):
                return _of(kind, because, files)
    generic = PROFILES[CHAT if chat else PLAIN]
    return ProfileChoice(generic, f"the model has {'a' if chat else 'no'} chat template", None)


def _of(kind: _Kind, because: str, files: CheckpointFiles) -> ProfileChoice:
    if kind.profile is None:
        problem = (
            f"{because}: this model {kind.lacks}; to ask its language model in a generic way all the same, name a "
            "profile in decision_profile"
        )
        return ProfileChoice(PROFILES[PLAIN], because, problem)
    profile = PROFILES[kind.profile]
    try:
        return ProfileChoice(Profile.model_validate(profile.model_dump() | kind.own(files)), because, None)
    except ValidationError as error:
        (first, *_) = error.errors(include_url=False)
        place = ".".join(map(str, first["loc"]))
        return ProfileChoice(profile, because, f"what its files say of answers does not fit: {place} {first['msg']}")


def _evidence(files: CheckpointFiles, where: str, pattern: str) -> str | None:
    """What shows that a checkpoint is of a kind; None if nothing does."""
    if where == _NAME:
        said = ((source, re.search(pattern, name, re.IGNORECASE)) for source, name in files.names())
        return next((f"{source} says {found[0]}" for source, found in said if found), None)
    if where == _PROMPT:
        asking = (source for source, text in files.prompts() if re.search(pattern, text, re.DOTALL))
        return next((f"its prompt is in {source}" for source in asking), None)
    if where == _RERANK:
        template = template_choice.recognised(files)
        return template.because if template and template.name == pattern else None
    if not pattern:
        return f"it has {where}" if files.has(where) else None
    found = re.search(pattern, files.text(where))
    return f"{where} says {found[0]}" if found else None
