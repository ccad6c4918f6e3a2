"""Models whose text part is a family, and checkpoints in other spellings, against transformers' float32 forward."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from model import loading
from model.engine import Engine
from tests.parity.cases import HAVE_TORCH, LABELS, reference, sequences, torch_on_one_thread
from tests.parity.test_classifiers import class_batch
from tests.parity.test_heads import SIZES, logprobs
from tests.tiny import write_json
from tests.tiny_families import WRAPPED, config_of, make_family, wrapped_config

pytestmark = pytest.mark.skipif(not HAVE_TORCH, reason="torch is not installed, and these answers are not stored")

BEGINNINGS = {
    "Gemma3ForConditionalGeneration": {"model.": "model.language_model."},
    "Gemma3ForSequenceClassification": {"model.": "model.language_model."},
    "Mistral3ForConditionalGeneration": {"model.": "language_model.model.", "lm_head.": "language_model.lm_head."},
    "Qwen3_5ForConditionalGeneration": {"model.": "model.language_model."},
    "Qwen3_5ForSequenceClassification": {"model.": "model.language_model."},
    "Qwen3_5MoeForConditionalGeneration": {"model.": "model.language_model."},
}
"""How the names of the text part begin in such a checkpoint: in today's and in the first spelling."""


def wrapped(folder: Path, architecture: str) -> Path:
    """A checkpoint with random text tensors; transformers makes up those for images."""
    classes = 3 if architecture.endswith("Classification") else 0
    made = make_family(folder, WRAPPED[architecture], classes=classes)
    tensors: dict[str, np.ndarray] = {}
    for name, tensor in load_file(made / "model.safetensors").items():
        beginning = next((old for old in BEGINNINGS[architecture] if name.startswith(old)), "")
        tensors[BEGINNINGS[architecture].get(beginning, "") + name.removeprefix(beginning)] = np.array(tensor)
    (made / "model.safetensors").unlink()  # not in place: numpy has mapped the file
    save_file(tensors, made / "model.safetensors", {"format": "pt"})
    write_json(made / "config.json", {**wrapped_config(architecture), **({"num_labels": 3} if classes else {})})
    return made


@pytest.mark.parametrize(
    "architecture",
    [pytest.param(name, marks=pytest.mark.slow) if WRAPPED[name] == "qwen3_5_moe" else name for name in WRAPPED],
)
def test_a_text_part_scores_as_the_whole_model_does(architecture: str, tmp_path: Path) -> None:
    import torch
    import transformers

    torch_on_one_thread()
    folder = wrapped(tmp_path, architecture)
    scorer = loading.load(folder, **SIZES)
    assert scorer.info.notes == (f"the text part of {architecture} alone is used: it reads no images",)
    whole: Any = getattr(transformers, architecture, None) or transformers.AutoModelForSequenceClassification
    model = whole.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        outputs = [model(torch.tensor([tokens])).logits[0] for tokens in sequences()]
    if scorer.info.classes:
        got = scorer.score(class_batch(sequences(), 0)).values.reshape(-1, 3)
        wanted = np.stack([logits.numpy() for logits in outputs])
    else:
        got = logprobs(scorer)
        wanted = np.stack([torch.log_softmax(logits[-1].double(), -1)[list(LABELS)].numpy() for logits in outputs])
    assert wanted.std() > 1
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-4)


def test_of_a_tied_pair_the_head_alone_is_stored(tmp_path: Path) -> None:
    folder = make_family(tmp_path, "qwen2")
    tensors = {name: np.array(tensor) for name, tensor in load_file(folder / "model.safetensors").items()}
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    (folder / "model.safetensors").unlink()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    np.testing.assert_allclose(logprobs(scorer(folder)), np.array(reference(folder)), rtol=0, atol=1e-4)


@pytest.mark.parametrize("original", [True, False])
def test_what_transformers_saves_itself(original: bool, tmp_path: Path) -> None:
    """A mixture with its experts apart, or fused as it has them in memory."""
    from transformers import AutoModelForCausalLM

    folder = make_family(tmp_path / "own", "qwen3_moe")
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    model.save_pretrained(tmp_path / "saved", save_original_format=original)
    names = load_file(tmp_path / "saved" / "model.safetensors").keys()
    assert ("model.layers.0.mlp.experts.gate_up_proj" in names) != original
    np.testing.assert_allclose(logprobs(scorer(tmp_path / "saved")), np.array(reference(folder)), rtol=0, atol=1e-4)


def test_a_model_that_was_saved_without_its_head_and_given_one_again(tmp_path: Path) -> None:
    """The base model's own save has other names; a head beside it makes it a causal model."""
    from transformers import AutoModel

    folder = make_family(tmp_path / "own", "qwen3")
    base: Any = AutoModel.from_pretrained(folder)
    base.save_pretrained(tmp_path / "base")
    tensors = {name: np.array(tensor) for name, tensor in load_file(tmp_path / "base" / "model.safetensors").items()}
    assert "norm.weight" in tensors
    head = {"lm_head.weight": load_file(folder / "model.safetensors")["lm_head.weight"]}
    (tmp_path / "base" / "model.safetensors").unlink()
    save_file({**tensors, **head}, tmp_path / "base" / "model.safetensors")
    found = scorer(tmp_path / "base")
    assert found.info.architecture == "Qwen3ForCausalLM"
    np.testing.assert_allclose(logprobs(found), np.array(reference(folder)), rtol=0, atol=1e-4)


def scorer(folder: Path) -> Engine:
    return loading.load(folder, **SIZES)


def test_classes_that_the_tensor_decides(tmp_path: Path) -> None:
    folder = make_family(tmp_path, "qwen2", classes=3)
    plain = scorer(folder).score(class_batch(sequences(), 0)).values
    config = {**config_of("qwen2"), "architectures": ["Qwen2ForSequenceClassification"], "num_labels": 3}
    write_json(folder / "config.json", {**config, "id2label": {"0": "a", "1": "b"}})
    np.testing.assert_array_equal(scorer(folder).score(class_batch(sequences(), 0)).values, plain)
