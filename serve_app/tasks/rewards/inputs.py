"""The texts of a request for rewards, and what is known of each: a prompt and its logits, or an error."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, cast

from pydantic import Field

from serve_app.errors import InvalidRequestError, ScoringError
from serve_app.schemas import IdLists, Ids, ItemError, Message, Messages, RequestBody, Text, Texts, Usage

Entries = list[str] | list[list[int]]


class RewardRequest(RequestBody):
    """What the requests for rewards in vLLM's and sglang's shapes have.

    Attributes:
        input: one text or several, as text or token ids. Text may be a whole prompt with the model's own markup.
        messages: a conversation in place of ``input``, made into text by the model's chat template.
        add_special_tokens: add the tokenizer's special tokens. None: to ``input``, since a chat template has them.
            There is at most one BOS.
        add_generation_prompt: end the conversation's text where the model's next answer begins. None: false, since the
            last message is what is rewarded.
        on_error: ``"item"``: a text that is wrong, or for which the model's output is not finite, has null for its
            result and an entry in ``errors``. ``"fail"``: such a text fails the request.
        request_id: a part of the answer's ``id``. None: the id in the header, or a new one.
        timeout_s: seconds after which the request gets a 504, see ``ScoreRequest``.
    """

    model: Text | None = None
    input: Annotated[Text | Texts | Ids | IdLists | None, Field(union_mode="left_to_right")] = None
    messages: Messages | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    on_error: Literal["fail", "item"] = "fail"
    request_id: Text | None = None
    timeout_s: Annotated[float, Field(gt=0)] | None = None

    @property
    def inputs(self) -> Inputs:
        """The texts, free of the request's shape.

        Raises:
            InvalidRequestError: there is no text, or both a text and a conversation.
        """
        special, fail = self.add_special_tokens, self.on_error == "fail"
        if (self.input is None) == (self.messages is None):
            raise InvalidRequestError("send either input or messages", param="input")
        if self.messages is not None:
            if not self.messages:
                raise InvalidRequestError("messages is empty; send at least one message", param="messages")
            return Inputs("messages", self.messages, special is True, fail, answer=self.add_generation_prompt is True)
        if self.add_generation_prompt:
            raise InvalidRequestError(
                "add_generation_prompt is for messages, not for input; leave it out", param="add_generation_prompt"
            )
        return Inputs("input", _entries(self.input), special is not False, fail)


@dataclass(frozen=True, slots=True)
class Inputs:
    """Texts to reward.

    Attributes:
        field: their name in the request.
        entries: texts, or lists of token ids, or the messages of one conversation.
        special: whether to add the tokenizer's special tokens to text.
        fail: whether a wrong text fails the request.
        answer: whether a conversation's text goes on to where the model's answer begins.
    """

    field: str
    entries: Entries | list[Message]
    special: bool
    fail: bool
    answer: bool = False

    @property
    def conversation(self) -> list[Message] | None:
        """The conversation; None if there are texts or ids."""
        return cast(list[Message], self.entries) if self.field == "messages" else None

    def place(self, index: int) -> str:
        """The place of a text in the request."""
        return self.field if self.conversation is not None else f"{self.field}[{index}]"


@dataclass(frozen=True, slots=True)
class Read:
    """What the model says of one text.

    Attributes:
        logits: one for each class.
        label_mass: how much of a judge's next-token distribution its answers cover, 0 to 1. None: a classifier.
    """

    logits: Sequence[float]
    label_mass: float | None = None


Outcome = Read | ScoringError
"""What the model says of a text, or why it says nothing."""


@dataclass(frozen=True, slots=True)
class Reads:
    """What the model says of the texts of a request, in their order."""

    outcomes: Sequence[Outcome]
    usage: Usage

    def errors(self, *, fail: bool) -> list[ItemError] | None:
        """The errors of the texts that have none of their own; None if such a text fails the request."""
        if fail:
            return None
        return [
            ItemError(index=index, code=outcome.status, message=outcome.message)
            for index, outcome in enumerate(self.outcomes)
            if isinstance(outcome, ScoringError)
        ]


class Wrong:
    """The errors of the texts that are wrong.

    Args:
        fail: whether the first of them is raised.
    """

    def __init__(self, *, fail: bool) -> None:
        self._fail = fail
        self.by_index: dict[int, ScoringError] = {}

    def add(self, error: ScoringError) -> None:
        """Keep the first error of a text, or raise it."""
        if self._fail:
            raise error
        assert error.index is not None
        self.by_index.setdefault(error.index, error)


def _entries(given: str | list[str] | list[int] | list[list[int]] | None) -> Entries:
    if isinstance(given, str):
        return [given]
    if not given:
        raise InvalidRequestError("input is an empty list; send at least one text", param="input")
    return [cast(list[int], given)] if isinstance(given[0], int) else cast(Entries, given)
