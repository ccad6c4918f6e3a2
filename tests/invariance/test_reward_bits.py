"""On the CPU kernels a text has the same rewards alone, among 64, in any order, cold and warm: all is ``==``."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from model import loading
from serve_app.frontend.service import ModelService
from serve_app.jobs.local_replicas import LocalReplicas
from serve_app.settings import Limits, ModelSettings
from serve_app.tasks.classify import CLASSIFY, ClassifyRequest
from serve_app.tasks.pooling import EMBEDDINGS, EmbeddingsRequest
from serve_app.tasks.remote_reward import REMOTE_REWARD, RemoteRewardRequest
from serve_app.tasks.tokenizer import TextTokenizer
from tests.rewarding import make_reward_model

pytestmark = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler is installed")

TEXTS = 64


@pytest.mark.parametrize(
    ("classes", "dtype"),
    [
        pytest.param(1, "bfloat16", id="classifier in bfloat16", marks=pytest.mark.slow),
        pytest.param(0, "float32", id="judge"),
        pytest.param(1, "float32", id="classifier", marks=pytest.mark.slow),
        pytest.param(0, "bfloat16", id="judge in bfloat16", marks=pytest.mark.slow),
    ],
)
async def test_a_text_has_the_rewards_that_it_has_alone(classes: int, dtype: Any, tmp_path: Path) -> None:
    folder = make_reward_model(tmp_path, classes=classes)
    engine = loading.load(
        folder,
        dtype=dtype,
        implementation="native",
        max_segment_tokens=96,
        call_tokens=160,
        chunks=(64, 96, 160),
        prefix_cache_bytes=2**24,
    )
    settings = ModelSettings(
        model=str(folder), dtype=dtype, max_batch_tokens=600, timeout_s=600, limits=Limits(max_queued_tokens=100_000)
    )
    rng = np.random.default_rng(24)
    words = ["is", "this", "text", "positive", "no", "lazy", "the fox", "over"]
    front = "<s>user: " + " ".join(rng.choice(words, 40))  # many answers to one prompt share it
    texts = [
        (front if number % 2 else "<s>user: ") + "\nassistant: " + " ".join(rng.choice(words, int(rng.integers(1, 40))))
        for number in range(TEXTS)
    ]
    replicas = LocalReplicas(engine, settings)
    service = ModelService(settings, TextTokenizer.load(folder), engine.info, replicas, folder=folder)

    def forget() -> None:
        engine._forget_prefixes()  # pyright: ignore[reportPrivateUsage]

    async def rewards(*own: str) -> list[Any]:
        request = RemoteRewardRequest(query=list(own))
        return (await service.answer(REMOTE_REWARD, request, request_id="one")).rewards

    async def classes_of(*own: str) -> list[Any]:
        request = ClassifyRequest(input=list(own), use_activation=False, add_special_tokens=False)
        answer = await service.answer(CLASSIFY, request, request_id="one")
        return [each.probs for each in answer.data if each]

    async def embeddings(*own: str) -> list[Any]:
        request = EmbeddingsRequest(input=list(own), add_special_tokens=False)
        answer = await service.answer(EMBEDDINGS, request, request_id="one")
        return [each.embedding for each in answer.data if each]

    try:
        for ask in (rewards, classes_of, embeddings):
            alone: list[Any] = []
            for text in texts if ask is rewards else texts[::9]:
                forget()
                alone += await ask(text)
            asked = texts if ask is rewards else texts[::9]
            assert len({str(each) for each in alone}) == len(asked)
            forget()
            assert await ask(*asked) == alone  # cold
            order = rng.permutation(len(asked)).tolist()
            assert await ask(*(asked[i] for i in order)) == [alone[i] for i in order]  # warm
            assert [each for text in asked[:5] for each in await ask(text)] == alone[:5]
            together = await asyncio.gather(*(ask(text) for text in asked))
            assert [each for some in together for each in some] == alone
    finally:
        service.close()
        await replicas.queue.close()
