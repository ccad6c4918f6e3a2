"""Llama (2, 3.x) and its look-alikes such as SmolLM: grouped-query attention, rotary positions, gated MLP.

Source: transformers' ``modeling_llama``, whose float32 forward the parity tests compare with.
"""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from model.attention import Context, Layer, attend
from model.checkpoint import Target
from model.config import ModelConfig
from model.layers import GatedMLP, Linear, RMSNorm, rope_angles, rotate

Angles = tuple[Float[Array, "M half"], Float[Array, "M half"]]
KeysValues = Float[Array, "2 M K H"]


class Attention(nnx.Module):
    """Projections of one attention layer; the attending itself is ``model.attention``."""

    def __init__(self, config: ModelConfig, dtype: jnp.dtype) -> None:
        self.config = config
        heads, kv_heads = config.heads * config.head_width, config.kv_heads * config.head_width
        self.q = Linear(config.width, heads, bias=config.attention_bias, dtype=dtype)
        self.k = Linear(config.width, kv_heads, bias=config.attention_bias, dtype=dtype)
        self.v = Linear(config.width, kv_heads, bias=config.attention_bias, dtype=dtype)
        self.o = Linear(heads, config.width, bias=config.attention_bias, dtype=dtype)

    def queries(self, x: Float[Array, "M D"], angles: Angles) -> Float[Array, "M N H"]:
        """Rotated, scaled by 1 / sqrt(H), in the weights' dtype."""
        q = self.q(x).reshape(-1, self.config.heads, self.config.head_width)
        q = rotate(q * self.config.head_width**-0.5, angles)  # scaled first: XLA then keeps no float32 copy on TPU
        return q.astype(self.q.kernel.dtype)

    def keys_values(
        self, x: Float[Array, "M D"], angles: Angles
    ) -> tuple[Float[Array, "M K H"], Float[Array, "M K H"]]:
        """Keys, rotated, and values, in the weights' dtype."""
        k = self.k(x).reshape(-1, self.config.kv_heads, self.config.head_width)
        v = self.v(x).reshape(-1, self.config.kv_heads, self.config.head_width)
        return rotate(k, angles).astype(self.k.kernel.dtype), v.astype(self.v.kernel.dtype)

    def output(self, attended: Float[Array, "M N H"]) -> Float[Array, "M D"]:
        return self.o(attended.reshape(attended.shape[0], -1))


class Block(nnx.Module):
    """One decoder layer.

    Args:
        implementation: of attention, see ``model.attention``.
    """

    def __init__(self, config: ModelConfig, *, dtype: jnp.dtype, implementation: str) -> None:
        self.implementation = implementation
        self.attention_norm = RMSNorm(config.width, eps=config.norm_eps, dtype=dtype)
        self.attention = Attention(config, dtype)
        self.mlp_norm = RMSNorm(config.width, eps=config.norm_eps, dtype=dtype)
        self.mlp = GatedMLP(config.width, config.ff_width, bias=config.mlp_bias, dtype=dtype)

    def __call__(
        self, x: Float[Array, "M D"], angles: Angles, context: Context, layer: Layer
    ) -> tuple[Float[Array, "M D"], KeysValues]:
        """The layer's output, and its keys and values."""
        normed = self.attention_norm(x)
        k, v = self.attention.keys_values(normed, angles)
        q = self.attention.queries(normed, angles)
        attended = attend(q, k, v, context, layer, implementation=self.implementation)
        return self._finish(x, attended), jnp.stack([k, v])

    def keys_values(self, x: Float[Array, "M D"], angles: Angles) -> KeysValues:
        """Of a last layer whose output nobody reads."""
        return jnp.stack(self.attention.keys_values(self.attention_norm(x), angles))

    def read(
        self, x: Float[Array, "M D"], angles: Angles, context: Context, layer: Layer, reads: Int[Array, " R"]
    ) -> Float[Array, "R D"]:
        """The output at the tokens at flat indices ``reads`` alone: past keys and values nothing else is computed."""
        normed = self.attention_norm(x)
        k, v = self.attention.keys_values(normed, angles)
        q = self.attention.queries(normed[reads], (angles[0][reads], angles[1][reads]))
        attended = attend(q, k, v, context, layer, implementation=self.implementation, reads=reads)
        return self._finish(x[reads], attended)

    def _finish(self, x: Float[Array, "Q D"], attended: Float[Array, "Q N H"]) -> Float[Array, "Q D"]:
        x = x + self.attention.output(attended)
        return x + self.mlp(self.mlp_norm(x))


class Ends(nnx.Module):
    """What lies before the first layer and behind the last."""

    def __init__(self, config: ModelConfig, *, dtype: jnp.dtype) -> None:
        self.config = config
        self.embedding = nnx.Param(jnp.zeros((config.vocab_size, config.width), dtype))
        self.norm = RMSNorm(config.width, eps=config.norm_eps, dtype=dtype)
        self.head = None if config.tied_head else nnx.Param(jnp.zeros((config.vocab_size, config.width), dtype))

    def embed(self, tokens: Int[Array, " M"], positions: Int[Array, " M"]) -> tuple[Float[Array, "M D"], Angles]:
        """The first layer's input, float32, and the rope angles of all layers."""
        angles = rope_angles(self.config.rope, self.config.head_width, positions)
        return self.embedding[...][tokens].astype(jnp.float32), angles

    def head_weights(self) -> Float[Array, "V D"]:
        """The output head's rows."""
        return self.embedding[...] if self.head is None else self.head[...]


def weights(config: ModelConfig) -> dict[str, Target]:
    """Each tensor of a Hugging Face checkpoint -> where it goes here. Linear weights are stored [out, in] there."""
    width, vocab = config.width, config.vocab_size
    heads, kv_heads = config.heads * config.head_width, config.kv_heads * config.head_width
    table = {
        "model.embed_tokens.weight": Target(("embedding",), (vocab, width), "same"),
        "model.norm.weight": Target(("norm", "scale"), (width,), "same"),
    }
    if not config.tied_head:
        table["lm_head.weight"] = Target(("head",), (vocab, width), "same")
    linears = {
        "self_attn.q_proj": ("attention.q", heads, width, config.attention_bias),
        "self_attn.k_proj": ("attention.k", kv_heads, width, config.attention_bias),
        "self_attn.v_proj": ("attention.v", kv_heads, width, config.attention_bias),
        "self_attn.o_proj": ("attention.o", width, heads, config.attention_bias),
        "mlp.gate_proj": ("mlp.gate", config.ff_width, width, config.mlp_bias),
        "mlp.up_proj": ("mlp.up", config.ff_width, width, config.mlp_bias),
        "mlp.down_proj": ("mlp.down", width, config.ff_width, config.mlp_bias),
    }
    norms = {"input_layernorm": "attention_norm", "post_attention_layernorm": "mlp_norm"}
    for layer in range(config.layers):
        source, block = f"model.layers.{layer}", ("blocks", layer)
        for name, (path, out, into, bias) in linears.items():
            here = (*block, *path.split("."))
            table[f"{source}.{name}.weight"] = Target((*here, "kernel"), (out, into), "transpose")
            if bias:
                table[f"{source}.{name}.bias"] = Target((*here, "bias"), (out,), "same")
        for name, path in norms.items():
            table[f"{source}.{name}.weight"] = Target((*block, path, "scale"), (width,), "same")
    return table


def ignored(config: ModelConfig) -> tuple[str, ...]:
    """Tensors that some checkpoints carry though nothing reads them: old rope tables, and a copy of a tied head."""
    inv_freq = r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"
    return (inv_freq, r"lm_head\.weight") if config.tied_head else (inv_freq,)
