"""Bodies as clients encode them: compressed, with a byte-order mark, in UTF-16, and with half a character."""

from __future__ import annotations

import gzip
import json
import tracemalloc
import zlib
from collections.abc import Callable
from typing import Any

import pytest
from backports import zstd

from serve_app.errors import InvalidRequestError, TooLargeError
from serve_app.frontend import bodies
from tests.boundary.asking import Http

ASK: dict[str, Any] = {"query": "the ", "items": ["fox", "dog"], "label_token_ids": [5, 7]}
GOOD = json.dumps(ASK).encode()


def raw_deflate(data: bytes) -> bytes:
    made = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return made.compress(data) + made.flush()


ENCODED: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
    "gzip": ("gzip", gzip.compress),
    "x-gzip": ("X-GZip", gzip.compress),
    "deflate": ("deflate", zlib.compress),
    "deflate without its header": ("deflate", raw_deflate),
    "zstd": ("zstd", zstd.compress),
    "identity": ("identity", bytes),
}
COMPRESSED = [name for name in ENCODED if name != "identity"]


@pytest.mark.parametrize("name", ENCODED)
async def test_an_encoded_body_is_decoded(http: Http, name: str):
    encoding, encode = ENCODED[name]
    plain = (await http.post(GOOD)).json()
    answer = await http.post(encode(GOOD), content_encoding=encoding)
    assert (answer.status_code, answer.json()) == (200, plain)
    # More than one step decodes, and hardly compressible.
    large = json.dumps(ASK | {"query": list(range(256)) * 300, "items": [[1]]}).encode()
    wrong = http.flat(await http.post(encode(large), content_encoding=encoding), 400)
    assert "76801 tokens" in wrong["message"]


@pytest.mark.parametrize("name", COMPRESSED)
async def test_incomplete_or_wrongly_encoded_bodies_are_refused(http: Http, name: str):
    encoding, encode = ENCODED[name]
    whole = encode(GOOD)
    for wrong in (whole[:-3], whole[:5], whole + b"more", whole + whole, GOOD, b"\x00\x01"):
        error = http.flat(await http.post(wrong, content_encoding=encoding), 400)
        assert f"not valid {encoding.lower().removeprefix('x-')}" in error["message"]


@pytest.mark.parametrize("encoding", ["br", "compress", "gzip, zstd", "gzip, gzip", "nonsense"])
async def test_another_encoding_is_named(http: Http, encoding: str):
    response = await http.post(GOOD, content_encoding=encoding)
    error = http.flat(response, 415)
    assert f"'{encoding}'" in error["message"]
    assert "gzip, deflate, zstd" in error["message"]


@pytest.mark.parametrize("name", COMPRESSED)
def test_a_bomb_is_refused_in_flat_memory(name: str):
    encoding, encode = ENCODED[name]
    bomb = encode(bytes(2**26))
    assert len(bomb) < 2**20
    tracemalloc.start()
    with pytest.raises(TooLargeError, match="decoded, larger than 1000000 bytes"):
        bodies.decoded(bomb, encoding.lower().removeprefix("x-"), 1_000_000)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8 * 2**20
    assert len(bodies.decoded(bomb, encoding.lower().removeprefix("x-"), 2**26)) == 2**26


async def test_a_bomb_is_413(http: Http):
    bomb = gzip.compress(bytes(http.info["limits"]["max_body_bytes"] + 1))
    assert "decoded" in http.flat(await http.post(bomb, content_encoding="gzip"), 413)["message"]


async def test_a_byte_order_mark_is_skipped(http: Http):
    assert (await http.post(b"\xef\xbb\xbf" + GOOD)).json() == (await http.post(GOOD)).json()


