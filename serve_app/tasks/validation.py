"""Validation that several routes share."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager

from serve_app.contract import ModelInfo
from serve_app.errors import InvalidRequestError, TooLargeError


def check_ids(
    ids: Sequence[int], vocab_size: int, where: str, index: int | None = None, *, of_text: bool = False
) -> None:
    """Check that the model has all of the token ids.

    Args:
        ids: Python integers, not numpy's: 10**30 must get this error, not an overflow.
        where: the field, and the place in it, that the ids came from, such as ``items[417]``.
        index: the item's index.
        of_text: whether they are the tokens of a text: their positions mean nothing to the caller.

    Raises:
        InvalidRequestError: an id is out of the vocabulary; the message says which one.
    """
    if ids and (min(ids) < 0 or max(ids) >= vocab_size):
        at, wrong = next((at, i) for at, i in enumerate(ids) if not 0 <= i < vocab_size)
        place = where if of_text else f"{where}[{at}]"
        raise InvalidRequestError(
            f"{place}: Token ID {_short(wrong)} is out of vocabulary (vocab size: {vocab_size})",
            param=where.partition("[")[0],
            index=index,
        )


def wrong_ids(
    entries: Iterable[tuple[int, Sequence[int]]], vocab_size: int, param: str, *, of_text: bool = False
) -> Iterator[InvalidRequestError]:
    """The error of each entry of the field ``param`` with an id that the model does not have, see ``check_ids``.

    Args:
        entries: the index and the ids of each entry.
    """
    for index, ids in entries:
        try:
            check_ids(ids, vocab_size, f"{param}[{index}]", index, of_text=of_text)
        except InvalidRequestError as error:
            yield error


def wrong_texts(texts: Sequence[str], added: Sequence[int], most: int, param: str) -> Iterator[InvalidRequestError]:
    """The error of each text of the field ``param`` that cannot be tokenised or is too long.

    Args:
        added: the number of characters that are tokenised together with each text.
        most: the most characters that may be tokenised at once.
    """
    for index, (text, more) in enumerate(zip(texts, added, strict=True)):
        try:
            check_text(text, param, index)
            check_characters(len(text) + more, most, param, index)
        except InvalidRequestError as error:
            yield error


def check_count(entries: Sequence[object], most: int, param: str) -> None:
    """Raise TooLargeError when the field ``param`` has more entries than a request may have items."""
    if len(entries) > most:
        raise TooLargeError(
            f"{param} has {len(entries)} entries; this service takes at most {most}; split the request", param=param
        )


def too_many_tokens(tokens: int, most: int, param: str, index: int, counted: str = "") -> TooLargeError:
    """The error of a request that has more tokens than allowed.

    Args:
        tokens: the number of tokens of the prompts up to the entry ``index`` of the field ``param``.
        most: the most tokens that a request may have.
        counted: how the tokens are counted, if that is not obvious.
    """
    return TooLargeError(
        f"the prompts up to {param}[{index}] have {tokens} tokens; a request may have at most {most}{counted}; "
        "split the request",
        param=param,
    )


def check_text(text: str, param: str, index: int | None = None) -> None:
    """Raise InvalidRequestError when a text has a lone surrogate, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        entry = param if index is None else f"{param}[{index}]"
        raise InvalidRequestError(
            f"{entry} must be text without lone surrogates; it has one at character {error.start + 1}",
            param=param,
            index=index,
        ) from None


@contextmanager
def of_field(param: str, index: int | None = None, place: str | None = None) -> Generator[None]:
    """Give an error that names no field this one.

    Args:
        place: what the message begins with; None: the field, and its entry ``index`` if there is one.
    """
    try:
        yield
    except InvalidRequestError as error:
        if error.param:
            raise
        place = place or (param if index is None else f"{param}[{index}]")
        raise InvalidRequestError(f"{place}: {error.message}", param=param, index=index) from None


def check_characters(characters: int, most: int, param: str, index: int | None = None) -> None:
    """Raise InvalidRequestError when a text is so long that tokenising it alone would keep others waiting.

    Args:
        characters: the number of characters of the text and all that is tokenised with it.
        param: the field of the text; ``index`` is its entry there.
    """
    if characters > most:
        entry = param if index is None else f"{param}[{index}]"
        raise InvalidRequestError(
            f"{entry} makes a text of {characters:,} characters; this service tokenises at most {most:,} at once; "
            "shorten it",
            param=param,
            index=index,
        )


def check_work(characters: int, most: int, param: str) -> None:
    """Raise TooLargeError when the texts of a request are too long together to be tokenised."""
    if characters > most:
        raise TooLargeError(
            f"{param}: {characters:,} characters would have to be tokenised, a repeated text counted each time; "
            f"a request may have at most {most:,}; split the request",
            param=param,
        )


class Work:
    """Counts the characters that are tokenised to find the tokens of a request's labels.

    Each label is tokenised after the end of its prompt, and some tokenizers need the whole prompt for this.

    Args:
        most: the most characters that a request may have.
        param: the field to name in the error.
    """

    def __init__(self, most: int, param: str) -> None:
        self._left = self._most = most
        self._param = param

    def spend(self, characters: int) -> None:
        """Raise TooLargeError when these are more characters than are left."""
        self._left -= characters
        if self._left < 0:
            raise TooLargeError(
                f"{self._param}: more than {self._most:,} characters would have to be tokenised to find the labels' "
                "tokens, the end of a prompt again for each label; split the request, or shorten the prompts",
                param=self._param,
            )


def check_decides(info: ModelInfo) -> None:
    """Raise InvalidRequestError when the model is a classifier: it cannot be asked questions."""
    if info.classes:
        raise InvalidRequestError(
            f"this model is a classifier with {info.classes} classes; it has no next-token probabilities; "
            "use /v1/score or /v1/rerank",
            param="model",
        )


def check_scores(info: ModelInfo) -> None:
    """Raise InvalidRequestError when the model answers questions alone."""
    if info.decision_head:
        raise InvalidRequestError(
            f"this model answers typed questions with a {info.decision_head} head, and has neither next-token "
            "probabilities nor classes; use /v1/systemone or /v1/decisions",
            param="model",
        )


def check_causal(info: ModelInfo) -> None:
    """Raise InvalidRequestError when the model has no next-token probabilities."""
    check_decides(info)
    check_scores(info)


def _short(number: int) -> str:
    text = str(number)
    return text if len(text) <= 40 else f"{text[:20]}... ({len(text)} digits)"
