"""Qwen 3 with a mixture of experts in every layer.

Source: transformers' ``modeling_qwen3_moe``.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int

from model import decoder, overlap
from model.checkpoint import Target, Targets
from model.config import ModelConfig, common_config, with_window
from model.families import llama
from model.families.qwen2 import within_chunk
from model.fields import IGNORED, NEUTRAL, ConfigError, Fields
from model.layers import Linear, OfStack, activate, summed
from model.lora import Rows
from model.sharding import MODEL

BLOCK_ROWS = 32
"""Tokens that an expert takes at a time on a CPU. As all blocks have this size, a token's result has the same bits
however many others chose its expert. Fewer rows would read an expert's weights more often, more would hold more
padding."""


def parse(fields: Fields) -> ModelConfig:
    bias = fields.flag("attention_bias", False)
    config = common_config(
        fields,
        kv_heads=4,
        ff_key="moe_intermediate_size",
        ff_width=768,
        attention_bias=bias,
        output_bias=bias,
        qk_norm="head",
        experts=_experts(fields),
        experts_per_token=fields.integer("num_experts_per_tok", 8),
        norm_expert_weights=fields.flag("norm_topk_prob", False),
    )
    check_experts(config)
    config = within_chunk(config, fields)
    window = fields.integer_or_none("sliding_window", absent=4096)
    if not fields.flag("use_sliding_window", False):
        window = None
    config = with_window(config, fields, window, [True] * config.layers)
    fields.refuse_rest(
        # transformers reads no max_window_layers here: the window is that of all layers. intermediate_size is of
        # dense layers, of which there are none.
        ignored=IGNORED | {"max_window_layers", "intermediate_size"},
        neutral={**NEUTRAL, "decoder_sparse_step": 1, "mlp_only_layers": []},
    )
    return config


def _experts(fields: Fields) -> int:
    """Published under the first name; transformers v5 writes the second."""
    return fields.integer("num_experts" if "num_experts" in fields else "num_local_experts", 128)


def check_experts(config: ModelConfig) -> None:
    """Refuse a token that goes through more experts than there are."""
    if config.experts_per_token > config.experts:
        raise ConfigError(f"num_experts_per_tok {config.experts_per_token} is more than num_experts {config.experts}")


class Experts(nnx.Module):
    """A mixture of gated MLPs: each token goes through those of its top ``experts_per_token`` experts alone."""

    def __init__(self, config: ModelConfig, *, dtype: jnp.dtype) -> None:
        self.config = config
        experts, width, ff_width = config.experts, config.width, config.ff_width
        self.router = Linear(width, experts, dtype=dtype, axes=("embed", "experts"))
        self.gate = nnx.Param(jnp.zeros((experts, width, ff_width), dtype), axes=("experts", "embed", "mlp"))
        self.up = nnx.Param(jnp.zeros((experts, width, ff_width), dtype), axes=("experts", "embed", "mlp"))
        self.down = nnx.Param(jnp.zeros((experts, ff_width, width), dtype), axes=("experts", "mlp", "embed"))

    def __call__(self, x: Float[Array, "M D"], _rows: Rows | None = None) -> Float[Array, "M D"]:
        """The mixture. Adapters change no experts."""
        shares, chosen = self._in_blocks(x) if self.config.native else self._chosen(x)
        if self.config.by_tokens:
            x, shares, chosen = (overlap.all_rows(each) for each in (x.astype(self.router.dtype), shares, chosen))
            x = x.astype(jnp.float32)
        tokens, per_token = x.shape[0], self.config.experts_per_token
        through = self._sorted if self.config.ragged else self._block_by_block
        results = through(x, chosen.reshape(-1)).reshape(tokens, per_token, -1)
        mixed = jnp.sum(results.astype(jnp.float32) * shares[..., None], axis=1)
        # Each device holds some of every expert's channels: as with an MLP, one sum over the devices.
        if self.config.by_tokens:
            return overlap.own_share(mixed.astype(self.router.dtype)).astype(jnp.float32)
        return mixed if self.config.shards == 1 else summed(mixed, MODEL, self.router.dtype)

    def _sorted(self, x: Float[Array, "M D"], chosen: Int[Array, " pairs"]) -> Float[Array, "pairs D"]:
        """Every (token, expert) pair's result, of products over all pairs in the order of the experts.

        A row of a product depends on its own token and expert alone: libtpu's kernel multiplies a tile of rows by one
        expert's kernel at a time, and keeps that expert's rows. The kernels are those of all layers' experts where they
        are stacked, and the other layers' are chosen by no pair: to cut a layer's out would copy them.
        """
        dtype, per_token = self.router.dtype, self.config.experts_per_token
        order = jnp.argsort(chosen)
        counts = jnp.sum(chosen[:, None] == jnp.arange(self.config.experts)[None], axis=0, dtype=jnp.int32)

        def times(
            x: Float[Array, "pairs into"], kernels: nnx.Param[Any], result: jnp.dtype | type = jnp.float32
        ) -> Float[Array, "pairs out"]:
            stored = kernels.get_value()
            of = stored if isinstance(stored, OfStack) else OfStack(stored[None], 0)
            stack = of.stack.reshape(-1, *of.stack.shape[2:])
            sizes = lax.dynamic_update_slice(jnp.zeros(len(stack), jnp.int32), counts, (of.number * len(counts),))
            return lax.ragged_dot(x.astype(dtype), stack, sizes, preferred_element_type=result)

        pairs = x.astype(dtype)[order // per_token]
        hidden = activate(times(pairs, self.gate), self.config.activation) * times(pairs, self.up)
        # Rounded as a sum over devices is: in float32 so many rows take longer to put back in order than to compute.
        return times(hidden, self.down, dtype)[jnp.argsort(order)]

    def _block_by_block(self, x: Float[Array, "M D"], chosen: Int[Array, " pairs"]) -> Float[Array, "pairs D"]:
        """The same in blocks of one size, which keeps a token's bits on a CPU."""
        places, experts, used = _blocks(chosen, self.config.experts)
        pairs = jnp.zeros((experts.size * BLOCK_ROWS, x.shape[1]), x.dtype)
        pairs = pairs.at[places].set(jnp.repeat(x, self.config.experts_per_token, axis=0))

        def through(block: Int[Array, ""], pairs: Float[Array, "rows D"]) -> Float[Array, "rows D"]:
            start = block * BLOCK_ROWS
            rows = lax.dynamic_slice_in_dim(pairs, start, BLOCK_ROWS)
            return lax.dynamic_update_slice_in_dim(pairs, self._expert(rows, experts[block]), start, axis=0)

        return lax.fori_loop(0, used, through, pairs)[places]

    def _chosen(self, x: Float[Array, "M D"]) -> tuple[Float[Array, "M chosen"], Int[Array, "M chosen"]]:
        """The shares and the numbers of each token's experts."""
        shares, chosen = lax.top_k(jax.nn.softmax(self.router(x), axis=-1), self.config.experts_per_token)
        if self.config.norm_expert_weights:
            shares = shares / shares.sum(axis=-1, keepdims=True)
        return shares, chosen

    def _in_blocks(self, x: Float[Array, "M D"]) -> tuple[Float[Array, "M chosen"], Int[Array, "M chosen"]]:
        """The same in blocks of one size: of few experts, XLA's CPU backend rounds otherwise in other sizes."""
        padded = jnp.pad(x, ((0, -len(x) % BLOCK_ROWS), (0, 0)))
        blocks = lax.map(self._chosen, padded.reshape(-1, BLOCK_ROWS, x.shape[1]))
        shares, chosen = (part.reshape(len(padded), -1)[: len(x)] for part in blocks)
        return shares, chosen

    def _expert(self, x: Float[Array, "M D"], number: Int[Array, ""]) -> Float[Array, "M D"]:
        """One block of tokens through one expert."""

        def times(x: Float[Array, "M into"], kernels: Float[Array, "experts into out"]) -> Float[Array, "M out"]:
            kernel = lax.dynamic_index_in_dim(kernels, number, keepdims=False)
            return lax.dot(x.astype(kernel.dtype), kernel, preferred_element_type=jnp.float32)

        hidden = activate(times(x, self.gate[...]), self.config.activation) * times(x, self.up[...])
        return times(hidden, self.down[...])


