"""Qwen 3.5 and 3.6 with a mixture of experts in every layer, and beside it one expert that all tokens go through.

Source: transformers' ``modeling_qwen3_5_moe``.
"""

from collections.abc import Callable
from dataclasses import replace

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from model import decoder
from model.checkpoint import Target, Targets
from model.config import ModelConfig
from model.families import qwen3_5, qwen3_moe
from model.fields import Fields
from model.layers import row_dots
from model.lora import Rows


def parse(fields: Fields) -> ModelConfig:
    config = qwen3_5.hybrid(
        fields,
        ff_key="moe_intermediate_size",
        ff_width=512,
        experts=fields.integer("num_experts", 256),
        experts_per_token=fields.integer("num_experts_per_tok", 8),
        norm_expert_weights=True,
        shared_ff_width=fields.integer("shared_expert_intermediate_size", 512),
        ignored={"intermediate_size"},  # of dense layers, of which there are none
        neutral={"norm_topk_prob": True, "decoder_sparse_step": 1},
    )
    qwen3_moe.check_experts(config)
    return config


class Experts(nnx.Module):
    """The mixture, and the expert of all tokens, whose result each token multiplies by a gate of its own."""

    def __init__(self, config: ModelConfig, dtype: jnp.dtype) -> None:
        self.native = config.native
        self.mixture = qwen3_moe.Experts(config, dtype=dtype)
        self.shared = decoder.gated_mlp(replace(config, ff_width=config.shared_ff_width), dtype)
        self.gate = nnx.Param(jnp.zeros((1, config.width), dtype), axes=(None, "embed"))

    def __call__(self, x: Float[Array, "M D"], rows: Rows | None = None) -> Float[Array, "M D"]:
        gate = jnp.broadcast_to(self.gate[...].astype(jnp.float32), x.shape)
        share = jax.nn.sigmoid(row_dots(x, gate, native=self.native))[:, None]
        return self.mixture(x) + share * self.shared(x, rows)


class Block(qwen3_5.Block):
    """Qwen 3.5's layers, with experts in place of their MLPs."""

    def feed_forward(self, config: ModelConfig, dtype: jnp.dtype) -> Callable[[Array, Rows | None], Array]:
        return Experts(config, dtype)


def weights(config: ModelConfig) -> Targets:
    mixture = {
        name: replace(target, path=("mlp", "mixture", *target.path[1:]))
        for name, target in qwen3_moe.expert_targets(config).items()
    }
    shared = {
        f"mlp.shared_expert.{name}_proj.weight": Target(("mlp", "shared", name, "kernel"), shape, "transpose")
        for name, shape in {
            "gate": (config.shared_ff_width, config.width),
            "up": (config.shared_ff_width, config.width),
            "down": (config.width, config.shared_ff_width),
        }.items()
    }
    gate = {"mlp.shared_expert_gate.weight": Target(("mlp", "gate"), (1, config.width), "same")}
    return qwen3_5.table(config, mixture | shared | gate)
