"""A checkpoint's chat template: a conversation as the text that the model was trained on, up to its answer.

The text is the one that ``apply_chat_template`` of transformers makes, with reasoning switched off. What the messages
say is guarded (``plain_text.py``), so that it is text wherever it stands.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError

from serve_app.errors import InvalidRequestError
from serve_app.tasks.plain_text import original
from serve_app.tasks.sandbox import BoundedTemplate
from serve_app.tasks.tokenizer import TextTokenizer

TOGGLES: Mapping[str, Any] = {
    "enable_thinking": False,
    "thinking": False,
    "enable_reasoning": False,
    "reasoning": False,
    "reasoning_effort": "none",
    "thinking_budget": 0,
}
"""The variables by which templates switch reasoning, and the values that switch it off."""

_REASONING = {
    "<think>": "</think>",
    "<thinking>": "</thinking>",
    "<thought>": "</thought>",
    "<reasoning>": "</reasoning>",
    "<|think|>": "<|/think|>",
    "<seed:think>": "</seed:think>",
    "[THINK]": "[/THINK]",
    "<|START_THINKING|>": "<|END_THINKING|>",
    "<|begin_of_thought|>": "<|end_of_thought|>",
    "<|channel|>analysis": "<|channel|>final",
}
"""What opens and closes a block of reasoning."""

_QUESTION, _ANSWER, _SYSTEM = "Is question 7351 here?", "Answer 9264 is here.", "Rule 4817 is here."
"""Texts of the conversations that are tried when a template is loaded, as no template has them."""
_REMEDY = "send the whole prompt as text, with the model's own markup, to /v1/score or /tokenize"


class _RefusedError(Exception):
    """The template cannot be used, or not for a conversation, for the reason in the message."""


class ChatTemplate:
    """A chat template, proved at load: a prompt ends where the model's answer begins, without a block of reasoning.

    Attributes:
        problem: why the template is not used; None if it is used.
        system: whether it shows system messages.
        off: the variables that switch its reasoning off.
    """

    def __init__(self, source: str, tokenizer: TextTokenizer) -> None:
        self._tokenizer = tokenizer
        facts = tokenizer.facts
        names = ("bos_token", "eos_token", "unk_token", "pad_token")
        self._tokens = {name: token for name in names if (token := getattr(facts, name)) is not None}
        self.problem: str | None = None
        self.system = False
        self.off: Mapping[str, Any] = {}
        try:
            self._template = _loaded(source)
            self.off = self._proved_off()
            self.system = self._shows_system()
        except _RefusedError as error:
            self.problem = f"this model's chat template is not used, since {error}; {_REMEDY}"

    @classmethod
    def load(cls, tokenizer: TextTokenizer) -> ChatTemplate | None:
        """Load the template in the tokenizer's files; None if there is none."""
        source = tokenizer.facts.chat_template
        return None if source is None else cls(source, tokenizer)

    def render(self, messages: Sequence[Mapping[str, str]], *, answer: bool = True) -> str:
        """The prompt of a conversation, to be tokenised by ``TextTokenizer.guarded`` without special tokens.

        Args:
            messages: the messages, each with its ``role`` and its ``content``.
            answer: whether the prompt goes on to where the model's answer begins.

        Raises:
            InvalidRequestError: the template is not used, refuses the conversation, or makes markup of what it says.
        """
        if self.problem:
            raise InvalidRequestError(self.problem, param="messages")
        plain = self._tokenizer.plain
        guarded = [{**message, "content": plain.guard(message["content"])} for message in messages]
        neutral = [{**message, "content": "a" if message["content"].strip() else ""} for message in messages]
        try:
            prompt = self._rendered(guarded, self.off, answer)
            # A template that removes a part of a text may put a control token together that the guard did not see.
            if plain.count(prompt) > plain.count(self._rendered(neutral, self.off, answer)):
                raise _RefusedError("it would make a control token of their text")
            return prompt
        except _RefusedError as error:
            said = original(str(error))
            raise InvalidRequestError(
                f"this model's chat template cannot show these messages: {said}", param="messages"
            ) from None

    def _rendered(self, messages: Sequence[Mapping[str, str]], off: Mapping[str, Any], answer: bool) -> str:
        variables = {**self._tokens, **off, "messages": [dict(message) for message in messages]}
        variables |= {"tools": None, "documents": None, "add_generation_prompt": answer}
        try:
            return self._template.render(variables, sum(len(message["content"]) for message in messages))
        except Exception as error:  # a template is code, and raises what it likes
            raise _RefusedError(_said(error)) from None

    def _proved_off(self) -> Mapping[str, Any]:
        """The toggles with which the answer follows the prompt directly: all that the template names, or else none.

        Raises:
            _RefusedError: there are no such toggles, or the template cannot be rendered.
        """
        named = {name: value for name, value in TOGGLES.items() if name in self._template.variables}
        try:
            self._prove(named)
        except _RefusedError:
            if not named:
                raise
            self._prove({})
            return {}
        return named

    def _prove(self, off: Mapping[str, Any]) -> None:
        question = {"role": "user", "content": _QUESTION}
        prompt = self._rendered([question], off, True)
        finished = self._rendered([question, {"role": "assistant", "content": _ANSWER}], off, False)
        for text, content in ((prompt, _QUESTION), (finished, _QUESTION), (finished, _ANSWER)):
            if text.count(content) != 1:
                raise _RefusedError(f"it shows a message's text {text.count(content)} times in place of once")
        opening = prompt[prompt.index(_QUESTION) + len(_QUESTION) :]
        before = finished[finished.index(_QUESTION) + len(_QUESTION) : finished.index(_ANSWER)]
        for opens, closes in _REASONING.items():
            if opening.count(opens) > opening.count(closes):
                raise _RefusedError(f"its prompt opens a block of reasoning ({opens}) that it does not close")
        own, wanted = opening.rstrip(), before.rstrip()
        if own == wanted or (own.startswith(wanted) and _is_empty_reasoning(own[len(wanted) :])):
            return
        if wanted.startswith(own):
            raise _RefusedError(f"a finished answer begins with {wanted[len(own) :]!r}, which its prompt lacks")
        raise _RefusedError(f"its prompt ends in {opening!r}, but a finished answer follows {before!r}")

    def _shows_system(self) -> bool:
        messages = [{"role": "system", "content": _SYSTEM}, {"role": "user", "content": _QUESTION}]
        try:
            return _SYSTEM in self._rendered(messages, self.off, True)
        except _RefusedError:
            return False


def _loaded(source: str) -> BoundedTemplate:
    try:
        return BoundedTemplate(source)
    except TemplateError as error:
        raise _RefusedError(_said(error)) from None


def _said(error: Exception) -> str:
    """What an error says, without the place in the template."""
    return (error.message if isinstance(error, TemplateError) else str(error)) or type(error).__name__


def _is_empty_reasoning(text: str) -> bool:
    """Whether a text is a block of reasoning, or the end of one, with nothing in it."""
    return any("".join(text.split()) in (opens + closes, closes) for opens, closes in _REASONING.items())
