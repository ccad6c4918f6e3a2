"""Logprobs of prompts in the shape of sglang's native route: ``POST /generate``, with ``max_new_tokens`` 0.

The shapes are those of ``GenerateReqInput`` in ``sglang/srt/managers/io_struct.py`` and of what its tokenizer manager
makes of it: for each token from ``logprob_start_len`` on ``[logprob, id, text or null]``, the first without a logprob.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal, cast

import numpy as np
from pydantic import ConfigDict, Field

from serve_app import compat
from serve_app.contract import BatchResult
from serve_app.errors import InvalidRequestError
from serve_app.schemas import IdLists, Ids, RequestBody, ResponseBody, Text, Texts
from serve_app.tasks.model_facts import ModelFacts
from serve_app.tasks.positions import MOST_IN_JSON, Found, Positions, check_size, check_top, in_json
from serve_app.tasks.sequences import is_one, read_sequences
from serve_app.tasks.steps import Steps
from serve_app.tasks.task import Prepare, PreparedRequest, Task
from serve_app.tasks.validation import check_causal, check_ids

TokenLogprob = tuple[float | None, int, str | None]
"""A logprob in nats, None for the first token; the id; with ``return_text_in_logprobs`` the text."""


class SamplingParams(RequestBody):
    """How to sample, in sglang's shape. All other fields are ignored, since nothing is sampled.

    Attributes:
        max_new_tokens: 0, since this service never generates text. None: an error, since sglang's default is 128.
    """

    model_config = ConfigDict(extra="allow")

    max_new_tokens: int | None = None


class GenerateRequest(RequestBody):
    """Request for the logprobs of prompts in sglang's shape: ``POST /generate``. Where lists are allowed, one value is
    for all prompts.

    Attributes:
        text: one prompt or several as text.
        input_ids: one prompt or several as token ids, in place of ``text``.
        sampling_params: with ``max_new_tokens`` 0.
        return_logprob: true, since nothing else is returned.
        logprob_start_len: the first token that is returned; its own logprob is null. -1, or None: the last.
        top_logprobs_num: also return so many most probable tokens at each position, at most 1,024.
        token_ids_logprob: also return the logprobs of these ids at each position.
        return_text_in_logprobs: also return the texts of the tokens.
    """

    foreign = compat.GENERATE

    model: Text = "default"
    text: Annotated[Text | Texts | None, Field(union_mode="left_to_right")] = None
    input_ids: Annotated[Ids | IdLists | None, Field(union_mode="left_to_right")] = None
    sampling_params: SamplingParams | list[SamplingParams] = SamplingParams()
    return_logprob: bool | list[bool] = False
    logprob_start_len: int | Ids | None = None
    top_logprobs_num: int | Ids | None = None
    token_ids_logprob: Annotated[Ids | list[Ids | None] | None, Field(union_mode="left_to_right")] = None
    return_text_in_logprobs: bool = False


class FinishReason(ResponseBody):
    """Why nothing follows the prompt.

    Attributes:
        length: the number of new tokens.
    """

    type: Literal["length"] = "length"
    length: Literal[0] = 0


class MetaInfo(ResponseBody):
    """What sglang says of a prompt. Each entry of the lists is [logprob, id, text or null].

    Attributes:
        finish_reason: that the length asked for, 0, is reached.
        cached_tokens: prompt tokens that did not have to be computed for this request.
        input_token_logprobs: the prompt's tokens from the start on.
        output_token_logprobs: empty, since nothing is generated.
        input_top_logprobs: with ``top_logprobs_num``: the most probable tokens in the place of each; null for the
            first.
        input_token_ids_logprobs: with ``token_ids_logprob``: these ids in the place of each; null for the first.
    """

    id: str
    finish_reason: FinishReason = FinishReason()
    prompt_tokens: int
    completion_tokens: Literal[0] = 0
    cached_tokens: int
    input_token_logprobs: list[TokenLogprob]
    output_token_logprobs: list[TokenLogprob] = Field(default_factory=list[TokenLogprob])
    input_top_logprobs: list[list[TokenLogprob] | None] | None = None
    input_token_ids_logprobs: list[list[TokenLogprob] | None] | None = None


class GenerateResponse(ResponseBody):
    """The answer to one prompt; several have a list of these.

    Attributes:
        text: empty, since nothing is generated.
        output_ids: empty, too.
        meta_info: the logprobs.
    """

    text: Literal[""] = ""
    output_ids: list[int] = Field(default_factory=list[int])
    meta_info: MetaInfo


def _each(value: Any, count: int, field: str) -> list[Any]:
    """A value for each prompt."""
    if not isinstance(value, list):
        return [value] * count
    values = cast(list[Any], value)
    if len(values) != count:
        raise InvalidRequestError(
            f"{field} has {len(values)} values; send one for all prompts, or one for each of the {count}", param=field
        )
    return values


class _Asked:
    """A request whose fields are checked and apart by prompt."""

    def __init__(self, model: ModelFacts, request: GenerateRequest, sequences: Sequence[list[int]]) -> None:
        count = len(sequences)
        for params in _each(request.sampling_params, count, "sampling_params"):
            if params.max_new_tokens != 0:
                asked = "left out, which means 128" if params.max_new_tokens is None else params.max_new_tokens
                raise InvalidRequestError(
                    f"sampling_params.max_new_tokens is {asked}; this service prefills prompts and never generates "
                    "text: send max_new_tokens: 0",
                    param="sampling_params",
                )
        if not all(_each(request.return_logprob, count, "return_logprob")):
            raise InvalidRequestError(
                "return_logprob is false, and nothing but logprobs is returned; send true", param="return_logprob"
            )
        self.tops: list[int] = [top or 0 for top in _each(request.top_logprobs_num, count, "top_logprobs_num")]
        for top in self.tops:
            check_top(top, model, "top_logprobs_num")
        starts = _each(request.logprob_start_len, count, "logprob_start_len")
        self.starts = [
            _start(start, len(ids), index) for index, (start, ids) in enumerate(zip(starts, sequences, strict=True))
        ]
        self.candidates = _candidates(request.token_ids_logprob, count)
        for ids in self.candidates:
            check_ids(ids or [], model.info.vocab_size, "token_ids_logprob")
        chosen = [
            [ids or []] * (len(own) - start - 1)
            for ids, own, start in zip(self.candidates, sequences, self.starts, strict=True)
        ]
        self.positions = Positions(
            [np.asarray(ids, np.int32) for ids in sequences],
            [start + 1 for start in self.starts],
            chosen if any(self.candidates) else None,
            max(self.tops),
        )


def _start(start: int | None, length: int, index: int) -> int:
    if start is None or start == -1:
        return length - 1
    if not 0 <= start < length:
        raise InvalidRequestError(
            f"logprob_start_len of prompt {index} is {start}; send 0 to {length - 1}, or -1 for the last token",
            param="logprob_start_len",
            index=index,
        )
    return start


def _candidates(given: list[int] | list[list[int] | None] | None, count: int) -> list[list[int] | None]:
    if given and isinstance(given[0], int):
        return [cast(list[int], given)] * count
    return _each(given or None, count, "token_ids_logprob")


def _builder(model: ModelFacts) -> Prepare[GenerateRequest, GenerateResponse | list[GenerateResponse]]:
    backend = model.tokenizer.backend

    def entries(ids: Sequence[int], logprobs: Iterable[float | None], *, text: bool) -> list[TokenLogprob]:
        texts: Sequence[str | None] = [None] * len(ids)
        if text:
            texts = backend.decode_batch([[token] for token in ids], skip_special_tokens=False)
        return list(zip(logprobs, ids, texts, strict=True))

    def prepare(
        request: GenerateRequest, request_id: str
    ) -> Steps[PreparedRequest[GenerateResponse | list[GenerateResponse]]]:
        check_causal(model.info)
        if (request.text is None) == (request.input_ids is None):
            raise InvalidRequestError("send either text or input_ids", param="text")
        given, field = (request.input_ids, "input_ids") if request.text is None else (request.text, "text")
        assert given is not None
        _, sequences = yield from read_sequences(model, given, field)
        asked = _Asked(model, request, sequences)
        positions, text = asked.positions, request.return_text_in_logprobs
        check_size(positions.numbers, MOST_IN_JSON, 'send fewer prompts or ids, or /v1/logprobs with format: "npz"')
        batch = positions.batch()

        def answer(index: int, own: Found, computed: int) -> GenerateResponse:
            ids, start, top = sequences[index], asked.starts[index], asked.tops[index]
            tops, chosen = None, None
            if top:
                rows = zip(own.top_ids[:, :top].tolist(), in_json(own.top_logprobs[:, :top]), strict=True)
                tops = [None, *(entries(*row, text=text) for row in rows)]
            if candidates := asked.candidates[index]:
                chosen = [None, *(entries(candidates, row, text=text) for row in own.candidate_rows)]
            found = MetaInfo.model_construct(
                id=request_id if is_one(given) else f"{request_id}-{index}",
                finish_reason=FinishReason(),
                prompt_tokens=len(ids),
                completion_tokens=0,
                cached_tokens=max(0, len(ids) - computed),
                input_token_logprobs=entries(ids[start:], [None, *in_json(own.logprobs)], text=text),
                output_token_logprobs=[],
                input_top_logprobs=tops,
                input_token_ids_logprobs=chosen,
            )
            return GenerateResponse.model_construct(text="", output_ids=[], meta_info=found)

        def answers(result: BatchResult) -> GenerateResponse | list[GenerateResponse]:
            found = positions.found(batch, result, field)
            computed = result.computed_tokens.tolist() or [0] * len(found)  # without reads there is no job
            made = [answer(index, *each) for index, each in enumerate(zip(found, computed, strict=True))]
            return made[0] if is_one(given) else made

        return PreparedRequest(batch, 0, batch.num_sequences, positions.numbers, answers)

    return prepare


GENERATE = Task[GenerateRequest, GenerateResponse | list[GenerateResponse]](
    name="generate",
    paths=("/generate",),
    description="Logprobs of prompts in sglang's shape, without generating anything.",
    example={
        "text": "The sky is blue.",
        "sampling_params": {"max_new_tokens": 0},
        "return_logprob": True,
        "logprob_start_len": 0,
    },
    request=GenerateRequest,
    response=GenerateResponse,
    builder=_builder,
)
