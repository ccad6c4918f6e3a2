"""What each ``general.architecture`` is: the names of its tensors and its ``config.json``.

Source: llama.cpp's ``conversion/*.py``, which write these files from Hugging Face's.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from model.gguf.keys import Keys

Config = dict[str, Any]

ATTENTION = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
}
QK_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
MLP = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
EXPERTS = {
    "ffn_gate_exps": "mlp.experts.{}.gate_proj",
    "ffn_up_exps": "mlp.experts.{}.up_proj",
    "ffn_down_exps": "mlp.experts.{}.down_proj",
}
"""Each is one tensor with all experts; the braces stand for an expert's number."""
NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
POST_NORMS = {"post_attention_norm": "post_attention_layernorm", "post_ffw_norm": "post_feedforward_layernorm"}
GEMMA_NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "pre_feedforward_layernorm", **POST_NORMS}
DELTA = {
    "attn_qkv": "linear_attn.in_proj_qkv",
    "attn_gate": "linear_attn.in_proj_z",
    "ssm_beta": "linear_attn.in_proj_b",
    "ssm_alpha": "linear_attn.in_proj_a",
    "ssm_conv1d": "linear_attn.conv1d",
    "ssm_norm": "linear_attn.norm",
    "ssm_out": "linear_attn.out_proj",
}
"""Gated DeltaNet's."""
_NORMS_AFTER = {"attn_norm": "input_layernorm", "post_attention_norm": "post_attention_layernorm"}
FUSED = {
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_up": "mlp.gate_up_proj",
    "ffn_down": "mlp.down_proj",
}


@dataclass(frozen=True)
class Kind:
    """One architecture.

    Attributes:
        architecture: its name in ``config.json``.
        model_type: the same.
        layer: a layer's tensors, GGUF's name -> Hugging Face's, without ``.weight``.
        config: what its ``config.json`` has beside the keys that all have, from its keys and those.
        biases: groups of GGUF's names that may have a bias, by the key of ``config.json`` that says so. In a file that
            has some of a group's, the absent ones are zeros.
        always: the group of ``biases`` that has no key and is always there.
        interleaved: each head's rotary channels are stored as 0, H/2, 1, H/2 + 1, ...; Hugging Face has two halves.
        norm_shift: what stored norms have more than Hugging Face's.
        recurrent: the tensors of a hybrid's recurrent layers in place of ``layer``, with their endings; its layers of
            attention are every ``full_attention_interval``-th.
        ignored: what keys and tensors of other parts than the text's model begin with.
    """

    architecture: str
    model_type: str
    layer: Mapping[str, str]
    config: Callable[[Keys, Config], Config]
    biases: Mapping[str, tuple[str, ...]] = field(default_factory=dict[str, tuple[str, ...]])
    always: tuple[str, ...] = ()
    interleaved: bool = False
    norm_shift: float = 0.0
    recurrent: Mapping[str, str] = field(default_factory=dict[str, str])
    ignored: tuple[str, ...] = ()

    def tensors(self, layer: int, config: Config) -> Mapping[str, str]:
        """A layer's tensors, GGUF's name -> Hugging Face's."""
        if self.recurrent and (layer + 1) % config["full_attention_interval"]:
            return self.recurrent
        return {f"{name}.weight": f"{hf_name}.weight" for name, hf_name in self.layer.items()}


def _silu(keys: Keys, config: Config) -> Config:
    keys.same("rope.dimension_count", config["head_dim"])
    return {"hidden_act": "silu"}


def _mistral(keys: Keys, config: Config) -> Config:
    # llama.cpp writes no window for these models, and computes none.
    return {**_silu(keys, config), "sliding_window": None}


def _qwen3_moe(keys: Keys, config: Config) -> Config:
    return {
        **_silu(keys, config),
        "num_experts": keys.required("expert_count"),
        "num_experts_per_tok": keys.required("expert_used_count"),
        "moe_intermediate_size": keys.required("expert_feed_forward_length"),
        "norm_topk_prob": True,  # llama.cpp's graph of this architecture always does
    }


def _qwen3_5(keys: Keys, config: Config) -> Config:
    value_heads, values = keys.required("ssm.time_step_rank"), keys.required("ssm.inner_size")
    keys.whole("rope.dimension_sections")  # of images
    ahead = keys.get("nextn_predict_layers", 0)  # that predict further tokens, after the others
    return {
        "hidden_act": "silu",
        "num_hidden_layers": config["num_hidden_layers"] - ahead,
        "full_attention_interval": keys.get("full_attention_interval", 4),
        "partial_rotary_factor": keys.get("rope.dimension_count", config["head_dim"]) / config["head_dim"],
        "linear_num_key_heads": keys.required("ssm.group_count"),
        "linear_num_value_heads": value_heads,
        "linear_key_head_dim": keys.required("ssm.state_size"),
        "linear_value_head_dim": values // value_heads,
        "linear_conv_kernel_dim": keys.required("ssm.conv_kernel"),
    }


