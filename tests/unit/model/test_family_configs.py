"""``config.json`` of the model families: the keys that each reads besides Llama's, and those it refuses by name."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from model.config import ModelConfig, Recurrence, Rope
from model.families.registry import FAMILIES, KNOWN, from_hf
from model.fields import ConfigError
from model.loading import choose
from model.sizes import BY_PLATFORM
from tests.tiny_families import CLASSIFIERS, CONFIGS, config_of


def with_(family: str, without: tuple[str, ...] = (), **changes: Any) -> ModelConfig:
    config = {key: value for key, value in config_of(family).items() if key not in without}
    return from_hf(config | changes)


@pytest.mark.parametrize("family", CONFIGS)
def test_what_transformers_itself_writes_means_the_same(family: str, tmp_path: Path) -> None:
    """Every key of the family's config class, defaults included, is known."""
    from transformers import AutoConfig

    path = tmp_path / "config.json"
    path.write_text(json.dumps(config_of(family)))
    config = AutoConfig.from_pretrained(tmp_path)
    for use_diff in (True, False):
        config.to_json_file(path, use_diff=use_diff)
        assert from_hf(json.loads(path.read_text())) == with_(family)


QWEN = {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 2}


@pytest.mark.parametrize(
    ("family", "changes", "window", "sliding"),
    [
        ("qwen2", QWEN, 9, (False, False, True)),
        ("qwen2", QWEN | {"max_window_layers": 0}, 9, (True, True, True)),
        ("qwen2", QWEN | {"use_sliding_window": False}, 0, ()),
        ("qwen2", QWEN | {"max_window_layers": 28}, 0, ()),
        ("qwen3", QWEN | {"layer_types": ["sliding_attention", *["full_attention"] * 2]}, 9, (True, False, False)),
        ("qwen3", {}, 0, ()),
        ("qwen3_moe", QWEN, 9, (True, True, True)),
        ("qwen3_moe", {}, 0, ()),
        ("mistral", {"sliding_window": 9}, 9, (True, True, True)),
        ("mistral", {"sliding_window": None}, 0, ()),
        ("mistral", {"sliding_window": 512}, 0, (True, True, True)),
        ("phi3", {"sliding_window": None}, 0, ()),
        ("gemma2", {"sliding_window": 9}, 9, (True, False, True)),
        ("gemma3", {"sliding_window": 9, "sliding_window_pattern": 3}, 9, (True, True, False)),
    ],
)  # fmt: skip
def test_windows(family: str, changes: dict[str, Any], window: int, sliding: tuple[bool, ...]) -> None:
    config = with_(family, **changes)
    assert (config.window, config.sliding) == (window, sliding)


def test_an_absent_window_is_that_of_the_class_in_transformers() -> None:
    assert with_("mistral", without=("sliding_window",), max_position_embeddings=9000).window == 4096
    assert with_("gemma2", without=("sliding_window",), max_position_embeddings=9000).window == 4096
    assert with_("phi3", without=("sliding_window",), max_position_embeddings=9000).window == 0


def test_gemma_constants() -> None:
    two, three = with_("gemma2"), with_("gemma3")
    assert (two.attention_softcap, two.logit_softcap, two.attention_scale) == (2.5, 4.5, 17**-0.5)
    assert (three.attention_softcap, three.logit_softcap, three.attention_scale) == (None, None, 23**-0.5)
    assert (two.norm_offset, two.embedding_scale, two.activation, two.tied_head) == (1.0, 48**0.5, "gelu_tanh", True)
    bare = with_("gemma2", without=("attn_logit_softcapping", "final_logit_softcapping", "query_pre_attn_scalar"))
    assert (bare.attention_softcap, bare.logit_softcap, bare.attention_scale) == (50.0, 30.0, 1 / 16)
    nulls = with_("gemma2", attn_logit_softcapping=None, final_logit_softcapping=None)
    assert (nulls.attention_softcap, nulls.logit_softcap) == (None, None)


def test_gemma_3_has_two_ropes_in_v4_and_v5() -> None:
    v4 = with_("gemma3")
    assert (v4.rope, v4.local_rope) == (Rope(5678.0, "linear", 2.5), Rope(77.0))
    old = ("rope_theta", "rope_scaling", "rope_local_base_freq")
    groups = {
        "full_attention": {"rope_type": "linear", "factor": 2.5, "rope_theta": 5678.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 77.0},
    }
    assert with_("gemma3", old, rope_parameters=groups) == v4
    bare = with_("gemma3", old)
    assert (bare.rope, bare.local_rope) == (Rope(1e6), Rope(1e4))
    assert with_("gemma3", layer_types=["full_attention"] * 3).local_rope is None


