"""Log-likelihoods in OpenAI's shape: ``/v1/completions``, prefill only.

``echo`` with ``logprobs`` returns the logprob of each token of a prompt, as evaluation harnesses ask for. The engine
reads the distribution after every position for one target; no [positions, vocabulary] array exists anywhere. At most
one token follows a prompt: the top-1 token, which the prefill computes anyway.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError
from typing_extensions import TypedDict

from serve_app import compat
from serve_app.batches import Reads, pack
from serve_app.contract import MOST_TOP, BatchResult, Float32, Int32, TokenBatch
from serve_app.errors import COMPLETIONS as COMPLETIONS_PATH
from serve_app.errors import InvalidRequestError
from serve_app.schemas import LOWEST, IdLists, Ids, RequestBody, ResponseBody, Text, Texts, Usage
from serve_app.tasks.model_facts import ModelFacts
from serve_app.tasks.positions import LOWEST_TEMPERATURE, MOST_IN_JSON, check_size, check_top, in_json
from serve_app.tasks.scores import not_finite, usage
from serve_app.tasks.sequences import read_sequences
from serve_app.tasks.steps import Steps
from serve_app.tasks.task import PreparedRequest, Task
from serve_app.tasks.token_texts import TokenReader, TokenTexts
from serve_app.tasks.tokenizer import TextTokenizer
from serve_app.tasks.validation import check_causal


def _one_at_most(count: int) -> int:
    if not 0 <= count <= 1:
        raise PydanticCustomError("one_token", "0 or 1, since this service prefills prompts and never generates text")
    return count


def _top_1_only(count: int) -> int:
    if not 0 <= count <= 1:
        raise PydanticCustomError("one_logprob", "0 or 1, since only the top-1 token is supported")
    return count


_ZERO_OR_ONE: dict[str, Any] = {"minimum": 0, "maximum": 1}


class CompletionRequest(RequestBody):
    """Request for logprobs of prompts, and for their top-1 next tokens: ``POST /v1/completions``.

    Attributes:
        prompt: one prompt or several, as text or token ids.
        max_tokens: 0, or 1 for the top-1 next token. None: 0 if ``echo`` and ``logprobs`` ask about the prompt, else
            an error, since OpenAI's default is 16.
        echo: begin the answer's text, and its logprobs, with the prompt.
        logprobs: 0: return the logprobs of the answer's tokens; 1: also those of the top-1 token at each position.
            None: return no logprobs.
        prompt_logprobs: return, as vLLM does, the logprobs of each token of the prompt and of so many most probable
            tokens in its place, at most 1,024. None: return none.
        temperature: with ``prompt_logprobs``, divides the logits before all logprobs, as vLLM's ``processed_logprobs``
            are made; 0 is 1. Else 0, which is also the default.
    """

    foreign = compat.COMPLETIONS

    model: Text = "default"
    prompt: Annotated[Text | Texts | Ids | IdLists, Field(union_mode="left_to_right")]
    max_tokens: Annotated[int, AfterValidator(_one_at_most), Field(json_schema_extra=_ZERO_OR_ONE)] | None = None
    echo: bool = False
    logprobs: Annotated[int, AfterValidator(_top_1_only), Field(json_schema_extra=_ZERO_OR_ONE)] | None = None
    prompt_logprobs: Annotated[int, Field(ge=0, le=MOST_TOP)] | None = None
    temperature: Annotated[float, Field(ge=0, le=1000)] | None = None

    @property
    def new_tokens(self) -> int:
        """The number of tokens that follow each prompt.

        Raises:
            InvalidRequestError: the request asks for OpenAI's default, which is more than one.
        """
        if self.max_tokens is None and not self.rates_prompts and self.prompt_logprobs is None:
            raise InvalidRequestError(
                "max_tokens is left out, which in OpenAI's API means 16; this service prefills prompts and never "
                "generates text: send max_tokens: 0, or 1 for the top-1 next token",
                param="max_tokens",
            )
        return self.max_tokens or 0

    @property
    def rates_prompts(self) -> bool:
        """Whether ``logprobs`` are those of the prompt's tokens."""
        return self.echo and self.logprobs is not None

    @property
    def divisor(self) -> float:
        """The temperature of all logprobs.

        Raises:
            InvalidRequestError: the request asks for a token at a temperature, or for one near 0.
        """
        if not self.temperature:
            return 1.0
        if self.prompt_logprobs is None:
            raise InvalidRequestError(
                f"temperature must be 0 or left out, since the one token is the top-1 token, never sampled; it is "
                f"{self.temperature}",
                param="temperature",
            )
        if self.temperature < LOWEST_TEMPERATURE:
            raise InvalidRequestError(
                f"temperature is {self.temperature}; send 0, which is 1 here, or {LOWEST_TEMPERATURE} to 1000",
                param="temperature",
            )
        return self.temperature


