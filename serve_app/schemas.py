"""Wire types of every route, also used from Python, and ``parse``, which makes a checked request of a JSON body.

Only types are checked here. ``prompts.py`` checks what needs the model or the limits: vocabulary, lengths, counts.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping, Set
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar, cast, get_args

import numpy as np
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails, PydanticCustomError

from serve_app import compat
from serve_app.compat import Foreign
from serve_app.errors import InvalidRequestError
from serve_app.field_texts import Described


def _encodable(text: str) -> str:
    """Refuse text with a lone surrogate. ``parse`` finds those in JSON; strings made in Python may hold them too."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise PydanticCustomError("surrogate", "text without lone surrogates") from None
    return text


Text = Annotated[str, AfterValidator(_encodable)]
# A list stops at its first wrong element: a million wrong ids are one error, not a million.
Texts = Annotated[list[Text], Field(fail_fast=True)]
Ids = Annotated[list[int], Field(fail_fast=True)]
TextLists = Annotated[list[Texts], Field(fail_fast=True)]
IdLists = Annotated[list[Ids], Field(fail_fast=True)]

LOWEST = float(np.finfo(np.float32).min)
"""The value in JSON for a logprob of -inf, which JSON cannot hold. Its exponential is 0.0 too."""

_SURROGATE = re.compile("[\ud800-\udfff]")
_SHOWN = 60
"""The most characters of a wrong value that an error message repeats."""


class RequestBody(Described):
    """What all requests have.

    Attributes:
        cache_salt: requests with different salts share nothing in the prefix cache, so that none can tell from its time
            or its cached tokens what another one sent.
    """

    # Strict: a token id is neither true nor 1.5 nor "7". Unknown fields are refused: a misspelt option must not be
    # ignored in silence.
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    foreign: ClassVar[Mapping[str, Foreign]] = compat.EVERYWHERE
    """Fields of other services. ``parse`` accepts them if their value asks for nothing."""

    cache_salt: Text | None = None


class ResponseBody(Described):
    model_config = ConfigDict(allow_inf_nan=False)


class TextPart(RequestBody):
    """A part of a message."""

    model_config = ConfigDict(extra="allow")  # what is more is refused by the message

    type: Literal["text"]
    text: Text


class Message(RequestBody):
    """A message of a conversation, in OpenAI's shape.

    Attributes:
        content: its text; of several parts, each is a line or more.
    """

    model_config = ConfigDict(extra="allow")  # clients send many fields as null

    role: Literal["system", "user", "assistant"]
    content: Text | list[TextPart]

    @model_validator(mode="after")
    def _has_nothing_more(self) -> Self:
        parts = [] if isinstance(self.content, str) else self.content
        more = [
            name for each in (self, *parts) for name, value in (each.model_extra or {}).items() if value is not None
        ]
        for name in more:
            raise PydanticCustomError("more", "a role and a content of text, without {name}", {"name": name[:_SHOWN]})
        return self

    @property
    def text(self) -> str:
        """The text of the whole message."""
        return self.content if isinstance(self.content, str) else "\n".join(part.text for part in self.content)


Messages = Annotated[list[Message], Field(fail_fast=True)]


