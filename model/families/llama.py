"""Llama (2, 3.x) and its look-alikes such as SmolLM: grouped-query attention, rotary positions, gated MLP.

Source: transformers' ``modeling_llama``; the parity tests compare with its float32 forward pass.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float

from model import decoder
from model.checkpoint import Targets
from model.config import ModelConfig, common_config, with_window
from model.fields import IGNORED, NEUTRAL, Fields
from model.lora import Rows


def parse(fields: Fields) -> ModelConfig:
    attention_bias = fields.flag("attention_bias", False)
    config = common_config(
        fields,
        attention_bias=attention_bias,
        output_bias=attention_bias,
        mlp_bias=fields.flag("mlp_bias", False),
    )
    config = with_window(config, fields, None, [])
    fields.refuse_rest(ignored=IGNORED, neutral=NEUTRAL)
    return config


class Block(decoder.Block):
    """One layer: a norm before attention and one before the MLP."""

    def __init__(self, config: ModelConfig, *, dtype: jnp.dtype, implementation: str) -> None:
        super().__init__(config, dtype=dtype, implementation=implementation)
        self.attention_norm = decoder.norm(config, config.width, dtype)
        self.mlp_norm = decoder.norm(config, config.width, dtype)
        self.mlp = self.feed_forward(config, dtype)

    def feed_forward(self, config: ModelConfig, dtype: jnp.dtype) -> Callable[[Array, Rows | None], Array]:
        """The layer's last part, for a family to overwrite that has another than a gated MLP."""
        return decoder.gated_mlp(config, dtype)

    def pre_attention(self, x: Float[Array, "M D"]) -> Float[Array, "M D"]:
        return self.attention_norm(x)

    def post_attention(
        self, x: Float[Array, "Q D"], attended: Float[Array, "Q D"], rows: Rows | None
    ) -> Float[Array, "Q D"]:
        x = x + attended
        return x + self.mlp(self.mlp_norm(x), rows)


NORMS = {"input_layernorm": "attention_norm", "post_attention_layernorm": "mlp_norm"}


def weights(config: ModelConfig) -> Targets:
    return decoder.table(config, {**decoder.attention_linears(config), **decoder.mlp_linears(config)}, NORMS)
