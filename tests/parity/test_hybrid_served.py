"""A tiny Qwen 3.5 over HTTP, with a chat template like its own: decisions and scores against transformers' float32."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest

from model import loading
from serve_app.frontend.models import Models
from serve_app.frontend.routes import create_app
from serve_app.frontend.service import ModelService
from serve_app.settings import ModelSettings
from serve_app.tasks.tokenizer import TextTokenizer
from tests.local import DirectReplicas
from tests.parity.cases import HAVE_TORCH
from tests.parity.test_decision_probabilities import CHATML, STATE, Reference, make_judge
from tests.served import serving

pytestmark = [pytest.mark.heavy, pytest.mark.skipif(not HAVE_TORCH, reason="torch is not installed")]

TEMPLATE = CHATML.removesuffix("{% endif %}") + (
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}"
    "{%- else %}{{- '<think>\\n' }}{%- endif %}{% endif %}"
)
"""As in Qwen 3.5's, the prompt leaves a block of thoughts open unless thinking is off."""


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[httpx.Client, Reference]]:
    """The service, and transformers over the same folder."""
    folder = make_judge(tmp_path_factory.mktemp("hybrid") / "judge", "qwen3_5", TEMPLATE)
    engine = loading.load(folder, max_segment_tokens=64, call_tokens=128, chunks=(128,), prefix_cache_bytes=2**22)
    settings = ModelSettings(model=str(folder), served_name="hybrid")
    service = ModelService(settings, TextTokenizer.load(folder), engine.info, DirectReplicas(engine), folder=folder)
    services = Models(service)
    with serving(create_app(lambda: services)) as served, httpx.Client(base_url=served.url, timeout=300) as client:
        yield client, Reference(folder, "chat-v1")
    service.close()


def answer(client: httpx.Client, path: str, body: dict[str, Any]) -> Any:
    response = client.post(path, json=body)
    assert response.status_code == 200, response.text
    return response.json()


def test_decisions_on_both_routes_are_transformers(running: tuple[httpx.Client, Reference]) -> None:
    """Cold, and again where the state's snapshot and pages are cached."""
    client, reference = running
    wanted = [reference.probabilities(number, 0) for number in (0, 2, 3)]
    assert all(np.ptp(own) > 1e-3 for own, _ in wanted)
    assert reference.prompt(2, 0).endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    criteria = {"Billing": "money", "Shipping": None, "Returns": None}
    questions = {
        "angry": {"type": "noul", "instructions": "Is the customer angry?"},
        "team": {"type": "choice", "instructions": "Which team?", "criteria": criteria},
        "urgency": {"type": "score", "instructions": "How urgent?", "criteria": ["not", "a bit", "very"]},
    }
    for cached in (False, True):
        found = answer(client, "/v1/systemone", {"state": STATE, "questions": questions})
        assert (found["x_cached_tokens"] > 0) == cached
        answers = found["answers"]
        noul = answers["angry"]["noul"]
        probabilities = [
            [1 - noul, noul],
            *([*answers[name]["probabilities"].values()] for name in ("team", "urgency")),
        ]
        for ours, each, (theirs, mass) in zip(probabilities, answers.values(), wanted, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)
            np.testing.assert_allclose(each["x_label_mass"], mass, rtol=1e-4)
    choices = [{"value": value, "description": text} for value, text in criteria.items()]
    question = {"type": "choice", "name": "team", "instructions": "Which team?", "choices": choices}
    (decided,) = answer(client, "/v1/decisions", {"model": "hybrid", "input": STATE, "questions": [question]})[
        "answers"
    ]
    found = [each["probability"] for each in decided["probabilities"]]
    np.testing.assert_allclose(found, wanted[1][0], rtol=0, atol=1e-5)


def test_scores_of_a_conversation_and_of_text_are_transformers(running: tuple[httpx.Client, Reference]) -> None:
    client, reference = running
    items, labels = [" It is late.", " All is well.", ""], [" yes", "No"]
    messages = [{"role": "user", "content": STATE}]
    for asked, prompt in (({"query": STATE}, STATE), ({"messages": messages}, reference.conversation(messages))):
        body = {**asked, "items": items, "labels": labels, "apply_softmax": True}
        wanted = [reference.of_labels(prompt + item, labels)[0] for item in items]
        assert np.ptp(np.array(wanted)[:, 0]) > 0.01
        np.testing.assert_allclose(answer(client, "/v1/score", body)["scores"], wanted, rtol=0, atol=1e-5)
