"""The real model through a real Ray Serve, as a user of the demo sees it, against transformers in float32."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import ray

from serve_app import model_source
from serve_app.app import build
from serve_app.client import ScoreClient
from serve_app.settings import ModelSettings
from tests import documents
from tests.local import service_of
from tests.parity.cases import HAVE_TORCH
from tests.processes import mapped_files, replica_process

pytestmark = [pytest.mark.ray, pytest.mark.demo]

WORKLOADS = Path(__file__).parents[2] / "scripts" / "workloads" / "smollm2-135m"
QUESTION = "\nSentiment:"
REVIEWS = [
    "Review: I loved every minute of it.",
    "Review: A waste of two hours.",
    "这部电影太棒了！",  # noqa: RUF001  the full-width mark is Chinese
    "Worst film of the year 😡",
]


@pytest.fixture(scope="module")
def client(deploy: Callable[[Any], httpx.Client]) -> httpx.Client:
    return deploy(build(service_of(ModelSettings(model="demo", scorer_cpus=0.1))))


def workload(name: str, variant: int) -> tuple[dict[str, Any], list[int], np.ndarray]:
    """A workload's inputs, its labels, and the reference's log-probabilities."""
    content = json.loads((WORKLOADS / f"{name}.json").read_text())
    wanted = json.loads((WORKLOADS / "ref_fp32.json").read_text())[name][variant]
    return content["variants"][variant], content["label_ids"], np.array(wanted)


def test_a_sentiment_question_is_answered_sensibly(client: httpx.Client) -> None:
    tokens = client.post("/tokenize", json={"prompt": [" positive", " negative"], "add_special_tokens": False}).json()
    labels = [ids[0] for ids in tokens["tokens"]]
    body = {"query": QUESTION, "items": REVIEWS[:2], "item_first": True, "label_token_ids": labels}
    good, bad = client.post("/v1/score", json={**body, "apply_softmax": True}).json()["scores"]
    assert good[0] > 0.5 > bad[0]


@pytest.fixture(scope="module")
def transformers() -> Callable[[str], tuple[list[int], np.ndarray]]:
    """The ids of a text, and the logprobs over the vocabulary after each, [T, V], by transformers in float32."""
    if not HAVE_TORCH:
        pytest.skip("torch, the reference, is not installed")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = model_source.resolve("demo")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def read(text: str) -> tuple[list[int], np.ndarray]:
        ids = tokenizer(text).input_ids
        with torch.no_grad():
            return ids, torch.log_softmax(model(torch.tensor([ids])).logits[0], -1).numpy()

    return read


Reference = Callable[[str], tuple[list[int], np.ndarray]]


def test_scores_are_those_of_transformers(client: httpx.Client, transformers: Reference) -> None:
    labels = [9230, 2838, 0, 49_151]
    body = {"query": QUESTION, "items": REVIEWS, "item_first": True, "label_token_ids": labels}
    answer = client.post("/v1/score", json={**body, "return_token_logprobs": True}).json()
    for review, scores, logprobs in zip(REVIEWS, answer["scores"], answer["token_logprobs"], strict=True):
        wanted = transformers(review + QUESTION)[1][-1, labels]
        np.testing.assert_allclose(logprobs, wanted, rtol=0, atol=1e-4)
        np.testing.assert_allclose(scores, np.exp(wanted), rtol=2e-4)


def test_every_token_of_a_prompt_has_transformers_logprob(client: httpx.Client, transformers: Reference) -> None:
    prompts = [f"{QUESTION} {review}" for review in REVIEWS]
    body = {"prompt": prompts, "max_tokens": 1, "echo": True, "logprobs": 1, "temperature": 0, "seed": 1234}
    answer = client.post("/v1/completions", json=body).json()
    for prompt, choice in zip(prompts, answer["choices"], strict=True):
        ids, logprobs = transformers(prompt)
        told = choice["logprobs"]
        own = logprobs[np.arange(len(ids) - 1), ids[1:]]
        np.testing.assert_allclose(told["token_logprobs"][1:-1], own, rtol=0, atol=1e-4)
        highest = [max(top.values()) for top in told["top_logprobs"][1:]]
        np.testing.assert_allclose(highest, logprobs.max(-1), rtol=0, atol=1e-4)
        greedy = [a == b for a, b in zip(told["token_logprobs"][1:-1], highest[:-1], strict=True)]
        assert greedy == (logprobs.argmax(-1)[:-1] == ids[1:]).tolist()
        assert told["token_logprobs"][-1] == highest[-1]


@pytest.mark.parametrize("kind", ["text", "ids"])
def test_w1_over_http_equals_the_reference(client: httpx.Client, kind: str) -> None:
    inputs, labels, wanted = workload("W1", 2)
    body = {"query": inputs[f"query_{kind}"], "items": inputs[f"items_{kind}"], "label_token_ids": labels}
    answer = client.post("/v1/score", json={**body, "return_token_logprobs": True}).json()
    np.testing.assert_allclose(answer["token_logprobs"], wanted, rtol=0, atol=1e-4)
    lengths = [len(inputs["query_ids"]) + len(item) for item in inputs["items_ids"]]
    assert answer["usage"]["prompt_tokens"] == sum(lengths)
    # The query was computed at most once: 99 items shared it, and the second request computed nothing of it.
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] >= 99 * len(inputs["query_ids"])


def test_softmax_is_over_the_labels_alone(client: httpx.Client) -> None:
    inputs, labels, wanted = workload("W4", 1)
    with ScoreClient(str(client.base_url), timeout_s=60) as typed:
        answer = typed.score(
            inputs["query_text"], inputs["items_text"], label_token_ids=labels, apply_softmax=True, temperature=0.5
        )
    weights = np.exp(wanted[0] / 0.5)
    np.testing.assert_allclose(answer.scores[0] or [], weights / weights.sum(), rtol=2e-4)


def test_the_right_document_is_usually_first(client: httpx.Client) -> None:
    """The model was not trained to rerank, and still has 17 of these 20 right (measured); at random it would be 7."""
    lines = Path(__file__).with_name("rerank_queries.jsonl").read_text().splitlines()
    asked = [json.loads(line) for line in lines[40:]]  # the template was not chosen with these

    def first(query: dict[str, Any]) -> int:
        body = {"query": query["query"], "documents": query["documents"], "top_n": 1}
        return client.post("/v1/rerank", json=body).raise_for_status().json()["results"][0]["index"]

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(first, asked))
    assert sum(index == query["right"] for index, query in zip(found, asked, strict=True)) >= 15


EXAMPLES = [
    # A job with a Ray of its own takes a quarter of a minute.
    pytest.param(each, id=each.name, marks=[pytest.mark.slow] if each.starts_ray else [])
    for each in documents.examples()
]


@pytest.mark.parametrize("example", EXAMPLES)
def test_the_documentations_examples(client: httpx.Client, example: documents.Example, tmp_path: Path) -> None:
    address = ray.get_runtime_context().gcs_address
    printed = documents.run(example, str(client.base_url), tmp_path, RAY_ADDRESS=address)
    if example.shown is not None:
        documents.check(printed, example.shown)


def test_the_scorer_loads_jax_and_the_front_end_never_does(client: httpx.Client) -> None:
    assert client.get("/ready").status_code == 200
    assert "jaxlib" not in mapped_files(replica_process("Ingress"))
    assert "jaxlib" in mapped_files(replica_process("Scorer"))


def test_info_shows_the_compiled_programs(client: httpx.Client) -> None:
    info = client.get("/v1/info").json()
    assert (info["architecture"], info["vocab_size"], info["context_length"]) == ("LlamaForCausalLM", 49_152, 8_192)
    assert "1x64" in info["buckets"]


@pytest.mark.skipif(not HAVE_TORCH, reason="torch, the reference, is not installed")
def test_labels_in_words_have_the_log_likelihoods_of_transformers(client: httpx.Client) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = model_source.resolve("demo")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    words = [" positive", " overwhelmingly positive", " unenthusiastic", " overwhelmingly unenthusiastic, on the whole"]
    body = {"query": QUESTION, "items": REVIEWS, "item_first": True, "labels": words}
    answer = client.post("/v1/score", json={**body, "return_token_logprobs": True, "return_label_mass": True}).json()
    lines = client.post("/v1/score", json={**body, "return_token_logprobs": True, "stream": True}).text.splitlines()
    streamed = {row["index"]: row["token_logprobs"] for row in map(json.loads, lines) if "index" in row}
    for number, review in enumerate(REVIEWS):
        start = len(tokenizer(review + QUESTION).input_ids)
        wanted: list[float] = []
        for word, pieces in zip(words, answer["label_tokens"][number], strict=True):
            ids = tokenizer(review + QUESTION + word).input_ids
            with torch.no_grad():
                logprobs = torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), -1)
            wanted.append(sum(logprobs[at - 1, ids[at]].item() for at in range(start, len(ids))))
            assert pieces == tokenizer.convert_ids_to_tokens(ids[start:])
        assert max(map(len, answer["label_tokens"][number])) > 4
        # Each token of a label is within 1e-4.
        within = 1e-4 * np.array([len(pieces) for pieces in answer["label_tokens"][number]])
        assert (np.abs(np.array(answer["token_logprobs"][number]) - wanted) < within).all()
        assert (np.abs(np.array(streamed[number]) - wanted) < within).all()
        np.testing.assert_allclose(answer["scores"][number], np.exp(wanted), rtol=1e-3)
        np.testing.assert_allclose(answer["label_mass"][number], np.exp(wanted).sum(), rtol=1e-3)


@pytest.mark.slow
@pytest.mark.skipif(
    not (HAVE_TORCH and find_spec("lm_eval") and find_spec("accelerate")),
    reason="NO LM-EVAL: it is not compared with the service; pip install '.[test]'",
)
def test_lm_eval_has_the_log_likelihoods_of_its_own_huggingface_backend(client: httpx.Client) -> None:
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "scripts.benchmarks.lm_eval_compare", "--url", str(client.base_url), "--json"]
    run = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    by_ids, by_text, by_hf = json.loads(run.stdout)["backends"].values()
    wanted = [choice for sample in by_hf["samples"] for choice in sample]
    assert (len(by_hf["samples"]), len(wanted)) == (30, 117)
    for found in (by_ids, by_text):
        assert (found["acc"], found["acc_norm"]) == (by_hf["acc"], by_hf["acc_norm"])
        choices = [choice for sample in found["samples"] for choice in sample]
        np.testing.assert_allclose([c[0] for c in choices], [c[0] for c in wanted], rtol=0, atol=1e-3)
        assert [c[1] for c in choices] == [c[1] for c in wanted]
    assert by_hf["acc"] > 0.5  # the model was asked, and answered sensibly
