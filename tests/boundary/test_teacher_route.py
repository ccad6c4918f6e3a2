"""``POST /v1/logprobs``, on the fake or on a running service."""

from __future__ import annotations

import io
import math
from typing import Any

import numpy as np
import pytest

from serve_app.tasks import logprobs as route
from tests.boundary.asking import Http

PROMPT = "the quick brown fox jumps over the lazy dog"
IDS = [5, 9, 17, 4, 22, 31]


async def answered(http: Http, **body: Any) -> dict[str, Any]:
    response = await http.client.post("/v1/logprobs", json=body)
    assert response.status_code == 200, response.text
    return response.json()


async def of(http: Http, **body: Any) -> dict[str, Any]:
    """The answer for the only sequence."""
    [data] = (await answered(http, **body))["data"]
    return data


async def distribution(http: Http, ids: list[int], temperature: float = 1.0) -> np.ndarray:
    """All logprobs after a prompt, by scoring every token with ``/v1/score``."""
    step, size = http.info["limits"]["max_labels"], http.vocab_size
    found: list[float] = []
    for start in range(0, size, step):
        labels = list(range(start, min(start + step, size)))
        answer = await http.score(query=[], items=[ids], label_token_ids=labels, return_token_logprobs=True)
        found += answer["token_logprobs"][0]
    scaled = np.array(found) / temperature
    return scaled - np.log(np.exp(scaled - scaled.max()).sum()) - scaled.max()


async def test_every_token_has_the_logprob_of_a_label(http: Http):
    answer = await answered(http, input=PROMPT)
    assert set(answer) == {"object", "model", "data", "usage"}
    [data] = answer["data"]
    ids = await http.ids(PROMPT)
    assert set(data) == {"index", "start", "token_ids", "logprobs"}
    assert (data["start"], data["token_ids"]) == (1, ids[1:])
    assert answer["usage"]["prompt_tokens"] == len(ids)
    for at in range(1, len(ids)):
        asked = await http.score(query=[], items=[ids[:at]], label_token_ids=[ids[at]], return_token_logprobs=True)
        assert data["logprobs"][at - 1] == pytest.approx(asked["token_logprobs"][0][0], abs=1e-4)


@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
async def test_the_most_probable_tokens_and_candidates(http: Http, temperature: float):
    chosen = [[7], [], [1, 2, 3, 4]]
    data = await of(http, input=IDS, start=3, top=5, candidates=[chosen], temperature=temperature)
    assert data["start"] == 3
    for row, at in enumerate(range(3, 6)):
        wanted = await distribution(http, IDS[:at], temperature)
        assert data["logprobs"][row] == pytest.approx(wanted[IDS[at]], abs=1e-4)
        assert data["candidates"][row] == pytest.approx(wanted[chosen[row]].tolist(), abs=1e-4)
        assert data["top_logprobs"][row] == pytest.approx((-np.sort(-wanted)[:5]).tolist(), abs=1e-4)
        assert data["top_logprobs"][row] == pytest.approx(wanted[data["top_ids"][row]].tolist(), abs=1e-4)


async def test_sequences_have_starts_of_their_own_and_are_answered_as_alone(http: Http):
    many = [IDS, IDS[:3], [8, *IDS]]
    together = await answered(http, input=many, start=[4, 2, 1], top=2)
    assert [data["index"] for data in together["data"]] == [0, 1, 2]
    for data, ids, start in zip(together["data"], many, [4, 2, 1], strict=True):
        alone = await of(http, input=ids, start=start, top=2)
        assert data | {"index": 0} == alone


