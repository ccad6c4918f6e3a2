"""Profiles: how a typed question becomes a prompt, and which tokens answer it.

A profile is a TOML file in this folder. Its name is permanent, since answers depend on every byte of it: a better
wording gets a new name.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from functools import cached_property
from importlib import resources
from typing import Annotated, Literal, NamedTuple, Self

from jinja2 import StrictUndefined, Template
from jinja2.sandbox import ImmutableSandboxedEnvironment
from pydantic import BaseModel, ConfigDict, Field, model_validator

CODE = "{code}"
"""The place of an option's code in a label."""

Labels = tuple[str, ...]
Type = Literal["noul", "choice", "score"]
Temperature = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class ShownOption(NamedTuple):
    """An option as a question shows it.

    Attributes:
        text: its name and description in one text.
        description: None if it has none.
    """

    code: str
    text: str
    name: str
    description: str | None = None


_JINJA = ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined, keep_trailing_newline=True
)


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

    @model_validator(mode="after")
    def _has_labels(self) -> Self:
        if "noul" in self.types and self.outcomes != "codes" and not (self.no and self.yes):
            raise ValueError("no and yes must have at least one label each")
        if (self.outcomes == "codes" or self.types != ("noul",)) and not self.codes:
            raise ValueError("codes must have at least one label")
        if self.token_ids and len(self.token_ids) != len(self.alphabet):
            raise ValueError(f"token_ids has {len(self.token_ids)} tokens for {len(self.alphabet)} codes")
        return self

    def front(self, state: str) -> str:
        """The prompt's text up to the question."""
        return self._state.render(state=state)

    def tail(self, type: str, instructions: str | None, options: Sequence[ShownOption], state: str) -> str:
        """The prompt's text of one question."""
        own = self._question.render(type=type, instructions=instructions, options=options, state=state)
        return own.strip("\n")

    def labels(self, codes: Sequence[str]) -> tuple[Labels, ...]:
        """The labels of each option, given the options' codes."""
        return tuple(tuple(form.replace(CODE, code) for form in self.codes) for code in codes)

    @cached_property
    def _state(self) -> Template:
        return _JINJA.from_string(self.state)

    @cached_property
    def _question(self) -> Template:
        return _JINJA.from_string(self.question)


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
"""Profiles of the checkpoints that declare themselves, see ``profile_choice.py``."""
