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
QUESTION = {"type": "predicate", "instructions": "Is it true?"}
QUERY = "how many people live in berlin?"
DOCUMENTS = [
    "berlin had a population of 3520031 people in a city of 891 km.",
    "paris is the capital of france.",
    "the river lies on the museum",
    "a",
    " ".join(["berlin is a city on a river and has many people, living in the city."] * 9),
    "Ünd, who's the one-eyed?",
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


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        *((kind, {}) for kind in ENCODERS),
        ("bert", {"implementation": "paged"}),
        ("modernbert", {"implementation": "paged"}),
        ("modernbert-mean", {"by_layer": False}),
    ],
    ids=str,
)
def test_class_logits_equal_transformers(
    kind: str, options: dict[str, Any], folders: Callable[[str], Path], wanted: Callable[[str], np.ndarray]
) -> None:
    scorer = load(folders(kind), **options)
    assert (scorer.info.classes, scorer.info.pad_token_id, scorer.info.max_prompt_tokens) == (3, None, 130)
    assert wanted(kind).std() > 0.5, "the reference must vary, or the case shows nothing"
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
        for query in (QUERY, " ".join([QUERY] * 7), " ".join([QUERY] * 15)):
            found = answer(client, "/v1/rerank", query=query, documents=DOCUMENTS)
            reference = encoder.predict([(query, document) for document in DOCUMENTS])
            assert reference.std() > 0.01
            np.testing.assert_allclose(in_order(found), reference, rtol=0, atol=WITHIN)
            assert "only the beginning was read: documents[" in found["meta"]["warnings"][0]
        strict = client.post("/v1/rerank", json={"query": QUERY, "documents": DOCUMENTS, "truncate": False})
        assert (strict.status_code, "makes a prompt of" in strict.text) == (400, True)
        tuned = client.post("/v1/rerank", json={"query": QUERY, "documents": DOCUMENTS, "instruct": "Find it"})
        assert (tuned.status_code, "reads the query and a document as a pair" in tuned.text) == (400, True)
        texts = answer(client, "/rerank", query=QUERY, texts=DOCUMENTS, raw_scores=True)  # TEI's shape
        logits = encoder.predict([(QUERY, document) for document in DOCUMENTS], activation_fn=torch_identity())
        scores = [each["score"] for each in sorted(texts, key=lambda each: each["index"])]
        np.testing.assert_allclose(scores, logits, rtol=0, atol=WITHIN)


def test_a_score_is_the_logit_where_sentence_transformers_files_say_so(tmp_path: Path) -> None:
    from sentence_transformers import CrossEncoder

    identity = "torch.nn.modules.linear.Identity"
    for number, changes in enumerate(
        ({"sentence_transformers": {"activation_fn": identity}}, {"sbert_ce_default_activation_function": identity})
    ):
        folder = make_encoder(tmp_path / str(number), "bert", changes=changes)
        reference = CrossEncoder(str(folder), device="cpu").predict([(QUERY, document) for document in DOCUMENTS])
        assert reference.max() > 1
        with served(folder) as client:
            found = answer(client, "/v1/rerank", query=QUERY, documents=DOCUMENTS)
            np.testing.assert_allclose(in_order(found), reference, rtol=0, atol=WITHIN)


def in_order(answer: Any) -> list[float]:
    """The scores of a ranking in the order of the documents."""
    return [each["relevance_score"] for each in sorted(answer["results"], key=lambda each: each["index"])]


def torch_identity() -> Any:
    import torch

    return torch.nn.Identity()