@pytest.mark.parametrize("name", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"])
async def test_another_unicode_encoding_is_named(http: Http, name: str):
    error = http.flat(await http.post(GOOD.decode().encode(name)), 400)
    assert f"{name[:6].upper()}; send UTF-8" in error["message"]


LONE = json.dumps(ASK | {"items": ["fox", "a\ud800", "dog"]})


async def test_a_lone_surrogate_is_named_with_its_field_and_item(http: Http):
    error = http.flat(await http.post(LONE), 400)
    assert error["message"].startswith("items[1] must be text without lone surrogates")
    assert error["param"] == "items"
    for path, body, where in (
        ("/v1/score", ASK | {"query": "\udfff"}, "query"),
        ("/v1/score", ASK | {"items": "\ud800"}, "items"),
        ("/v1/score", {"items": ["a"], "labels": [["a", "b\ud800"]]}, "labels[0][1]"),
        ("/v1/rerank", {"query": "a", "documents": ["a", {"text": "\ud83d"}]}, "documents[1].text"),
        ("/v1/rerank", {"query": "a", "documents": ["a", "\ud83d\ud83d"]}, "documents[1]"),
        ("/generative_scoring", ASK | {"items": ["a", "\ud800"]}, "items[1]"),
        ("/tokenize", {"prompt": ["a", "\ud800"]}, "prompt[1]"),
    ):
        error = http.flat(await http.post(json.dumps(body), path), 400)
        assert error["message"].startswith(f"{where} must be text without lone surrogates, not "), error
        assert error["param"] == where.split("[")[0]


async def test_a_lone_surrogate_is_an_error_of_its_own_item_alone(http: Http):
    right = await http.score(**ASK)
    for stream in (False, True):
        response = await http.post(json.dumps(json.loads(LONE) | {"on_error": "item", "stream": stream}))
        assert response.status_code == 200, response.text
        if stream:
            rows = {row["index"]: row for row in map(json.loads, response.text.splitlines()) if "index" in row}
            scores = [rows[index].get("scores") for index in range(3)]
            fault = rows[1]["error"]
        else:
            scores, (fault,) = response.json()["scores"], response.json()["errors"]
        assert scores == [right["scores"][0], None, right["scores"][1]]
        assert (fault["index"], fault["code"]) == (1, 400)
        assert "items[1] must be text without lone surrogates" in fault["message"]


async def test_other_errors_are_reported_despite_a_lone_surrogate(http: Http):
    lone = json.loads(LONE)
    assert (await http.refused(**ASK | {"items": 3}))["param"] == "items"
    assert http.flat(await http.post(json.dumps(lone | {"banana": 1})), 400)["param"] == "banana"
    assert "NaN" in http.flat(await http.post(LONE[:-1] + ', "temperature": NaN}'), 400)["message"]
    assert "not valid JSON" in http.flat(await http.post(LONE[:-1]), 400)["message"]
    assert http.flat(await http.post(LONE[:-1] + ', "items": ["b"]}'), 400)["message"].startswith(
        "items is given twice"
    )


async def test_a_large_body_is_answered_as_a_small_one_is(http: Http):
    items = [[index % 100, 1, 2, 3] for index in range(9_000)]
    answer = await http.score(items=items, label_token_ids=[5, 7])
    small = await http.score(items=items[-2:], label_token_ids=[5, 7])
    assert len(answer["scores"]) == len(items)
    assert answer["scores"][-2:] == small["scores"]
    error = await http.refused(items=[*items[:-1], [1, "2"]], label_token_ids=[5, 7])
    assert error["message"] == 'items[8999][1] must be a valid integer, not "2"'


async def test_a_pair_of_surrogates_is_a_character(http: Http):
    assert '"\\ud83e\\udd8a"' in json.dumps({"prompt": "🦊"})
    assert (await http.post(json.dumps({"prompt": "🦊"}), "/tokenize")).status_code == 200


def test_no_encoding_is_decoded_beyond_a_step_at_once():
    for name in COMPRESSED:
        encoding, encode = ENCODED[name]
        pieces = bodies.ENCODINGS[encoding.lower().removeprefix("x-")](encode(bytes(2**24)))
        assert max(map(len, pieces)) <= bodies.STEP_BYTES
    with pytest.raises(InvalidRequestError):
        bodies.decoded(b"", "zstd", 10)
