"""Classes of texts in vLLM's shape, ``POST /classify``: a reward model's rewards, or a judge's probability of yes.

The shape is that of ``vllm/entrypoints/pooling/classify/protocol.py``. What is beyond it: ``on_error`` and
``timeout_s``, and ``errors`` in an answer.
"""

from __future__ import annotations

import time
from typing import Annotated, Literal

from pydantic import AliasChoices, Field

from serve_app import compat
from serve_app.schemas import ItemError, ResponseBody, Usage
from serve_app.tasks.rewards.answers import Rewarded, builder
from serve_app.tasks.rewards.inputs import RewardRequest
from serve_app.tasks.task import Task

UseActivation = Annotated[bool | None, Field(validation_alias=AliasChoices("use_activation", "activation", "softmax"))]


class ClassifyRequest(RewardRequest):
    """Request to classify texts: ``POST /classify``.

    Attributes:
        use_activation: return probabilities; False: the logits, which are a reward model's rewards. None: true. Older
            names are ``activation`` and ``softmax``.
    """

    foreign = compat.CLASSIFY

    use_activation: UseActivation = None


class TextClass(ResponseBody):
    """The classes of one text.

    Attributes:
        label: the name of the most probable class, the first of equals.
        probs: the probabilities of the classes; without ``use_activation`` their logits.
        num_classes: the number of classes.
    """

    index: int
    label: str
    probs: list[float]
    num_classes: int


class ClassifyResponse(ResponseBody):
    """The classes of each text, in the order of the request.

    Attributes:
        data: null for a text that failed, with ``on_error: "item"``.
        errors: with ``on_error: "item"``: why entries are null.
    """

    id: str
    object: Literal["list"] = "list"
    created: int
    model: str
    data: list[TextClass | None]
    usage: Usage
    errors: list[ItemError] | None = None


def _answer(request: ClassifyRequest, rewarded: Rewarded) -> ClassifyResponse:
    names = rewarded.head.names
    return ClassifyResponse(
        id=f"classify-{request.request_id or rewarded.request_id}",
        created=int(time.time()),
        model=rewarded.model,
        data=[
            None
            if probs is None
            else TextClass(index=index, label=names[probs.index(max(probs))], probs=probs, num_classes=len(probs))
            for index, probs in enumerate(rewarded.values(request.use_activation is not False))
        ],
        usage=rewarded.usage,
        errors=rewarded.reads.errors(fail=request.on_error == "fail"),
    )


CLASSIFY = Task[ClassifyRequest, ClassifyResponse](
    name="classify",
    paths=("/classify", "/v1/classify"),
    description="The probabilities or logits of each text's classes, in vLLM's shape.",
    example={"input": ["The sky is blue.", "The sky is green."]},
    request=ClassifyRequest,
    response=ClassifyResponse,
    builder=builder(lambda request: request.inputs, _answer),
)
