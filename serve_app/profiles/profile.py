"""Profiles: how a typed question becomes a prompt, and which tokens answer it.

A profile is a TOML file in this folder. Its name is permanent, since answers depend on every byte of it: a better
wording gets a new name.
"""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Mapping, Sequence
from functools import cached_property
from importlib import resources
from typing import Annotated, Any, Literal, NamedTuple, Self, cast

from jinja2 import StrictUndefined, Template
from jinja2.sandbox import ImmutableSandboxedEnvironment
from pydantic import BaseModel, ConfigDict, Field, model_validator

CODE = "{code}"
"""The place of an option's code in a label."""

Labels = tuple[str, ...]
Type = Literal["noul", "choice", "score"]
Temperature = Annotated[float, Field(gt=0, allow_inf_nan=False)]


_SIZES = (("2", 2), ("3-5", 5), ("6-10", 10), ("11+", math.inf))
"""Names of numbers of options, with the most options of each."""


class ShownOption(NamedTuple):
    """An option as a question shows it.

    Attributes:
        code: its code; with ``Profile.option`` its number in the request, from 0.
        text: its name and description in one text.
        name: a text; with ``Profile.option`` any JSON value.
        description: the same; None if it has none.
    """

    code: str
    text: str
    name: Any
    description: Any = None


def canonical(value: Any) -> str:
    """A JSON value as text without spaces, names in order."""
    return json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _text_or_json(value: Any) -> str:
    return value if isinstance(value, str) else canonical(value)


def _text_or_spaced(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _flat(value: Any, indent: int = 0) -> str:
    """A JSON value as indented lines, as kev writes it (kev/api.py at 7b43875, render)."""
    pad = "  " * indent
    match value:
        case None:
            return ""
        case list():
            items = cast(list[Any], value)
            return "\n".join(f"{pad}- {_flat(each, indent + 1).lstrip()}" for each in items)
        case dict():
            entries = cast(dict[str, Any], value).items()
            nested = {name for name, each in entries if isinstance(each, dict | list)}
            return "\n".join(
                f"{pad}{name}:\n{_flat(each, indent + 1)}" if name in nested else f"{pad}{name}: {_flat(each)}"
                for name, each in entries
            )
        case _:
            return str(value)


_JINJA = ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined, keep_trailing_newline=True
)
_JINJA.filters |= {
    "canonical": canonical,
    "text_or_json": _text_or_json,
    "text_or_spaced": _text_or_spaced,
    "flat": _flat,
}