class ScoreRequest(RequestBody):
    """Request for the probability of each label after each prompt: ``POST /v1/score``.

    Attributes:
        query: text or token ids, the same kind as ``items``. None: empty.
        messages: a conversation in place of a query. The query is the text that the model's chat template makes of it,
            up to where the model's answer begins, without reasoning. The items, often one empty text, are then
            beginnings of the answer. Items and labels are plain text here: control tokens in them are spelt out.
        items: texts or lists of token ids, one prompt each. A single string is one item; for an empty list the answer
            has no scores.
        label_token_ids: the labels as tokens, one list for all items or one list per item. Send either these or
            ``labels``; a model with classes needs neither.
        labels: the labels as text, one list for all items or one list per item. The tokens that a label adds after the
            prompt are scored. If it adds several, its logprob is the sum of their logprobs, each given the tokens
            before it.
        length_normalize: a label's logprob is the mean of its tokens' logprobs in place of their sum.
        apply_softmax: True: probabilities over the labels alone, each row sums to 1. False: over the whole vocabulary.
        item_first: the prompt is item + query instead of query + item.
        temperature: divides the logprobs before the softmax; other than 1.0 only with ``apply_softmax``.
        model: ``"default"`` or a served name.
        return_token_logprobs: also return the labels' logprobs over the whole vocabulary, in nats.
        return_label_mass: also return how much of the model's distribution the labels cover, 0 to 1 per item.
        return_prompt_token_ids: also return the tokens that the model saw.
        add_special_tokens: add the tokenizer's special tokens to text, for most models a BOS token. Token ids are used
            as they are, and ``messages`` have those of the chat template.
        truncate: ``"item"``: a prompt that is too long loses tokens from the end of its item, never from the query.
            ``"error"``: it is an error.
        on_error: ``"item"``: an item that is wrong, or for which the model's output is not finite, has null for a row
            and an entry in ``errors``. ``"fail"``: such an item fails the request.
        stream: send rows as lines of JSON (``ScoreRow``) as they finish, then a line with the usage (``ScoreEnd``).
        timeout_s: seconds after which the request gets a 504 and its work is dropped, at most the service's own limit.
            None: that limit.
    """

    foreign = compat.SCORE

    query: Annotated[Text | Ids | None, Field(union_mode="left_to_right")] = None
    messages: Messages | None = None
    items: Annotated[Texts | IdLists | Text, Field(union_mode="left_to_right")]
    label_token_ids: Annotated[Ids | IdLists | None, Field(union_mode="left_to_right")] = None
    labels: Annotated[Texts | TextLists | None, Field(union_mode="left_to_right")] = None
    length_normalize: bool = False
    apply_softmax: bool = False
    item_first: bool = False
    temperature: Annotated[float, Field(gt=0)] = 1.0
    model: Text = "default"
    return_token_logprobs: bool = False
    return_label_mass: bool = False
    return_prompt_token_ids: bool = False
    add_special_tokens: bool = True
    truncate: Literal["error", "item"] = "error"
    on_error: Literal["fail", "item"] = "fail"
    stream: bool = False
    timeout_s: Annotated[float, Field(gt=0)] | None = None


class PromptTokensDetails(ResponseBody):
    """Details of ``Usage.prompt_tokens``.

    Attributes:
        cached_tokens: prompt tokens that did not have to be computed for this request.
    """

    cached_tokens: int


class Usage(ResponseBody):
    """Token counts of all prompts; the query counts once per item. Nothing is ever generated."""

    prompt_tokens: int
    completion_tokens: int = 0
    total_tokens: int
    reasoning_tokens: int = 0
    prompt_tokens_details: PromptTokensDetails


class ItemError(ResponseBody):
    """The error of an item that has no scores.

    Attributes:
        code: the HTTP status of a request with this item alone.
    """

    index: int
    code: int
    message: str


class ScoreRow(ResponseBody):
    """One item's part of the answer, and one line of a streamed answer. ``ScoreResponse`` documents the fields."""

    index: int
    scores: list[float] | None = None
    token_logprobs: list[float] | None = None
    label_tokens: list[list[str]] | None = None
    label_mass: float | None = None
    prompt_token_ids: list[int] | None = None
    truncated: int | None = None
    error: ItemError | None = None


class ScoreEnd(ResponseBody):
    """The last line of a streamed answer, after all rows."""

    model: str
    usage: Usage
    object: Literal["scoring"] = "scoring"


