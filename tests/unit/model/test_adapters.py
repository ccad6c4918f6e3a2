"""Adapters: the weights that peft itself merges, and refusals that name what is not merged here."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from model.fields import ConfigError
from model.tensors.adapters import CONFIG, WEIGHTS, read
from model.tensors.folder import opened
from model.tensors.stored import whole
from tests.tiny import save
from tests.tiny_families import make_family
from tests.tiny_peft import PEFT_WARNS, adapted

pytestmark = PEFT_WARNS

KINDS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "plain": ("llama", {"target_modules": ["q_proj", "v_proj", "down_proj"]}),
    "all linears": ("qwen2", {"target_modules": "all-linear", "lora_alpha": 5}),
    "fused": ("phi3", {"target_modules": ["qkv_proj", "gate_up_proj"]}),
    "rsLoRA": ("llama", {"target_modules": ["k_proj"], "use_rslora": True}),
    "patterns": (
        "gemma3",
        {
            "target_modules": ["q_proj", "o_proj", "up_proj"],
            "rank_pattern": {"q_proj": 2, "model.layers.1.mlp.up_proj": 5, "^model.layers.0.self_attn.o_proj": 3},
            "alpha_pattern": {"proj": 99, "up_proj": 11, "layers.2.self_attn.o_proj": 1},
        },
    ),
    "head saved": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "head saved, tied": ("qwen2", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "both ends saved, tied": ("qwen2", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]}),
    "embedding saved": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}),
    "embedding saved, tied": ("qwen2", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}),
    "norms saved": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["input_layernorm"]}),
    "head adapted": ("llama", {"target_modules": ["q_proj", "lm_head"]}),
    "some layers": ("llama", {"target_modules": ["q_proj"], "layers_to_transform": [0, 2]}),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_weights_are_those_that_peft_merges(kind: str, dtype: str, tmp_path: Path) -> None:
    family, options = KINDS[kind]
    base = make_family(tmp_path / "base", family)
    if dtype == "bfloat16":
        save(base, load_file(base / "model.safetensors"), dtype=dtype)
    wanted = adapted(base, tmp_path / "both", dtype=dtype, **options)
    with opened(tmp_path / "both") as stored, opened(base) as plain:
        assert stored.problems == []
        untied = not np.array_equal(wanted["lm_head.weight"], wanted["model.embed_tokens.weight"])
        assert untied == ("lm_head.weight" in stored.tensors)
        changed = 0
        for name, tensor in stored.tensors.items():
            np.testing.assert_allclose(whole(tensor).astype(np.float32), wanted[name], rtol=0, atol=2e-6, err_msg=name)
            changed += name not in plain.tensors or np.any(whole(tensor) != whole(plain.tensors[name]))
        assert changed >= 2
        assert plain.tensors.keys() <= stored.tensors.keys()


@pytest.fixture
def both(tmp_path: Path) -> Path:
    """A base, and a plain adapter of its queries beside it."""
    base = make_family(tmp_path / "base", "llama")
    adapted(base, tmp_path / "both", target_modules=["q_proj"])
    return tmp_path / "both"


def with_tensors(folder: Path, changes: Mapping[str, np.ndarray | None]) -> None:
    """Change the adapter's tensors; None: take one away."""
    tensors = {name: np.array(tensor) for name, tensor in load_file(folder / WEIGHTS).items()}
    changed = {name: tensor for name, tensor in {**tensors, **changes}.items() if tensor is not None}
    (folder / WEIGHTS).unlink()  # not in place: numpy has mapped the file
    save_file(changed, folder / WEIGHTS)