class PromptLogprob(TypedDict):
    """The logprob of a token in a place of the prompt."""

    logprob: Annotated[float, Field(description="In nats, over the whole vocabulary.")]
    rank: Annotated[
        int,
        Field(description="1 for the most probable token; a token that is not among those asked for has the next one."),
    ]
    decoded_token: Annotated[str, Field(description="The token's text.")]


class CompletionLogprobs(ResponseBody):
    """Logprobs of each token of the answer, in nats over the whole vocabulary.

    Attributes:
        tokens: the tokens' names: a token's text, or its bytes as ``bytes:\\xe7\\x8b`` if it is a part of a character.
        token_logprobs: the logprob of each token; None for a prompt's first token, since nothing precedes it.
        top_logprobs: with ``logprobs: 1``, the token and the top-1 token at each position.
        text_offset: the number of characters before each token in the answer's ``text``. Parts of a character begin
            where the character does.
    """

    tokens: list[str]
    token_logprobs: list[float | None]
    text_offset: list[int]
    top_logprobs: list[dict[str, float] | None] | None = None


class CompletionChoice(ResponseBody):
    """The answer to one prompt.

    Attributes:
        text: the prompt with ``echo``, and the next token with ``max_tokens: 1``.
        logprobs: with ``logprobs``: those of the text's tokens.
        finish_reason: always that the length asked for is reached.
        prompt_logprobs: with ``prompt_logprobs``: for each token of the prompt, by token id, its own logprob and those
            of the most probable tokens in its place; null for the first.
    """

    text: str
    index: int
    logprobs: CompletionLogprobs | None = None
    finish_reason: Literal["length"] = "length"
    prompt_logprobs: list[dict[str, PromptLogprob] | None] | None = None


class CompletionResponse(ResponseBody):
    """One choice per prompt, in order.

    Attributes:
        choices: one for each prompt.
    """

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class OpenAIError(ResponseBody):
    """The error in ``OpenAIErrorResponse``."""

    message: str
    type: str
    param: str | None
    code: int


class OpenAIErrorResponse(ResponseBody):
    """The nested error object that OpenAI's clients expect.

    Attributes:
        error: the error.
    """

    error: OpenAIError


