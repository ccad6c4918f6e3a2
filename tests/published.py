"""Published checkpoints: the shape of each ``config.json``, and whether it loads.

``docs/families.md`` has them as a table, and ``python -m tests.checkpoint_table`` compares each with transformers, at
tiny sizes. Token ids, dtypes and versions are left out, as they have no effect.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tests.published_quantised import PUBLIC

Config = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """One checkpoint, or one kind.

    Attributes:
        name: on the hub, and what was changed.
        config: what matters of ``config.json``.
        keys: the keys that set it apart.
        refused: words of the error; empty: it loads.
        context: tokens of the longest prompt, if they are not ``max_position_embeddings``.
        compared: the test file that compares such a checkpoint with transformers; empty: ``checkpoint_table`` does.
    """

    name: str
    config: Config
    keys: str = ""
    refused: str = ""
    context: int = 0
    compared: str = ""

    @property
    def row(self) -> str:
        """Its row of the table in ``docs/families.md``."""
        loads = f"no: `{self.refused}`" if self.refused else "yes"
        if self.context:
            loads += f", {self.context:,} tokens"
        return f"| {self.name} | {self.keys} | {loads} |"


def _config(model_type: str, architecture: str, sizes: tuple[int, ...], **keys: Any) -> dict[str, Any]:
    """A ``config.json``.

    Args:
        sizes: hidden size, layers, heads, key/value heads, intermediate size, vocabulary, context.
    """
    names = (
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "intermediate_size",
        "vocab_size",
        "max_position_embeddings",
    )
    return {
        "architectures": [architecture],
        "model_type": model_type,
        **dict(zip(names, sizes, strict=True)),
        "initializer_range": 0.02,
        "use_cache": True,
        **keys,
    }


def _llama(*sizes: int, **keys: Any) -> dict[str, Any]:
    base = {"hidden_act": "silu", "rms_norm_eps": 1e-5, "attention_bias": False, "attention_dropout": 0.0}
    return _config(
        "llama",
        keys.pop("architecture", "LlamaForCausalLM"),
        sizes,
        **{**base, "mlp_bias": False, "pretraining_tp": 1, "tie_word_embeddings": False, **keys},
    )


def _llama3_rope(factor: float) -> dict[str, Any]:
    return {
        "factor": factor,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    }


def _llama31(*sizes: int, **keys: Any) -> dict[str, Any]:
    sizes = sizes or (4096, 32, 32, 8, 14336, 128256, 131072)
    return _llama(*sizes, **{"rope_theta": 500000.0, "rope_scaling": _llama3_rope(8.0), **keys})


def _llama32(*sizes: int, **keys: Any) -> dict[str, Any]:
    scaling = {"rope_scaling": _llama3_rope(32.0), "tie_word_embeddings": True}
    return _llama31(*sizes, **{**scaling, **keys})


def _qwen25(*sizes: int, **keys: Any) -> dict[str, Any]:
    base = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 1e6, "attention_dropout": 0.0}
    window = {"sliding_window": sizes[-1], "max_window_layers": sizes[1], "use_sliding_window": False}
    return _config("qwen2", "Qwen2ForCausalLM", sizes, **{**base, **window, "tie_word_embeddings": False, **keys})


def _qwen3(*sizes: int, **keys: Any) -> dict[str, Any]:
    base = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 1e6, "rope_scaling": None, "head_dim": 128}
    window = {"sliding_window": None, "max_window_layers": sizes[1], "use_sliding_window": False}
    bias = {"attention_bias": False, "attention_dropout": 0.0, "tie_word_embeddings": False}
    architecture = keys.pop("architecture", "Qwen3ForCausalLM")
    return _config("qwen3", architecture, sizes, **{**base, **window, **bias, **keys})


def _qwen3_moe(*sizes: int, **keys: Any) -> dict[str, Any]:
    experts = {
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "output_router_logits": False,
        "router_aux_loss_coef": 0.001,
    }
    config = _qwen3(*sizes, **{**experts, **keys})
    return {**config, "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"]}


def _mistral(*sizes: int, **keys: Any) -> dict[str, Any]:
    base = {"hidden_act": "silu", "rms_norm_eps": 1e-5, "attention_dropout": 0.0, "tie_word_embeddings": False}
    return _config("mistral", "MistralForCausalLM", sizes, **{**base, **keys})


def _gemma(*sizes: int, **keys: Any) -> dict[str, Any]:
    base = {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "head_dim": 256,
        "hidden_act": "gelu",
        "hidden_activation": None,
        "rms_norm_eps": 1e-6,
        "rope_scaling": None,
        "rope_theta": 10000.0,
    }
    return _config("gemma", "GemmaForCausalLM", sizes, **{**base, **keys})


def _gemma2(*sizes: int, **keys: Any) -> dict[str, Any]:
    base = {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attn_logit_softcapping": 50.0,
        "cache_implementation": "hybrid",
        "final_logit_softcapping": 30.0,
        "head_dim": 256,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 256,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
    }
    return _config("gemma2", "Gemma2ForCausalLM", sizes, **{**base, **keys})


def _gemma3(*sizes: int, **keys: Any) -> dict[str, Any]:
    base = {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attn_logit_softcapping": None,
        "cache_implementation": "hybrid",
        "final_logit_softcapping": None,
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 256,
        "rms_norm_eps": 1e-6,
        "rope_local_base_freq": 10000,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": 512,
    }
    return _config("gemma3_text", "Gemma3ForCausalLM", sizes, **{**base, **keys})


def _phi3(*sizes: int, **keys: Any) -> dict[str, Any]:
    base = {
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "attention_dropout": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "original_max_position_embeddings": 4096,
        "tie_word_embeddings": False,
    }
    return _config("phi3", "Phi3ForCausalLM", sizes, **{**base, **keys})


def _longrope(pairs: int, **keys: Any) -> dict[str, Any]:
    factors = {
        "short_factor": [1.0 + 0.02 * pair for pair in range(pairs)],
        "long_factor": [1.0 + 1.3 * pair for pair in range(pairs)],
    }
    return {"type": "longrope", **factors, **keys}


def _olmo2(*sizes: int, **keys: Any) -> dict[str, Any]:
    base = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 500000, "rope_scaling": None}
    bias = {"attention_bias": False, "attention_dropout": 0.0, "tie_word_embeddings": False}
    return _config("olmo2", "Olmo2ForCausalLM", sizes, **{**base, **bias, **keys})


def _foreign(model_type: str, architecture: str) -> dict[str, Any]:
    return _config(model_type, architecture, (1024, 24, 16, 16, 4096, 250002, 8192))


_ONE_CLASS = {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}

LLAMA = (
    Checkpoint("meta-llama/Llama-3.1-8B-Instruct", _llama31(), "rope `llama3`"),
    Checkpoint(
        "meta-llama/Llama-3.2-1B-Instruct", _llama32(2048, 16, 32, 8, 8192, 128256, 131072, head_dim=64), "tied"
    ),
    Checkpoint(
        "meta-llama/Llama-3.2-3B-Instruct", _llama32(3072, 28, 24, 8, 8192, 128256, 131072, head_dim=128), "tied"
    ),
    Checkpoint("meta-llama/Llama-3.3-70B-Instruct", _llama31(8192, 80, 64, 8, 28672, 128256, 131072), "rope `llama3`"),
    Checkpoint(
        "meta-llama/Meta-Llama-3-8B-Instruct",
        _llama(4096, 32, 32, 8, 14336, 128256, 8192, rope_theta=500000.0, rope_scaling=None),
    ),
    Checkpoint("meta-llama/Llama-Guard-3-8B", _llama31(), "rope `llama3`"),
    Checkpoint(
        "meta-llama/Llama-2-7b-chat-hf",
        _llama(4096, 32, 32, 32, 11008, 32000, 4096, rope_scaling=None),
        "`pretraining_tp`",
    ),
    Checkpoint(
        "meta-llama/Llama-2-13b-chat-hf, `pretraining_tp` 2",
        _llama(5120, 40, 40, 40, 13824, 32000, 4096, pretraining_tp=2),
        "`pretraining_tp`",
    ),
    Checkpoint(
        "lmsys/vicuna-7b-v1.5",
        _llama(4096, 32, 32, 32, 11008, 32000, 4096, max_sequence_length=4096, pad_token_id=0, rope_scaling=None),
        "`max_sequence_length`",
    ),
    Checkpoint("TinyLlama/TinyLlama-1.1B-Chat-v1.0", _llama(2048, 22, 32, 4, 5632, 32000, 2048, rope_theta=10000.0)),
    Checkpoint("codellama/CodeLlama-7b-Instruct-hf", _llama(4096, 32, 32, 32, 11008, 32016, 16384, rope_theta=1000000)),
    Checkpoint(
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        _llama(
            *(576, 30, 9, 3, 1536, 49152, 8192),
            is_llama_config=True,
            rope_interleaved=False,
            rope_theta=100000,
            tie_word_embeddings=True,
            **{"transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}}},
        ),
        "`transformers.js_config`",
    ),
    Checkpoint(
        "HuggingFaceTB/SmolLM2-1.7B-Instruct",
        _llama(2048, 24, 32, 32, 8192, 49152, 8192, rope_theta=130000, tie_word_embeddings=True),
        "tied",
    ),
    Checkpoint(
        "01-ai/Yi-1.5-9B-Chat", _llama(4096, 48, 32, 4, 11008, 64000, 4096, rope_theta=5000000.0, pad_token_id=0)
    ),
    Checkpoint(
        "tiiuae/Falcon3-7B-Instruct",
        _llama(3072, 28, 12, 4, 23040, 131072, 32768, head_dim=256, rope_theta=1000042),
        "`head_dim`",
    ),
    Checkpoint(
        "deepseek-ai/deepseek-coder-6.7b-instruct",
        _llama(
            4096, 32, 32, 32, 11008, 32256, 16384, rope_theta=100000, rope_scaling={"factor": 4.0, "type": "linear"}
        ),
        "rope `linear`",
    ),
    Checkpoint("deepseek-ai/DeepSeek-R1-Distill-Llama-8B", _llama31(), "rope `llama3`"),
    Checkpoint("NousResearch/Hermes-3-Llama-3.1-8B", _llama31(), "rope `llama3`"),
    Checkpoint(
        "unsloth/Llama-3.2-1B-Instruct",
        _llama32(2048, 16, 32, 8, 8192, 128256, 131072, head_dim=64, unsloth_fixed=True, pad_token_id=128004),
        "`unsloth_fixed`",
    ),
    Checkpoint(
        "Llama 3.1, saved by Unsloth", _llama31(unsloth_version="2025.9.1", unsloth_fixed=True), "`unsloth_version`"
    ),
    Checkpoint(
        "Llama 2, saved by transformers 4.36",
        _llama(
            *(4096, 32, 32, 32, 11008, 32000, 4096),
            _flash_attn_2_enabled=True,
            _attn_implementation="flash_attention_2",
            tokenizer_class="LlamaTokenizer",
            num_beams=1,
            early_stopping=False,
            typical_p=1.0,
            length_penalty=1.0,
        ),
        "`_flash_attn_2_enabled`, generation's keys",
    ),
    Checkpoint(
        "Llama 3.1, tuned with NEFTune and Liger kernels",
        _llama31(neftune_noise_alpha=5, use_liger_kernel=True, model_max_length=8192),
        "`neftune_noise_alpha`, `use_liger_kernel`",
    ),
    Checkpoint(
        "Llama 2 with YaRN to 65,536 tokens",
        _llama(
            *(4096, 32, 32, 32, 11008, 32000, 65536),
            rope_scaling={
                "type": "yarn",
                "factor": 16.0,
                "original_max_position_embeddings": 4096,
                "finetuned": True,
            },
        ),
        "rope `yarn`",
    ),
    Checkpoint(
        "Llama 2 with a dynamic rope",
        _llama(4096, 32, 32, 32, 11008, 32000, 4096, rope_scaling={"type": "dynamic", "factor": 2.0}),
        "rope `dynamic`",
        context=4096,
    ),
    Checkpoint(
        "Skywork/Skywork-Reward-V2-Llama-3.1-8B",
        _llama31(architecture="LlamaForSequenceClassification", pad_token_id=128009, **_ONE_CLASS),
        "one class",
    ),
    Checkpoint(
        "Skywork/Skywork-Reward-Llama-3.1-8B-v0.2",
        _llama31(architecture="LlamaForSequenceClassification", pad_token_id=128256, **_ONE_CLASS),
        "one class",
    ),
)
QWEN = (
    Checkpoint(
        "Qwen/Qwen2.5-0.5B-Instruct", _qwen25(896, 24, 14, 2, 4864, 151936, 32768, tie_word_embeddings=True), "tied"
    ),
    Checkpoint("Qwen/Qwen2.5-7B-Instruct", _qwen25(3584, 28, 28, 4, 18944, 152064, 32768)),
    Checkpoint(
        "Qwen/Qwen2.5-7B-Instruct, with its card's YaRN",
        _qwen25(3584, 28, 28, 4, 18944, 152064, 32768, rope_scaling={"type": "yarn", **_YARN}),
        "rope `yarn`",
        context=131072,
    ),
    Checkpoint(
        "Qwen/Qwen2.5-14B-Instruct-1M",
        _qwen25(
            *(5120, 48, 40, 8, 13824, 152064, 1010000),
            rope_theta=10000000.0,
            dual_chunk_attention_config={
                "chunk_size": 262144,
                "local_size": 8192,
                "original_max_position_embeddings": 262144,
            },
        ),
        "`dual_chunk_attention_config`",
        context=262144,
    ),
    Checkpoint("Qwen/Qwen2.5-72B-Instruct", _qwen25(8192, 80, 64, 8, 29568, 152064, 32768)),
    Checkpoint("Qwen/Qwen2.5-Coder-7B-Instruct", _qwen25(3584, 28, 28, 4, 18944, 152064, 32768)),
    Checkpoint("Qwen/Qwen2.5-Math-7B-Instruct", _qwen25(3584, 28, 28, 4, 18944, 152064, 4096, rope_theta=10000.0)),
    Checkpoint("Qwen/Qwen2-7B-Instruct", _qwen25(3584, 28, 28, 4, 18944, 152064, 32768, sliding_window=131072)),
    Checkpoint("Qwen/QwQ-32B", _qwen25(5120, 64, 40, 8, 27648, 152064, 40960, sliding_window=32768)),
    Checkpoint(
        "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B",
        _qwen25(3584, 28, 28, 4, 18944, 152064, 131072, rope_theta=10000, sliding_window=4096, use_mrope=False),
        "`use_mrope`",
    ),
    Checkpoint(
        "mixedbread-ai/mxbai-rerank-base-v2",
        _qwen25(896, 24, 14, 2, 4864, 151936, 32768, tie_word_embeddings=True),
        "tied",
    ),
    Checkpoint(
        "mixedbread-ai/mxbai-rerank-large-v2",
        _qwen25(1536, 28, 12, 2, 8960, 151936, 32768, tie_word_embeddings=True),
        "tied",
    ),
    Checkpoint("Qwen/Qwen3-0.6B", _qwen3(1024, 28, 16, 8, 3072, 151936, 40960, tie_word_embeddings=True), "tied"),
    Checkpoint("Qwen/Qwen3-8B", _qwen3(4096, 36, 32, 8, 12288, 151936, 40960)),
    Checkpoint(
        "Qwen/Qwen3-8B, with its card's YaRN",
        _qwen3(4096, 36, 32, 8, 12288, 151936, 40960, rope_scaling=_YARN),
        "rope `yarn`",
        context=131072,
    ),
    Checkpoint("Qwen/Qwen3-32B", _qwen3(5120, 64, 64, 8, 25600, 151936, 40960)),
    Checkpoint(
        "Qwen/Qwen3-4B-Instruct-2507",
        _qwen3(2560, 36, 32, 8, 9728, 151936, 262144, rope_theta=5000000, tie_word_embeddings=True),
        "tied",
    ),
    Checkpoint(
        "Qwen/Qwen3-Reranker-0.6B", _qwen3(1024, 28, 16, 8, 3072, 151669, 40960, tie_word_embeddings=True), "tied"
    ),
    Checkpoint("Qwen/Qwen3-Reranker-8B", _qwen3(4096, 36, 32, 8, 12288, 151669, 40960), ""),
    Checkpoint(
        "tomaarsen/Qwen3-Reranker-0.6B-seq-cls",
        _qwen3(
            *(1024, 28, 16, 8, 3072, 151669, 40960),
            architecture="Qwen3ForSequenceClassification",
            tie_word_embeddings=True,
            pad_token_id=151643,
            sentence_transformers={"activation_fn": "torch.nn.modules.activation.Sigmoid", "version": "5.0.0"},
            **_ONE_CLASS,
        ),
        "one class, `sentence_transformers`",
    ),
    Checkpoint(
        "Qwen3-Reranker as classifier, with vLLM's keys",
        _qwen3(
            *(1024, 28, 16, 8, 3072, 151669, 40960),
            architecture="Qwen3ForSequenceClassification",
            classifier_from_token=["no", "yes"],
            is_original_qwen3_reranker=True,
            method="no_post_processing",
            pad_token_id=151643,
            **_ONE_CLASS,
        ),
        "one class, `classifier_from_token`, `method`",
    ),
    Checkpoint("zeroentropy/zerank-1", _qwen3(2560, 36, 32, 8, 9728, 151936, 40960, tie_word_embeddings=True), "tied"),
    Checkpoint(
        "Skywork/Skywork-Reward-V2-Qwen3-8B",
        _qwen3(
            *(4096, 36, 32, 8, 12288, 151936, 40960),
            architecture="Qwen3ForSequenceClassification",
            pad_token_id=151643,
            **_ONE_CLASS,
        ),
        "one class",
    ),
    Checkpoint(
        "deepseek-ai/DeepSeek-R1-0528-Qwen3-8B",
        _qwen3(4096, 36, 32, 8, 12288, 151936, 131072, rope_scaling={**_YARN, "attn_factor": 0.8782488562869419}),
        "rope `yarn`",
        refused="attn_factor",
    ),
    Checkpoint("Qwen/Qwen3-30B-A3B", _qwen3_moe(2048, 48, 32, 4, 6144, 151936, 40960), "experts"),
    Checkpoint(
        "Qwen/Qwen3-30B-A3B-Instruct-2507",
        _qwen3_moe(2048, 48, 32, 4, 6144, 151936, 262144, rope_theta=10000000),
        "experts",
    ),
    Checkpoint(
        "Qwen 3 MoE with dense layers",
        _qwen3_moe(2048, 48, 32, 4, 6144, 151936, 40960, mlp_only_layers=[0]),
        "`mlp_only_layers`",
        refused="mlp_only_layers",
    ),
    Checkpoint(
        "Alibaba-NLP/gte-Qwen2-7B-instruct",
        _qwen25(
            *(3584, 28, 28, 4, 18944, 151646, 131072),
            auto_map={"AutoModelForCausalLM": "modeling_qwen.Qwen2ForCausalLM"},
            is_causal=False,
        ),
        "`auto_map`, `is_causal` false",
        refused="is_causal",
    ),
)
OTHERS = (
    Checkpoint(
        "mistralai/Mistral-7B-v0.1",
        _mistral(4096, 32, 32, 8, 14336, 32000, 32768, rope_theta=10000.0, sliding_window=4096),
        "window",
    ),
    Checkpoint(
        "mistralai/Mistral-7B-Instruct-v0.3",
        _mistral(4096, 32, 32, 8, 14336, 32768, 32768, rope_theta=1000000.0, sliding_window=None),
    ),
    Checkpoint(
        "mistralai/Mistral-Nemo-Instruct-2407",
        _mistral(5120, 40, 32, 8, 14336, 131072, 131072, rope_theta=1000000.0, head_dim=128, sliding_window=None),
        "`head_dim`",
    ),
    Checkpoint(
        "mistralai/Ministral-8B-Instruct-2410",
        _mistral(4096, 36, 32, 8, 12288, 131072, 32768, rope_theta=100000000.0, head_dim=128, sliding_window=32768),
        "window",
    ),
    Checkpoint(
        "mistralai/Mistral-Small-24B-Instruct-2501",
        _mistral(5120, 40, 32, 8, 32768, 131072, 32768, rope_theta=100000000.0, head_dim=128, sliding_window=None),
        "`head_dim`",
    ),
    Checkpoint(
        "HuggingFaceH4/zephyr-7b-beta",
        _mistral(4096, 32, 32, 8, 14336, 32000, 32768, rope_theta=10000.0, sliding_window=4096, pad_token_id=2),
        "window",
    ),
    Checkpoint(
        "prometheus-eval/prometheus-7b-v2.0",
        _mistral(4096, 32, 32, 8, 14336, 32000, 32768, rope_theta=1000000.0, sliding_window=None, attention_bias=False),
        "`attention_bias` false",
    ),
    Checkpoint("google/gemma-2b-it", _gemma(2048, 18, 8, 1, 16384, 256000, 8192), "`hidden_act` `gelu`"),
    Checkpoint("google/gemma-7b-it", _gemma(3072, 28, 16, 16, 24576, 256000, 8192), "`hidden_act` `gelu`"),
    Checkpoint("BAAI/bge-reranker-v2-gemma", _gemma(2048, 18, 8, 1, 16384, 256000, 8192), "`hidden_act` `gelu`"),
    Checkpoint("google/gemma-2-2b-it", _gemma2(2304, 26, 8, 4, 9216, 256000, 8192, query_pre_attn_scalar=256)),
    Checkpoint(
        "google/gemma-2-27b-it",
        _gemma2(4608, 46, 32, 16, 36864, 256000, 8192, head_dim=128, query_pre_attn_scalar=144),
        "`query_pre_attn_scalar`",
    ),
    Checkpoint("google/shieldgemma-2b", _gemma2(2304, 26, 8, 4, 9216, 256000, 8192)),
    Checkpoint("google/gemma-3-1b-it", _gemma3(1152, 26, 4, 1, 6912, 262144, 32768, sliding_window_pattern=6)),
    Checkpoint(
        "google/gemma-3-270m-it",
        _gemma3(
            *(640, 18, 4, 1, 2048, 262144, 32768),
            _sliding_window_pattern=6,
            use_bidirectional_attention=False,
            layer_types=["full_attention" if (layer + 1) % 6 == 0 else "sliding_attention" for layer in range(18)],
        ),
        "`layer_types`",
    ),
    Checkpoint(
        "microsoft/Phi-3-mini-4k-instruct",
        _phi3(
            *(3072, 32, 32, 32, 8192, 32064, 4096),
            sliding_window=2047,
            auto_map={"AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"},
        ),
        "window",
    ),
    Checkpoint(
        "microsoft/Phi-3.5-mini-instruct",
        _phi3(3072, 32, 32, 32, 8192, 32064, 131072, sliding_window=262144, rope_scaling=_longrope(48)),
        "rope `longrope`",
    ),
    Checkpoint("microsoft/phi-4", _phi3(5120, 40, 40, 10, 17920, 100352, 16384, rope_theta=250000)),
    Checkpoint(
        "microsoft/Phi-4-mini-instruct",
        _phi3(
            *(3072, 32, 24, 8, 8192, 200064, 131072),
            partial_rotary_factor=0.75,
            full_attn_mod=1,
            interpolate_factor=1,
            lm_head_bias=False,
            mlp_bias=False,
            attention_bias=False,
            sliding_window=262144,
            tie_word_embeddings=True,
            rope_scaling=_longrope(48),
        ),
        "rope `longrope`, `partial_rotary_factor`",
    ),
    Checkpoint("allenai/OLMo-2-0425-1B-Instruct", _olmo2(2048, 16, 16, 16, 8192, 100352, 4096)),
    Checkpoint("allenai/OLMo-2-1124-7B-Instruct", _olmo2(4096, 32, 32, 32, 11008, 100352, 4096)),
    *(
        Checkpoint(name, _foreign(model_type, architecture), refused=architecture)
        for name, model_type, architecture in (
            ("meta-llama/Llama-Prompt-Guard-2-86M", "deberta-v2", "DebertaV2ForSequenceClassification"),
            ("HuggingFaceTB/SmolLM3-3B", "smollm3", "SmolLM3ForCausalLM"),
            ("allenai/Olmo-3-7B-Instruct", "olmo3", "Olmo3ForCausalLM"),
            ("ibm-granite/granite-3.3-8b-instruct", "granite", "GraniteForCausalLM"),
            ("mistralai/Mixtral-8x7B-Instruct-v0.1", "mixtral", "MixtralForCausalLM"),
            ("openai/gpt-oss-20b", "gpt_oss", "GptOssForCausalLM"),
            ("Qwen/Qwen3-Next-80B-A3B-Instruct", "qwen3_next", "Qwen3NextForCausalLM"),
            ("Qwen/Qwen2.5-Math-PRM-7B", "qwen2", "Qwen2ForProcessRewardModel"),
            ("Qwen/Qwen2.5-Math-RM-72B", "qwen2", "Qwen2ForRewardModel"),
        )
    ),
)


def _quantised(name: str, config: Config, what: str) -> Checkpoint:
    own = {**config, "quantization_config": PUBLIC[name]}
    return Checkpoint(name, own, what, compared="tests/parity/test_quantised_models.py")


QUANTISED = (
    _quantised("Qwen/Qwen3-8B-FP8", _qwen3(4096, 36, 32, 8, 12288, 151936, 40960), "FP8, blocks"),
    _quantised(
        "RedHatAI/Qwen3-8B-FP8-dynamic", _qwen3(4096, 36, 32, 8, 12288, 151936, 40960), "FP8, compressed-tensors"
    ),
    _quantised(
        "neuralmagic/Meta-Llama-3-8B-Instruct-FP8-KV",
        _llama(4096, 32, 32, 8, 14336, 128256, 8192, rope_theta=500000.0, rope_scaling=None),
        "FP8, tensors",
    ),
    _quantised(
        "meta-llama/Llama-3.1-405B-Instruct-FP8",
        _llama31(16384, 126, 128, 8, 53248, 128256, 131072),
        "FP8, `fbgemm_fp8`",
    ),
    _quantised("Qwen/Qwen2.5-7B-Instruct-AWQ", _qwen25(3584, 28, 28, 4, 18944, 152064, 32768), "AWQ"),
    _quantised("hugging-quants/Meta-Llama-3.1-8B-Instruct-AWQ-INT4", _llama31(), "AWQ"),
    _quantised("Qwen/Qwen2.5-7B-Instruct-GPTQ-Int4", _qwen25(3584, 28, 28, 4, 18944, 152064, 32768), "GPTQ"),
    _quantised(
        "TheBloke/Llama-2-7B-Chat-GPTQ",
        _llama(4096, 32, 32, 32, 11008, 32000, 4096, rope_scaling=None),
        "GPTQ, act-order",
    ),
    _quantised(
        "unsloth/Llama-3.2-1B-Instruct-bnb-4bit",
        _llama32(2048, 16, 32, 8, 8192, 128256, 131072, head_dim=64, unsloth_fixed=True),
        "bitsandbytes, nf4",
    ),
    Checkpoint(
        "ISTA-DASLab/Meta-Llama-3.1-8B-Instruct-AQLM-PV-2Bit-1x16-hf",
        _llama31(quantization_config={"quant_method": "aqlm", "nbits_per_codebook": 16}),
        "AQLM",
        refused="aqlm",
    ),
)


def _of_images(model_type: str, architecture: str, text: Config, **keys: Any) -> dict[str, Any]:
    """A model for images: ``text`` is its ``text_config``."""
    beside = {key: value for key, value in text.items() if key not in ("architectures", "tie_word_embeddings")}
    return {
        "architectures": [architecture],
        "model_type": model_type,
        "text_config": beside,
        "vision_config": {},
        **keys,
    }


_WRAPPERS = "tests/parity/test_wrapped_models.py"
_GEMMA3_IMAGES = {"boi_token_index": 255999, "eoi_token_index": 256000, "image_token_index": 262144}
WRAPPERS = (
    Checkpoint(
        "google/gemma-3-4b-it",
        _of_images(
            "gemma3",
            "Gemma3ForConditionalGeneration",
            {
                "hidden_size": 2560,
                "intermediate_size": 10240,
                "model_type": "gemma3_text",
                "num_hidden_layers": 34,
                "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
                "sliding_window": 1024,
            },
            mm_tokens_per_image=256,
            **_GEMMA3_IMAGES,
        ),
        "text part",
        context=131072,
        compared=_WRAPPERS,
    ),
    Checkpoint(
        "mistralai/Mistral-Small-3.1-24B-Instruct-2503",
        _of_images(
            "mistral3",
            "Mistral3ForConditionalGeneration",
            _mistral(
                5120, 40, 32, 8, 32768, 131072, 131072, head_dim=128, rope_theta=1000000000.0, sliding_window=None
            ),
            image_token_index=10,
            multimodal_projector_bias=False,
            projector_hidden_act="gelu",
            spatial_merge_size=2,
            vision_feature_layer=-1,
        ),
        "text part",
        context=131072,
        compared=_WRAPPERS,
    ),
    Checkpoint(
        "weqweasdas/RM-Mistral-7B",
        {
            **_mistral(4096, 32, 32, 8, 14336, 32000, 32768, sliding_window=4096, pad_token_id=2),
            "architectures": ["MistralForSequenceClassification"],
            **_ONE_CLASS,
        },
        "one class",
        compared="tests/parity/test_classifiers.py",
    ),
)


def _hybrid(*, architecture: str, model_type: str, layers: int, tied: bool, **text: Any) -> dict[str, Any]:
    """A Qwen 3.5 or 3.6, which is published as a model for images."""
    kinds = ["full_attention" if (layer + 1) % 4 == 0 else "linear_attention" for layer in range(layers)]
    rope = {"mrope_interleaved": True, "mrope_section": [11, 11, 10], "rope_type": "default"}
    common = {
        "attention_bias": False,
        "attn_output_gate": True,
        "full_attention_interval": 4,
        "head_dim": 256,
        "hidden_act": "silu",
        "layer_types": kinds,
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 128,
        "linear_num_key_heads": 16,
        "linear_value_head_dim": 128,
        "mamba_ssm_dtype": "float32",
        "max_position_embeddings": 262144,
        "mtp_num_hidden_layers": 1,
        "num_hidden_layers": layers,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {**rope, "rope_theta": 10000000, "partial_rotary_factor": 0.25},
        "vocab_size": 248320,
    }
    ids = {"image_token_id": 248056, "video_token_id": 248057, "vision_start_token_id": 248053}
    own = {**common, **text, "model_type": f"{model_type}_text"}
    more = {**ids, "vision_end_token_id": 248054, "tie_word_embeddings": tied}
    return _of_images(model_type, architecture, own, **more)


def _qwen35(width: int, layers: int, heads: tuple[int, int], value_heads: int, ff: int, *, tied: bool) -> Config:
    return _hybrid(
        architecture="Qwen3_5ForConditionalGeneration",
        model_type="qwen3_5",
        layers=layers,
        tied=tied,
        hidden_size=width,
        num_attention_heads=heads[0],
        num_key_value_heads=heads[1],
        linear_num_value_heads=value_heads,
        intermediate_size=ff,
    )


HYBRIDS = (
    Checkpoint(
        "Qwen/Qwen3.5-0.8B",
        _qwen35(1024, 24, (8, 2), 16, 3584, tied=True),
        "gated DeltaNet, text part, tied",
        compared=_WRAPPERS,
    ),
    Checkpoint(
        "Qwen/Qwen3.5-4B",
        _qwen35(2560, 32, (16, 4), 32, 9216, tied=True),
        "gated DeltaNet, text part, tied",
        compared=_WRAPPERS,
    ),
    Checkpoint(
        "Qwen/Qwen3.5-9B",
        _qwen35(4096, 32, (16, 4), 32, 12288, tied=False),
        "gated DeltaNet, text part",
        compared=_WRAPPERS,
    ),
    Checkpoint(
        "Qwen/Qwen3.5-27B",
        _qwen35(5120, 64, (24, 4), 48, 17408, tied=False),
        "gated DeltaNet, text part",
        compared=_WRAPPERS,
    ),
    Checkpoint(
        "Qwen/Qwen3.6-35B-A3B",
        _hybrid(
            architecture="Qwen3_5MoeForConditionalGeneration",
            model_type="qwen3_5_moe",
            layers=40,
            tied=False,
            hidden_size=2048,
            num_attention_heads=16,
            num_key_value_heads=2,
            linear_num_value_heads=32,
            moe_intermediate_size=512,
            shared_expert_intermediate_size=512,
            num_experts=256,
            num_experts_per_tok=8,
            output_router_logits=False,
            router_aux_loss_coef=0.001,
        ),
        "gated DeltaNet, experts, text part",
        compared=_WRAPPERS,
    ),
)


def _encoder(model_type: str, architecture: str, sizes: tuple[int, ...], **keys: Any) -> dict[str, Any]:
    """An encoder's ``config.json``; sizes as in ``_config``, without key/value heads."""
    width, layers, heads, ff, vocab, context = sizes
    found = _config(model_type, architecture, (width, layers, heads, heads, ff, vocab, context), **keys)
    del found["num_key_value_heads"]
    return {**found, **_ONE_CLASS}