def test_longrope() -> None:
    rope = with_("phi3-longrope").rope
    assert (rope.kind, rope.original_context_length, len(rope.short_factors), rope.long_factors[5]) == (
        "longrope",
        170,
        6,
        9.0,
    )
    assert rope.magnitude == pytest.approx(1.10212, abs=1e-5)  # sqrt(1 + ln(512 / 170) / ln(170))


@pytest.mark.parametrize("architecture", FAMILIES)
def test_an_architecture_of_another_model_type_is_refused(architecture: str) -> None:
    """transformers chooses a class by the model type: a Mistral called llama would lose its window, or gain one."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES as CLASSES

    own = FAMILIES[architecture].model_type
    if architecture != "LayaDecisionModel":  # a name of this project's, see serve_app.decision_packages
        assert architecture in (CAUSAL.get(own), CLASSES.get(own))
    other = "mistral" if own == "llama" else "llama"
    with pytest.raises(ConfigError, match=f"{architecture}.*model_type '{other}'"):
        from_hf({**config_of("llama"), "architectures": [architecture], "model_type": other})


@pytest.mark.parametrize("family", CLASSIFIERS)
def test_classes(family: str) -> None:
    names = {"architectures": [CLASSIFIERS[family]]}
    for count, keys in ((2, {}), (1, {"num_labels": 1}), (3, {"id2label": {"0": "a", "1": "b", "2": "c"}})):
        config = with_(family, **names, **keys, tie_word_embeddings=True)
        assert (config.classes, config.tied_head, config.logit_softcap) == (count, False, None)
        assert config.architecture == CLASSIFIERS[family]


@pytest.mark.parametrize("family", CLASSIFIERS)
def test_an_absent_pad_is_that_of_the_class_in_transformers(family: str) -> None:
    from transformers import CONFIG_MAPPING

    absent = with_(family, without=("pad_token_id",), architectures=[CLASSIFIERS[family]])
    assert absent.pad_token_id == CONFIG_MAPPING[config_of(family)["model_type"]]().pad_token_id


@pytest.mark.parametrize(
    ("family", "changes", "named"),
    [
        ("qwen2", {"sliding_window": 0}, ["sliding_window is 0"]),
        ("qwen2", {"layer_types": ["full_attention"]}, ["layer_types", "3 layers"]),
        ("qwen2", {"layer_types": ["chunked_attention"] * 3}, ["chunked_attention", "full_attention or sliding"]),
        ("qwen2", {"layer_types": "full_attention"}, ["layer_types", "list of strings"]),
        ("qwen2", {"use_sliding_window": False, "layer_types": ["sliding_attention"] * 3}, ["window of None"]),
        ("qwen2", {"use_mrope": True}, ["use_mrope=True"]),
        ("qwen2", {"dual_chunk_attention_config": {"chunk_size": 9, "sparse": 1}}, ["dual_chunk", "sparse=1"]),
        ("qwen3", {"rope_scaling": {"rope_type": "su", "factor": 4.0}}, ["'su'"]),
        ("mistral", {"hidden_act": "relu"}, ["hidden_act is 'relu'", "silu, gelu_pytorch_tanh"]),
        ("gemma2", {"use_bidirectional_attention": True}, ["use_bidirectional_attention=True"]),
        ("gemma2", {"attn_logit_softcapping": 0.0}, ["attn_logit_softcapping is 0.0"]),
        ("gemma3", {"attn_logit_softcapping": 50.0}, ["attn_logit_softcapping=50.0"]),
        ("gemma3", {"rope_parameters": {"full_attention": {}}}, ["both", "keep rope_parameters"]),
        ("olmo2", {"clip_qkv": 8.0}, ["clip_qkv=8.0"]),
        ("phi3", {"partial_rotary_factor": 0.3}, ["0.3 of head_dim 12", "3 channels"]),
        ("phi3", {"mlp_bias": True}, ["mlp_bias=True"]),
        ("phi3", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, ["'linear'", "default, longrope"]),
        ("phi3-longrope", {"partial_rotary_factor": 0.5}, ["6 channels", "6 and 6"]),
        ("phi3-longrope", {"rope_scaling": {"type": "longrope", "short_factor": [1.0] * 6}}, ["lacks long_factor"]),
        ("qwen3_moe", {"mlp_only_layers": [1]}, ["mlp_only_layers=[1]"]),
        ("qwen3_moe", {"decoder_sparse_step": 2}, ["decoder_sparse_step=2", "only 1"]),
        ("qwen3_moe", {"num_experts_per_tok": 6}, ["num_experts_per_tok 6", "num_experts 5"]),
        ("qwen3_moe", {"shared_expert_intermediate_size": 9}, ["shared_expert_intermediate_size=9"]),
    ],
)  # fmt: skip
def test_refused_with_the_names_in_the_message(family: str, changes: Mapping[str, Any], named: list[str]) -> None:
    with pytest.raises(ConfigError) as refusal:
        with_(family, **changes)
    for word in named:
        assert word in str(refusal.value)


HARMLESS: Mapping[str, Any] = {
    "unsloth_version": "2025.9.1",
    "unsloth_fixed": True,
    "_attn_implementation": "flash_attention_2",
    "_attn_implementation_autoset": True,
    "_attn_implementation_internal": "sdpa",
    "attn_implementation": "flash_attention_2",
    "_flash_attn_2_enabled": True,
    "sentence_transformers": {"activation_fn": "torch.nn.modules.activation.Sigmoid", "version": "5.1.0"},
    "sbert_ce_default_activation_function": "torch.nn.modules.linear.Identity",
    "classifier_from_token": ["no", "yes"],
    "is_original_qwen3_reranker": True,
    "method": "no_post_processing",
    "max_sequence_length": 64,
    "model_max_length": 64,
    "tokenizer_class": "LlamaTokenizer",
    "pretraining_tp": 2,
    "use_mrope": False,
    "use_sliding_window": False,
    "is_causal": True,
    "transformers.js_config": {"dtype": {"model": "q4"}},
    "neftune_noise_alpha": 5.0,
    "use_liger_kernel": True,
    "gradient_checkpointing": True,
    "keys_to_ignore_at_inference": ["past_key_values"],
    "_commit_hash": "0123",
    "_name_or_path": "org/name",
}
"""Keys that others write, and that change no forward pass."""
TRANSFORMERS_4: Mapping[str, Any] = {
    "return_dict": True,
    "output_hidden_states": False,
    "output_attentions": False,
    "torchscript": False,
    "use_bfloat16": False,
    "tf_legacy_loss": False,
    "pruned_heads": {},
    "tie_encoder_decoder": False,
    "chunk_size_feed_forward": 0,
    "is_encoder_decoder": False,
    "is_decoder": False,
    "cross_attention_hidden_size": None,
    "add_cross_attention": False,
    "max_length": 20,
    "min_length": 0,
    "do_sample": False,
    "early_stopping": False,
    "num_beams": 1,
    "num_beam_groups": 1,
    "diversity_penalty": 0.0,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "typical_p": 1.0,
    "repetition_penalty": 1.0,
    "length_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "bad_words_ids": None,
    "num_return_sequences": 1,
    "output_scores": False,
    "return_dict_in_generate": False,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "remove_invalid_values": False,
    "exponential_decay_length_penalty": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "finetuning_task": None,
    "id2label": {"0": "LABEL_0", "1": "LABEL_1"},
    "label2id": {"LABEL_0": 0, "LABEL_1": 1},
    "tokenizer_class": None,
    "prefix": None,
    "task_specific_params": None,
    "problem_type": None,
}
"""What ``PretrainedConfig.to_dict`` of transformers 4 adds to a class's own keys, with its defaults."""


