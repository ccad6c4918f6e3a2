"""Callers who keep their cached prefixes apart: by ``cache_salt``, and by their API key where the service says so."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest

from serve_app.frontend.auth import ApiKeys
from serve_app.frontend.models import Models
from serve_app.frontend.routes import create_app
from serve_app.frontend.service import ModelService
from serve_app.frontend.tenants import Tenants
from serve_app.scorer.fake_engine import FakeEngine
from serve_app.settings import ModelSettings
from serve_app.tasks.tokenizer import TextTokenizer
from tests.local import DirectReplicas, save_tokenizer

SCORE = ("/v1/score", {"query": "a", "items": [" b", " c"], "label_token_ids": [1]})
STREAM = ("/v1/score", {"query": "a", "items": [" b", " c"], "label_token_ids": [1], "stream": True})
RERANK = ("/v1/rerank", {"query": "a", "documents": ["b", "c"]})
COMPLETION = ("/v1/completions", {"prompt": "a", "max_tokens": 1})


class Salts:
    """A service that tells which salts its batches have."""

    def __init__(self, folder: Path, *, salt_by_api_key: bool) -> None:
        tokenizer, engine = TextTokenizer.load(save_tokenizer(folder, adds_bos=False)), FakeEngine()
        self._replicas = DirectReplicas(engine)
        models = Models(ModelService(ModelSettings(), tokenizer, engine.info, self._replicas))
        (folder / "keys").write_text("one\nother\n")
        app = create_app(lambda: models, keys=ApiKeys(str(folder / "keys")), tenants=Tenants(salted=salt_by_api_key))
        self._client = httpx.AsyncClient(base_url="http://fake", transport=httpx.ASGITransport(app))

    async def of(self, request: tuple[str, dict[str, object]], key: str = "one", **fields: object) -> int:
        self._replicas.jobs.clear()
        path, body = request
        answer = await self._client.post(path, json=body | fields, headers={"authorization": f"Bearer {key}"})
        assert answer.status_code == 200, answer.text
        batches = [job.batch for job in self._replicas.jobs]
        (salt,) = {each for batch in batches for each in ([0] if batch.salts is None else batch.salts.tolist())}
        return salt


@pytest.mark.parametrize("request_", [SCORE, STREAM, RERANK, COMPLETION])
async def test_each_salt_is_its_own(tmp_path: Path, request_: tuple[str, dict[str, object]]):
    salts = Salts(tmp_path, salt_by_api_key=False)
    assert (
        await salts.of(request_) == await salts.of(request_, "other") == await salts.of(request_, cache_salt=None) == 0
    )
    ours = await salts.of(request_, cache_salt="ours")
    assert ours == await salts.of(request_, "other", cache_salt="ours")
    assert len({0, ours, await salts.of(request_, cache_salt="theirs")}) == 3


@pytest.mark.parametrize("request_", [SCORE, STREAM, RERANK, COMPLETION])
async def test_each_api_key_is_its_own(tmp_path: Path, request_: tuple[str, dict[str, object]]):
    salts = Salts(tmp_path, salt_by_api_key=True)
    one = await salts.of(request_)
    assert one == await salts.of(request_)
    found = {0, one, await salts.of(request_, "other"), await salts.of(request_, cache_salt="other")}
    assert len({*found, await salts.of(request_, "other", cache_salt="other")}) == 5
