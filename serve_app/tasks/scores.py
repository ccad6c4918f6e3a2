"""Scores from an engine's values: the rows of an answer. Plain Python, since the front end must not import JAX."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from serve_app.contract import BatchResult
from serve_app.errors import InternalError, ScoringError
from serve_app.schemas import LOWEST, ItemError, PromptTokensDetails, ScoreRequest, ScoreResponse, ScoreRow, Usage
from serve_app.tasks.prompts import PreparedItems, Prompt

Float64 = npt.NDArray[np.float64]


def rows(request: ScoreRequest, prepared: PreparedItems, result: BatchResult) -> list[ScoreRow]:
    """Make the rows of the prepared items, in order.

    Raises:
        InternalError: the model's output for an item is not finite, and the request does not have
            ``on_error: "item"``.
    """
    answered = [_failed(error) for error in prepared.errors]
    tokens = result.values[prepared.parts].astype(np.float64)
    lengths = np.concatenate([np.zeros(0, np.int64), *(prompt.layout.lengths for prompt in prepared.prompts)])
    # A label's logprob is the sum of its tokens' logprobs.
    sums: Float64 = np.add.reduceat(tokens, np.cumsum(lengths) - lengths) if len(lengths) else tokens
    values: list[float] = (sums / lengths if request.length_normalize else sums).tolist()
    start = 0
    for prompt in prepared.prompts:
        stop = start + len(prompt.layout.lengths)
        try:
            answered.append(_row(request, prompt, values[start:stop], sums[start:stop], classes=prepared.classes))
        except InternalError as error:
            if request.on_error == "fail":
                raise
            answered.append(_failed(error))
        start = stop
    return sorted(answered, key=lambda row: row.index)


def _row(request: ScoreRequest, prompt: Prompt, values: list[float], sums: Float64, *, classes: bool) -> ScoreRow:
    if classes and not request.apply_softmax:
        scores = class_logits(values, prompt.index)
    else:
        scores = label_scores(values, prompt.index, softmax=request.apply_softmax, temperature=request.temperature)
    mass = None
    if request.return_label_mass:
        mass = min(1.0, math.fsum(math.exp(sums[label]) for label in prompt.layout.disjoint))
    return ScoreRow(
        index=prompt.index,
        scores=scores,
        token_logprobs=[max(value, LOWEST) for value in values] if request.return_token_logprobs else None,
        label_tokens=prompt.spelling,
        label_mass=mass,
        prompt_token_ids=prompt.ids.tolist() if request.return_prompt_token_ids else None,
        truncated=prompt.dropped if request.truncate == "item" else None,
    )


def _failed(error: ScoringError) -> ScoreRow:
    assert error.index is not None
    return ScoreRow(index=error.index, error=ItemError(index=error.index, code=error.status, message=error.message))


def usage(prompt_tokens: int, computed_tokens: int, completion_tokens: int = 0) -> Usage:
    """Usage of a request. Labels do not count, though some of their tokens may have been computed."""
    return Usage(
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        total_tokens=prompt_tokens + completion_tokens,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=max(0, prompt_tokens - computed_tokens)),
    )


def size(request: ScoreRequest, prepared: PreparedItems) -> int:
    """The approximate size of the rows, in values."""
    return len(prepared.parts) + (prepared.prompt_tokens if request.return_prompt_token_ids else 0)


def answer(request: ScoreRequest, prepared: PreparedItems, model: str, result: BatchResult) -> ScoreResponse:
    """Make the answer to a whole request.

    Args:
        model: the model's name in the answer.

    Raises:
        InternalError: see ``rows``.
    """
    answered = rows(request, prepared, result)
    words = request.labels is not None
    # The values are not validated again: one call for millions of values would block all threads.
    return ScoreResponse.model_construct(
        scores=[row.scores for row in answered],
        model=model,
        usage=usage(prepared.prompt_tokens, int(result.computed_tokens.sum())),
        token_logprobs=[row.token_logprobs for row in answered] if request.return_token_logprobs else None,
        label_tokens=[row.label_tokens for row in answered] if words else None,
        label_mass=[row.label_mass for row in answered] if request.return_label_mass else None,
        prompt_token_ids=[row.prompt_token_ids for row in answered] if request.return_prompt_token_ids else None,
        truncated=[row.truncated for row in answered] if request.truncate == "item" else None,
        errors=[row.error for row in answered if row.error] if request.on_error == "item" else None,
    )


def label_scores(
    values: Sequence[float], index: int, *, softmax: bool, temperature: float = 1.0, field: str = "items"
) -> list[float]:
    """The probabilities of one item's labels from their logprobs, in plain floats.

    Args:
        values: logprobs in nats; with ``softmax`` any constant may be added to all of them.
        index: the item's index, for the error.
        temperature: divides the values after centring, so that a tiny temperature cannot overflow.
        field: the item's field, for the error.

    Raises:
        InternalError: a value is NaN or +inf, or with ``softmax`` all values are -inf.
    """
    peak = max(values)
    if any(math.isnan(value) for value in values) or peak == math.inf or (softmax and peak == -math.inf):
        raise not_finite(index, field)
    if not softmax:
        # A computed logprob may be above 0 by float32's last digit.
        return [min(1.0, math.exp(value)) for value in values]
    weights = [math.exp((value - peak) / temperature) for value in values]
    total = math.fsum(weights)
    return [weight / total for weight in weights]


def class_logits(values: Sequence[float], index: int, *, field: str = "items") -> list[float]:
    """One item's class logits, unchanged.

    Args:
        index: the item's index, for the error.
        field: the item's field, for the error.

    Raises:
        InternalError: a value is not finite.
    """
    if not all(map(math.isfinite, values)):
        raise not_finite(index, field)
    return list(values)


def not_finite(index: int, field: str) -> InternalError:
    """The error of an entry of a field for which the model's output is NaN or infinite."""
    entry = field.removesuffix("s")
    return InternalError(
        f"{field}[{index}]: the model's output is not finite, so there is no score; leave this {entry} out",
        param=field,
        index=index,
    )
