"""Encoders against transformers' float32 forward, and pairs of texts over HTTP against sentence-transformers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from model import loading
from model.contract import TokenBatch
from model.engine import Engine
from serve_app.frontend.models import Models
from serve_app.frontend.routes import create_app
from serve_app.frontend.service import ModelService
from serve_app.settings import ModelSettings
from serve_app.tasks.tokenizer import TextTokenizer
from tests.batches import label_batch
from tests.local import DirectReplicas
from tests.parity.cases import HAVE_TORCH, torch_on_one_thread
from tests.served import serving
from tests.tiny_encoders import ENCODERS, make_encoder

pytestmark = pytest.mark.skipif(not HAVE_TORCH, reason="torch is not installed, and these logits are not stored")

WITHIN = 1e-4
CLASSES = (0, 1, 2)
QUERY = "how many people live in berlin?"
DOCUMENTS = [
    "berlin had a population of 3520031 people in a city of 891 km.",
    "paris is the capital of france.",
    "the river lies on the museum",
    "a",
    " ".join(["berlin is a city on a river and has many people, living in the city."] * 9),
    "Ünd, who's [SEP] the </s> one-eyed?",
]


def load(folder: Path, **options: Any) -> Engine:
    return loading.load(folder, call_tokens=64, **options)


def prompts() -> list[list[int]]:
    """Of 1 to 130 tokens; token 1 is XLM-RoBERTa's pad."""
    rng = np.random.default_rng(7)
    lengths = (1, 2, 16, 33, 64, 130)
    return [*(rng.integers(0, 307, n).tolist() for n in lengths), [5, 1, 1, 9, 200, 1], [1, 1, 7]]


def types(tokens: Sequence[int], kind: str) -> list[int]:
    """The second third of a BERT's tokens is of the second type."""
    third = len(tokens) // 3
    return [int(kind == "bert" and third <= at < 2 * third) for at in range(len(tokens))]


def batch(sequences: Sequence[Sequence[int]], kind: str) -> TokenBatch:
    typed = [[id + 307 * type for id, type in zip(tokens, types(tokens, kind), strict=True)] for tokens in sequences]
    return label_batch(typed, [CLASSES] * len(typed), vocab_logprobs=False)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    return cache(lambda kind: make_encoder(tmp_path_factory.mktemp("encoder"), kind, classes=len(CLASSES)))


@pytest.fixture(scope="module")
def wanted(folders: Callable[[str], Path]) -> Callable[[str], np.ndarray]:
    @cache
    def logits(kind: str) -> np.ndarray:
        import torch
        from transformers import AutoModelForSequenceClassification

        torch_on_one_thread()
        auto: Any = AutoModelForSequenceClassification
        model = auto.from_pretrained(folders(kind), dtype=torch.float32, attn_implementation="eager").eval()
        rows: list[np.ndarray] = []
        with torch.no_grad():
            for tokens in prompts():
                more = {"token_type_ids": torch.tensor([types(tokens, kind)])} if kind == "bert" else {}
                rows.append(model(torch.tensor([tokens]), **more).logits[0].numpy())
        return np.stack(rows)

    return logits


@pytest.mark.parametrize("options", [{}, {"implementation": "paged"}, {"by_layer": False}], ids=str)
@pytest.mark.parametrize("kind", ENCODERS)
def test_class_logits_equal_transformers(
    kind: str, options: dict[str, Any], folders: Callable[[str], Path], wanted: Callable[[str], np.ndarray]
) -> None:
    scorer = load(folders(kind), **options)
    assert (scorer.info.classes, scorer.info.pad_token_id, scorer.info.max_prompt_tokens) == (3, None, 130)
    assert wanted(kind).std() > 0.7, "the reference must vary, or the case shows nothing"
    got = scorer.score(batch(prompts(), kind)).values.reshape(-1, 3)
    np.testing.assert_allclose(got, wanted(kind), rtol=0, atol=WITHIN)


@contextmanager
def served(folder: Path) -> Iterator[httpx.Client]:
    engine = load(folder)
    settings = ModelSettings(model=str(folder), served_name="encoder")
    service = ModelService(settings, TextTokenizer.load(folder), engine.info, DirectReplicas(engine), folder=folder)
    services = Models(service)
    with serving(create_app(lambda: services)) as running, httpx.Client(base_url=running.url) as client:
        yield client
    service.close()


@pytest.mark.parametrize("kind", ENCODERS)
def test_rerank_gives_the_scores_of_a_cross_encoder(kind: str, tmp_path: Path) -> None:
    """Longer pairs are cut at the same tokens, whichever text is the longer one."""
    from sentence_transformers import CrossEncoder

    torch_on_one_thread()
    folder = make_encoder(tmp_path, kind)
    encoder = CrossEncoder(str(folder), device="cpu")
    with served(folder) as client:
        plain = [document for document in DOCUMENTS if "[SEP]" not in document]
        for query in (QUERY, " ".join([QUERY] * 7), " ".join([QUERY] * 15)):
            found = answer(client, "/v1/rerank", query=query, documents=plain)
            scores = {each["index"]: each["relevance_score"] for each in found["results"]}
            reference = encoder.predict([(query, document) for document in plain])
            assert reference.std() > 0.01
            np.testing.assert_allclose([scores[at] for at in range(len(plain))], reference, rtol=0, atol=WITHIN)


def answer(client: httpx.Client, path: str, **body: Any) -> Any:
    response = client.post(path, json=body)
    assert response.status_code == 200, response.text
    return response.json()