async def test_arrays_hold_what_json_does(http: Http):
    body = {"input": [IDS, IDS[:3]], "start": [3, 1], "top": 3, "candidates": [[[7], [], [1, 2]], [[], [3]]]}
    answer = await answered(http, **body)
    response = await http.client.post("/v1/logprobs", json=body | {"format": "npz"})
    assert response.headers["content-type"] == route.NPZ
    with np.load(io.BytesIO(response.content), allow_pickle=False) as arrays:
        found = dict(arrays)
    assert found["usage"].tolist() == [9, answer["usage"]["prompt_tokens_details"]["cached_tokens"]]
    assert found["starts"].tolist() == [3, 1]
    assert found["offsets"].tolist() == [0, 3, 5]
    assert found["candidate_offsets"].tolist() == [0, 1, 1, 3, 3, 4]
    for name in ("token_ids", "logprobs", "top_ids", "top_logprobs"):
        rows = [row for data in answer["data"] for row in data[name]]
        assert found[name].tolist() == rows
        assert found[name].dtype == (np.int32 if "ids" in name else np.float32)
    flat = [value for data in answer["data"] for row in data["candidates"] for value in row]
    assert found["candidates"].tolist() == flat


WRONG: dict[str, tuple[dict[str, Any], str, str]] = {
    "no sequence": ({"input": []}, "input", "at least one"),
    "an empty sequence": ({"input": [[1, 2], []]}, "input", "0 tokens"),
    "an unknown id": ({"input": [[1, 2], [3, 10**9]]}, "input", str(10**9)),
    "a negative id": ({"input": [1, -2]}, "input", "-2"),
    "one token": ({"input": [7]}, "start", "longer sequence"),
    "a start beyond the end": ({"input": IDS, "start": 6}, "start", "1 to 5"),
    "a start of 0": ({"input": IDS, "start": 0}, "start", "1 to 5"),
    "starts of another number": ({"input": [IDS, IDS], "start": [1]}, "start", "1 numbers"),
    "too many of the most probable": ({"input": IDS, "top": 1025}, "top", "1024"),
    "fewer than none of them": ({"input": IDS, "top": -1}, "top", "0"),
    "lists of another number than sequences": ({"input": IDS, "candidates": [[[1]] * 5] * 2}, "candidates", "2 lists"),
    "lists of another number than positions": ({"input": IDS, "candidates": [[[1]] * 6]}, "candidates", "6 lists"),
    "an unknown candidate": ({"input": IDS, "start": 5, "candidates": [[[1, 10**30]]]}, "candidates", "[0][0][1]"),
    "a temperature of 0": ({"input": IDS, "temperature": 0}, "temperature", "0"),
    "a temperature below 0": ({"input": IDS, "temperature": -0.5}, "temperature", "-0.5"),
    "a temperature near 0": ({"input": IDS, "temperature": 1e-9}, "temperature", "0.001"),
    "a high temperature": ({"input": IDS, "temperature": 1001}, "temperature", "1000"),
    "another format": ({"input": IDS, "format": "csv"}, "format", "csv"),
    "the field of another route": ({"input": IDS, "prompt": "the"}, "prompt", "input"),
}


@pytest.mark.parametrize("name", WRONG)
async def test_wrong_requests(http: Http, name: str):
    body, param, said = WRONG[name]
    error = await http.refused("/v1/logprobs", **body)
    assert error["param"] == param
    assert said in error["message"]


@pytest.mark.parametrize("temperature", ["NaN", "Infinity", "-Infinity", "1e999"])
async def test_a_temperature_that_is_no_number(http: Http, temperature: str):
    response = await http.post(f'{{"input": [5, 9], "temperature": {temperature}}}', "/v1/logprobs")
    http.flat(response, 400)


async def test_extreme_temperatures_are_answered(http: Http):
    for temperature in (0.001, 1000):
        data = await of(http, input=IDS, top=1, temperature=temperature)
        assert all(math.isfinite(value) for value in data["logprobs"])
        assert all(value <= 1e-4 for value in data["logprobs"])


async def test_answers_are_limited(http: Http, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(route, "MOST_IN_JSON", 40)
    monkeypatch.setattr(route, "MOST_IN_BINARY", 60)
    await answered(http, input=IDS, top=3)
    error = await http.refused("/v1/logprobs", status=413, input=IDS, top=4)
    assert "50 numbers" in error["message"]
    assert "npz" in error["message"]
    await http.client.post("/v1/logprobs", json={"input": IDS, "top": 4, "format": "npz"})
    error = await http.refused("/v1/logprobs", status=413, input=IDS, top=6, format="npz")
    assert "at most 60" in error["message"]
    assert "smaller top" in error["message"]
