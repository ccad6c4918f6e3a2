"""One bad item beside 99 good ones in the same device batch: the 99 have transformers' scores."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from serve_app.contract import Engine
from serve_app.errors import ScoringError
from serve_app.frontend.service import ModelService
from serve_app.jobs.local_replicas import LocalReplicas
from serve_app.schemas import ScoreRequest
from serve_app.settings import ModelSettings
from serve_app.tasks.score import SCORE
from serve_app.tasks.tokenizer import TextTokenizer
from tests.tiny import make_llama

torch = pytest.importorskip("torch")

CONTEXT, VOCAB = 128, 307
POISON = 5
"""A token with a NaN embedding: every sequence with it is NaN, too."""
QUERY = [11, 12, 13, 14, 15, 16]
LABELS = [40, 41, 42]
GOOD = [[20 + i % 90, 30 + i, *[7 + i % 3] * (i % 9)] for i in range(99)]
BAD = {
    "not a number": [20, POISON, 30],
    "over-long": [21] * CONTEXT,
    "no such id": [22, VOCAB],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_llama(tmp_path_factory.mktemp("poisoned"), context=CONTEXT, vocab=VOCAB, tokenizer=True)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"][POISON] = np.nan
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def engine(folder: Path) -> Engine:
    from model.loading import load

    return load(folder, max_segment_tokens=64, call_tokens=128)


@pytest.fixture(scope="module")
def right(folder: Path) -> np.ndarray:
    """The good items' probabilities, by transformers in float32."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    rows: list[np.ndarray] = []
    with torch.no_grad():
        for item in GOOD:
            logits = model(torch.tensor([QUERY + item])).logits[0, -1]
            rows.append(torch.softmax(logits, -1)[LABELS].numpy())
    return np.stack(rows)


@pytest.fixture
async def poisoned_service(folder: Path, engine: Engine) -> AsyncIterator[ModelService]:
    settings = ModelSettings(model=str(folder), max_batch_tokens=8_192, timeout_s=60)
    replicas = LocalReplicas(engine, settings)
    service = ModelService(settings, TextTokenizer.load(folder), engine.info, replicas)
    yield service
    service.close()
    await replicas.queue.close()


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
async def test_in_one_request(poisoned_service: ModelService, right: np.ndarray, bad: list[int]):
    request = ScoreRequest(query=QUERY, items=[*GOOD[:50], bad, *GOOD[50:]], label_token_ids=LABELS, on_error="item")
    answer = await poisoned_service.answer(SCORE, request, request_id="one")
    assert [error.index for error in answer.errors or []] == [50]
    assert answer.scores[50] is None
    rows = [row for row in answer.scores if row is not None]
    np.testing.assert_allclose(np.log(rows), np.log(right), rtol=0, atol=1e-4)


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
async def test_in_a_hundred_requests_at_once(poisoned_service: ModelService, right: np.ndarray, bad: list[int]):
    async def ask(number: int, item: list[int]) -> list[float]:
        request = ScoreRequest(query=QUERY, items=[item], label_token_ids=LABELS)
        (row,) = (await poisoned_service.answer(SCORE, request, request_id=str(number))).scores
        assert row is not None
        return row

    items = [*GOOD[:50], bad, *GOOD[50:]]
    rows = await asyncio.gather(*(ask(i, item) for i, item in enumerate(items)), return_exceptions=True)
    assert isinstance(rows.pop(50), ScoringError)
    np.testing.assert_allclose(np.log(rows), np.log(right), rtol=0, atol=1e-4)
