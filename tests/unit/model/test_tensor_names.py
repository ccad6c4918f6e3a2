"""Tensors under other names, and in other shapes, become the same parameters; what is ambiguous is refused by name."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from model import checkpoint, decoder
from model.checkpoint import Place
from model.families.registry import FAMILIES, from_hf
from model.fields import read_config
from model.tensors.folder import opened
from model.tensors.names import known_name
from model.tensors.stored import CheckpointError
from tests.tiny_families import config_of, make_family

Named = Mapping[str, np.ndarray]


def parameters(folder: Path) -> dict[Place, np.ndarray]:
    """All parameters of a checkpoint."""
    config = from_hf(read_config(folder))
    table = FAMILIES[config.architecture].weights(config)
    with opened(folder) as stored:
        return checkpoint.load(stored, table, ignored=decoder.ignored(config), put=lambda _, tensor: np.array(tensor))


def saved_anew(folder: Path, change: Callable[[Named], Named]) -> None:
    tensors = {name: np.array(tensor) for name, tensor in load_file(folder / "model.safetensors").items()}
    (folder / "model.safetensors").unlink()  # not in place: numpy has mapped the file
    save_file(dict(change(tensors)), folder / "model.safetensors")


def respelt(pattern: str, name: str) -> Callable[[Named], Named]:
    return lambda tensors: {re.sub(pattern, name, own): tensor for own, tensor in tensors.items()}


SPELLINGS: Mapping[str, Callable[[Named], Named]] = {
    "without its head": respelt(r"^model\.", ""),
    "of images, older": respelt(r"^(model|lm_head)\.", r"language_model.\1."),
    "of images": respelt(r"^model\.", "model.language_model."),
    "of images, without its head": respelt(r"^model\.", "language_model."),
    "in part": respelt(r"^model\.layers\.1\.", "layers.1."),
    "the first Yi": lambda tensors: respelt(r"post_attention_layernorm", "ln2")(
        respelt(r"input_layernorm", "ln1")(tensors)
    ),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_becomes_the_same_parameters(spelling: str, tmp_path: Path) -> None:
    folder = make_family(tmp_path, "llama")
    wanted = parameters(folder)
    saved_anew(folder, SPELLINGS[spelling])
    found = parameters(folder)
    assert found.keys() == wanted.keys()
    for path, value in wanted.items():
        np.testing.assert_array_equal(found[path], value)


def fused(tensors: Named) -> Named:
    """Experts as transformers 5 has them in memory, and saves them with ``save_original_format=False``."""
    made = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    for layer in range(3):
        experts = f"model.layers.{layer}.mlp.experts"
        gate, up, down = (
            np.stack([tensors[f"{experts}.{expert}.{name}_proj.weight"] for expert in range(5)])
            for name in ("gate", "up", "down")
        )
        made |= {f"{experts}.gate_up_proj": np.concatenate([gate, up], axis=1), f"{experts}.down_proj": down}
    return made


def test_fused_experts_become_the_same_parameters(tmp_path: Path) -> None:
    folder = make_family(tmp_path, "qwen3_moe")
    wanted = parameters(folder)
    saved_anew(folder, fused)
    found = parameters(folder)
    assert found.keys() == wanted.keys()
    for path, value in wanted.items():
        np.testing.assert_array_equal(found[path], value)


def test_a_tensor_in_two_spellings_is_refused(tmp_path: Path) -> None:
    folder = make_family(tmp_path, "llama")
    saved_anew(folder, lambda tensors: {**tensors, "norm.weight": tensors["model.norm.weight"]})
    with pytest.raises(CheckpointError, match=r"twice: model.norm.weight, as model.norm.weight and as norm.weight"):
        parameters(folder)
    moe = make_family(tmp_path / "moe", "qwen3_moe")
    saved_anew(moe, lambda tensors: {**tensors, **fused(tensors)})
    one = "model.layers.2.mlp.experts.4.up_proj.weight"
    with pytest.raises(CheckpointError, match=rf"twice: {one}, as {one} and as .*gate_up_proj"):
        parameters(moe)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "model.rotary_emb.inv_freq",
        "rotary_emb.inv_freq",
        "language_model.model.rotary_emb_local.inv_freq",
        "model.language_model.rotary_emb.full_attention_inv_freq",
        "vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight",
        "model.vision_tower.ln_pre.weight",
        "multi_modal_projector.mm_input_projection_weight",
        "model.multi_modal_projector.norm.weight",
    ],
)
def test_a_table_of_ropes_and_what_only_images_go_through_are_left_alone(name: str, tmp_path: Path) -> None:
    folder = make_family(tmp_path, "llama")
    saved_anew(folder, lambda tensors: {**tensors, name: np.ones(5, np.float32)})
    assert parameters(folder)


@pytest.mark.parametrize("name", ["vision_model.weight", "model.layers.0.self_attn.rotary_emb.scale", "score.weight"])
def test_any_other_tensor_is_refused(name: str, tmp_path: Path) -> None:
    folder = make_family(tmp_path, "llama")
    saved_anew(folder, lambda tensors: {**tensors, name: np.ones(5, np.float32)})
    with pytest.raises(CheckpointError, match=f"unexpected: {name}"):
        parameters(folder)


def test_a_name_that_is_known_stays() -> None:
    for family in ("llama", "gemma3", "olmo2", "phi3", "qwen3_moe"):
        config = from_hf(config_of(family))
        for name in FAMILIES[config.architecture].weights(config):
            assert known_name(name) == name
