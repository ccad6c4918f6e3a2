"""Rewards in the shape of OpenRLHF's remote reward model, ``POST /get_reward``.

The shape is that of ``openrlhf/cli/serve_rm.py``, and of its client in ``openrlhf/utils/agent.py``.
"""

from __future__ import annotations

from typing import Any, Literal

from serve_app import compat
from serve_app.errors import InvalidRequestError
from serve_app.schemas import ItemError, RequestBody, ResponseBody, Text, Texts
from serve_app.tasks.rewards.answers import Rewarded, builder
from serve_app.tasks.rewards.inputs import Inputs
from serve_app.tasks.task import Task


class RemoteRewardRequest(RequestBody):
    """Request for one reward for each text: ``POST /get_reward``.

    Attributes:
        query: prompts with their answers, as the chat template has made text of them. No special tokens are added.
        prompts: the prompts alone, one for each text; a model does not need them.
        labels: the expected answers, one for each text; a model does not need them.
        on_error: ``"item"``: a text that is wrong has null for its reward and an entry in ``errors``.
    """

    foreign = compat.EVERYWHERE

    model: Text | None = None
    query: Texts
    prompts: Texts | None = None
    labels: list[Any] | None = None
    on_error: Literal["fail", "item"] = "fail"


class RemoteRewardResponse(ResponseBody):
    """The rewards, in the order of the request.

    Attributes:
        rewards: the logit of the only class, or of the last of two less that of the first; a causal model's
            probability of yes. Null for a text that failed, with ``on_error: "item"``.
        scores: the same; OpenRLHF filters prompts by them.
        extra_logs: numbers that OpenRLHF logs: ``label_mass`` of a causal model, how much of its next-token
            distribution yes and no cover.
        errors: with ``on_error: "item"``: why rewards are null.
    """

    rewards: list[float | None]
    scores: list[float | None]
    extra_logs: dict[str, list[float | None]]
    errors: list[ItemError] | None = None


def _inputs(request: RemoteRewardRequest) -> Inputs:
    if not request.query:
        raise InvalidRequestError("query is an empty list; send at least one text", param="query")
    for name in ("prompts", "labels"):
        given = getattr(request, name)
        if given is not None and len(given) != len(request.query):
            raise InvalidRequestError(
                f"{name} has {len(given)} entries and query {len(request.query)}; send one for each, or leave it out",
                param=name,
            )
    return Inputs("query", request.query, special=False, fail=request.on_error == "fail")


def _answer(request: RemoteRewardRequest, rewarded: Rewarded) -> RemoteRewardResponse:
    rewards, masses = rewarded.rewards, rewarded.label_masses
    return RemoteRewardResponse(
        rewards=rewards,
        scores=rewards,
        extra_logs={} if masses is None else {"label_mass": masses},
        errors=rewarded.reads.errors(fail=request.on_error == "fail"),
    )


REMOTE_REWARD = Task[RemoteRewardRequest, RemoteRewardResponse](
    name="get_reward",
    paths=("/get_reward",),
    description="One reward for each text, in the shape of OpenRLHF's remote reward model.",
    example={"query": ["What colour is the sky? Blue.", "What colour is the sky? Green."]},
    request=RemoteRewardRequest,
    response=RemoteRewardResponse,
    builder=builder(_inputs, _answer, single=True),
)