@pytest.mark.parametrize("family", CONFIGS)
def test_keys_that_change_nothing_are_accepted_in_every_family(family: str) -> None:
    bias = {} if config_of(family).get("attention_bias") else {"attention_bias": False}
    if family == "qwen2":
        bias |= {"use_sliding_window": True}
    parsed = with_(family, **{**HARMLESS, **TRANSFORMERS_4, **bias})
    assert parsed == with_(family)
    assert parsed.notes == ()


@pytest.mark.parametrize("family", ["llama", "olmo2", "qwen3"])
def test_layers_that_are_all_full_may_be_listed(family: str) -> None:
    assert with_(family, layer_types=["full_attention"] * 3) == with_(family)


def test_dual_chunk_attention_bounds_the_context() -> None:
    """Within its first chunk attention is the ordinary one."""
    chunks = {"chunk_size": 300, "local_size": 8, "original_max_position_embeddings": 300}
    for family in ("qwen2", "qwen3", "qwen3_moe"):
        config = with_(family, dual_chunk_attention_config=chunks)
        assert config.context_length == 300
        assert "the longest prompt has 300 tokens" in config.notes[0]


def test_an_unknown_architecture_is_answered_with_all_that_are_known() -> None:
    with pytest.raises(ConfigError) as refusal:
        with_("llama", architectures=["MixtralForCausalLM"])
    for name in KNOWN:
        assert name in str(refusal.value)


