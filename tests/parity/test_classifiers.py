"""Sequence-classification heads: class logits against transformers, and a reranker in both of its forms."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from model import loading
from model.engine import Engine
from model.families import registry
from model.fields import read_config
from serve_app.contract import TokenBatch
from serve_app.tasks import labels
from serve_app.tasks.prompts import Prompt, packed
from tests.batches import label_batch
from tests.parity.cases import HAVE_TORCH, sequences, torch_on_one_thread
from tests.tiny import write_json
from tests.tiny_families import CLASSIFIERS, config_of, make_family


def load(folder: Path) -> Engine:
    """Load with the shapes of the causal models of ``tests.conftest``, so that most programs are already compiled."""
    return loading.load(folder, max_segment_tokens=32, call_tokens=64, chunks=(64,), prefix_cache_bytes=2**21)


@pytest.mark.skipif(not HAVE_TORCH, reason="torch is not installed, and class logits are not stored")
@pytest.mark.parametrize("family", CLASSIFIERS)
def test_class_logits_equal_transformers(family: str, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForSequenceClassification

    torch_on_one_thread()
    folder = make_family(tmp_path, family, classes=3)
    scorer = load(folder)
    assert (scorer.info.classes, scorer.info.vocab_size, scorer.info.pad_token_id) == (3, 307, 0)
    own = [5, 0, 17, 208]  # with a pad in the middle
    prompts = [*sequences(), *([*own, *[0] * pads] for pads in (0, 1, 40)), [0, 0, 9], [9, 0, 0], [0], [0] * 40]
    auto: Any = AutoModelForSequenceClassification
    for pad in ({"pad_token_id": 0}, {"pad_token_id": 208}, {"pad_token_id": None}, {"pad_token_id": -1}, {}):
        if family == "phi3" and not pad:
            continue  # transformers' own default is 32,000, beyond this vocabulary, and it builds no such model
        config = config_of(family) | {
            "architectures": [CLASSIFIERS[family]],
            "id2label": {"0": "a", "1": "b", "2": "c"},
        }
        write_json(folder / "config.json", {key: value for key, value in config.items() if key != "pad_token_id"} | pad)
        model = auto.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
        with torch.no_grad():
            wanted = np.stack([model(torch.tensor([tokens])).logits[0].numpy() for tokens in prompts])
        assert wanted.std() > 1
        got = scorer.score(class_batch(prompts, registry.from_hf(read_config(folder)).pad_token_id)).values
        np.testing.assert_allclose(got.reshape(-1, 3), wanted, rtol=0, atol=1e-4, err_msg=str(pad))


def class_batch(prompts: Sequence[Sequence[int]], pad: int | None) -> TokenBatch:
    """A batch as the front end makes it for a model with three classes."""
    layout = labels.of_tokens(range(3))
    made = [Prompt(index, np.array(tokens, np.int32), layout) for index, tokens in enumerate(prompts)]
    return packed(made, (), 0, vocab_logprobs=False, classes=True, pad=pad).batch


def test_an_output_head_that_is_left_among_the_tensors_changes_nothing(tmp_path: Path) -> None:
    """Some classifiers made from a causal model keep its head; transformers ignores it in the file."""
    folder = make_family(tmp_path, "qwen2", classes=3)
    batch = class_batch(sequences(), None)
    plain = load(folder).score(batch).values
    tensors = {name: np.array(tensor) for name, tensor in load_file(folder / "model.safetensors").items()}
    head = np.random.default_rng(0).normal(size=tensors["model.embed_tokens.weight"].shape).astype(np.float32)
    (folder / "model.safetensors").unlink()  # not in place: numpy has mapped the file
    save_file({**tensors, "lm_head.weight": head}, folder / "model.safetensors", {"format": "pt"})
    np.testing.assert_array_equal(load(folder).score(batch).values, plain)


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
