"""The sequences of a request that names them alone, as text or token ids, one or several."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from serve_app.errors import InvalidRequestError
from serve_app.tasks.model_facts import ModelFacts
from serve_app.tasks.steps import Steps
from serve_app.tasks.validation import check_count, check_ids, too_many_tokens

Given = str | list[str] | list[int] | list[list[int]]


def is_one(given: Given) -> bool:
    """Whether this is one sequence, not a list of them."""
    return isinstance(given, str) or (bool(given) and isinstance(given[0], int))


def read_sequences(
    model: ModelFacts, given: Given, field: str, *, add_special_tokens: bool = True
) -> Steps[tuple[Sequence[str | None], list[list[int]]]]:
    """The text of each sequence, None if it came as ids, and its ids.

    Args:
        field: the sequences' name in the request.

    Raises:
        InvalidRequestError: there is none, or one is empty, too long, or has ids that the model does not have.
        TooLargeError: there are more sequences or tokens than the limits allow.
    """
    if not given and not isinstance(given, str):
        raise InvalidRequestError(f"{field} is an empty list; send at least one prompt", param=field)
    where = field if is_one(given) and not isinstance(given, str) else f"{field}[{{}}]"
    if is_one(given):
        given = cast(list[str] | list[list[int]], [given])
    check_count(given, model.limits.max_items, field)
    texts: Sequence[str | None] = [None] * len(given)
    found = iter(cast(list[list[int]], given))
    of_text = isinstance(given[0], str)
    if of_text:
        texts = cast(list[str], given)
        found = model.encoded(cast(list[str], given), field, add_special_tokens=add_special_tokens)
    total = 0
    sequences: list[list[int]] = []
    for index, ids in enumerate(found):
        yield
        sequences.append(ids)
        check_ids(ids, model.info.vocab_size, where.format(index), index, of_text=of_text)
        total += len(ids)
        if not 0 < len(ids) <= model.max_prompt_tokens:
            raise InvalidRequestError(
                f"{field}[{index}] has {len(ids)} tokens; this model reads 1 to {model.most_tokens}; "
                "send a prompt of such a length",
                param=field,
                index=index,
            )
        if total > model.limits.max_request_tokens:
            raise too_many_tokens(total, model.limits.max_request_tokens, field, index)
    return texts, sequences
