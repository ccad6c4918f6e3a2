"""What the architectures share: attention's projections, the frame of a layer, both ends, and tables of weights.

A family's own file says how its layer puts these together, and which tensor of a checkpoint is which.
"""

from collections.abc import Mapping, Sequence
from functools import partial

import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from model import decision_heads, overlap, rotary_tpu
from model.attention import FUSED, FUSED_INTERPRETED, AttentionContext, Layer, MaskSpec, attend, query_factor
from model.checkpoint import Entry, Target
from model.config import ModelConfig
from model.delta import Snapshots
from model.inputs import Inputs
from model.layers import Angles, GatedMLP, Heads, Linear, RMSNorm, each, rope_angles, rotated
from model.logprobs import Split
from model.lora import Rows
from model.sharding import MODEL

KeysValues = Float[Array, "2 M K W"]
AllAngles = tuple[Float[Array, "*ropes M half"], Float[Array, "*ropes M half"]]
"""``Angles`` of all layers: where layers differ in their rope, those of the common and of the local one, stacked."""

EVERYTHING = 2**30
"""The window of a layer that sees the whole context."""


def windows(config: ModelConfig) -> tuple[int, ...] | None:
    """Each layer's window, in tokens; None: no layer has one."""
    return tuple(config.window if slides else EVERYTHING for slides in config.sliding) if config.window else None


def norm(config: ModelConfig, width: int, dtype: jnp.dtype, axis: str = "embed") -> RMSNorm:
    return RMSNorm(
        width,
        eps=config.norm_eps,
        dtype=dtype,
        offset=config.norm_offset,
        axis=axis,
        shards=config.shards,
        native=config.native,
    )


def gated_mlp(config: ModelConfig, dtype: jnp.dtype) -> GatedMLP:
    return GatedMLP(
        config.width,
        config.ff_width,
        bias=config.mlp_bias,
        dtype=dtype,
        activation=config.activation,
        shards=config.shards,
        by_tokens=config.by_tokens,
        int8=config.int8,
        packed=config.packed,
        lora=config.lora,
    )


def projection(
    config: ModelConfig, dtype: jnp.dtype, into: int, out: int, *, bias: bool = False, axes: tuple[str, str]
) -> Linear:
    """A linear of a layer, stored as the config says."""
    return Linear(
        into,
        out,
        bias=bias,
        dtype=dtype,
        axes=axes,
        shards=config.shards,
        by_tokens=config.by_tokens,
        int8=config.int8,
        packed=config.packed,
        lora=config.lora,
    )


def qk_norm_widths(config: ModelConfig) -> dict[str, int]:
    """Channels of the norms of queries and keys; empty where there are none."""
    if config.qk_norm is None:
        return {}
    q, k = (1, 1) if config.qk_norm == "head" else (config.heads, config.kv_heads)
    return {"q": q * config.head_width, "k": k * config.head_width}


