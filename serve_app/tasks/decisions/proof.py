"""Proof at load that a profile's labels can be read with a model's tokenizer and chat template."""

from __future__ import annotations

import string
import sys
from collections.abc import Iterator, Sequence

from serve_app.errors import InvalidRequestError
from serve_app.profiles.profile import Labels, Profile, ShownOption, Type
from serve_app.tasks.chat import ChatTemplate
from serve_app.tasks.decisions.labels import PAIRS, lay_out
from serve_app.tasks.labels import added_tokens, quoted
from serve_app.tasks.steps import finish
from serve_app.tasks.tokenizer import Ending, TextTokenizer

_SHOWN = len(string.ascii_uppercase) + 1
"""The most options of a prompt that is tried. More would change no prompt's end, where the answer is read."""


def unproved(profile: Profile, chat: ChatTemplate | None, tokenizer: TextTokenizer) -> str | None:
    """Why a profile's answers cannot be told apart where they are read; None if they can.

    No label may begin another answer's, or change the tokens of the prompt. Codes with declared tokens must have these.
    A prompt for a decision head has no labels, but perhaps control tokens, which the tokenizer must have.
    """
    if missing := [token for token in profile.control if token not in tokenizer.plain.control]:
        return (
            f"this model's tokenizer has no control token {quoted(missing[0])}, and the profile {profile.name} has it"
        )
    if profile.option:
        return None
    if profile.chat and profile.system and not (chat and chat.system):
        return f"this model's chat template shows no system text, and the profile {profile.name} has one"
    try:
        for type, codes, words in _sets(profile):
            shown = [ShownOption(code, "option", "option") for code in codes[:_SHOWN]]
            text = profile.front("") + profile.tail(type, "Question?", shown, "")
            if profile.chat and chat:
                system = [{"role": "system", "content": profile.system}] if profile.system else []
                text = chat.render([*system, {"role": "user", "content": text}])
            if wrong := _wrong(words, text + profile.opening, profile, codes, tokenizer.guarded):
                return wrong
    except InvalidRequestError as error:
        return error.message
    return None


def _wrong(
    words: Sequence[Labels], text: str, profile: Profile, codes: Sequence[str], tokenizer: TextTokenizer
) -> str | None:
    """The first code after a prompt that is not the token that it was declared to be.

    Raises:
        InvalidRequestError: see ``lay_out``.
    """
    end = text[tokenizer.last_boundary(text) :]
    (prompt,) = tokenizer.encode([end], add_special_tokens=False)
    ending = Ending(tokenizer, [], end, [])
    finish(lay_out(words, ending, prompt, sys.maxsize))
    if codes is not profile.alphabet or not profile.token_ids:
        return None
    for code, wanted, ids in zip(codes, profile.token_ids, ending.followed_by([w for w, *_ in words]), strict=True):
        if added_tokens(prompt, ids) != (wanted,):
            return f"the code {quoted(code)} is not this model's token {wanted}, as its files say"
    return None


def _sets(profile: Profile) -> Iterator[tuple[Type, tuple[str, ...], tuple[Labels, ...]]]:
    """Each set of answers that a question may have: its type, the options' codes and the answers' labels."""
    options = [profile.alphabet] if profile.alphabet else [tuple(string.ascii_uppercase), PAIRS]
    for type in profile.types:
        if type == "noul" and profile.outcomes != "codes":
            yield type, (), (profile.no, profile.yes)
            continue
        if type == "score" and profile.levels:
            yield type, profile.levels, profile.labels(profile.levels)
        for codes in options if type == "choice" or not profile.levels else ():
            yield type, codes, profile.labels(codes)