def published_qwen3_5(**changes: Any) -> dict[str, Any]:
    """The keys of Qwen3.5-27B's ``config.json``, with those of its text part nested."""
    kinds = ["full_attention" if (layer + 1) % 4 == 0 else "linear_attention" for layer in range(64)]
    text = {
        "attention_bias": False, "attention_dropout": 0.0, "attn_output_gate": True, "dtype": "bfloat16",
        "eos_token_id": 248_044, "full_attention_interval": 4, "head_dim": 256, "hidden_act": "silu",
        "hidden_size": 5120, "initializer_range": 0.02, "intermediate_size": 17_408, "layer_types": kinds,
        "linear_conv_kernel_dim": 4, "linear_key_head_dim": 128, "linear_num_key_heads": 16,
        "linear_num_value_heads": 48, "linear_value_head_dim": 128, "mamba_ssm_dtype": "float32",
        "max_position_embeddings": 262_144, "mlp_only_layers": [], "model_type": "qwen3_5_text",
        "mtp_num_hidden_layers": 1, "mtp_use_dedicated_embeddings": False, "num_attention_heads": 24,
        "num_hidden_layers": 64, "num_key_value_heads": 4, "output_gate_type": "swish", "pad_token_id": None,
        "partial_rotary_factor": 0.25, "rms_norm_eps": 1e-6, "use_cache": True, "vocab_size": 248_320,
        "rope_parameters": {
            "mrope_interleaved": True, "mrope_section": [11, 11, 10], "partial_rotary_factor": 0.25,
            "rope_theta": 10_000_000, "rope_type": "default",
        },
    }  # fmt: skip
    return {
        "architectures": ["Qwen3_5ForConditionalGeneration"],
        "model_type": "qwen3_5",
        "image_token_id": 248_056,
        "video_token_id": 248_057,
        "vision_start_token_id": 248_053,
        "vision_end_token_id": 248_054,
        "language_model_only": False,
        "tie_word_embeddings": False,
        "text_config": text | changes,
        "vision_config": {"depth": 27},
    }


def test_a_published_hybrid_is_read_in_blocks_that_end_in_attention() -> None:
    config = from_hf(published_qwen3_5())
    assert (config.layers, config.rotary_width, config.norm_offset, config.tied_head) == (16, 64, 1.0, False)
    assert config.recurrence == Recurrence(3, 16, 48, 128, 128, 4)
    assert config.rope.theta == 1e7
    assert any("mtp" in note for note in config.notes)
    assert from_hf(published_qwen3_5(layer_types=None)) == config


def test_a_published_mixture_of_a_hybrid_is_read() -> None:
    """The keys of Qwen3.5-35B-A3B."""
    from transformers import Qwen3_5MoeConfig

    kinds = ["full_attention" if (layer + 1) % 4 == 0 else "linear_attention" for layer in range(40)]
    dense = published_qwen3_5(
        hidden_size=2048, num_hidden_layers=40, layer_types=kinds, num_attention_heads=16, num_key_value_heads=2,
        linear_num_value_heads=32, model_type="qwen3_5_moe_text", num_experts=256, num_experts_per_tok=8,
        moe_intermediate_size=512, shared_expert_intermediate_size=512, router_aux_loss_coef=0.001,
    )  # fmt: skip
    del dense["text_config"]["intermediate_size"]
    named = {"architectures": ["Qwen3_5MoeForConditionalGeneration"], "model_type": "qwen3_5_moe"}
    config = from_hf(dense | named)
    assert (config.layers, config.experts, config.experts_per_token, config.norm_expert_weights) == (10, 256, 8, True)
    assert (config.ff_width, config.shared_ff_width, config.recurrence) == (
        512,
        512,
        Recurrence(3, 16, 32, 128, 128, 4),
    )
    of_class = Qwen3_5MoeConfig(**{key: dense[key] for key in ("text_config", "vision_config")} | named).to_dict()
    assert from_hf(of_class | {"architectures": named["architectures"]}) == config


@pytest.mark.parametrize("implementation", ["triton", "fused", "paged"])
def test_a_hybrid_s_call_has_one_prefix_where_xla_runs_its_recurrent_layers(implementation: str) -> None:
    config = from_hf(published_qwen3_5())
    choice = choose(
        config,
        dtype="bfloat16",
        implementation=implementation,
        by_layer=False,
        sizes=BY_PLATFORM["gpu"],
        max_prompt_tokens=4_096,
        mesh=None,
    )
    assert choice.model.layout.prefixes == 1


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"layer_types": ["linear_attention"] * 64}, "before each full_attention, which is the last"),
        ({"num_hidden_layers": 62, "layer_types": None}, "before each full_attention, which is the last"),
        ({"attn_output_gate": False}, "attn_output_gate=False (only True is implemented)"),
        ({"output_gate_type": "sigmoid"}, "output_gate_type='sigmoid' (only 'swish' is implemented)"),
        ({"linear_num_value_heads": 40}, "linear_num_value_heads 40 is not a multiple of linear_num_key_heads 16"),
    ],
)
def test_a_hybrid_of_another_shape_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        from_hf(published_qwen3_5(**changes))