def _bert(*sizes: int, architecture: str = "BertForSequenceClassification", **keys: Any) -> dict[str, Any]:
    base = {
        "attention_probs_dropout_prob": 0.1,
        "classifier_dropout": None,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1,
        "position_embedding_type": "absolute",
    }
    kinds = {"BertForSequenceClassification": "bert", "XLMRobertaForSequenceClassification": "xlm-roberta"}
    return _encoder(kinds[architecture], architecture, sizes, **{**base, **keys})


def _xlm_roberta(*sizes: int) -> dict[str, Any]:
    own: dict[str, Any] = {"layer_norm_eps": 1e-5, "output_past": True, "type_vocab_size": 1, "pad_token_id": 1}
    return _bert(*sizes, architecture="XLMRobertaForSequenceClassification", **own)


def _modernbert(*sizes: int) -> dict[str, Any]:
    return _encoder(
        "modernbert",
        "ModernBertForSequenceClassification",
        sizes,
        attention_bias=False,
        attention_dropout=0.0,
        classifier_activation="gelu",
        classifier_bias=False,
        classifier_dropout=0.0,
        classifier_pooling="mean",
        cls_token_id=50281,
        decoder_bias=True,
        deterministic_flash_attn=False,
        embedding_dropout=0.0,
        global_attn_every_n_layers=3,
        global_rope_theta=160000.0,
        gradient_checkpointing=False,
        hidden_activation="gelu",
        initializer_cutoff_factor=2.0,
        layer_norm_eps=1e-5,
        local_attention=128,
        local_rope_theta=10000.0,
        mlp_bias=False,
        mlp_dropout=0.0,
        norm_bias=False,
        norm_eps=1e-5,
        pad_token_id=50283,
        position_embedding_type="absolute",
    )


