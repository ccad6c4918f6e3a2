"""Rewards of a model with a classification head: the class logits at each text's last token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice
from typing import cast

import numpy as np

from serve_app.contract import BatchResult
from serve_app.errors import InternalError, InvalidRequestError
from serve_app.tasks import labels
from serve_app.tasks.model_facts import ModelFacts
from serve_app.tasks.prompts import PreparedItems, Prompt, packed
from serve_app.tasks.rewards.inputs import Inputs, Outcome, Read, Reads, Wrong
from serve_app.tasks.scores import class_logits, usage
from serve_app.tasks.steps import Steps
from serve_app.tasks.task import PreparedRequest
from serve_app.tasks.tokenizer import Joined
from serve_app.tasks.validation import (
    check_characters,
    check_count,
    check_ids,
    check_work,
    of_field,
    too_many_tokens,
    wrong_texts,
)


def prepare(model: ModelFacts, inputs: Inputs) -> Steps[PreparedRequest[Reads]]:
    """Build one prompt for each text, read for all classes.

    Raises:
        InvalidRequestError: a text is wrong, and the request does not go on without it.
        TooLargeError: the request has more texts or tokens than the limits allow.
    """
    wrong = Wrong(fail=inputs.fail)
    layout = labels.of_tokens(range(model.info.classes))
    prompts: list[Prompt] = []
    total = 0
    for index, ids in _tokenised(model, inputs, wrong):
        yield
        try:
            with of_field(inputs.field, index, inputs.place(index)):
                if isinstance(ids, InvalidRequestError):
                    raise ids
            _check(model, inputs, index, ids)
        except InvalidRequestError as error:
            wrong.add(error)
            continue
        total += len(ids)
        if total > model.limits.max_request_tokens:
            raise too_many_tokens(total, model.limits.max_request_tokens, inputs.field, index)
        prompts.append(Prompt(index, np.asarray(ids, np.int32), layout))
    made = packed(prompts, (), 0, vocab_logprobs=False, classes=True, pad=model.info.pad_token_id)
    return PreparedRequest(made.batch, 0, len(prompts), len(made.parts), partial(_reads, inputs, made, wrong))


def _tokenised(
    model: ModelFacts, inputs: Inputs, wrong: Wrong
) -> Iterator[tuple[int, list[int] | InvalidRequestError]]:
    """The index and the ids of each text, or its error, as they are asked for."""
    tokenizer = model.tokenizer
    if inputs.conversation is not None:
        texts = [model.prompt_of(inputs.conversation, answer=inputs.answer)]
        check_characters(len(texts[0]), model.max_text_characters, inputs.field)
        tokenizer = tokenizer.guarded
    else:
        check_count(inputs.entries, model.limits.max_items, inputs.field)
        if isinstance(inputs.entries[0], list):
            yield from enumerate(cast(list[list[int]], inputs.entries))
            return
        texts = cast(list[str], inputs.entries)
        for error in wrong_texts(texts, [0] * len(texts), model.max_text_characters, inputs.field):
            wrong.add(error)
    kept = [index for index in range(len(texts)) if index not in wrong.by_index]
    check_work(sum(len(texts[index]) for index in kept), model.max_request_characters, inputs.field)
    joined = Joined(tokenizer, "", add_special_tokens=inputs.special, many=False)
    numbers = iter(kept)
    for chunk in joined.checked(texts[index] for index in kept):
        yield from zip(islice(numbers, len(chunk)), chunk, strict=True)


def _check(model: ModelFacts, inputs: Inputs, index: int, ids: Sequence[int]) -> None:
    place = inputs.place(index)
    check_ids(ids, model.info.vocab_size, place, index, of_text=not isinstance(inputs.entries[0], list))
    if not 0 < len(ids) <= model.max_prompt_tokens:
        raise InvalidRequestError(
            f"{place} has {len(ids)} tokens; this model reads 1 to {model.most_tokens}; send a text of such a length",
            param=inputs.field,
            index=index,
        )


def _reads(inputs: Inputs, made: PreparedItems, wrong: Wrong, result: BatchResult) -> Reads:
    """Make what the model says of the texts from the engine's values.

    Raises:
        InternalError: the model's output for a text is not finite, and the request does not go on without it.
    """
    found: dict[int, Outcome] = dict(wrong.by_index)
    rows = result.values[made.parts].reshape(len(made.prompts), -1).tolist() if made.prompts else []
    for prompt, row in zip(made.prompts, rows, strict=True):
        try:
            found[prompt.index] = Read(class_logits(row, prompt.index, field=inputs.field))
        except InternalError as error:
            if inputs.fail:
                raise
            found[prompt.index] = error
    used = usage(made.prompt_tokens, int(result.computed_tokens.sum()))
    return Reads([found[index] for index in sorted(found)], used)
