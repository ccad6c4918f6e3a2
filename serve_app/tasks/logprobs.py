"""A teacher's logprobs: ``POST /v1/logprobs``, for every position of sequences, in JSON or as numpy arrays."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field

from serve_app import compat
from serve_app.contract import MOST_TOP, BatchResult, TokenBatch
from serve_app.errors import InvalidRequestError
from serve_app.schemas import IdLists, Ids, RequestBody, ResponseBody, Text, Texts, Usage
from serve_app.tasks.model_facts import ModelFacts
from serve_app.tasks.positions import (
    LOWEST_TEMPERATURE,
    MOST_IN_BINARY,
    MOST_IN_JSON,
    Found,
    Positions,
    check_candidates,
    check_size,
    check_start,
    check_top,
    in_json,
)
from serve_app.tasks.scores import usage
from serve_app.tasks.sequences import read_sequences
from serve_app.tasks.steps import Steps
from serve_app.tasks.task import Binary, Prepare, PreparedRequest, Task
from serve_app.tasks.validation import check_causal

NPZ = "application/x-npz"
"""The media type of numpy's archives of arrays."""


class LogprobsRequest(RequestBody):
    """Request for the logprobs of the tokens of sequences: ``POST /v1/logprobs``.

    Attributes:
        input: one sequence or several, as text or token ids.
        start: the first token whose logprob is returned, counted from 0: one number for all sequences, or one for each.
            At least 1, since nothing precedes the first token.
        top: also return so many of the most probable tokens at each position, at most 1,024; of equally probable ones
            those with smaller ids.
        candidates: for each sequence, for each token from the start on, ids whose logprobs in the place of this token
            are returned, too. The lists may be empty and of any lengths.
        temperature: divides the logits before the softmax, 0.001 to 1,000.
        add_special_tokens: add the tokenizer's special tokens to text, such as a begin-of-sequence token.
        format: ``"json"``, or ``"npz"``: arrays of numpy, which ``numpy.load`` reads, see docs/logprobs.md.
        timeout_s: seconds after which the request gets a 504, see ``ScoreRequest``.
    """

    foreign = compat.LOGPROBS

    model: Text = "default"
    input: Annotated[Text | Texts | Ids | IdLists, Field(union_mode="left_to_right")]
    start: int | Ids = 1
    top: Annotated[int, Field(ge=0, le=MOST_TOP)] = 0
    candidates: Annotated[list[IdLists], Field(fail_fast=True)] | None = None
    temperature: Annotated[float, Field(ge=LOWEST_TEMPERATURE, le=1000)] = 1.0
    add_special_tokens: bool = True
    format: Literal["json", "npz"] = "json"
    timeout_s: Annotated[float, Field(gt=0)] | None = None


class SequenceLogprobs(ResponseBody):
    """The logprobs of one sequence, in nats, over the whole vocabulary. All lists have an entry for each token from the
    start on. A logprob of -inf is float32's lowest number, since JSON has no infinity.

    Attributes:
        start: the first of these tokens, counted from 0.
        token_ids: these tokens.
        logprobs: the logprob of each token, given all tokens before it.
        candidates: with ``candidates``: the logprobs of the candidates at each position, in their order.
        top_ids: with ``top``: the most probable tokens at each position, the most probable first.
        top_logprobs: with ``top``: their logprobs.
    """

    index: int
    start: int
    token_ids: list[int]
    logprobs: list[float]
    candidates: list[list[float]] | None = None
    top_ids: list[list[int]] | None = None
    top_logprobs: list[list[float]] | None = None


class LogprobsResponse(ResponseBody):
    """The logprobs of each sequence, in the order of the request.

    Attributes:
        data: one entry for each sequence.
    """

    object: Literal["logprobs"] = "logprobs"
    model: str
    data: list[SequenceLogprobs]
    usage: Usage


