"""Qwen 2 and 2.5: Llama's layer with biases on q, k and v.

Source: transformers' ``modeling_qwen2``.
"""

from dataclasses import replace

from model.config import ModelConfig, common_config, with_window
from model.families.llama import Block as Block
from model.families.llama import weights as weights
from model.fields import IGNORED, NEUTRAL, Fields


def parse(fields: Fields) -> ModelConfig:
    config = with_qwen_window(common_config(fields, kv_heads=32, attention_bias=True), fields)
    fields.refuse_rest(ignored=IGNORED, neutral=NEUTRAL)
    return config


def with_qwen_window(config: ModelConfig, fields: Fields) -> ModelConfig:
    """``use_sliding_window`` switches it on, from layer ``max_window_layers`` on."""
    config = within_chunk(config, fields)
    window = fields.integer_or_none("sliding_window", absent=4096)
    first = fields.count("max_window_layers", 28)
    if not fields.flag("use_sliding_window", False):
        window = None
    return with_window(config, fields, window, [layer >= first for layer in range(config.layers)])


def within_chunk(config: ModelConfig, fields: Fields) -> ModelConfig:
    """``config`` with no longer context than dual chunk attention leaves as it is.

    Qwen2.5-1M's: positions start anew with every chunk, so that attention within the first is the ordinary one.
    transformers does not have it; vLLM does, in ``DualChunkRotaryEmbedding``.
    """
    if "dual_chunk_attention_config" not in fields:
        return config
    group = fields.group("dual_chunk_attention_config")
    chunk = group.integer("chunk_size")
    bound = min(config.context_length, chunk, group.integer("original_max_position_embeddings", chunk))
    group.integer("local_size", 1)
    group.refuse_rest()
    fields.notes.append(
        f"the longest prompt has {bound} tokens: beyond them the model needs dual chunk attention, which is not "
        "implemented"
    )
    return replace(config, context_length=bound)
