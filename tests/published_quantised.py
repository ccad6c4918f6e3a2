"""What published checkpoints with quantised weights say of themselves."""

from collections.abc import Mapping
from typing import Any

OPTIMUM = (
    "block_name_to_quantize", "dataset", "max_input_length", "model_seqlen", "module_name_preceding_first_block",
    "modules_in_block_to_quantize", "pad_token_id", "tokenizer",
)  # fmt: skip
WEIGHTS = {
    "actorder": None, "block_structure": None, "dynamic": False, "group_size": None, "num_bits": 8,
    "observer": "minmax", "observer_kwargs": {}, "strategy": "channel", "symmetric": True, "type": "float",
}  # fmt: skip
RED_HAT = {
    "config_groups": {
        "group_0": {
            "input_activations": {**WEIGHTS, "dynamic": True, "strategy": "token", "observer": None},
            "output_activations": None,
            "targets": ["Linear"],
            "weights": WEIGHTS,
        }
    },
    "format": "float-quantized",
    "global_compression_ratio": 1.4,
    "ignore": ["lm_head"],
    "kv_cache_scheme": None,
    "quant_method": "compressed-tensors",
    "quantization_status": "compressed",
}
PUBLIC: Mapping[str, dict[str, Any]] = {
    "Qwen/Qwen3-8B-FP8": {
        "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128],
        "modules_to_not_convert": ["lm_head"],
    },
    "deepseek-ai/DeepSeek-V3.1": {
        "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "scale_fmt": "ue8m0",
        "weight_block_size": [128, 128],
    },
    "neuralmagic/Meta-Llama-3-8B-Instruct-FP8-KV": {
        "activation_scheme": "static", "ignored_layers": ["lm_head"], "quant_method": "fp8",
        "kv_cache_scheme": "static",
    },
    "meta-llama/Llama-3.1-405B-Instruct-FP8": {
        "activation_scale_ub": 1200.0, "modules_to_not_convert": ["model.layers.0.mlp.down_proj"],
        "quant_method": "fbgemm_fp8",
    },
    "Qwen/Qwen2.5-7B-Instruct-AWQ": {
        "bits": 4, "group_size": 128, "modules_to_not_convert": None, "quant_method": "awq", "version": "gemm",
        "zero_point": True,
    },
    "hugging-quants/Meta-Llama-3.1-8B-Instruct-AWQ-INT4": {
        "backend": "autoawq", "bits": 4, "do_fuse": False, "exllama_config": None, "fuse_max_seq_len": None,
        "group_size": 128, "modules_to_fuse": None, "modules_to_not_convert": None, "quant_method": "awq",
        "version": "gemm", "zero_point": True,
    },
    "Qwen/Qwen2.5-7B-Instruct-GPTQ-Int4": {
        "batch_size": 1, "bits": 4, "cache_block_outputs": True, "damp_percent": 0.01, "desc_act": False,
        "exllama_config": {"version": 1}, "group_size": 128, "quant_method": "gptq", "sym": True,
        "true_sequential": True, "use_cuda_fp16": False, "use_exllama": True, **dict.fromkeys(OPTIMUM),
    },
    "TheBloke/Llama-2-7B-Chat-GPTQ": {
        "bits": 4, "damp_percent": 0.01, "desc_act": True, "group_size": 128, "model_file_base_name": "model",
        "model_name_or_path": None, "quant_method": "gptq", "static_groups": False, "sym": True,
        "true_sequential": True,
    },
    "ModelCloud/Llama-3.2-1B-Instruct-gptqmodel-4bit-vortex-v1": {
        "bits": 4, "checkpoint_format": "gptq", "desc_act": True, "dynamic": None, "group_size": 32, "lm_head": False,
        "meta": {"quantizer": ["gptqmodel:1.1.0"]}, "quant_method": "gptq", "sym": True,
    },
    "RedHatAI/Qwen3-8B-FP8-dynamic": RED_HAT,
    "unsloth/Llama-3.2-1B-Instruct-bnb-4bit": {
        "_load_in_4bit": True, "_load_in_8bit": False, "bnb_4bit_compute_dtype": "bfloat16",
        "bnb_4bit_quant_storage": "uint8", "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True,
        "llm_int8_enable_fp32_cpu_offload": False, "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": ["lm_head"], "llm_int8_threshold": 6.0, "load_in_4bit": True, "load_in_8bit": False,
        "quant_method": "bitsandbytes",
    },
    "bitsandbytes before it wrote a method": {"load_in_8bit": True, "llm_int8_threshold": 6.0},
}  # fmt: skip
"""``quantization_config`` as well-known checkpoints have it."""
