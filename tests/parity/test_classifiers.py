"""Sequence-classification heads: class logits against transformers, and a reranker in both of its forms."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from model import engine
from model.engine import Engine
from tests.batches import label_batch
from tests.parity.cases import HAVE_TORCH, sequences
from tests.tiny_families import CLASSIFIERS, config_of, make_family


def load(folder: Path) -> Engine:
    """With the shapes that the causal models of ``tests.conftest`` have, so that most programs are compiled already."""
    return engine.load(folder, max_row_tokens=32, call_tokens=64, chunks=(64,), prefix_cache_bytes=2**21)


@pytest.mark.skipif(not HAVE_TORCH, reason="torch is not installed, and class logits are not stored")
@pytest.mark.parametrize("family", CLASSIFIERS)
def test_class_logits_equal_transformers(family: str, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForSequenceClassification

    folder = make_family(tmp_path, family, classes=3)
    scorer = load(folder)
    assert (scorer.info.classes, scorer.info.vocab_size) == (3, 307)
    prompts = sequences()
    got = scorer.score(label_batch(prompts, [range(3)] * len(prompts), vocab_logprobs=False)).values.reshape(-1, 3)

    auto: Any = AutoModelForSequenceClassification
    model = auto.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    model.config.pad_token_id = None  # it would look for the last token that is not a pad, which may be a token here
    with torch.no_grad():
        wanted = np.stack([model(torch.tensor([tokens])).logits[0].numpy() for tokens in prompts])
    assert wanted.std() > 1
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-4)


def test_a_reranker_ranks_the_same_as_causal_model_and_as_classifier(tmp_path: Path) -> None:
    """Qwen3 rerankers are published in both forms: yes and no as tokens, or their two rows of the head as classes."""
    no, yes = 17, 208
    causal = make_family(tmp_path / "causal", "qwen3")
    tensors = load_file(causal / "model.safetensors")
    head = tensors.pop("lm_head.weight")
    classifier = tmp_path / "classifier"
    classifier.mkdir()
    save_file({**tensors, "score.weight": head[[no, yes]]}, classifier / "model.safetensors")
    config = config_of("qwen3") | {"architectures": ["Qwen3ForSequenceClassification"], "num_labels": 2}
    (classifier / "config.json").write_text(json.dumps(config))

    query = list(range(40, 90))
    prompts = [query + list(range(item, item + 9)) for item in range(100, 130)]
    by_token = load(causal).score(label_batch(prompts, [(no, yes)] * 30, vocab_logprobs=False)).values
    by_class = load(classifier).score(label_batch(prompts, [(0, 1)] * 30, vocab_logprobs=False)).values
    np.testing.assert_allclose(by_class, by_token, rtol=0, atol=1e-5)
    margins = by_class.reshape(-1, 2) @ [-1, 1]
    assert margins.std() > 1
    assert np.argsort(margins).tolist() == np.argsort(by_token.reshape(-1, 2) @ [-1, 1]).tolist()