class ScoreResponse(ResponseBody):
    """Scores in the order of the items, each row in the order of its labels.

    With ``on_error: "item"`` an item that failed has null in place of its row in every list.

    Attributes:
        scores: probabilities, 0 to 1. A model with classes and no ``apply_softmax`` gives the classes' logits.
        token_logprobs: with ``return_token_logprobs``: the labels' logprobs in nats, over the whole vocabulary and
            without temperature. A label of several tokens has the sum of its tokens' logprobs, or their mean with
            ``length_normalize``. A label of probability 0 has float32's lowest number, since JSON has no infinity.
        label_tokens: with ``labels``: the tokens that each label adds after the prompt, as the vocabulary spells them.
        label_mass: with ``return_label_mass``: the sum of the labels' probabilities over the whole vocabulary. A label
            that begins with another label is a part of it and counts once. ``length_normalize`` changes nothing here.
        prompt_token_ids: with ``return_prompt_token_ids``: what the model saw, without the labels.
        truncated: with ``truncate: "item"``: how many tokens each item lost.
        errors: with ``on_error: "item"``: why rows are null.
    """

    scores: list[list[float] | None]
    model: str
    usage: Usage
    object: Literal["scoring"] = "scoring"
    token_logprobs: list[list[float] | None] | None = None
    label_tokens: list[list[list[str]] | None] | None = None
    label_mass: list[float | None] | None = None
    prompt_token_ids: list[list[int] | None] | None = None
    truncated: list[int | None] | None = None
    errors: list[ItemError] | None = None


class TokenizeRequest(RequestBody):
    """Request to tokenise text or a conversation: ``POST /tokenize``.

    Attributes:
        prompt: one text or several.
        messages: a conversation in place of a prompt, made into text by the model's chat template.
        add_generation_prompt: end the conversation's text where the model's answer begins. None: true.
        add_special_tokens: add the tokenizer's special tokens. None: to a prompt, since a chat template has them.
    """

    foreign = compat.TOKENIZE

    model: Text = "default"
    prompt: Annotated[Text | Texts | None, Field(union_mode="left_to_right")] = None
    messages: Messages | None = None
    add_generation_prompt: bool | None = None
    add_special_tokens: bool | None = None


class TokenizeResponse(ResponseBody):
    """Token ids, and each token as the vocabulary spells it. If ``prompt`` was a list, one list per prompt.

    Attributes:
        prompt: with ``messages``: the text that the tokens are of.
        tokens: the token ids.
        count: their number.
        max_model_len: tokens of the longest prompt.
        token_strs: each token as the vocabulary spells it.
    """

    tokens: list[int] | list[list[int]]
    count: int | list[int]
    max_model_len: int
    token_strs: list[str] | list[list[str]]
    prompt: str | None = None


class DetokenizeRequest(RequestBody):
    """Request to decode tokens: ``POST /detokenize``.

    Attributes:
        tokens: token ids.
    """

    foreign = compat.DETOKENIZE

    model: Text = "default"
    tokens: Ids


class DetokenizeResponse(ResponseBody):
    """The decoded text, including special tokens.

    Attributes:
        prompt: the text.
    """

    prompt: str


class TokenizerInfo(ResponseBody):
    """What ``tokenizer_config.json`` says of a tokenizer, under its own names: ``GET /tokenizer_info``.

    Attributes:
        tokenizer_class: its class in transformers.
        bos_token: what begins a text.
        eos_token: what ends a text.
        pad_token: what fills a batch; not used here.
        unk_token: what stands for an unknown character.
        chat_template: the Jinja template of conversations.
        model_max_length: tokens of the longest prompt.
    """

    tokenizer_class: str | None = None
    bos_token: str | None = None
    eos_token: str | None = None
    pad_token: str | None = None
    unk_token: str | None = None
    chat_template: str | None = None
    model_max_length: int


class ModelCard(ResponseBody):
    """A model under one of its names.

    Attributes:
        id: one of the model's names.
        owned_by: this project.
        max_model_len: tokens of the longest prompt.
        parent: of a LoRA adapter: the model that it changes.
    """

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    max_model_len: int
    parent: str | None = None


class ModelMetadata(ResponseBody):
    """A model under one of its names, as TypeSafe's clients read it.

    Attributes:
        release_date: the day on which this service began to serve it, ``YYYY-MM-DD``.
        name: one of the model's names.
        description: what it is.
    """

    name: str
    description: str
    release_date: str


