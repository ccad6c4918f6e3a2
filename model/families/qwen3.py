"""Qwen 3, its embedders and rerankers too: Llama's layer, with a norm of each head's queries and keys.

Source: transformers' ``modeling_qwen3``.
"""

from model.config import ModelConfig, common_config
from model.families.llama import Block as Block
from model.families.llama import weights as weights
from model.families.qwen2 import with_qwen_window
from model.fields import IGNORED, NEUTRAL, Fields


def parse(fields: Fields) -> ModelConfig:
    bias = fields.flag("attention_bias", False)
    config = common_config(fields, kv_heads=32, head_width=128, attention_bias=bias, output_bias=bias, qk_norm="head")
    config = with_qwen_window(config, fields)
    fields.refuse_rest(ignored=IGNORED, neutral=NEUTRAL)
    return config