def _blocks(
    chosen: Int[Array, " pairs"], experts: int
) -> tuple[Int[Array, " pairs"], Int[Array, " blocks"], Int[Array, ""]]:
    """Every (token, expert) pair's place among blocks that hold one expert's pairs each, in the order of the experts.

    Returns:
        Places; each block's expert; how many blocks are used. There are enough for any choice, since each expert can
        leave but one block unfilled.
    """
    counts = jnp.zeros(experts, jnp.int32).at[chosen].add(1)
    blocks = -(-counts // BLOCK_ROWS)
    ends = jnp.cumsum(blocks)
    ranks = jnp.zeros_like(chosen).at[jnp.argsort(chosen)].set(jnp.arange(chosen.size, dtype=chosen.dtype))
    within = ranks - (jnp.cumsum(counts) - counts)[chosen]
    places = (ends - blocks)[chosen] * BLOCK_ROWS + within
    enough = chosen.size // BLOCK_ROWS + min(experts, chosen.size)
    return places, jnp.searchsorted(ends, jnp.arange(enough), side="right").astype(jnp.int32), ends[-1]


class Block(llama.Block):
    """One layer: Llama's, with experts in place of the MLP."""

    def feed_forward(self, config: ModelConfig, dtype: jnp.dtype) -> Callable[[Array, Rows | None], Array]:
        return Experts(config, dtype=dtype)


def weights(config: ModelConfig) -> Targets:
    table = decoder.table(config, decoder.attention_linears(config), llama.NORMS)
    experts = expert_targets(config)
    for layer in range(config.layers):
        for name, target in experts.items():
            table[f"model.layers.{layer}.{name}"] = replace(target, path=("blocks", layer, *target.path))
    return table


def expert_targets(config: ModelConfig) -> dict[str, Target]:
    """Name in a layer of the checkpoint -> place in a layer of the model."""
    width, ff_width, experts = config.width, config.ff_width, config.experts
    shapes = {"gate": (ff_width, width), "up": (ff_width, width), "down": (width, ff_width)}
    return {"mlp.gate.weight": Target(("mlp", "router", "kernel"), (experts, width), "transpose")} | {
        f"mlp.experts.{expert}.{name}_proj.weight": Target(("mlp", name), shape, "transpose", (expert, experts))
        for expert in range(experts)
        for name, shape in shapes.items()
    }