class ModelsResponse(ResponseBody):
    """OpenAI's list of models, and TypeSafe's.

    Attributes:
        data: the models, as OpenAI's clients read them.
        models: the models, as TypeSafe's clients read them.
    """

    object: Literal["list"] = "list"
    data: list[ModelCard]
    models: list[ModelMetadata]


class LimitsInfo(ResponseBody):
    """Limits of a request, and of the tokens that may wait.

    Attributes:
        max_items: items of a request.
        max_labels: labels of a request.
        max_body_bytes: bytes of a body.
        max_prompt_tokens: tokens of a prompt.
        max_text_characters: characters of a text.
        max_request_tokens: tokens of a request's prompts.
        max_queued_tokens: tokens that may wait; beyond them requests get a 503.
        timeout_s: seconds after which a request gets a 504.
    """

    max_items: int
    max_labels: int
    max_body_bytes: int
    max_prompt_tokens: int
    max_text_characters: int
    max_request_tokens: int
    max_queued_tokens: int
    timeout_s: float


class MemoryInfo(ResponseBody):
    """A replica's memory on each of its devices, as its start has planned it.

    Attributes:
        page_tokens: tokens that the pages hold: the beginnings of prompts that are kept.
        free_bytes: what was free before. None: the device does not tell.
        weights_bytes: the weights.
        workspace_bytes: what a call needs beside weights and pages.
        pages_bytes: the pages.
    """

    weights_bytes: int
    workspace_bytes: int
    pages_bytes: int
    page_tokens: int
    free_bytes: int | None = None


class MeshInfo(ResponseBody):
    """The devices of a replica: ``data`` calls run at once, each on ``model`` devices over which the model is split.

    Attributes:
        data: calls that run at once.
        model: devices of each call.
    """

    data: int
    model: int


class InfoResponse(ResponseBody):
    """Information about what is served, and how: ``GET /v1/info``.

    Attributes:
        dtype_reason: why the weights have this dtype: it is set, or the platform's default. None: an older service.
        decision_head: the kind of a head that reads the options of questions, ``candidate``, ``pointer`` or ``marker``:
            the model answers on the decision routes alone. None: it has none.
        decision_profile: how the decision routes ask, a file in ``serve_app/profiles``. None: the model cannot decide.
        calibration: how the decision routes' probabilities are calibrated. None: they are the model's own.
        rerank_template: the template's name, or ``custom``. None: the model has too many classes to
            rerank, or a decision head.
        notes: how the model was loaded, where that is not as its files say at first sight: of a model for images the
            text part alone; an adapter merged onto its base; a context shorter than ``config.json`` says, and why; keys
            of it that ``trust_config`` skips.
        memory: None: there is no model (the fake engine).
        model: the served name.
        names: all names by which requests may ask for the model.
        adapters: names of its LoRA adapters, by which requests may ask for them. None: it has none.
        architecture: its class, from ``config.json``.
        context_length: tokens of the longest prompt.
        vocab_size: the number of token ids.
        classes: the classes of a sequence-classification head; 0: it has none, and scores labels.
        pad_token_id: the id that fills batches, from ``config.json``.
        dtype: the type of the weights.
        quantization: ``"int8"``, or None.
        platform: where it runs: cpu, tpu, gpu or fake.
        buckets: the shapes of the compiled programs.
        limits: the limits of a request.
        version: this software's version.
        mesh: None: a replica has one device.
    """

    model: str
    names: list[str]
    adapters: list[str] | None = None
    architecture: str
    context_length: int
    vocab_size: int
    classes: int
    pad_token_id: int | None = None
    dtype: str
    dtype_reason: str | None = None
    quantization: str | None = None
    platform: str
    buckets: list[str]
    notes: list[str] | None = None
    decision_head: str | None = None
    decision_profile: str | None = None
    calibration: str | None = None
    rerank_template: str | None = None
    limits: LimitsInfo
    memory: MemoryInfo | None = None
    mesh: MeshInfo | None = None
    version: str