class Attention(nnx.Module):
    """Projections of one attention layer; the attending itself is ``model.attention``.

    Its input and output have the rows of M tokens, or of this device's share of them, see ``model.overlap``.

    Args:
        implementation: of attention. Its TPU kernel takes queries and keys from another, ``model.rotary_tpu``.
    """

    def __init__(self, config: ModelConfig, dtype: jnp.dtype, implementation: str) -> None:
        self.config = config
        self.implementation = implementation
        self.scale = (config.attention_scale or config.head_width**-0.5) * query_factor(implementation)
        heads, kv_heads = config.heads * config.head_width, config.kv_heads * config.head_width
        linear = partial(projection, config, dtype)
        self.q = linear(config.width, heads, bias=config.attention_bias, axes=("embed", "heads"))
        self.k = linear(config.width, kv_heads, bias=config.attention_bias, axes=("embed", "kv_heads"))
        self.v = linear(config.width, kv_heads, bias=config.attention_bias, axes=("embed", "kv_heads"))
        self.o = linear(heads, config.width, bias=config.output_bias, axes=("heads", "embed"))
        widths = qk_norm_widths(config)
        whole = config.qk_norm == "projection"
        self.q_norm = norm(config, widths["q"], dtype, "heads" if whole else "embed") if widths else None
        self.k_norm = norm(config, widths["k"], dtype, "kv_heads" if whole else "embed") if widths else None

    def __call__(
        self, x: Float[Array, "rows D"], angles: Angles, rows: Rows | None
    ) -> tuple[Float[Array, "M N W"], Float[Array, "M K W"], Float[Array, "M K H"]]:
        """Queries, keys and values of all tokens; see ``queries`` and ``keys_values``."""
        q, k, v = each((self.q, self.k, self.v), x, rows)
        q, k = self._rotated([self._queries(q), self._keys(k)], angles)
        return q, k, self._values(v)

    def queries(self, x: Float[Array, "rows D"], angles: Angles, rows: Rows | None) -> Float[Array, "M N W"]:
        """Queries of all tokens, rotated and scaled, in the weights' dtype; a TPU's kernel widens their heads."""
        return self._rotated([self._queries(self.q(x, rows))], angles)[0]

    def keys_values(
        self, x: Float[Array, "rows D"], angles: Angles, rows: Rows | None
    ) -> tuple[Float[Array, "M K W"], Float[Array, "M K H"]]:
        """Keys, rotated, and values, in the weights' dtype; a TPU's kernel widens the keys' heads."""
        k, v = each((self.k, self.v), x, rows)
        return self._rotated([self._keys(k)], angles)[0], self._values(v)

    def _queries(self, q: Float[Array, "M NH"]) -> Heads:
        return Heads(q, self.config.heads, self.q_norm, self.scale)

    def _keys(self, k: Float[Array, "M KH"]) -> Heads:
        return Heads(k, self.config.kv_heads, self.k_norm, 1.0)

    def _values(self, v: Float[Array, "M KH"]) -> Float[Array, "M K H"]:
        return v.reshape(-1, self.config.kv_heads, self.config.head_width).astype(self.v.dtype)

    def _rotated(self, parts: Sequence[Heads], angles: Angles) -> list[Float[Array, "M heads W"]]:
        if self.implementation in FUSED:
            interpret = self.implementation == FUSED_INTERPRETED
            return rotary_tpu.rotated(parts, angles, self.q.dtype, interpret=interpret)
        return [rotated(part, angles).astype(self.q.dtype) for part in parts]

    def output(self, attended: Float[Array, "M N H"], rows: Rows | None) -> Float[Array, "rows D"]:
        return self.o(attended.reshape(attended.shape[0], -1), rows)


def stacked(k: Float[Array, "M K W"], v: Float[Array, "M K H"]) -> KeysValues:
    return jnp.stack([k, jnp.pad(v, ((0, 0), (0, 0), (0, k.shape[2] - v.shape[2])))])


class Block(nnx.Module):
    """The frame of one decoder layer. A family adds what comes before and after attention.

    What differs between layers beside their weights is looked up by the layer's number, so that one program serves all.

    Args:
        implementation: of attention, see ``model.attention``.
    """

    def __init__(self, config: ModelConfig, *, dtype: jnp.dtype, implementation: str) -> None:
        self.config = config
        self.implementation = implementation
        self.attention = Attention(config, dtype, implementation)

    def pre_attention(self, x: Float[Array, "M D"]) -> Float[Array, "M D"]:
        """The input of attention's projections, from the layer's input."""
        raise NotImplementedError

    def attention_input(self, x: Float[Array, "M D"], layer: Layer) -> Float[Array, "M D"]:  # noqa: ARG002
        """``pre_attention``, for a family to overwrite whose layers differ in it."""
        return self.pre_attention(x)

    def post_attention(
        self, x: Float[Array, "Q D"], attended: Float[Array, "Q D"], rows: Rows | None
    ) -> Float[Array, "Q D"]:
        """The layer's output, from its input and attention's output."""
        raise NotImplementedError

    def __call__(
        self, x: Float[Array, "rows D"], angles: AllAngles, context: AttentionContext, layer: Layer
    ) -> tuple[Float[Array, "rows D"], KeysValues]:
        """The layer's output, and its keys and values."""
        rows = context.adapters
        q, k, v = self.attention(self.attention_input(x, layer), self._layer_angles(angles, layer), rows)
        attended = attend(q, k, v, context, layer, self._mask_spec(layer), implementation=self.implementation)
        return self.post_attention(x, self.attention.output(attended, rows), rows), stacked(k, v)

    def keep(
        self, x: Float[Array, "rows D"], angles: AllAngles, context: AttentionContext, layer: Layer
    ) -> tuple[Float[Array, "rows D"], KeysValues, Snapshots | None]:
        """What ``__call__`` returns, and the snapshots with this layer's, for a prefill."""
        return *self(x, angles, context, layer), context.snapshots

    def keep_last(
        self, x: Float[Array, "rows D"], angles: AllAngles, context: AttentionContext, layer: Layer
    ) -> tuple[KeysValues, Snapshots | None]:
        """The keys and values, and the snapshots with this layer's, for a last layer that is not read."""
        return self.keys_values(x, angles, layer, context.adapters), context.snapshots

    def keys_values(self, x: Float[Array, "rows D"], angles: AllAngles, layer: Layer, rows: Rows | None) -> KeysValues:
        """The keys and values alone, for a last layer that is not read."""
        inputs = self.attention_input(x, layer)
        return stacked(*self.attention.keys_values(inputs, self._layer_angles(angles, layer), rows))

    def forward_reads(
        self,
        x: Float[Array, "rows D"],
        angles: AllAngles,
        context: AttentionContext,
        layer: Layer,
        reads: Int[Array, " R"],
    ) -> Float[Array, "read D"]:
        """The layer's output at the flat indices ``reads`` alone; other tokens get only their keys and values."""
        (cos, sin), inputs = self._layer_angles(angles, layer), self.attention_input(x, layer)
        rows = context.adapters
        k, v = self.attention.keys_values(inputs, (cos, sin), rows)
        rows = rows and rows.at(reads)
        if self.config.by_tokens:
            x = overlap.rows_at(x, reads)
            inputs = self.attention_input(x, layer)
        else:
            x, inputs = x[reads], inputs[reads]
        q = self.attention.queries(inputs, (cos[reads], sin[reads]), rows)
        spec = self._mask_spec(layer)
        attended = attend(q, k, v, context, layer, spec, implementation=self.implementation, reads=reads)
        return self.post_attention(x, self.attention.output(attended, rows), rows)

    def _mask_spec(self, layer: Layer) -> MaskSpec:
        softcap, widths = self.config.attention_softcap, windows(self.config)
        return MaskSpec(None if widths is None else jnp.array(widths, jnp.int32)[layer], softcap)

    def _layer_angles(self, angles: AllAngles, layer: Layer) -> Angles:
        """The angles of this layer's rope."""
        if self.config.local_rope is None:
            return angles
        rope = jnp.array(self.config.sliding, jnp.int32)[layer]
        return angles[0][rope], angles[1][rope]