MODULE = "base_model.model.model.layers.1.self_attn.q_proj"


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({f"{MODULE}.lora_B.weight": None}, f"missing: {MODULE}.lora_B.weight of the adapter"),
        ({f"{MODULE}.lora_A.weight": None}, f"missing: {MODULE}.lora_A.weight of the adapter"),
        ({f"{MODULE}.lora_magnitude_vector": np.ones(60)}, f"not implemented: {MODULE}.lora_magnitude_vector"),
        ({f"{MODULE}.lora_embedding_A": np.ones((4, 9))}, f"not implemented: {MODULE}.lora_embedding_A"),
        ({f"{MODULE}.lora_B.bias": np.ones(60)}, f"not implemented: {MODULE}.lora_B.bias"),
        ({f"{MODULE}.lora_A.default.weight": np.ones((4, 48))}, f"not implemented: {MODULE}.lora_A.default.weight"),
        ({"model.norm.weight": np.ones(48)}, "not implemented: model.norm.weight"),
        ({"base_model.model.model.norm.weight": np.ones(48)}, "no place: base_model.model.model.norm.weight"),
        ({"base_model.model.score.bias": np.ones(3)}, "no place: base_model.model.score.bias"),
        ({f"{MODULE.replace('.1.', '.9.')}.lora_A.weight": np.ones((4, 48))}, "missing: base_model"),
        (
            {
                f"{MODULE.replace('.1.', '.9.')}.lora_A.weight": np.ones((4, 48)),
                f"{MODULE.replace('.1.', '.9.')}.lora_B.weight": np.ones((60, 4)),
            },
            "its base has no model.layers.9.self_attn.q_proj.weight",
        ),
        ({f"{MODULE}.lora_B.weight": np.ones((48, 4), np.float32)}, "mis-shaped: A and B of model.layers.1"),
        (
            {f"{MODULE}.lora_B.weight": np.ones((60, 4), np.int64)},
            "dtype: A and B of model.layers.1.self_attn.q_proj are I64",
        ),
    ],
)
def test_every_tensor_is_accounted_for(changes: Mapping[str, np.ndarray | None], problem: str, both: Path) -> None:
    with_tensors(both, changes)
    with opened(both) as stored:
        assert len(stored.problems) == 1
        assert stored.problems[0].startswith(problem) or problem in stored.problems[0]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"use_dora": True}, "use_dora=True"),
        ({"bias": "all"}, "bias='all'"),
        ({"lora_bias": True}, "lora_bias=True"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out=True"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices"),
        ({"target_parameters": ["mlp.experts.gate_up_proj"]}, "target_parameters"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"ensure_weight_tying": True}, "ensure_weight_tying=True"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
        ({"kasa_config": {"a": 1}}, "kasa_config"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is 'pissa_niter_4'"),
        ({"r": 0}, "r is 0"),
        ({"rank_pattern": {"q_proj": "2"}}, "rank_pattern"),
        ({"of_tomorrow": 1}, "of_tomorrow=1"),
    ],
)
def test_what_is_not_merged_is_refused_by_name(changes: Mapping[str, Any], named: str, both: Path) -> None:
    config = json.loads((both / CONFIG).read_text())
    (both / CONFIG).write_text(json.dumps({**config, **changes}))
    with pytest.raises(ConfigError) as refusal, opened(both):
        pass
    assert named in str(refusal.value)
    assert "merge_and_unload" in str(refusal.value)


@pytest.mark.parametrize("content", ["", "[]", "{"])
def test_a_damaged_config_is_refused(content: str, both: Path) -> None:
    (both / CONFIG).write_text(content)
    with pytest.raises(ConfigError, match=CONFIG):
        read(both)


def test_any_part_can_be_read_alone(both: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in blocks of three rows, as those of large weights are."""
    name = "model.layers.2.self_attn.q_proj.weight"
    with opened(both) as stored:
        tensor = stored.tensors[name]
        all_of_it = whole(tensor)
        monkeypatch.setattr("model.tensors.adapters._BLOCK", 100)
        for cut in ((slice(0, 60), slice(0, 48)), (slice(7, 29), slice(3, 40)), (slice(5, 5), slice(0, 48))):
            np.testing.assert_allclose(tensor.read(cut), all_of_it[cut], rtol=0, atol=1e-6)


def test_the_note_names_the_adapter_its_base_and_the_scaling(both: Path) -> None:
    adapter = read(both)
    assert adapter is not None
    base = json.loads((both / CONFIG).read_text())["base_model_name_or_path"]
    assert adapter.note == f"LoRA adapter {both} is merged onto {base} (rank 4, scaling 1.5)"
    config = {**json.loads((both / CONFIG).read_text()), "use_rslora": True, "alpha_pattern": {"q_proj": 4}}
    (both / CONFIG).write_text(json.dumps({**config, "_name_or_path": "org/judge"}))
    adapter = read(both)
    assert adapter is not None
    assert adapter.note == (
        f"rsLoRA adapter org/judge is merged onto {base} (rank 4, scaling 3, other modules by their patterns)"
    )
