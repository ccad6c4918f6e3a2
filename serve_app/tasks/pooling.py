"""Rewards in vLLM's and sglang's shapes of embeddings: ``POST /pooling`` and ``POST /v1/embeddings``.

The shapes are those of ``vllm/entrypoints/pooling/pooling/protocol.py``, and of ``EmbeddingRequest`` and
``EmbeddingResponse`` in ``sglang/srt/entrypoints/openai/protocol.py``. sglang answers a reward model's logits as an
embedding. Other embeddings are not made here.
"""

from __future__ import annotations

import base64
import time
from collections.abc import Sequence
from typing import Literal

import numpy as np

from serve_app import compat
from serve_app.schemas import ItemError, ResponseBody, Usage
from serve_app.tasks.classify import UseActivation
from serve_app.tasks.rewards.answers import Rewarded, builder
from serve_app.tasks.rewards.inputs import RewardRequest
from serve_app.tasks.task import Task

Encoding = Literal["float", "base64"]
Values = list[float] | str
"""Numbers, or the base64 of their float32 values in little-endian order."""


class PoolingRequest(RewardRequest):
    """Request for the values of texts' classes: ``POST /pooling``.

    Attributes:
        use_activation: return probabilities; False: the logits. None: true. Older names are ``activation`` and
            ``softmax``.
        encoding_format: ``base64``: values are float32 numbers in base64.
    """

    foreign = compat.POOLING

    use_activation: UseActivation = None
    encoding_format: Encoding = "float"


class PooledText(ResponseBody):
    """The values of one text's classes.

    Attributes:
        data: the values, or their bytes in base64.
    """

    index: int
    object: Literal["pooling"] = "pooling"
    data: Values


class PoolingResponse(ResponseBody):
    """The values of each text's classes, in the order of the request; see ``ClassifyResponse`` for errors.

    Attributes:
        data: one entry for each text.
        errors: with ``on_error: "item"``: why entries are null.
    """

    id: str
    object: Literal["list"] = "list"
    created: int
    model: str
    data: list[PooledText | None]
    usage: Usage
    errors: list[ItemError] | None = None


class EmbeddingsRequest(RewardRequest):
    """Request for the rewards of texts in the shape of embeddings: ``POST /v1/embeddings``.

    Attributes:
        encoding_format: ``base64``: values are float32 numbers in base64.
    """

    foreign = compat.EMBEDDINGS

    encoding_format: Encoding = "float"


class Embedding(ResponseBody):
    """The rewards of one text: a classifier's logits, one for each class, or a judge's probability of yes.

    Attributes:
        embedding: the values, or their bytes in base64.
    """

    object: Literal["embedding"] = "embedding"
    embedding: Values
    index: int


class EmbeddingsResponse(ResponseBody):
    """The rewards of each text, in the order of the request; see ``ClassifyResponse`` for errors.

    Attributes:
        data: one entry for each text.
        errors: with ``on_error: "item"``: why entries are null.
    """

    object: Literal["list"] = "list"
    data: list[Embedding | None]
    model: str
    usage: Usage
    errors: list[ItemError] | None = None


def _encoded(values: Sequence[float], encoding: Encoding) -> Values:
    if encoding == "float":
        return list(values)
    return base64.b64encode(np.asarray(values, "<f4").tobytes()).decode()


def _pooled(request: PoolingRequest, rewarded: Rewarded) -> PoolingResponse:
    return PoolingResponse(
        id=f"pooling-{request.request_id or rewarded.request_id}",
        created=int(time.time()),
        model=rewarded.model,
        data=[
            None if values is None else PooledText(index=index, data=_encoded(values, request.encoding_format))
            for index, values in enumerate(rewarded.values(request.use_activation is not False))
        ],
        usage=rewarded.usage,
        errors=rewarded.reads.errors(fail=request.on_error == "fail"),
    )


def _embedded(request: EmbeddingsRequest, rewarded: Rewarded) -> EmbeddingsResponse:
    return EmbeddingsResponse(
        data=[
            None if values is None else Embedding(index=index, embedding=_encoded(values, request.encoding_format))
            for index, values in enumerate(rewarded.values(None))
        ],
        model=rewarded.model,
        usage=rewarded.usage,
        errors=rewarded.reads.errors(fail=request.on_error == "fail"),
    )


POOLING = Task[PoolingRequest, PoolingResponse](
    name="pooling",
    paths=("/pooling",),
    description="The probabilities or logits of each text's classes, in vLLM's shape of pooled values.",
    example={"input": ["The sky is blue.", "The sky is green."]},
    request=PoolingRequest,
    response=PoolingResponse,
    builder=builder(lambda request: request.inputs, _pooled),
)
EMBEDDINGS = Task[EmbeddingsRequest, EmbeddingsResponse](
    name="embeddings",
    paths=("/v1/embeddings",),
    description="The rewards of texts in the shape of embeddings, as sglang answers for reward models.",
    example={"input": ["The sky is blue.", "The sky is green."]},
    request=EmbeddingsRequest,
    response=EmbeddingsResponse,
    builder=builder(lambda request: request.inputs, _embedded),
)