class StatusResponse(ResponseBody):
    """The answer of ``/health`` and ``/ready``."""

    status: Literal["ok"] = "ok"


class ErrorResponse(ResponseBody):
    """The flat error object (``errors.py``); ``/v1/completions`` has a nested one."""

    object: Literal["error"] = "error"
    message: str
    type: str
    param: str | None
    code: int


R = TypeVar("R", bound=RequestBody)


def parse(model: type[R], body: bytes) -> R:
    """Check a JSON body and return the request that it holds.

    Raises:
        InvalidRequestError: the body is wrong; one message names the field, the index, the value and what is expected.
    """
    if not body.strip():
        raise InvalidRequestError("the body is empty; send a JSON object")
    try:
        request = model.model_validate_json(body, extra="allow")
    except ValidationError as error:
        if b"\\u" not in body or not _is_about_surrogates(error):
            request = _explained(model, body)
        else:
            request = _parse_with_surrogates(model, body, error)
    _drop_foreign(request)
    _refuse_duplicates(model, body)
    return request


def _explained(model: type[R], body: bytes) -> R:
    """Parse a body again with unknown fields refused, so that the error names them."""
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        raise invalid(error, model) from None


def _drop_foreign(request: RequestBody) -> None:
    """Remove the fields of other services from a request.

    Raises:
        InvalidRequestError: a field asks for something, or no service has such a field.
    """
    foreign = request.model_extra or {}
    for name, value in foreign.items():
        if wrong := refused(name, value, type(request)):
            raise wrong
    foreign.clear()


def _is_about_surrogates(error: ValidationError) -> bool:
    (found, *_) = error.errors(include_url=False, include_input=False)
    return found["type"] == "json_invalid" and "hex escape" in found["msg"]


def _parse_with_surrogates(model: type[R], body: bytes, error: ValidationError) -> R:
    """Parse a body with lone surrogates. With ``on_error: "item"`` a surrogate in an item is that item's error alone.

    Raises:
        InvalidRequestError: something else is wrong with the body, or a surrogate fails the request.
    """
    lone: dict[tuple[str | int, ...], str] = {}

    def mended(value: Any, path: tuple[str | int, ...]) -> Any:
        if isinstance(value, list):
            return [mended(entry, (*path, i)) for i, entry in enumerate(cast(list[Any], value))]
        if isinstance(value, dict):
            return {mended(name, path): mended(own, (*path, name)) for name, own in cast(dict[str, Any], value).items()}
        if isinstance(value, str) and _SURROGATE.search(value):
            lone[path] = value
            return _SURROGATE.sub("\ufffd", value)
        return value

    try:
        request = model.model_validate_json(json.dumps(mended(json.loads(body), ())), extra="allow")
    except ValidationError as another:
        raise invalid(another, model) from None
    except (ValueError, RecursionError):
        raise invalid(error, model) from None
    _drop_foreign(request)
    for (field, *inside), text in lone.items():
        index = inside[0] if field == "items" and inside else None
        if isinstance(request, ScoreRequest) and request.on_error == "item" and isinstance(index, int):
            cast(list[str], request.items)[index] = text
            continue
        where = str(field) + "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in inside)
        raise InvalidRequestError(
            f"{where} must be text without lone surrogates, not {shown(text)}",
            param=str(field),
            index=index if isinstance(index, int) else None,
        )
    return request


