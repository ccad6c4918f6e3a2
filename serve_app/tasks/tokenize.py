"""Tokenize and detokenize, ``POST /tokenize`` and ``POST /detokenize``: text to the model's token ids, and back."""

from __future__ import annotations

from collections.abc import Sequence

from serve_app.errors import InvalidRequestError
from serve_app.schemas import DetokenizeRequest, DetokenizeResponse, Message, TokenizeRequest, TokenizeResponse
from serve_app.tasks.model_facts import ModelFacts
from serve_app.tasks.plain_text import original
from serve_app.tasks.steps import Steps
from serve_app.tasks.task import Answered, Task
from serve_app.tasks.validation import check_characters, check_count, check_ids, of_field


def tokenize(model: ModelFacts, request: TokenizeRequest) -> Steps[Answered[TokenizeResponse]]:
    """Tokenise each text into ids and pieces, or a conversation's text.

    Raises:
        InvalidRequestError: a text is too long to be tokenised at once, or the model's chat template cannot show the
            messages.
        TooLargeError: the request has more texts than it may have items, or they are too long together.
    """
    if (request.prompt is None) == (request.messages is None):
        raise InvalidRequestError("send either prompt or messages", param="prompt")
    if request.messages is not None:
        yield
        return Answered(_of_messages(model, request, request.messages))
    assert request.prompt is not None
    special = request.add_special_tokens is not False
    texts = [request.prompt] if isinstance(request.prompt, str) else request.prompt
    check_count(texts, model.limits.max_items, "prompt")
    tokens: list[list[int]] = []
    pieces: list[list[str]] = []
    for ids in model.encoded(texts, "prompt", add_special_tokens=special):
        tokens.append(ids)
        pieces.append(model.tokenizer.pieces(ids))
        yield
    counts, longest = [len(ids) for ids in tokens], model.max_prompt_tokens
    if isinstance(request.prompt, str):
        (ids,), (count,), (strings,) = tokens, counts, pieces
        return Answered(TokenizeResponse(tokens=ids, count=count, max_model_len=longest, token_strs=strings))
    return Answered(TokenizeResponse(tokens=tokens, count=counts, max_model_len=longest, token_strs=pieces))


def _of_messages(model: ModelFacts, request: TokenizeRequest, messages: Sequence[Message]) -> TokenizeResponse:
    prompt = model.prompt_of(messages, answer=request.add_generation_prompt is not False)
    check_characters(len(prompt), model.max_text_characters, "messages")
    with of_field("messages"):
        (ids,) = model.tokenizer.guarded.encode([prompt], add_special_tokens=bool(request.add_special_tokens))
    return TokenizeResponse(
        tokens=ids,
        count=len(ids),
        max_model_len=model.max_prompt_tokens,
        token_strs=model.tokenizer.pieces(ids),
        prompt=original(prompt),
    )


def detokenize(model: ModelFacts, request: DetokenizeRequest) -> Steps[Answered[DetokenizeResponse]]:
    """Decode ids to text.

    Raises:
        InvalidRequestError: an id is out of the vocabulary.
    """
    yield
    check_ids(request.tokens, model.info.vocab_size, "tokens")
    return Answered(DetokenizeResponse(prompt=model.tokenizer.decode(request.tokens)))


TOKENIZE = Task[TokenizeRequest, TokenizeResponse](
    name="tokenize",
    paths=("/tokenize",),
    description="The token ids and pieces of a text or a conversation, as the model would see them.",
    example={"prompt": "The sky is blue."},
    request=TokenizeRequest,
    response=TokenizeResponse,
    builder=lambda model: lambda request, _: tokenize(model, request),
    scores=False,
)
DETOKENIZE = Task[DetokenizeRequest, DetokenizeResponse](
    name="detokenize",
    paths=("/detokenize",),
    description="The text of token ids.",
    example={"tokens": [1, 2, 3]},
    request=DetokenizeRequest,
    response=DetokenizeResponse,
    builder=lambda model: lambda request, _: detokenize(model, request),
    scores=False,
)
