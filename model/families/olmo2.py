"""OLMo 2: norms after attention and MLP alone, and a norm over all heads' queries, and keys, as one vector.

Source: transformers' ``modeling_olmo2``.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from model import decoder
from model.checkpoint import Targets
from model.config import ModelConfig, common_config, with_window
from model.fields import IGNORED, NEUTRAL, Fields
from model.lora import Rows


def parse(fields: Fields) -> ModelConfig:
    bias = fields.flag("attention_bias", False)
    config = common_config(fields, norm_eps=1e-5, attention_bias=bias, output_bias=bias, qk_norm="projection")
    config = with_window(config, fields, None, [])
    fields.refuse_rest(ignored=IGNORED, neutral=NEUTRAL)
    return config


class Block(decoder.Block):
    """One layer: what is added to the residual stream is normed, not what is taken from it."""

    def __init__(self, config: ModelConfig, *, dtype: jnp.dtype, implementation: str) -> None:
        super().__init__(config, dtype=dtype, implementation=implementation)
        self.attention_norm = decoder.norm(config, config.width, dtype)
        self.mlp_norm = decoder.norm(config, config.width, dtype)
        self.mlp = decoder.gated_mlp(config, dtype)

    def pre_attention(self, x: Float[Array, "M D"]) -> Float[Array, "M D"]:
        return x

    def post_attention(
        self, x: Float[Array, "Q D"], attended: Float[Array, "Q D"], rows: Rows | None
    ) -> Float[Array, "Q D"]:
        x = x + self.attention_norm(attended)
        return x + self.mlp_norm(self.mlp(x, rows))


NORMS = {"post_attention_layernorm": "attention_norm", "post_feedforward_layernorm": "mlp_norm"}


def weights(config: ModelConfig) -> Targets:
    return decoder.table(config, {**decoder.attention_linears(config), **decoder.mlp_linears(config)}, NORMS)
