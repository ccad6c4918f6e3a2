"""Logprobs of prompts in vLLM's shape, ``prompt_logprobs``, and in sglang's, ``/generate``, and their clients."""

from __future__ import annotations

import asyncio
import math
from typing import Any

import pytest

from tests.boundary.asking import Http
from tests.teaching import Post, slime_logprobs, trl_logprobs

PROMPT = "the quick brown fox jumps over the lazy dog"
IDS = [5, 9, 17, 4, 22, 31]
NONE = {"max_new_tokens": 0}


async def posted(http: Http, path: str, **body: Any) -> Any:
    response = await http.client.post(path, json=body)
    assert response.status_code == 200, response.text
    return response.json()


async def wanted(http: Http, **body: Any) -> dict[str, Any]:
    """What ``/v1/logprobs`` answers for the only sequence."""
    return (await posted(http, "/v1/logprobs", **body))["data"][0]


def blocking(http: Http) -> Post:
    """Posts from a thread, as a client without asyncio."""
    loop = asyncio.get_running_loop()
    return lambda path, body: asyncio.run_coroutine_threadsafe(posted(http, path, **body), loop).result()


@pytest.mark.parametrize(("top", "temperature"), [(0, None), (3, 0), (3, 0.5)])
async def test_prompt_logprobs(http: Http, top: int, temperature: float | None):
    body = {"prompt": IDS, "max_tokens": 1, "prompt_logprobs": top, "temperature": temperature}
    [choice] = (await posted(http, "/v1/completions", **body))["choices"]
    first, *rest = choice["prompt_logprobs"]
    assert first is None
    assert choice.get("logprobs") is None
    data = await wanted(http, input=IDS, top=top, temperature=temperature or 1.0)
    for row, (token, entries) in enumerate(zip(IDS[1:], rest, strict=True)):
        ids = data["top_ids"][row] if top else []
        assert next(iter(entries)) == str(token)
        assert set(entries) == {str(token), *map(str, ids)}
        assert entries[str(token)]["logprob"] == pytest.approx(data["logprobs"][row], abs=1e-5)
        for rank, (other, logprob) in enumerate(zip(ids, data["top_logprobs"][row] if top else [], strict=True), 1):
            assert entries[str(other)]["rank"] == rank
            assert entries[str(other)]["logprob"] == pytest.approx(logprob, abs=1e-5)
        if token not in ids:
            assert entries[str(token)]["rank"] == top + 1
        texts = {await detokenized(http, int(name)): entry["decoded_token"] for name, entry in entries.items()}
        assert all(text == shown for text, shown in texts.items())


async def detokenized(http: Http, token: int) -> str:
    return (await posted(http, "/detokenize", tokens=[token]))["prompt"]


async def test_prompt_logprobs_change_no_other_field(http: Http):
    for body in ({"max_tokens": 1, "logprobs": 1}, {"max_tokens": 0, "echo": True, "logprobs": 1}, {"max_tokens": 1}):
        plain = await posted(http, "/v1/completions", prompt=[PROMPT, "fox"], **body)
        more = await posted(http, "/v1/completions", prompt=[PROMPT, "fox"], prompt_logprobs=2, **body)
        for choice, other in zip(plain["choices"], more["choices"], strict=True):
            assert len(other.pop("prompt_logprobs")) > 0
            if choice.get("logprobs"):
                found = (choice.pop("logprobs"), other.pop("logprobs"))
                assert found[0]["tokens"] == found[1]["tokens"]
                known = [[value for value in each["token_logprobs"] if value is not None] for each in found]
                assert known[0] == pytest.approx(known[1], abs=1e-5)
            assert choice == other


async def test_what_trl_reads(http: Http):
    sequences, lengths = [IDS, [8, *IDS], IDS[:4]], [2, 5, 3]
    found = await asyncio.to_thread(trl_logprobs, blocking(http), sequences, lengths, 4, 0.7)
    for number, (ids, start) in enumerate(zip(sequences, lengths, strict=True)):
        data = await wanted(http, input=ids, start=start, top=4, temperature=0.7)
        assert found["logprob_token_ids"][number] == data["top_ids"]
        assert found["actual_token_ids"][number] == [[token] for token in ids[start:]]
        for row in range(len(ids) - start):
            assert found["logprobs"][number][row] == pytest.approx(data["top_logprobs"][row], abs=1e-5)
            assert found["actual_logprobs"][number][row] == [pytest.approx(data["logprobs"][row], abs=1e-5)]


async def test_what_slime_reads(http: Http):
    found = await asyncio.to_thread(slime_logprobs, blocking(http), IDS, 4)
    data = await wanted(http, input=IDS, start=2)
    assert found == pytest.approx(data["logprobs"], abs=1e-5)