def positions_of(model: ModelFacts, request: LogprobsRequest) -> Steps[Positions]:
    """Check a request.

    Raises:
        InvalidRequestError: a field is wrong, or the model is not causal.
        TooLargeError: there are more sequences or tokens than the limits allow, or the answer would be too large.
    """
    check_causal(model.info)
    check_top(request.top, model, "top")
    _, sequences = yield from read_sequences(
        model, request.input, "input", add_special_tokens=request.add_special_tokens
    )
    starts = [request.start] * len(sequences) if isinstance(request.start, int) else request.start
    if len(starts) != len(sequences):
        raise InvalidRequestError(
            f"start has {len(starts)} numbers; send one for all sequences, or one for each of the {len(sequences)}",
            param="start",
        )
    for index, (ids, start) in enumerate(zip(sequences, starts, strict=True)):
        check_start(start, len(ids), "start", index)
    if request.candidates is not None:
        counts = [len(ids) - start for ids, start in zip(sequences, starts, strict=True)]
        yield from check_candidates(request.candidates, counts, model.info.vocab_size)
    arrays = [np.asarray(ids, np.int32) for ids in sequences]
    positions = Positions(arrays, starts, request.candidates, request.top, request.temperature)
    if request.format == "json":
        check_size(
            positions.numbers, MOST_IN_JSON, 'send format: "npz", a smaller top, later starts or fewer sequences'
        )
    check_size(positions.numbers, MOST_IN_BINARY, "send a smaller top, later starts or fewer sequences")
    return positions


def as_json(positions: Positions, found: Sequence[Found], model: str, used: Usage) -> LogprobsResponse:
    """The answer in JSON."""
    data: list[SequenceLogprobs] = []
    for index, (own, start) in enumerate(zip(found, positions.starts, strict=True)):
        data.append(
            # The values are not validated again: one call for millions of values would block all threads.
            SequenceLogprobs.model_construct(
                index=index,
                start=start,
                token_ids=own.ids.tolist(),
                logprobs=in_json(own.logprobs),
                candidates=None if positions.candidates is None else list(own.candidate_rows),
                top_ids=own.top_ids.tolist() if positions.top else None,
                top_logprobs=in_json(own.top_logprobs) if positions.top else None,
            )
        )
    return LogprobsResponse(model=model, data=data, usage=used)


def as_npz(positions: Positions, found: Sequence[Found], used: Usage) -> Binary:
    """The answer as arrays, all sequences one after the other."""
    counts = [len(own.ids) for own in found]
    arrays: dict[str, npt.NDArray[Any]] = {
        "offsets": np.cumsum([0, *counts]),
        "starts": np.asarray(positions.starts, np.int64),
        "token_ids": np.concatenate([own.ids for own in found]),
        "logprobs": np.concatenate([own.logprobs for own in found]),
        "usage": np.array([used.prompt_tokens, used.prompt_tokens_details.cached_tokens]),
    }
    if positions.candidates is not None:
        arrays["candidates"] = np.concatenate([own.candidates for own in found])
        of_each = np.concatenate([own.counts for own in found])
        arrays["candidate_offsets"] = np.concatenate([np.zeros(1, np.int64), np.cumsum(of_each)])
    if positions.top:
        arrays["top_ids"] = np.concatenate([own.top_ids for own in found])
        arrays["top_logprobs"] = np.concatenate([own.top_logprobs for own in found])
    content = io.BytesIO()
    np.savez(content, allow_pickle=False, **arrays)
    return Binary(content.getvalue(), NPZ)


def _builder(model: ModelFacts) -> Prepare[LogprobsRequest, LogprobsResponse | Binary]:
    def prepare(request: LogprobsRequest, _: str) -> Steps[PreparedRequest[LogprobsResponse | Binary]]:
        positions = yield from positions_of(model, request)
        batch: TokenBatch = positions.batch()

        def answer(result: BatchResult) -> LogprobsResponse | Binary:
            found = positions.found(batch, result, "input")
            used = usage(len(batch.tokens), int(result.computed_tokens.sum()))
            if request.format == "npz":
                return as_npz(positions, found, used)
            return as_json(positions, found, model.name, used)

        return PreparedRequest(batch, 0, batch.num_sequences, positions.numbers, answer)

    return prepare


LOGPROBS = Task[LogprobsRequest, LogprobsResponse | Binary](
    name="logprobs",
    paths=("/v1/logprobs",),
    description="The logprobs of every token of sequences, of chosen candidates and of the most probable tokens.",
    example={"input": ["The sky is blue.", "The sky is green."], "top": 2, "temperature": 1.0},
    request=LogprobsRequest,
    response=LogprobsResponse,
    builder=_builder,
    binary=(NPZ, 'With format "npz": an archive of arrays, which numpy.load reads, see docs/logprobs.md.'),
)