class Completer:
    """Builds the prompts of completion requests."""

    def __init__(self, model: ModelFacts) -> None:
        self._model = model
        self._reader = TokenReader(model.tokenizer.backend)

    def prepare(self, request: CompletionRequest, request_id: str) -> Steps[PreparedRequest[CompletionResponse]]:
        """Build one sequence for each prompt, read at every position where the next token is asked about.

        Raises:
            InvalidRequestError: ids or lengths are wrong, or the model is not causal.
            TooLargeError: the request has more prompts or tokens than the limits allow.
        """
        check_causal(self._model.info)
        new_tokens, top, temperature = request.new_tokens, request.prompt_logprobs, request.divisor
        check_top(top or 0, self._model, "prompt_logprobs")
        texts, sequences = yield from read_sequences(self._model, request.prompt, "prompt")
        rated = request.rates_prompts or top is not None
        arrays = [np.asarray(ids, np.int32) for ids in sequences]
        # Each position has the next token as its target. The last has no target: it is read for its top-1 token.
        firsts = [0 if rated else len(ids) - 1 for ids in arrays]
        reads = [
            np.arange(first, len(ids) - 1 + new_tokens, dtype=np.int32)
            for first, ids in zip(firsts, arrays, strict=True)
        ]
        targets = [ids[first + 1 :] for first, ids in zip(firsts, arrays, strict=True)]
        target_counts = [
            (np.arange(len(at)) < len(own)).astype(np.int32) for at, own in zip(reads, targets, strict=True)
        ]
        batch = pack(
            arrays,
            [Reads(*own) for own in zip(reads, targets, target_counts, strict=True)],
            argmax=new_tokens == 1 or (request.rates_prompts and request.logprobs == 1),
            top=top or 0,
            temperature=temperature,
        )
        # An entry has an id, a logprob and a rank.
        numbers = 0 if top is None else 3 * (1 + top) * len(batch.read_positions)
        check_size(
            numbers, MOST_IN_JSON, 'send fewer prompts or a smaller prompt_logprobs, or /v1/logprobs with format: "npz"'
        )
        tokenizer = self._model.tokenizer
        completions = Completions(batch, request, texts, tokenizer, self._reader, self._model.name, request_id)
        return PreparedRequest(batch, 0, batch.num_sequences, len(batch.tokens) + numbers, completions.answer)