def invalid(error: ValidationError, model: type[RequestBody]) -> InvalidRequestError:
    """Make one error of Pydantic's findings: of the first unknown field if there is one, else of the first field."""
    found = error.errors(include_url=False)
    for finding in found:
        if finding["type"] == "extra_forbidden" and (
            wrong := refused(str(finding["loc"][-1]), finding["input"], model)
        ):
            return wrong
    found = [finding for finding in found if finding["type"] != "extra_forbidden"] or found
    if not found[0]["loc"]:
        if found[0]["type"] == "json_invalid":
            return InvalidRequestError(f"the body is not valid JSON: {found[0]['msg'].removeprefix('Invalid JSON: ')}")
        return InvalidRequestError(f"the body must be a JSON object, not {shown(found[0]['input'])}")
    field = str(found[0]["loc"][0])
    # A union reports every kind that it allows; the kind that matched furthest is the one that was meant.
    mine = [finding for finding in found if finding["loc"][0] == field]
    inner = {name for each in model.model_fields.values() for name in _inner_fields(each.annotation)}
    places = [_place(finding, inner) for finding in mine]
    place = max(places, key=lambda place: [(isinstance(part, str), part) for part in place])
    furthest = [finding for finding, own in zip(mine, places, strict=True) if own == place]
    where = field + "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place)
    index = place[0] if place and isinstance(place[0], int) and field == "items" else None
    if furthest[0]["type"] == "missing":
        return InvalidRequestError(f"{where} is required", param=field, index=index)
    expected = " or ".join(dict.fromkeys(_expected(finding) for finding in furthest))
    return InvalidRequestError(
        f"{where} must be {expected}, not {shown(furthest[0]['input'])}", param=field, index=index
    )


def _expected(finding: ErrorDetails) -> str:
    if finding["type"] == "model_type":
        return "an object"
    expected = finding["msg"].removeprefix("Input should be ").replace("array", "list")
    return expected.lower() if expected in ("True", "False") else expected


def _place(finding: ErrorDetails, inner: Set[str]) -> tuple[int | str, ...]:
    """The place of a finding in its field, without the names of the union's kinds."""
    return tuple(part for part in finding["loc"][1:] if isinstance(part, int) or part in inner)


def _inner_fields(annotation: Any) -> Set[str]:
    """The names of the fields of the objects that a field may hold."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        own = annotation.model_fields
        return own.keys() | {name for each in own.values() for name in _inner_fields(each.annotation)}
    return {name for part in get_args(annotation) for name in _inner_fields(part)}


def refused(name: str, value: Any, model: type[RequestBody]) -> InvalidRequestError | None:
    """The error of a field that the schema does not have; None if it is another service's and asks for nothing."""
    if name in model.foreign:
        field = model.foreign[name]
        if field.allows(value):
            return None
        allowed = "".join(f"{json.dumps(own)} or " for own in field.neutral or ())
        return InvalidRequestError(f"{name} must be {allowed}left out, not {shown(value)}: {field.advice}", param=name)
    name = name if len(name) <= _SHOWN else name[:_SHOWN] + "..."
    fields = sorted(model.model_fields, key=RequestBody.model_fields.__contains__)  # what all requests have, last
    if close := difflib.get_close_matches(name, fields, n=1):
        advice = f"did you mean {close[0]!r}?"
    else:
        advice = f"the fields are {', '.join(fields)}"
    return InvalidRequestError(f"unknown field {name!r}: {advice}", param=name)


def shown(value: Any) -> str:
    """The value as JSON, short enough for a message."""
    if isinstance(value, list | tuple):
        return f"a {type(value).__name__} of {len(value)}"  # pyright: ignore[reportUnknownArgumentType]
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, str) and len(value) > _SHOWN:
        value = value[:_SHOWN] + "..."
    text = json.dumps(value, ensure_ascii=False, default=repr).encode(errors="backslashreplace").decode()
    return text if len(text) <= 2 * _SHOWN else text[:_SHOWN] + "..."


def _refuse_duplicates(model: type[RequestBody], body: bytes) -> None:
    """Refuse a field that is given twice: JSON parsers differ in which of the two they take.

    The body was parsed before, so it has one level of fields and no unknown field. It is parsed again only if a name
    appears twice in it, or if it has an escaped ASCII letter.
    """
    if b"\\u00" not in body and all(body.count(f'"{name}"'.encode()) < 2 for name in model.model_fields):
        return

    def check(pairs: list[tuple[str, Any]]) -> None:
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise InvalidRequestError(f"{name} is given twice; send it once", param=name)
            seen.add(name)

    json.loads(body, object_pairs_hook=check)