def all_angles(config: ModelConfig, positions: Int[Array, " M"], long: Bool[Array, " M"] | None = None) -> AllAngles:
    """The rope angles of all layers.

    Args:
        long: for ``longrope``: tokens of prompts beyond the original context.
    """
    width = config.head_width if config.rotary_width is None else config.rotary_width
    angles = rope_angles(config.rope, width, positions, long)
    if config.local_rope is None:
        return angles
    local = rope_angles(config.local_rope, width, positions)
    return jnp.stack([angles[0], local[0]]), jnp.stack([angles[1], local[1]])


def embedded(
    embedding: Float[Array, "rows D"], tokens: Int[Array, " M"], shards: int, *, by_tokens: bool = False
) -> Float[Array, "share D"]:
    """The rows of tokens, float32; zeros for padding, which is below 0.

    Args:
        shards: devices that the rows are split over.
        by_tokens: of this device's share of the tokens.
    """
    if shards == 1:
        return jnp.where(tokens[:, None] < 0, 0.0, embedding[tokens].astype(jnp.float32))
    rows = tokens - lax.axis_index(MODEL) * embedding.shape[0]
    local = (rows >= 0) & (rows < embedding.shape[0])
    x = embedding[jnp.where(local, rows, 0)]
    x = jnp.where(local[:, None], x, jnp.zeros_like(x))
    return (overlap.own_share(x) if by_tokens else lax.psum(x, MODEL)).astype(jnp.float32)


class AroundLayers(nnx.Module):
    """What is before the first layer and after the last."""

    def last_layer(
        self,
        block: Block,
        x: Float[Array, "rows D"],
        angles: AllAngles,
        context: AttentionContext,
        layer: Layer,
        inputs: Inputs,
    ) -> Float[Array, "read D"]:
        """The last layer's output for the reads, see ``Block.forward_reads``."""
        return block.forward_reads(x, angles, context, layer, inputs.reads)