@pytest.fixture(scope="module", params=["bert", "xlm-roberta"])
def running(request: pytest.FixtureRequest, folders: Callable[[str], Path]) -> Iterator[tuple[httpx.Client, Any]]:
    """An encoder over HTTP, and transformers' logits of a text or a pair of texts."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    torch_on_one_thread()
    folder = folders(request.param)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    auto: Any = AutoModelForSequenceClassification
    model = auto.from_pretrained(folder, dtype=torch.float32).eval()

    def logits(*texts: str) -> list[float]:
        with torch.no_grad():
            return model(**tokenizer(*texts, return_tensors="pt")).logits[0].tolist()

    with served(folder) as client:
        yield client, logits


def test_texts_are_classified(running: tuple[httpx.Client, Any]) -> None:
    client, logits = running
    texts = DOCUMENTS[:4]
    wanted = np.array([logits(text) for text in texts])
    for path in ("/classify", "/pooling"):
        data = answer(client, path, input=texts, use_activation=False)["data"]
        found = [each.get("probs") or each["data"] for each in data]
        np.testing.assert_allclose(found, wanted, rtol=0, atol=WITHIN)
    probabilities = answer(client, "/classify", input=texts)["data"]
    softmax = np.exp(wanted) / np.exp(wanted).sum(axis=1, keepdims=True)
    np.testing.assert_allclose([each["probs"] for each in probabilities], softmax, rtol=0, atol=WITHIN)
    assert probabilities[0]["label"] == f"class {softmax[0].argmax()}"


def test_scores_of_a_query_and_items_are_those_of_pairs(running: tuple[httpx.Client, Any]) -> None:
    client, logits = running
    items = DOCUMENTS[:4]
    scored = answer(client, "/v1/score", query=QUERY, items=items)["scores"]
    np.testing.assert_allclose(scored, [logits(QUERY, item) for item in items], rtol=0, atol=WITHIN)
    first = answer(client, "/v1/score", query=QUERY, items=items, item_first=True)["scores"]
    np.testing.assert_allclose(first, [logits(item, QUERY) for item in items], rtol=0, atol=WITHIN)
    assert np.abs(np.array(first) - scored).max() > 0.1
    alone = answer(client, "/v1/score", items=items)["scores"]
    np.testing.assert_allclose(alone, [logits(item) for item in items], rtol=0, atol=WITHIN)
    ids = answer(client, "/tokenize", prompt=items[0])["tokens"]
    np.testing.assert_allclose(answer(client, "/v1/score", items=[ids])["scores"], alone[:1], rtol=0, atol=WITHIN)


def test_a_pair_that_is_too_long_is_refused_or_loses_the_item_s_end(running: tuple[httpx.Client, Any]) -> None:
    client, logits = running
    long = " ".join(["people"] * 200)
    refused = client.post("/v1/score", json={"query": QUERY, "items": ["a", long]})
    assert refused.status_code == 400
    assert "items[1]: the prompt has" in refused.text
    cut = answer(client, "/v1/score", query=QUERY, items=[long], truncate="item")["scores"][0]
    around = len(answer(client, "/tokenize", prompt=QUERY)["tokens"]) + (2 if info(client) == "xlm" else 1)
    np.testing.assert_allclose(cut, logits(QUERY, " ".join(["people"] * (130 - around))), rtol=0, atol=WITHIN)


def info(client: httpx.Client) -> str:
    return client.get("/v1/info").json()["architecture"][:3].lower()


@pytest.mark.parametrize(
    ("path", "body", "field", "words"),
    [
        ("/v1/score", {"query": "a", "items": ["b"], "labels": ["yes"]}, "labels", "this encoder, with 3 classes"),
        ("/v1/score", {"items": ["b"], "label_token_ids": [1]}, "label_token_ids", "is for causal models"),
        ("/v1/completions", {"model": "encoder", "prompt": "a", "max_tokens": 1}, "model", "no next-token prob"),
        ("/v1/rerank", {"query": "a", "documents": ["b"]}, "model", "a classifier with 3 classes"),
        ("/v1/decisions", {"model": "encoder", "input": "a", "questions": [QUESTION]}, "model", "no next-token prob"),
        ("/get_reward", {"query": ["a"]}, "model", "no class is the reward"),
    ],
)
def test_what_an_encoder_cannot_answer_is_refused_by_name(
    running: tuple[httpx.Client, Any], path: str, body: dict[str, Any], field: str, words: str
) -> None:
    client, _ = running
    response = client.post(path, json=body)
    assert response.status_code in (400, 501), response.text
    error = response.json().get("error") or response.json()
    assert (error["param"], words in error["message"]) == (field, True), error


def answer(client: httpx.Client, path: str, **body: Any) -> Any:
    response = client.post(path, json=body)
    assert response.status_code == 200, response.text
    return response.json()
