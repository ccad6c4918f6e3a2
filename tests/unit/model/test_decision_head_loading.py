"""Decision heads beside a model's weights: what is loaded, and what is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from model import loading
from model.fields import ConfigError
from model.tensors.stored import CheckpointError
from tests.tiny import make_llama
from tests.tiny_families import make_family
from tests.tiny_heads import HEAD_WIDTH, candidate_head, pointer_head

FILE = "decision_head.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_llama(tmp_path / "model")


@pytest.mark.parametrize(("kind", "tensors"), [("candidate", candidate_head(48)), ("pointer", pointer_head(48))])
def test_the_head_is_float32_in_a_model_of_another_dtype(folder: Path, kind: str, tensors: dict[str, np.ndarray]):
    save_file(tensors, folder / FILE)
    choice = loading.prepare(folder, dtype="bfloat16")
    assert choice.whole.decision_head is not None
    assert (choice.whole.decision_head.kind, choice.whole.decision_head.width) == (kind, HEAD_WIDTH)
    assert choice.model.dtype == "bfloat16"
    leaves: Any = nnx.to_flat_state(choice.model.abstract.ends[1])
    assert {path[0]: str(leaf.dtype) for path, leaf in leaves} == {
        "decision_head": "float32",
        "embedding": "bfloat16",
        "norm": "bfloat16",
    }


def test_a_model_that_is_saved_without_its_head_needs_no_other(tmp_path: Path):
    folder = make_family(tmp_path / "model", "qwen3", changes={"architectures": ["Qwen3Model"]})
    save_file(pointer_head(48), folder / FILE)
    assert loading.prepare(folder).whole.architecture == "Qwen3ForCausalLM"


def test_a_head_of_another_kind_is_named(folder: Path):
    save_file({"proj.weight": np.zeros((2, 48), np.float32)}, folder / FILE)
    with pytest.raises(ConfigError, match=r"has the tensors proj.weight: a head of a kind that is not implemented"):
        loading.prepare(folder)


def test_a_classifier_with_a_head_is_ambiguous(tmp_path: Path):
    folder = make_family(tmp_path / "model", "qwen3", classes=2)
    save_file(pointer_head(48), folder / FILE)
    with pytest.raises(ConfigError, match="only one of them can be meant"):
        loading.prepare(folder)


def test_tensors_that_are_missing_or_of_another_shape_are_named(folder: Path):
    tensors = candidate_head(48)
    del tensors["scalar.weight"]
    save_file(tensors | {"query.weight": np.zeros((HEAD_WIDTH, 47), np.float32)}, folder / FILE)
    with pytest.raises(CheckpointError, match=r"missing: decision_head.scalar.weight \(1, 20\)") as error:
        loading.load(folder)
    assert "mis-shaped: decision_head.query.weight is (20, 47)" in str(error.value)