_ENCODERS = "tests/parity/test_encoders.py"
ENCODERS = (
    Checkpoint(
        "cross-encoder/ms-marco-MiniLM-L6-v2",
        _bert(
            *(384, 6, 12, 1536, 30522, 512),
            layer_norm_eps=1e-12,
            type_vocab_size=2,
            sbert_ce_default_activation_function="torch.nn.modules.linear.Identity",
        ),
        "BERT, one class",
        compared=_ENCODERS,
    ),
    Checkpoint(
        "BAAI/bge-reranker-base",
        _xlm_roberta(768, 12, 12, 3072, 250002, 514),
        "XLM-RoBERTa, one class",
        context=512,
        compared=_ENCODERS,
    ),
    Checkpoint(
        "BAAI/bge-reranker-large",
        _xlm_roberta(1024, 24, 16, 4096, 250002, 514),
        "XLM-RoBERTa, one class",
        context=512,
        compared=_ENCODERS,
    ),
    Checkpoint(
        "BAAI/bge-reranker-v2-m3",
        _xlm_roberta(1024, 24, 16, 4096, 250002, 8194),
        "XLM-RoBERTa, one class",
        context=8192,
        compared=_ENCODERS,
    ),
    Checkpoint(
        "Alibaba-NLP/gte-reranker-modernbert-base",
        _modernbert(768, 22, 12, 1152, 50368, 8192),
        "ModernBERT, one class",
        compared=_ENCODERS,
    ),
    Checkpoint(
        "MoritzLaurer/ModernBERT-large-zeroshot-v2.0",
        {**_modernbert(1024, 28, 16, 2624, 50368, 8192), "id2label": {"0": "entailment", "1": "not_entailment"}},
        "ModernBERT, two classes",
        compared=_ENCODERS,
    ),
)
CHECKPOINTS = (*LLAMA, *QWEN, *OTHERS, *QUANTISED, *WRAPPERS, *HYBRIDS, *ENCODERS)

HEADER = "| checkpoint | what sets it apart | loads |\n| --- | --- | --- |"


def table() -> str:
    """The table of ``docs/families.md``."""
    return "\n".join([HEADER, *(checkpoint.row for checkpoint in CHECKPOINTS)])
