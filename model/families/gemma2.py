"""Gemma 2: norms before and after attention and MLP, soft caps on scores and logits, every other layer sliding.

The norms store their scales less 1, the embedding is scaled by the square root of its width, and the scores by
``query_pre_attn_scalar`` in place of the head width. Source: transformers' ``modeling_gemma2``.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from model import decoder
from model.checkpoint import Targets
from model.config import ModelConfig, common_config, with_window
from model.fields import IGNORED, NEUTRAL, Fields
from model.lora import Rows


def parse(fields: Fields) -> ModelConfig:
    config = common_config(
        fields,
        kv_heads=4,
        attention_softcap=fields.number_or_none("attn_logit_softcapping", absent=50.0),
        logit_softcap=fields.number_or_none("final_logit_softcapping", absent=30.0),
        **constants(fields),
    )
    window = fields.integer_or_none("sliding_window", absent=4096)
    config = with_window(config, fields, window, [layer % 2 == 0 for layer in range(config.layers)])
    fields.refuse_rest(ignored=IGNORED | NOTES, neutral=NEUTRAL)
    return config


NOTES = {"hidden_act"}
"""Keys of published configs that transformers does not read: the activation is ``hidden_activation``."""


def constants(fields: Fields) -> dict[str, Any]:
    """What Gemma 2 and 3 have in common; for ``config.common_config``."""
    bias = fields.flag("attention_bias", False)
    return {
        "head_width": 256,
        "tied_head": True,
        "activation_key": "hidden_activation",
        "activation": "gelu_pytorch_tanh",
        "attention_bias": bias,
        "output_bias": bias,
        "attention_scale": fields.number("query_pre_attn_scalar", 256.0) ** -0.5,
        "norm_offset": 1.0,
        "embedding_scale": fields.integer("hidden_size") ** 0.5,
    }


class Block(decoder.Block):
    """One layer: four norms."""

    def __init__(self, config: ModelConfig, *, dtype: jnp.dtype, implementation: str) -> None:
        super().__init__(config, dtype=dtype, implementation=implementation)
        self.before_attention = decoder.norm(config, config.width, dtype)
        self.after_attention = decoder.norm(config, config.width, dtype)
        self.before_mlp = decoder.norm(config, config.width, dtype)
        self.after_mlp = decoder.norm(config, config.width, dtype)
        self.mlp = decoder.gated_mlp(config, dtype)

    def pre_attention(self, x: Float[Array, "M D"]) -> Float[Array, "M D"]:
        return self.before_attention(x)

    def post_attention(
        self, x: Float[Array, "Q D"], attended: Float[Array, "Q D"], rows: Rows | None
    ) -> Float[Array, "Q D"]:
        x = x + self.after_attention(attended)
        return x + self.after_mlp(self.mlp(self.before_mlp(x), rows))


NORMS = {
    "input_layernorm": "before_attention",
    "post_attention_layernorm": "after_attention",
    "pre_feedforward_layernorm": "before_mlp",
    "post_feedforward_layernorm": "after_mlp",
}


def weights(config: ModelConfig) -> Targets:
    return decoder.table(config, {**decoder.attention_linears(config), **decoder.mlp_linears(config)}, NORMS)
