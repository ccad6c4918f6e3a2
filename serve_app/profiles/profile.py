"""Profiles: how a typed question becomes a prompt, and which tokens answer it.

A profile is a TOML file in this folder. Its name is permanent, since answers depend on every byte of it: a better
wording gets a new name.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from functools import cached_property
from importlib import resources
from typing import Annotated, Literal, NamedTuple

from jinja2 import StrictUndefined, Template
from jinja2.sandbox import ImmutableSandboxedEnvironment
from pydantic import BaseModel, ConfigDict, Field

CODE = "{code}"
"""The place of an option's code in a label."""

Labels = Annotated[tuple[str, ...], Field(min_length=1)]
Temperature = Annotated[float, Field(gt=0)]


class ShownOption(NamedTuple):
    """An option as a question shows it: its code, and its name and description in one text."""

    code: str
    text: str


_JINJA = ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined, keep_trailing_newline=True
)


class Profile(BaseModel):
    """The prompt of a question, and its labels.

    Attributes:
        name: the name of the file.
        chat: whether the prompt is a user turn in the model's chat template. False: plain text.
        system: the system turn of a chat; empty: none.
        state: Jinja template of the prompt's front, given ``state``. All questions about a state share this text.
        question: Jinja template of the text after it, given ``type`` (``noul``, ``choice`` or ``score``),
            ``instructions`` (text or None) and ``options``, each with ``code`` and ``text``. A ``noul`` has an option
            for each outcome that the request describes.
        opening: text after a chat's assistant opening, or after the question, that the answer follows.
        codes: the labels of an option or level, with ``{code}`` in the place of its code.
        no: the labels of a ``noul`` that is false.
        yes: the labels of a ``noul`` that is true.
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
    codes: Labels
    no: Labels
    yes: Labels
    temperature: Mapping[Literal["noul", "choice", "score"], Temperature] = {}

    def front(self, state: str) -> str:
        """The prompt's text up to the question."""
        return self._state.render(state=state)

    def tail(self, type: str, instructions: str | None, options: Sequence[ShownOption]) -> str:
        """The prompt's text of one question."""
        return self._question.render(type=type, instructions=instructions, options=options).strip("\n")

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
