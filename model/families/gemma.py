"""Gemma, the first: Llama's layer with Gemma's norms, embedding and activation.

Source: transformers' ``modeling_gemma``.
"""

from model.config import ModelConfig, common_config, with_window
from model.families.llama import Block as Block
from model.families.llama import weights as weights
from model.fields import IGNORED, NEUTRAL, Fields


def parse(fields: Fields) -> ModelConfig:
    bias = fields.flag("attention_bias", False)
    # The first releases say "gelu" and mean its approximation, which is how transformers reads it.
    legacy = fields.text("hidden_act", "gelu_pytorch_tanh") == "gelu"
    config = common_config(
        fields,
        kv_heads=16,
        head_width=256,
        tied_head=True,
        activation_key="hidden_activation" if legacy else "hidden_act",
        activation="gelu_pytorch_tanh",
        attention_bias=bias,
        output_bias=bias,
        norm_offset=1.0,
        embedding_scale=fields.integer("hidden_size") ** 0.5,
    )
    config = with_window(config, fields, None, [])
    fields.refuse_rest(ignored=IGNORED | {"hidden_activation"}, neutral=NEUTRAL)
    return config