class Profile(BaseModel):
    """The prompt of a question, and its labels.

    Attributes:
        name: the name of the file.
        chat: whether the prompt is a user turn in the model's chat template. False: the texts here are the whole
            prompt, with the markup that they have.
        system: the system turn of a chat; empty: none.
        state: Jinja template of the prompt's front, given ``state``. All questions about a state share this text.
        question: Jinja template of the text after it, given ``type`` (``noul``, ``choice`` or ``score``),
            ``instructions`` (text or None), ``options`` (see ``ShownOption``), and ``state`` for a model that reads the
            state after the question.
        opening: text after a chat's assistant opening, or after the question, that the answer follows.
        types: the types of questions that it asks.
        outcomes: how a ``noul`` shows its outcomes. ``words``: as options those that the request describes; the answer
            is one of the words ``no`` and ``yes``. ``codes``: both as options, no first; the answer is a code.
            ``unseen``: not at all, so that it must have instructions and no descriptions; the answer is one of the
            words.
        codes: the labels of an option or level, with ``{code}`` in the place of its code.
        no: the labels of a ``noul`` that is false.
        yes: the labels of a ``noul`` that is true.
        levels: the codes of a scale's levels, lowest first. A scale with more levels has the codes of options.
        alphabet: the codes of options. Empty: A to Z; for more options, two letters each.
        token_ids: the tokens that the codes of ``alphabet`` must be; empty: any.
        temperature: divides the log-probabilities of a type's answers before they are normalised.
        temperature_by_options: the same by type and number of options, such as ``choice:3-5``, where there is one.
        option: Jinja template of one option's text, given ``type`` and ``option``; for models with a decision head,
            which reads an option at the last token of this text, and the question at that of ``opening`` (but see
            ``closing``). The texts up to the options, each option's and what follows are tokenised one by one. All
            templates are then given JSON values, not texts. Empty: the answer is read from labels.
        closing: Jinja template of the text after the options, given ``state``; for encoders with a decision head, which
            read each option at the first token of its text and tell the types of questions apart by those of tokens.
            Empty: ``opening`` follows.
        window: with ``closing``, the most tokens of the instructions and all options together; options are cut to fit.
        control: the control tokens of those texts.
        level_offsets: number of levels -> what is added to each level's logit.

    The probabilities of an answer's labels are added. Its first label always counts. The others count where they are
    single tokens of the model and no other answer has them.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    chat: bool
    system: str = ""
    state: str
    question: str
    opening: str = ""
    types: Annotated[tuple[Type, ...], Field(min_length=1)] = ("noul", "choice", "score")
    outcomes: Literal["words", "codes", "unseen"] = "words"
    codes: Labels = ()
    no: Labels = ()
    yes: Labels = ()
    levels: tuple[str, ...] = tuple("0123456789")
    alphabet: tuple[str, ...] = ()
    token_ids: tuple[int, ...] = ()
    temperature: Mapping[Type, Temperature] = {}
    temperature_by_options: Mapping[str, Temperature] = {}
    option: str = ""
    closing: str = ""
    window: int = 0
    control: tuple[str, ...] = ()
    level_offsets: Mapping[int, tuple[Annotated[float, Field(allow_inf_nan=False)], ...]] = {}

    @model_validator(mode="after")
    def _has_labels(self) -> Self:
        if wrong := [count for count, own in self.level_offsets.items() if len(own) != count]:
            raise ValueError(f"level_offsets has {len(self.level_offsets[wrong[0]])} numbers for {wrong[0]} levels")
        if self.option:
            return self
        if "noul" in self.types and self.outcomes != "codes" and not (self.no and self.yes):
            raise ValueError("no and yes must have at least one label each")
        if (self.outcomes == "codes" or self.types != ("noul",)) and not self.codes:
            raise ValueError("codes must have at least one label")
        if self.token_ids and len(self.token_ids) != len(self.alphabet):
            raise ValueError(f"token_ids has {len(self.token_ids)} tokens for {len(self.alphabet)} codes")
        return self

    def front(self, state: Any) -> str:
        """The prompt's text up to the question."""
        return self._state.render(state=state)

    def tail(self, type: str, instructions: Any, options: Sequence[ShownOption], state: Any) -> str:
        """The prompt's text of one question."""
        own = self._question.render(type=type, instructions=instructions, options=options, state=state)
        return own.strip("\n")

    def option_text(self, type: str, option: ShownOption) -> str:
        """The text at whose end, or beginning, a decision head reads an option."""
        return self._option.render(type=type, option=option)

    def closing_text(self, state: Any) -> str:
        """The text after the options."""
        return self._closing.render(state=state)

    def divisor(self, type: Type, options: int) -> float:
        """What the log-probabilities of an answer with so many options are divided by."""
        size = next(size for size, most in _SIZES if options <= most)
        return self.temperature_by_options.get(f"{type}:{size}", self.temperature.get(type, 1.0))

    def labels(self, codes: Sequence[str]) -> tuple[Labels, ...]:
        """The labels of each option, given the options' codes."""
        return tuple(tuple(form.replace(CODE, code) for form in self.codes) for code in codes)

    @cached_property
    def _state(self) -> Template:
        return _JINJA.from_string(self.state)

    @cached_property
    def _question(self) -> Template:
        return _JINJA.from_string(self.question)

    @cached_property
    def _option(self) -> Template:
        return _JINJA.from_string(self.option)

    @cached_property
    def _closing(self) -> Template:
        return _JINJA.from_string(self.closing)


def _read() -> dict[str, Profile]:
    files = [file for file in resources.files("serve_app.profiles").iterdir() if file.name.endswith(".toml")]
    names = {file.name.removesuffix(".toml"): file for file in sorted(files, key=lambda file: file.name)}
    return {name: Profile(name=name, **tomllib.loads(file.read_text("utf-8"))) for name, file in names.items()}


PROFILES: Mapping[str, Profile] = _read()
"""All profiles by name."""

CHAT = "chat-v1"
"""The profile of a chat model that has none of its own."""
PLAIN = "plain-v1"
"""The profile of a model without a chat template."""
DECIDER = "decider-v1"
SHIELDGEMMA = "shieldgemma-v1"
LLAMA_GUARD_3 = "llama-guard-3-v1"
QWEN3_RERANKER = "qwen3-reranker-v1"
DECISION2 = "decision2-v1"
KEV = "kev-v1"
LAYA = "laya-v1"
"""Profiles of the checkpoints that declare themselves, see ``profile_choice.py``."""

NUMBERED: tuple[Type, ...] = ("choice", "score", "noul")
"""The types of questions in the order in which encoders with a decision head number them."""