@dataclass(frozen=True, slots=True)
class Completions:
    """Makes the answer to a completion request.

    Attributes:
        batch: the request's prompts.
        texts: the text of each prompt, None if it came as ids.
        reader: the reader that names the tokens.
        model: the model's name in the answer.
    """

    batch: TokenBatch
    request: CompletionRequest
    texts: Sequence[str | None]
    tokenizer: TextTokenizer
    reader: TokenReader
    model: str
    request_id: str

    def answer(self, result: BatchResult) -> CompletionResponse:
        """Make the answer from the engine's values, in OpenAI's shape.

        Raises:
            InternalError: the model's output for a prompt is not finite.
        """
        batch = self.batch
        prompts = range(batch.num_sequences)
        read_bounds = np.searchsorted(batch.read_sequences, np.arange(len(prompts) + 1)).tolist()
        offsets, target_offsets = batch.offsets.tolist(), batch.target_offsets.tolist()
        choices: list[CompletionChoice] = []
        for index, (start, stop), (first, last) in zip(prompts, pairwise(offsets), pairwise(read_bounds), strict=True):
            ids = batch.tokens[start:stop].tolist()
            own = result.values[target_offsets[first] : target_offsets[last]]
            tops = result.top_ids[first:last], result.top_values[first:last]
            highest = result.argmax[first:last], result.argmax_values[first:last]
            if not all((values < math.inf).all() for values in (own, tops[1], highest[1])):  # false for NaN too
                raise not_finite(index, "prompt")
            shown = own if self.request.rates_prompts else own[:0]
            reads = len(shown) + self.request.new_tokens if len(highest[0]) else 0
            prompt = _Read(ids, shown.tolist(), *(column[len(column) - reads :].tolist() for column in highest))
            choice = self._choice(index, prompt)
            if self.request.prompt_logprobs is not None:
                choice.prompt_logprobs = self._prompt_logprobs(ids, own, *tops)
            choices.append(choice)
        prompt_tokens, generated = len(batch.tokens), len(prompts) * self.request.new_tokens
        return CompletionResponse(
            id=f"cmpl-{self.request_id}",
            created=int(time.time()),
            model=self.model,
            choices=choices,
            usage=usage(prompt_tokens, int(result.computed_tokens.sum()), generated),
        )

    def _choice(self, index: int, prompt: _Read) -> CompletionChoice:
        request = self.request
        generated = prompt.argmax[-request.new_tokens :] if request.new_tokens else []
        told = self._told(index, prompt.ids, generated)
        if not request.echo:
            own = len(prompt.ids)
            front = told.starts[own] if generated else len(told.text)
            told = TokenTexts(told.text[front:], [0] * len(generated), told.names[own:])
        if request.logprobs is None:
            return CompletionChoice(text=told.text, index=index, logprobs=None)
        nats = [*prompt.logprobs, *prompt.argmax_logprobs[len(prompt.argmax) - len(generated) :]]
        shown = [*prompt.ids[1:], *generated] if request.echo else generated
        top: list[dict[str, float] | None] | None = None
        if request.logprobs:
            before = [*prompt.ids, *generated][-len(shown) - 1 : -1] if shown else []
            top_names = self.reader.names(before, prompt.argmax)
            names = told.names[request.echo :]
            rows = zip(shown, names, nats, prompt.argmax, top_names, prompt.argmax_logprobs, strict=True)
            top = [_top(*row) for row in rows]
        known: list[float | None] = [max(value, LOWEST) for value in nats]
        if request.echo:
            known = [None, *known]
            top = None if top is None else [None, *top]
        logprobs = CompletionLogprobs(
            tokens=told.names, token_logprobs=known, top_logprobs=top, text_offset=told.starts
        )
        return CompletionChoice(text=told.text, index=index, logprobs=logprobs)

    def _prompt_logprobs(
        self, ids: list[int], own: Float32, top_ids: Int32, top_logprobs: Float32
    ) -> list[dict[str, PromptLogprob] | None]:
        """vLLM's: the own token first, then the most probable ones."""
        known = np.unique(np.concatenate([np.asarray(ids, np.int32), top_ids.ravel()])).tolist()
        texts = self.tokenizer.backend.decode_batch([[token] for token in known], skip_special_tokens=False)
        text_of = dict(zip(known, texts, strict=True))
        found: list[dict[str, PromptLogprob] | None] = [None]
        for token, logprob, others, logprobs in zip(
            ids[1:], in_json(own), top_ids[: len(own)].tolist(), in_json(top_logprobs[: len(own)]), strict=True
        ):
            last = {"logprob": logprob, "rank": len(others) + 1, "decoded_token": text_of[token]}
            entries: dict[str, Any] = {str(token): last}
            for rank, (other, value) in enumerate(zip(others, logprobs, strict=True), 1):
                entries[str(other)] = {"logprob": value, "rank": rank, "decoded_token": text_of[other]}
            found.append(entries)
        return found

    def _told(self, index: int, ids: list[int], generated: list[int]) -> TokenTexts:
        """The text of the prompt and the generated token, with the tokens' names and starts."""
        told = self.reader.read([*ids, *generated])
        if (given := self.texts[index]) is None:
            return told
        end = told.starts[len(ids)] if generated else len(told.text)
        if told.text[:end].endswith(given):
            return told.without_front(end - len(given))
        # The tokenizer changed the text before splitting it into tokens.
        _, ends = self.tokenizer.encode_with_ends(given)
        starts = [0]
        for last, this in pairwise([0, *ends]):
            starts.append(last if this > last else starts[-1])
        starts = [min(start, len(given)) for start in starts[1:]] + [len(given)] * len(generated)
        return TokenTexts(given + told.text[end:], starts, told.names)


@dataclass(frozen=True, slots=True)
class _Read:
    """What the engine read of one prompt: the logprobs of its tokens after the first, and each read's top-1 token."""

    ids: list[int]
    logprobs: list[float]
    argmax: list[int]
    argmax_logprobs: list[float]


def _top(token: int, name: str, logprob: float, top: int, top_name: str, highest: float) -> dict[str, float]:
    """The token at a position and the top-1 token there, with their logprobs; one entry if they are the same token."""
    logprob = max(logprob, LOWEST)
    if token == top:
        return {name: logprob}
    if top_name == name:  # some vocabularies have two tokens with the same text
        top_name = f"token_id:{top}"
    return {name: logprob} | {top_name: max(highest, logprob)}


COMPLETIONS = Task[CompletionRequest, CompletionResponse](
    name="completions",
    paths=(COMPLETIONS_PATH,),
    description="Logprobs of the prompts' own tokens, and the top-1 next tokens.",
    example={"prompt": ["The sky is blue.", "The sky is green."], "max_tokens": 0, "echo": True, "logprobs": 0},
    request=CompletionRequest,
    response=CompletionResponse,
    builder=lambda model: Completer(model).prepare,
    error=OpenAIErrorResponse,
)