async def test_generate_returns_what_is_asked_of_each_prompt(http: Http):
    answers = await posted(
        http,
        "/generate",
        input_ids=[IDS, IDS[:3]],
        sampling_params=NONE,
        return_logprob=True,
        logprob_start_len=[2, 0],
        top_logprobs_num=[3, 1],
        token_ids_logprob=[[7, 8], None],
        return_text_in_logprobs=True,
    )
    first, second = [answer["meta_info"] for answer in answers]
    data = await wanted(http, input=IDS, start=3, top=3, candidates=[[[7, 8]] * 3])
    assert [entry[1] for entry in first["input_token_logprobs"]] == IDS[2:]
    assert [entry[0] for entry in first["input_token_logprobs"]] == [None, *data["logprobs"]]
    assert first["input_token_logprobs"][0][2] == await detokenized(http, IDS[2])
    assert first["input_top_logprobs"][0] is first["input_token_ids_logprobs"][0] is None
    for row, entries in enumerate(first["input_top_logprobs"][1:]):
        assert [entry[0] for entry in entries] == data["top_logprobs"][row]
        assert [entry[1] for entry in entries] == data["top_ids"][row]
    for row, entries in enumerate(first["input_token_ids_logprobs"][1:]):
        assert [entry[0] for entry in entries] == pytest.approx(data["candidates"][row])
        assert [entry[1] for entry in entries] == [7, 8]
    assert [len(each or []) for each in second["input_top_logprobs"]] == [0, 1, 1]
    assert "input_token_ids_logprobs" not in second
    assert (first["prompt_tokens"], first["completion_tokens"]) == (6, 0)
    assert first["finish_reason"] == {"type": "length", "length": 0}
    assert answers[0]["text"] == ""


async def test_generate_without_a_start_returns_the_last_token(http: Http):
    answer = await posted(http, "/generate", text=PROMPT, sampling_params=NONE, return_logprob=True)
    ids = await http.ids(PROMPT)
    assert answer["meta_info"]["input_token_logprobs"] == [[None, ids[-1], None]]


WRONG: dict[str, tuple[dict[str, Any], str, str]] = {
    "no prompt": ({"text": None}, "text", "input_ids"),
    "two prompts": ({"input_ids": IDS}, "text", "either"),
    "tokens to generate": ({"sampling_params": {"max_new_tokens": 16}}, "sampling_params", "16"),
    "as many as by default": ({"sampling_params": {}}, "sampling_params", "128"),
    "no logprobs": ({"return_logprob": False}, "return_logprob", "true"),
    "a start beyond the end": ({"logprob_start_len": 10**6}, "logprob_start_len", "-1 for the last"),
    "too many of the most probable": ({"top_logprobs_num": 2000}, "top_logprobs_num", "2000"),
    "an unknown id": ({"token_ids_logprob": [1, 10**9]}, "token_ids_logprob", str(10**9)),
    "lists of another number": ({"token_ids_logprob": [[1], [2]]}, "token_ids_logprob", "2 values"),
    "images": ({"image_data": ["data:"]}, "image_data", "text"),
    "a stream": ({"stream": True}, "stream", "whole"),
}


@pytest.mark.parametrize("name", WRONG)
async def test_wrong_requests_to_generate(http: Http, name: str):
    body, param, said = WRONG[name]
    right = {"text": PROMPT, "sampling_params": NONE, "return_logprob": True}
    error = await http.refused("/generate", **(right | body))
    assert error["param"] == param
    assert said in error["message"]


@pytest.mark.parametrize(
    ("body", "param", "said"),
    [
        ({"prompt_logprobs": 1025}, "prompt_logprobs", "1024"),
        ({"prompt_logprobs": -1}, "prompt_logprobs", "-1"),
        ({"prompt_logprobs": 1, "temperature": 1e-9}, "temperature", "0.001"),
        ({"temperature": 0.5}, "temperature", "never sampled"),
        ({"prompt_logprobs": 1, "temperature": -1}, "temperature", "-1"),
    ],
)
async def test_wrong_prompt_logprobs(http: Http, body: dict[str, Any], param: str, said: str):
    response = await http.client.post("/v1/completions", json={"prompt": IDS, "max_tokens": 0} | body)
    error = http.nested(response, 400)
    assert error["param"] == param
    assert said in error["message"]


async def test_the_answers_hold_no_infinity(http: Http):
    answer = await posted(http, "/v1/completions", prompt=IDS, max_tokens=0, prompt_logprobs=2, temperature=0.001)
    entries = [entry for each in answer["choices"][0]["prompt_logprobs"][1:] for entry in each.values()]
    assert all(math.isfinite(entry["logprob"]) for entry in entries)