def _first_gemma(keys: Keys, config: Config) -> Config:
    keys.same("rope.dimension_count", config["head_dim"])
    return {"hidden_act": "gelu_pytorch_tanh"}


def _gemma2(keys: Keys, config: Config) -> Config:
    return {
        **_gemma(keys, config, largest=46),
        "sliding_window": keys.get("attention.sliding_window", 4096),
        "attn_logit_softcapping": keys.number("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": keys.number("final_logit_softcapping", 30.0),
    }


def _gemma3(keys: Keys, config: Config) -> Config:
    window = keys.required("attention.sliding_window")
    pattern = keys.whole("attention.sliding_window_pattern")
    if isinstance(pattern, list):
        kinds = ["sliding_attention" if slides else "full_attention" for slides in pattern]  # pyright: ignore[reportUnknownVariableType]
        layers = {"layer_types": kinds}
    else:
        layers = {"sliding_window_pattern": pattern or 6}
    return {
        **_gemma(keys, config, largest=62),
        **layers,
        "sliding_window": window,
        "rope_local_base_freq": keys.number("rope.freq_base_swa", 10_000.0),
        "final_logit_softcapping": keys.get("final_logit_softcapping"),
    }


def _gemma(keys: Keys, config: Config, *, largest: int) -> Config:
    """What Gemma 2 and 3 have in common.

    The file does not say how scores are scaled. Of the published models that of 27B alone does it by another number
    than the head width; it is known by its ``largest`` number of layers, as in llama.cpp.
    """
    keys.same("rope.dimension_count", config["head_dim"])
    by_width = config["num_hidden_layers"] == largest
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": (
            config["hidden_size"] // config["num_attention_heads"] if by_width else config["head_dim"]
        ),
    }


def _phi3(keys: Keys, config: Config) -> Config:
    rotated = keys.get("rope.dimension_count", config["head_dim"])
    return {
        "hidden_act": "silu",
        "partial_rotary_factor": rotated / config["head_dim"],
        "original_max_position_embeddings": keys.get(
            "rope.scaling.original_context_length", config["max_position_embeddings"]
        ),
        "sliding_window": keys.get("attention.sliding_window", 0) or None,
        "pad_token_id": None,  # the class has one of its own, beyond small vocabularies
    }


QKV, OUTPUT = ("attn_q", "attn_k", "attn_v"), ("attn_output",)

KINDS = {
    "llama": Kind(
        "LlamaForCausalLM",
        "llama",
        {**ATTENTION, **MLP, **NORMS},
        _silu,
        biases={"attention_bias": QKV + OUTPUT, "mlp_bias": tuple(MLP)},
        interleaved=True,
    ),
    "mistral3": Kind("MistralForCausalLM", "mistral", {**ATTENTION, **MLP, **NORMS}, _mistral, interleaved=True),
    "qwen2": Kind("Qwen2ForCausalLM", "qwen2", {**ATTENTION, **MLP, **NORMS}, _silu, always=QKV),
    "qwen3": Kind("Qwen3ForCausalLM", "qwen3", {**ATTENTION, **QK_NORMS, **MLP, **NORMS}, _silu),
    "qwen35": Kind(
        "Qwen3_5ForCausalLM",
        "qwen3_5_text",
        {**ATTENTION, **QK_NORMS, **MLP, **_NORMS_AFTER},
        _qwen3_5,
        norm_shift=1.0,
        recurrent={
            **{f"{name}.weight": f"{hf_name}.weight" for name, hf_name in {**DELTA, **MLP, **_NORMS_AFTER}.items()},
            "ssm_a": "linear_attn.A_log",
            "ssm_dt.bias": "linear_attn.dt_bias",
        },
    ),
    "qwen3moe": Kind(
        "Qwen3MoeForCausalLM",
        "qwen3_moe",
        {**ATTENTION, **QK_NORMS, "ffn_gate_inp": "mlp.gate", **EXPERTS, **NORMS},
        _qwen3_moe,
    ),
    "gemma": Kind("GemmaForCausalLM", "gemma", {**ATTENTION, **MLP, **NORMS}, _first_gemma, norm_shift=1.0),
    "gemma2": Kind("Gemma2ForCausalLM", "gemma2", {**ATTENTION, **MLP, **GEMMA_NORMS}, _gemma2, norm_shift=1.0),
    "gemma3": Kind(
        "Gemma3ForCausalLM",
        "gemma3_text",
        {**ATTENTION, **QK_NORMS, **MLP, **GEMMA_NORMS},
        _gemma3,
        norm_shift=1.0,
        ignored=("vision.", "mm.", "v."),  # some files hold the vision tower, or its keys
    ),
    "olmo2": Kind("Olmo2ForCausalLM", "olmo2", {**ATTENTION, **QK_NORMS, **MLP, **POST_NORMS}, _silu),
    "phi3": Kind("Phi3ForCausalLM", "phi3", {**FUSED, **NORMS}, _phi3),
}
"""The kinds of models by their ``general.architecture``."""
