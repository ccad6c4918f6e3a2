"""``config.json``: keys that are read, that are ignored, and that are refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest

from model.config import MOST_TOKENS, ModelConfig, Rope
from model.contract import SALT_BITS, TOKEN_BITS
from model.families.registry import from_hf
from model.fields import ConfigError, read_config

BASE: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 307,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "intermediate_size": 52,
    "max_position_embeddings": 512,
}


def with_(**changes: Any) -> ModelConfig:
    return from_hf(BASE | changes)


def test_every_field_is_read() -> None:
    assert with_(
        num_key_value_heads=2,
        head_dim=10,
        rms_norm_eps=3e-4,
        rope_theta=1234.5,
        tie_word_embeddings=True,
        attention_bias=True,
        mlp_bias=True,
    ) == ModelConfig(
        architecture="LlamaForCausalLM",
        vocab_size=307,
        width=48,
        layers=3,
        heads=6,
        kv_heads=2,
        head_width=10,
        ff_width=52,
        norm_eps=3e-4,
        rope=Rope(1234.5),
        context_length=512,
        tied_head=True,
        attention_bias=True,
        output_bias=True,
        mlp_bias=True,
    )


def test_absent_and_null_keys_mean_what_transformers_means() -> None:
    absent = with_()
    assert (absent.kv_heads, absent.head_width, absent.norm_eps, absent.rope) == (6, 8, 1e-6, Rope(10_000.0))
    assert (absent.tied_head, absent.attention_bias, absent.mlp_bias) == (False, False, False)
    nulls = dict.fromkeys(("num_key_value_heads", "head_dim", "rope_scaling", "rope_parameters", "sliding_window"))
    assert with_(**nulls) == absent


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.5, "high_freq_factor": 4, "original_max_position_embeddings": 128}


@pytest.mark.parametrize(
    ("keys", "rope"),
    [
        ({"rope_theta": 5e5}, Rope(5e5)),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, Rope(5e5)),
        ({"rope_parameters": {"rope_theta": 5e5, "partial_rotary_factor": 1.0}}, Rope(5e5)),
        ({"rope_theta": 9.0, "rope_scaling": {"type": "linear", "factor": 4}}, Rope(9.0, "linear", 4.0)),
        ({"rope_scaling": {"type": "linear", "rope_type": "linear", "factor": 4}}, Rope(1e4, "linear", 4.0)),
        (
            {"rope_theta": 9.0, "rope_scaling": LLAMA3 | {"rope_type": "llama3"}},
            Rope(9.0, "llama3", 8.0, 1.5, 4.0, 128),
        ),
        (
            {"rope_parameters": LLAMA3 | {"rope_type": "llama3", "rope_theta": 9.0}},
            Rope(9.0, "llama3", 8.0, 1.5, 4.0, 128),
        ),
        ({"rope_theta": 9.0, "rope_parameters": {"rope_type": "default", "rope_theta": 9.0}}, Rope(9.0)),
    ],
)
def test_rope_of_v4_and_v5(keys: dict[str, Any], rope: Rope) -> None:
    assert with_(**keys).rope == rope


def test_the_original_context_of_llama3_rope_defaults_to_the_context() -> None:
    short = {key: value for key, value in LLAMA3.items() if key != "original_max_position_embeddings"}
    assert with_(rope_scaling=short | {"rope_type": "llama3"}).rope.original_context_length == 512


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, ["GPT2LMHeadModel", "LlamaForCausalLM"]),
        ({"architectures": None}, ["architectures is None", "LlamaForCausalLM"]),
        ({"architectures": ["LlamaForCausalLM", "X"]}, ["exactly one"]),
        ({"architectures": [["LlamaForCausalLM"]]}, ["architectures"]),
        ({"hidden_act": "gelu"}, ["hidden_act", "'gelu'", "silu"]),
        ({"num_key_value_heads": 4}, ["num_attention_heads 6", "num_key_value_heads 4"]),
        ({"num_attention_heads": 7}, ["hidden_size 48", "num_attention_heads 7"]),
        ({"head_dim": 7}, ["head_dim is 7", "even"]),
        ({"vocab_size": None}, ["lacks vocab_size"]),
        ({"vocab_size": 0}, ["vocab_size is 0"]),
        ({"vocab_size": True}, ["vocab_size is True"]),
        ({"vocab_size": 2**20 + 1}, ["vocab_size is 1048577", "at most 1048576"]),
        ({"vocab_size": "307"}, ["vocab_size is '307'"]),
        ({"rms_norm_eps": -1e-5}, ["rms_norm_eps", "-1e-05"]),
        ({"rms_norm_eps": float("nan")}, ["rms_norm_eps", "nan"]),
        ({"mlp_bias": 1}, ["mlp_bias is 1", "true or false"]),
        ({"hidden_act": 3}, ["hidden_act is 3", "string"]),
        ({"rope_scaling": "linear"}, ["rope_scaling is 'linear'", "object"]),
        ({"rope_scaling": {"rope_type": "ntk", "factor": 4.0}}, ["'ntk'", "default, linear, dynamic, llama3, yarn"]),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "alpha": 2.0}}, ["rope_scaling", "alpha=2.0"]),
        ({"rope_scaling": {"rope_type": "dynamic"}}, ["rope_scaling", "lacks factor"]),
        ({"layer_types": ["full_attention", "full_attention", "sliding_attention"]}, ["layer_types", "window of None"]),
        ({"rope_scaling": {"rope_type": "linear"}}, ["rope_scaling", "lacks factor"]),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "beta_fast": 32}}, ["rope_scaling", "beta_fast=32"]),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, ["partial_rotary_factor=0.5", "only 1.0"]),
        ({"rope_theta": 9.0, "rope_parameters": {"rope_theta": 10.0}}, ["rope_theta", "contradict"]),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_type": "default"}},
            ["contradict"],
        ),
    ],
)
def test_refused_with_the_names_in_the_message(changes: dict[str, Any], named: list[str]) -> None:
    with pytest.raises(ConfigError) as refusal:
        with_(**changes)
    for word in named:
        assert word in str(refusal.value)


def test_unknown_keys_are_refused_all_at_once() -> None:
    with pytest.raises(ConfigError) as refusal:
        with_(layer_scale={"bits": 4}, sliding_window=4096, is_causal=False, use_cache=True)
    for word in ("layer_scale", "sliding_window=4096", "is_causal=False (only True is implemented)"):
        assert word in str(refusal.value)
    assert "use_cache" not in str(refusal.value)
    assert "that could change the scores" in str(refusal.value)
    assert "trust_config" in str(refusal.value)


def test_trusted_keys_are_skipped_and_named() -> None:
    parsed = from_hf(BASE | {"layer_scale": 3, "is_causal": False}, trusted=("layer_scale", "is_causal", "absent"))
    assert parsed == with_()
    (note,) = parsed.notes
    for word in ("trust_config", "layer_scale=3", "is_causal=False"):
        assert word in note
    with pytest.raises(ConfigError, match="layer_scale") as refusal:
        from_hf(BASE | {"layer_scale": 3, "other": 4}, trusted=("other",))
    assert "other" not in str(refusal.value)


@pytest.mark.parametrize("key", ["rope_theta", "hidden_size", "layer_types"])
def test_a_key_that_is_read_cannot_be_skipped(key: str) -> None:
    with pytest.raises(ConfigError, match=f"trust_config names {key}: keys that this program reads"):
        from_hf(BASE, trusted=(key,))


def test_yarn_extends_the_context_and_a_dynamic_rope_bounds_it() -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 400}
    assert with_(rope_scaling=yarn).context_length == 1600
    assert with_(rope_scaling=yarn, max_position_embeddings=2048).context_length == 2048
    assert with_(rope_scaling=yarn).notes == ()
    plain = with_(rope_scaling={"type": "dynamic", "factor": 2.0})
    assert (plain.context_length, plain.rope.kind) == (512, "dynamic")
    assert "the longest prompt has 512 tokens" in plain.notes[0]
    short = with_(rope_scaling={"type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 256})
    assert short.context_length == 256


def test_yarn_as_its_card_writes_it_means_the_same_in_both_spellings() -> None:
    yarn = {"factor": 4.0, "original_max_position_embeddings": 400, "attention_factor": 1.5, "beta_slow": 2}
    v4 = with_(rope_theta=9.0, rope_scaling={"type": "yarn", **yarn})
    v5 = with_(rope_parameters={"rope_type": "yarn", "rope_theta": 9.0, **yarn})
    expected = Rope(9.0, "yarn", 4.0, original_context_length=400, beta_slow=2.0, magnitude=1.5)
    assert v4 == v5
    assert v4.rope == expected


def test_read_config(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no config\.json"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="not JSON"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ConfigError, match="must be a JSON object"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(BASE))
    assert from_hf(read_config(tmp_path)) == with_()


def test_what_transformers_itself_writes_is_read(tmp_path: Path) -> None:
    """Every key of a LlamaConfig that transformers saves, defaults included, is known."""
    from transformers import LlamaConfig

    config = LlamaConfig(
        architectures=["LlamaForCausalLM"], rope_parameters={"rope_theta": 77.0, "rope_type": "linear", "factor": 3.0}
    )
    for use_diff in (True, False):
        config.to_json_file(tmp_path / "config.json", use_diff=use_diff)
        parsed = from_hf(read_config(tmp_path))
        assert parsed.rope == Rope(77.0, "linear", 3.0)
        assert (parsed.width, parsed.ff_width, parsed.head_width) == (4096, 11008, 128)


def test_the_largest_vocabulary_fits_beside_a_salt():
    """``Engine`` puts a salt above a token's id, which is up to a vocabulary higher in long prompts."""
    assert MOST_TOKENS - 1 + MOST_TOKENS < 2**TOKEN_BITS
    assert (2**SALT_BITS - 1 << TOKEN_BITS) + 2 * MOST_TOKENS - 1 == 2**63 - 1
    assert with_(vocab_size=MOST_TOKENS).vocab_size == MOST_TOKENS
