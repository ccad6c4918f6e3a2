"""What ``cached_tokens`` tells on every route that scores: nothing about what callers of another salt have sent."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from typing import Any

import httpx
import pytest

from model import loading
from model.contract import Engine
from serve_app.frontend.auth import ApiKeys
from serve_app.frontend.models import Models
from serve_app.frontend.routes import create_app
from serve_app.frontend.service import ModelService
from serve_app.frontend.tenants import Tenants
from serve_app.settings import ModelSettings
from serve_app.tasks.completions import COMPLETIONS
from serve_app.tasks.generate import GENERATE
from serve_app.tasks.logprobs import LOGPROBS
from serve_app.tasks.table import TASKS
from serve_app.tasks.tokenizer import TextTokenizer
from tests.local import DirectReplicas
from tests.tiny import make_llama

pytestmark = pytest.mark.heavy

LENGTHENED = {"query", "state", "input", "prompt"}
"""Fields with the beginnings of prompts: a page of the cache has 128 tokens."""


def longer(example: Mapping[str, Any]) -> dict[str, Any]:
    def long(text: str) -> str:
        return f"{text} " * 12

    return {
        name: value
        if name not in LENGTHENED
        else long(value)
        if isinstance(value, str)
        else [long(each) for each in value]
        for name, value in example.items()
    }


REQUESTS = {task.name: (task.paths[0], longer(task.example)) for task in TASKS if task.scores}
REQUESTS |= {
    f"{task.name} in lines": (task.paths[0], longer(task.example) | {"stream": True}) for task in TASKS if task.lines
}
# These examples ask for every position's value, so that nothing is cached.
REQUESTS[COMPLETIONS.name] = (COMPLETIONS.paths[0], {"prompt": "The sky is blue. " * 12, "max_tokens": 1})
IDS = [5 + number % 200 for number in range(300)]
REQUESTS[LOGPROBS.name] = (LOGPROBS.paths[0], {"input": IDS, "start": 299})
REQUESTS[GENERATE.name] = (
    GENERATE.paths[0],
    GENERATE.example | {"text": None, "input_ids": IDS, "logprob_start_len": 298},
)


class Asked:
    """A service on a real engine, asked with two API keys.

    Attributes:
        computed: tokens that the last request's answer took.
    """

    def __init__(self, client: httpx.AsyncClient, replicas: DirectReplicas) -> None:
        self._client = client
        self._replicas = replicas
        self.computed = 0

    async def cached(self, request: tuple[str, dict[str, Any]], key: str, **fields: object) -> list[int]:
        """All numbers of cached tokens in the answer."""
        path, body = request
        before = self._replicas.engine.stats.computed_tokens
        answer = await self._client.post(path, json=body | fields, headers={"authorization": f"Bearer {key}"})
        assert answer.status_code == 200, answer.text
        self.computed = self._replicas.engine.stats.computed_tokens - before
        lines = answer.text.splitlines() if body.get("stream") else [answer.text]
        return [number for line in lines for number in reported(json.loads(line))]


def reported(answer: object) -> list[int]:
    if isinstance(answer, list):
        return [number for each in answer for number in reported(each)]
    if not isinstance(answer, dict):
        return []
    own = [value for name, value in answer.items() if name in ("cached_tokens", "x_cached_tokens")]
    return own + [number for each in answer.values() for number in reported(each)]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> tuple[TextTokenizer, Engine]:
    folder = make_llama(tmp_path_factory.mktemp("salted"), context=2048, tokenizer=True)
    engine = loading.load(folder, max_segment_tokens=256, call_tokens=256, chunks=(64,), prefix_cache_bytes=2**24)
    return TextTokenizer.load(folder), engine


@pytest.fixture
async def asked(loaded: tuple[TextTokenizer, Engine], tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Asked]:
    tokenizer, engine = loaded
    file = tmp_path_factory.mktemp("keys") / "keys"
    file.write_text("one: key-one\nother: key-other\n")
    replicas = DirectReplicas(engine)
    service = ModelService(ModelSettings(), tokenizer, engine.info, replicas)
    app = create_app(lambda: Models(service), keys=ApiKeys(str(file)), tenants=Tenants(salted=True))
    async with httpx.AsyncClient(base_url="http://it", transport=httpx.ASGITransport(app)) as client:
        yield Asked(client, replicas)
    service.close()


@pytest.mark.parametrize("name", REQUESTS)
async def test_another_salts_prompts_leave_no_trace(asked: Asked, name: str):
    request = REQUESTS[name]
    cold = await asked.cached(request, "key-one", cache_salt=name)  # the engine keeps what earlier cases sent
    computed = asked.computed
    for _ in range(2):  # a prompt is kept when it comes the second time
        warm = await asked.cached(request, "key-one", cache_salt=name)
    assert asked.computed < computed
    assert not cold or sum(warm) > sum(cold)
    for key, salt in (("key-other", name), ("key-one", f"not {name}"), ("key-other", f"not {name}")):
        assert await asked.cached(request, key, cache_salt=salt) == cold
        assert asked.computed == computed
