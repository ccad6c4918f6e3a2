"""``POST /v1/completions``: prefill only, on the fake or on a running service."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from tests.boundary.asking import Http

PROMPT = "the quick brown fox jumps over the lazy dog"


async def complete(http: Http, **body: Any) -> dict[str, Any]:
    response = await http.client.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    return response.json()


async def refused(http: Http, *, status: int = 400, **body: Any) -> dict[str, Any]:
    return http.nested(await http.client.post("/v1/completions", json=body), status)


async def next_token(http: Http, ids: list[int]) -> tuple[int, float]:
    """The top-1 token after a prompt and its logprob, found by scoring every token with ``/v1/score``."""
    step, size = http.info["limits"]["max_labels"], http.vocab_size
    logprobs: list[float] = []
    for start in range(0, size, step):
        labels = list(range(start, min(start + step, size)))
        answer = await http.score(query=[], items=[ids], label_token_ids=labels, return_token_logprobs=True)
        logprobs += answer["token_logprobs"][0]
    best = max(range(size), key=logprobs.__getitem__)
    return best, logprobs[best]


async def test_envelope(http: Http):
    answer = await complete(http, model="default", prompt=PROMPT, max_tokens=1)
    assert set(answer) == {"id", "object", "created", "model", "choices", "usage"}
    assert answer["object"] == "text_completion"
    assert answer["model"] == http.info["model"]
    [choice] = answer["choices"]
    assert (choice["index"], choice["finish_reason"]) == (0, "length")
    usage = answer["usage"]
    assert usage["prompt_tokens"] == len(await http.ids(PROMPT))
    assert usage["completion_tokens"] == 1
    assert usage["total_tokens"] == usage["prompt_tokens"] + 1


async def test_the_request_of_an_evaluation_harness(http: Http):
    ids = await http.ids(PROMPT)
    body = {"prompt": [ids], "temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": True}
    [choice] = (await complete(http, **body))["choices"]
    logprobs = choice["logprobs"]
    assert {len(column) for column in logprobs.values()} == {len(ids) + 1}
    assert logprobs["token_logprobs"][0] is logprobs["top_logprobs"][0] is None
    for position in range(1, len(ids)):
        prompt, token = ids[:position], ids[position]
        asked = await http.score(query=[], items=[prompt], label_token_ids=[token], return_token_logprobs=True)
        assert logprobs["token_logprobs"][position] == pytest.approx(asked["token_logprobs"][0][0], abs=2e-5)
    for position in (1, 4, len(ids)):
        token, highest = await next_token(http, ids[:position])
        top = logprobs["top_logprobs"][position]
        assert max(top.values()) == pytest.approx(highest, abs=2e-5)
        own = logprobs["token_logprobs"][position]
        assert (own == max(top.values())) == ([*ids, token][position] == token)
    # The last is the top-1 token after the whole prompt.
    assert choice["text"].startswith(PROMPT)
    assert choice["text"] == "".join(logprobs["tokens"])
    assert logprobs["top_logprobs"][-1] == {logprobs["tokens"][-1]: logprobs["token_logprobs"][-1]}


async def test_text_and_its_tokens_are_the_same_prompt(http: Http):
    ids = await http.ids(PROMPT)
    rest = {"max_tokens": 0, "echo": True, "logprobs": 0}
    answers = [await complete(http, prompt=prompt, **rest) for prompt in (PROMPT, [PROMPT], ids, [ids])]
    for answer in answers:
        [choice] = answer["choices"]
        assert choice["text"] == PROMPT
        assert choice["logprobs"].get("top_logprobs") is None
        assert choice["logprobs"]["tokens"] == answers[0]["choices"][0]["logprobs"]["tokens"]
        nats = choice["logprobs"]["token_logprobs"][1:]
        assert nats == pytest.approx(answers[0]["choices"][0]["logprobs"]["token_logprobs"][1:], abs=2e-5)
        offsets = choice["logprobs"]["text_offset"]
        assert [PROMPT[a:b] for a, b in zip(offsets, [*offsets[1:], None], strict=True)] == choice["logprobs"]["tokens"]
        assert answer["usage"]["completion_tokens"] == 0


async def test_several_prompts(http: Http):
    prompts = ["the quick", "a", "the quick brown fox", "no"]
    rest = {"max_tokens": 1, "echo": True, "logprobs": 1}
    together = (await complete(http, prompt=prompts, **rest))["choices"]
    assert [choice["index"] for choice in together] == [0, 1, 2, 3]
    for prompt, choice in zip(prompts, together, strict=True):
        [alone] = (await complete(http, prompt=prompt, **rest))["choices"]
        assert alone["text"] == choice["text"]
        nats = [other["logprobs"]["token_logprobs"][1:] for other in (choice, alone)]
        assert nats[0] == pytest.approx(nats[1], abs=2e-5)


@pytest.mark.parametrize("echo", [False, True])
@pytest.mark.parametrize("max_tokens", [0, 1])
@pytest.mark.parametrize("logprobs", [None, 0, 1])
async def test_every_combination(http: Http, echo: bool, max_tokens: int, logprobs: int | None):
    for prompt in (PROMPT, [[7]]):
        answer = await complete(http, prompt=prompt, echo=echo, max_tokens=max_tokens, logprobs=logprobs)
        [choice] = answer["choices"]
        count = max_tokens + echo * answer["usage"]["prompt_tokens"]
        if logprobs is None:
            assert "logprobs" not in choice
        else:
            told = choice["logprobs"]
            assert len(told["tokens"]) == len(told["token_logprobs"]) == len(told["text_offset"]) == count
            assert len(told["top_logprobs"]) == count if logprobs else "top_logprobs" not in told
            assert all(nats <= 0 for nats in told["token_logprobs"][echo:])
        assert choice["text"] or not echo
        assert not choice["text"] or echo or max_tokens


async def test_parts_of_characters(http: Http):
    ids = await http.ids("狐狸 🦊")
    [choice] = (await complete(http, prompt=[ids], max_tokens=0, echo=True, logprobs=1))["choices"]
    assert choice["text"] == "狐狸 🦊"
    names, offsets = choice["logprobs"]["tokens"], choice["logprobs"]["text_offset"]
    assert len(names) == len(offsets) == len(ids)
    assert "\ufffd" not in "".join(names)
    assert offsets[0] == 0
    assert offsets == sorted(offsets)
    assert offsets[-1] < len(choice["text"])
    assert all(math.isfinite(nats) for nats in choice["logprobs"]["token_logprobs"][1:])


@pytest.mark.parametrize(
    ("body", "param", "said"),
    [
        ({"max_tokens": 16}, "max_tokens", "must be 0 or 1, since this service prefills"),
        ({"max_tokens": -1}, "max_tokens", "must be 0 or 1"),
        ({"max_tokens": True}, "max_tokens", "valid integer"),
        ({"logprobs": 5}, "logprobs", "must be 0 or 1"),
        ({"temperature": 0.7}, "temperature", "must be 0 or left out"),
        ({"n": 2}, "n", "must be 1"),
        ({"stream": True}, "stream", "must be false"),
        ({"stop": ["a"]}, "stop", 'stop must be [] or "" or left out'),
        ({"prompt": []}, "prompt", "empty list"),
        ({"prompt": ""}, "prompt", "prompt[0] has 0 tokens"),
        ({"prompt": [[1], []]}, "prompt", "prompt[1] has 0 tokens"),
        ({"prompt": [1, "a"]}, "prompt", "prompt[1]"),
        ({"prompt": [[1], [-1]]}, "prompt", "prompt[1][0]: Token ID -1 is out of vocabulary"),
        ({"prompt": [1, 10**30]}, "prompt", f"prompt[1]: Token ID {10**30} is out of vocabulary"),
        ({"prompt": None}, "prompt", "not null"),
    ],
)
async def test_what_is_wrong_is_named(http: Http, body: dict[str, Any], param: str, said: str):
    error = await refused(http, **{"prompt": "a", "max_tokens": 1} | body)
    assert error["param"] == param
    assert said in error["message"]
    assert error["type"] == "BadRequestError"


async def test_other_errors_are_nested_too(http: Http):
    assert (await refused(http, max_tokens=1))["message"] == "prompt is required"
    error = await refused(http, status=404, prompt="a", max_tokens=1, model="gpt-3.5-turbo-instruct")
    assert (error["type"], error["param"]) == ("NotFoundError", "model")
    limit = http.info["limits"]["max_items"]
    assert str(limit) in (await refused(http, status=413, prompt=["a"] * (limit + 1), max_tokens=1))["message"]
    http.nested(await http.post("{", "/v1/completions"), 400)
    http.nested(await http.client.get("/v1/completions"), 405)


async def test_the_context_is_the_limit(http: Http):
    limit = http.info["limits"]["max_prompt_tokens"]
    await complete(http, prompt=[1] * limit, max_tokens=1, logprobs=1, echo=True)
    error = await refused(http, prompt=[1] * (limit + 1), max_tokens=1)
    assert all(word in error["message"] for word in (str(limit), str(limit + 1)))


async def test_openapi_describes_the_nested_errors(http: Http):
    api = (await http.client.get("/openapi.json")).json()
    responses = api["paths"]["/v1/completions"]["post"]["responses"]
    assert {code for code in responses if code != "200"} == {"400", "404", "413", "415", "500", "503", "504"}
    assert "OpenAIErrorResponse" in json.dumps(responses["400"])
