"""Mistral: Llama's layer, where all layers may have a sliding window.

Source: transformers' ``modeling_mistral``.
"""

from model.config import ModelConfig, common_config, with_window
from model.families.llama import Block as Block
from model.families.llama import weights as weights
from model.fields import IGNORED, NEUTRAL, Fields


def parse(fields: Fields) -> ModelConfig:
    config = common_config(fields, kv_heads=8)
    window = fields.integer_or_none("sliding_window", absent=4096)
    config = with_window(config, fields, window, [True] * config.layers)
    fields.refuse_rest(ignored=IGNORED, neutral=NEUTRAL)
    return config
