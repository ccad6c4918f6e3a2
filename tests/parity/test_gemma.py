"""Gemma 3 270M, a second real model, from its GGUF file: tokens and log-probabilities as stored.

The stored answers are from transformers' float32 forward, on the weights that the file's 4 to 8 bits stand for. The
queries have 256, 16 and 512 tokens: after the last, items are beyond the sliding layers' window of 512.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from model import loading
from tests.batches import label_batch
from tests.gemma import gemma_folder

CASES: dict[str, Any] = json.loads(Path(__file__).with_name("gemma3_270m.json").read_text())

pytestmark = pytest.mark.gemma


@pytest.fixture(scope="module")
def folder() -> Path:
    return gemma_folder()


def test_tokens(folder: Path) -> None:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    for case in CASES.values():
        for text, ids in zip(case["items"], case["items_ids"], strict=True):
            prompt = case["query"] + text
            encoded = tokenizer.encode(prompt).ids
            assert encoded == case["query_ids"] + ids
            assert tokenizer.decode(encoded) == prompt


def test_logprobs(folder: Path) -> None:
    scorer = loading.load(folder, max_prompt_tokens=1024)
    for case in CASES.values():
        prompts = [case["query_ids"] + ids for ids in case["items_ids"]]
        values = scorer.score(label_batch(prompts, [case["label_ids"]] * len(prompts))).values
        wanted = np.array(case["logprobs"])
        np.testing.assert_allclose(values.reshape(wanted.shape), wanted, rtol=0, atol=1e-4)
