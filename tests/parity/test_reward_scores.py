"""Rewards over HTTP against transformers' logits of the conversation, in every shape that clients send it."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from model import loading
from serve_app.client import ScoreClient
from serve_app.frontend.models import Models
from serve_app.frontend.routes import create_app
from serve_app.frontend.service import ModelService
from serve_app.settings import ModelSettings
from serve_app.tasks.tokenizer import TextTokenizer
from tests.local import DirectReplicas
from tests.parity.cases import HAVE_TORCH, torch_on_one_thread
from tests.rewarding import CHATS, make_reward_model, openrlhf_rewards, verl_reward
from tests.served import serving

pytestmark = pytest.mark.skipif(not HAVE_TORCH, reason="torch is not installed, and these logits are not stored")

WITHIN = 1e-4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_reward_model(tmp_path_factory.mktemp("reward"))


@pytest.fixture(scope="module")
def url(folder: Path) -> Iterator[str]:
    engine = loading.load(folder, max_segment_tokens=32, call_tokens=64, chunks=(64,), prefix_cache_bytes=2**21)
    settings = ModelSettings(model=str(folder), served_name="org/reward")
    service = ModelService(settings, TextTokenizer.load(folder), engine.info, DirectReplicas(engine), folder=folder)
    services = Models(service)
    with serving(create_app(lambda: services)) as served:
        yield served.url
    service.close()


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def wanted(folder: Path, tokenizer: Any) -> list[float]:
    """transformers' logits of the conversations' own tokens, with one BOS."""
    import torch
    from transformers import AutoModelForSequenceClassification

    torch_on_one_thread()
    auto: Any = AutoModelForSequenceClassification
    model = auto.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    found: list[float] = []
    for chat in CHATS:
        ids = tokenizer.apply_chat_template(chat, return_dict=False)
        assert ids.count(tokenizer.bos_token_id) == 1
        with torch.no_grad():
            found.append(float(model(torch.tensor([ids])).logits[0, 0]))
    assert np.std(found) > 0.1
    return found


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_verls_reward_loop(url: str, tokenizer: Any, wanted: list[float], engine: str) -> None:
    got = [verl_reward(url, "org/reward", tokenizer, chat, engine) for chat in CHATS]
    np.testing.assert_allclose(got, wanted, rtol=0, atol=WITHIN)


def test_openrlhfs_remote_reward(url: str, tokenizer: Any, wanted: list[float]) -> None:
    queries = [tokenizer.apply_chat_template(chat, tokenize=False) for chat in CHATS]
    prompts = [tokenizer.apply_chat_template(chat[:1], tokenize=False, add_generation_prompt=True) for chat in CHATS]
    rewards, scores, logs = openrlhf_rewards(url, queries, prompts, ["yes", None, 3, {"a": 1}])
    np.testing.assert_allclose(rewards, wanted, rtol=0, atol=WITHIN)
    assert (scores, logs) == (rewards, {})
    with ScoreClient(url) as client:
        assert client.rewards(queries) == rewards


def test_messages_text_and_ids(url: str, tokenizer: Any, wanted: list[float]) -> None:
    texts = [tokenizer.apply_chat_template(chat, tokenize=False) for chat in CHATS]
    ids = [tokenizer.apply_chat_template(chat, return_dict=False) for chat in CHATS]
    with ScoreClient(url) as client:
        by_chat = [client.classify(messages=chat, use_activation=False).data[0] for chat in CHATS]
        by_text = client.classify(texts, use_activation=False).data
        by_ids = client.classify(ids, use_activation=False).data
        activated = client.classify(texts).data
    for found in (by_chat, by_text, by_ids):
        assert all(each is not None and each.num_classes == 1 for each in found)
        got = [each.probs[0] for each in found if each is not None]
        np.testing.assert_allclose(got, wanted, rtol=0, atol=WITHIN)
    probabilities = [each.probs[0] for each in activated if each is not None]
    np.testing.assert_allclose(probabilities, 1 / (1 + np.exp(-np.array(wanted))), rtol=0, atol=WITHIN)
    assert [each.label for each in activated if each is not None] == ["class 0"] * len(CHATS)


def test_openais_client_reads_base64(url: str, tokenizer: Any, wanted: list[float]) -> None:
    openai = pytest.importorskip("openai")
    texts = [tokenizer.apply_chat_template(chat, tokenize=False) for chat in CHATS]
    with openai.OpenAI(api_key="none", base_url=f"{url}/v1") as client:
        answer = client.embeddings.create(model="org/reward", input=texts)
        raw = client.embeddings.create(model="org/reward", input=texts, encoding_format="base64")
    np.testing.assert_allclose([each.embedding[0] for each in answer.data], wanted, rtol=0, atol=WITHIN)
    packed = [np.frombuffer(base64.b64decode(each.embedding), "<f4")[0] for each in raw.data]
    np.testing.assert_allclose(packed, wanted, rtol=0, atol=WITHIN)
