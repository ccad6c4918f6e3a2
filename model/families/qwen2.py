"""Qwen 2 and 2.5: Llama's layer with biases on q, k and v.

Source: transformers' ``modeling_qwen2``.
"""

from model.config import ModelConfig, common_config, with_window
from model.families.llama import Block as Block
from model.families.llama import weights as weights
from model.fields import IGNORED, NEUTRAL, Fields


def parse(fields: Fields) -> ModelConfig:
    config = with_qwen_window(common_config(fields, kv_heads=32, attention_bias=True), fields)
    fields.refuse_rest(ignored=IGNORED, neutral={**NEUTRAL, "use_mrope": False})
    return config


def with_qwen_window(config: ModelConfig, fields: Fields) -> ModelConfig:
    """``use_sliding_window`` switches it on, from layer ``max_window_layers`` on."""
    window = fields.integer_or_none("sliding_window", absent=4096)
    first = fields.count("max_window_layers", 28)
    if not fields.flag("use_sliding_window", False):
        window = None
    return with_window(config, fields, window, [layer >= first for layer in range(config.layers)])