class EmbeddingAndHead(AroundLayers):
    """The embedding before the first layer; the norm and the output head after the last."""

    def __init__(self, config: ModelConfig, *, dtype: jnp.dtype) -> None:
        self.config = config
        self.rows = -(-config.vocab_size // config.shards)
        """Vocabulary rows on one device."""
        self.embedding = nnx.Param(jnp.zeros((self.rows, config.width), dtype), axes=("vocab", "embed"))
        self.norm = norm(config, config.width, dtype)
        rows, axis = (config.classes, None) if config.classes else (self.rows, "vocab")
        head = None if config.tied_head else nnx.Param(jnp.zeros((rows, config.width), dtype), axes=(axis, "embed"))
        self.head = head
        self.decision_head = decision_heads.build(config)
        of_adapters = (config.lora.slots, config.classes, config.width) if config.lora and config.classes else None
        self.adapter_heads = of_adapters and nnx.Param(jnp.zeros(of_adapters, dtype), axes=(None, None, "embed"))

    def embed(self, tokens: Int[Array, " M"], positions: Int[Array, " M"]) -> tuple[Float[Array, "rows D"], AllAngles]:
        """The first layer's input, float32, and the rope angles of all layers.

        Args:
            tokens: ids; -1 for padding, which becomes zeros; those of a prompt beyond a ``longrope``'s original
                context are V higher.
        """
        config, long = self.config, None
        if config.rope.kind == "longrope":
            long = tokens >= config.vocab_size
            tokens = jnp.where(long, tokens - config.vocab_size, tokens)
        angles = all_angles(config, positions, long)
        x = embedded(self.embedding[...], tokens, config.shards, by_tokens=config.by_tokens)
        return x if config.embedding_scale == 1.0 else x * config.embedding_scale, angles

    def head_weights(self) -> Float[Array, "V D"]:
        """The output head's rows: tokens, or classes, followed by those of adapters. Of a split vocabulary this
        device's."""
        if self.adapter_heads is not None and self.head is not None:
            return jnp.concatenate([self.head[...], self.adapter_heads[...].reshape(-1, self.config.width)])
        return self.embedding[...] if self.head is None else self.head[...]

    def head_bias(self) -> None:
        """What is added to the logits: nothing."""
        return

    def head_split(self) -> Split | None:
        """How the vocabulary is split, if it is."""
        return None if self.config.shards == 1 or self.config.classes else Split(MODEL, self.config.vocab_size)


Linears = dict[str, tuple[str, int, int, bool]]
"""Name in a layer of the checkpoint -> path in a block, features out, features in, whether it has a bias."""


def attention_linears(config: ModelConfig) -> Linears:
    width, heads, kv_heads = config.width, config.heads * config.head_width, config.kv_heads * config.head_width
    return {
        "self_attn.q_proj": ("attention.q", heads, width, config.attention_bias),
        "self_attn.k_proj": ("attention.k", kv_heads, width, config.attention_bias),
        "self_attn.v_proj": ("attention.v", kv_heads, width, config.attention_bias),
        "self_attn.o_proj": ("attention.o", width, heads, config.output_bias),
    }


def mlp_linears(config: ModelConfig) -> Linears:
    return {
        "mlp.gate_proj": ("mlp.gate", config.ff_width, config.width, config.mlp_bias),
        "mlp.up_proj": ("mlp.up", config.ff_width, config.width, config.mlp_bias),
        "mlp.down_proj": ("mlp.down", config.width, config.ff_width, config.mlp_bias),
    }


def kernel(layer: int, path: str, out: int, into: int) -> Target:
    """The target of a linear in a layer's block, which the checkpoint stores as [out, in]."""
    return Target(("blocks", layer, *path.split("."), "kernel"), (out, into), "transpose")


def table(config: ModelConfig, linears: Linears, norms: Mapping[str, str]) -> dict[str, Entry]:
    """Each tensor of a Hugging Face checkpoint -> where it goes here.

    Args:
        norms: of width D: name in a layer of the checkpoint -> path in a block; but those of queries and keys.
    """
    width, vocab = config.width, config.vocab_size
    targets: dict[str, Entry] = {
        "model.embed_tokens.weight": Target(("embedding",), (vocab, width), "same"),
        "model.norm.weight": Target(("norm", "scale"), (width,), "same"),
    }
    if config.classes:
        targets["score.weight"] = Target(("head",), (config.classes, width), "same")
    elif not config.tied_head:
        targets["lm_head.weight"] = Target(("head",), (vocab, width), "same")
    for layer in range(config.layers):
        source, block = f"model.layers.{layer}", ("blocks", layer)
        for name, (path, out, into, bias) in linears.items():
            targets[f"{source}.{name}.weight"] = kernel(layer, path, out, into)
            if bias:
                targets[f"{source}.{name}.bias"] = Target((*block, *path.split("."), "bias"), (out,), "same")
        for name, path in norms.items():
            targets[f"{source}.{name}.weight"] = Target((*block, path, "scale"), (width,), "same")
        for name, size in qk_norm_widths(config).items():
            place = (*block, "attention", f"{name}_norm", "scale")
            targets[f"{source}.self_attn.{name}_norm.weight"] = Target(place, (size,), "same")
    return targets


def ignored(config: ModelConfig) -> tuple[str, ...]:
    """Tensors that some checkpoints carry though nothing reads them: rope tables, what only images go through, what
    predicts further tokens, a copy of a tied head, and the output head that a classifier was made from."""
    images = r"(model\.)?(vision_tower|multi_modal_projector|visual)\..+"
    always = (r"(.+\.)?rotary_emb\w*\.\w*inv_freq", images, r"mtp\..+")
    return (*always, r"lm_head\.weight") if config.tied_head or config.classes else always
