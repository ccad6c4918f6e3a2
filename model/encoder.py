"""What encoders share: layer norm, a layer in which every token sees its whole sequence, and both ends.

A family's own file says how its layer puts these together, and which tensor of a checkpoint is which. A sequence is
one segment of a call. It has no prefix, since each of its tokens depends on those after it.
"""

from collections.abc import Callable, Sequence
from typing import cast

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from model import decoder
from model.attention import AttentionContext, Layer, MaskSpec
from model.checkpoint import Entry, Fused, Target
from model.config import Encoder, ModelConfig
from model.cpu import linear
from model.decoder import AllAngles
from model.layers import Linear, standardized


def encoder_of(config: ModelConfig) -> Encoder:
    """What an encoder's config has beyond a decoder's."""
    return cast(Encoder, config.encoder)


class LayerNorm(nnx.Module):
    """Layer norm in float32."""

    def __init__(self, config: ModelConfig, dtype: jnp.dtype) -> None:
        self.config = config
        self.scale = nnx.Param(jnp.zeros((config.width,), dtype), axes=("embed",))
        has_bias = encoder_of(config).norm_bias
        self.bias = nnx.Param(jnp.zeros((config.width,), dtype), axes=("embed",)) if has_bias else None

    def __call__(self, x: Float[Array, "M D"], more: Float[Array, "M D"] | None = None) -> Float[Array, "M D"]:
        """The norm of x, or of x with what is added to it."""
        if not self.config.native:
            return self.scaled(standardized(x if more is None else x + more, self.config.norm_eps, native=False))
        scale = self.scale[...].astype(jnp.float32)
        bias = jnp.zeros_like(scale) if self.bias is None else self.bias[...].astype(jnp.float32)
        return linear.layer_norms(x, scale, bias, self.config.norm_eps, more)

    def scaled(self, x: Float[Array, "M D"]) -> Float[Array, "M D"]:
        """The norm of what is standardised already."""
        x = x * self.scale[...].astype(jnp.float32)[None, :]
        return x if self.bias is None else x + self.bias[...].astype(jnp.float32)[None, :]


class Block(decoder.Block):
    """The frame of one encoder layer."""

    def finished(self, x: Float[Array, "M D"]) -> Float[Array, "M D"]:
        """What is taken of the last layer's output: the mean over a sequence, or its first token's."""
        return x

    def forward_reads(
        self,
        x: Float[Array, "M D"],
        angles: AllAngles,
        context: AttentionContext,
        layer: Layer,
        reads: Int[Array, " R"],
    ) -> Float[Array, "R D"]:
        """What represents the sequences of the tokens at the flat indices ``reads``, whichever of their tokens these
        are."""
        if encoder_of(self.config).mean:
            return _means(self.finished(self(x, angles, context, layer)[0]), context, reads)
        return self.finished(super().forward_reads(x, angles, context, layer, reads - context.positions[reads]))

    def _mask_spec(self, layer: Layer) -> MaskSpec:
        return super()._mask_spec(layer)._replace(causal=False)


def _means(x: Float[Array, "M D"], context: AttentionContext, reads: Int[Array, " R"]) -> Float[Array, "R D"]:
    """The means over the segments of ``reads``; there are no more segments than reads."""
    segments = context.segments.reshape(-1)
    rows = jnp.where(segments < 0, len(reads), segments)  # those of padding are dropped
    sums = jnp.zeros((len(reads), x.shape[1]), x.dtype).at[rows].add(x, mode="drop")
    counts = jnp.zeros(len(reads), x.dtype).at[rows].add(1.0, mode="drop")
    own = segments[reads]
    return sums[own] / jnp.maximum(counts[own], 1.0)[:, None]


class Embedding(decoder.AroundLayers):
    """The embedding before the first layer."""

    def __init__(self, config: ModelConfig, *, dtype: jnp.dtype) -> None:
        self.config = config
        encoder, rows = encoder_of(config), -(-config.vocab_size // config.shards)

        def table(rows: int, axis: str | None = None) -> nnx.Param[Array]:
            return nnx.Param(jnp.zeros((rows, config.width), dtype), axes=(axis, "embed"))

        self.embedding = table(rows, "vocab")
        self.types = table(encoder.token_types) if encoder.token_types else None
        self.positions = table(encoder.positions) if encoder.positions else None
        self.embedding_norm = LayerNorm(config, dtype)

    def embed(self, tokens: Int[Array, " M"], positions: Int[Array, " M"]) -> tuple[Float[Array, "M D"], AllAngles]:
        """The first layer's input, float32, and the rope angles of all layers.

        Args:
            tokens: ids; -1 for padding, which becomes zeros; those of the second type are V higher, and so on.
        """
        vocab = self.config.vocab_size
        ids = jnp.where(tokens < 0, -1, tokens % vocab)
        x = decoder.embedded(self.embedding[...], ids, self.config.shards)
        x = self.typed(x, tokens)
        if self.positions is not None:
            x += self.positions[...][self._rows(ids, positions)].astype(jnp.float32)
        x = jnp.where(tokens[:, None] < 0, 0.0, self.embedding_norm(x))
        return x, decoder.all_angles(self.config, positions)

    def typed(self, x: Float[Array, "M D"], tokens: Int[Array, " M"]) -> Float[Array, "M D"]:
        """The tokens' embeddings with those of their types."""
        if self.types is None:
            return x
        return x + self.types[...][jnp.where(tokens < 0, 0, tokens // self.config.vocab_size)].astype(jnp.float32)

    def _rows(self, ids: Int[Array, " M"], positions: Int[Array, " M"]) -> Int[Array, " M"]:
        """The tokens' rows in the embedding of positions."""
        encoder = encoder_of(self.config)
        if encoder.pad_token_id is None:
            return encoder.first_position + positions
        pads = (ids == encoder.pad_token_id).astype(jnp.int32)
        until = jnp.cumsum(pads)
        first = jnp.arange(len(ids)) - positions
        skipped = until - (until - pads)[first]
        return encoder.first_position + jnp.where(pads == 1, -1, positions - skipped)


class EmbeddingAndClassifier(Embedding):
    """The embedding before the first layer; the classifier after the last."""

    def __init__(self, config: ModelConfig, *, dtype: jnp.dtype) -> None:
        super().__init__(config, dtype=dtype)
        self.dense = Linear(
            config.width,
            config.width,
            bias=encoder_of(config).dense_bias,
            dtype=dtype,
            axes=("embed", "embed"),
            shards=config.shards,
            packed=config.packed,
        )
        self.head = nnx.Param(jnp.zeros((config.classes, config.width), dtype), axes=(None, "embed"))
        self.bias = nnx.Param(jnp.zeros((config.classes,), dtype), axes=(None,))

    def norm(self, hidden: Float[Array, "R D"]) -> Float[Array, "R D"]:
        """What the classes are read from, of what represents a sequence."""
        return jnp.tanh(self.dense(hidden))

    def head_weights(self) -> Float[Array, "V D"]:
        """The rows of the classes."""
        return self.head[...]

    def head_bias(self) -> Float[Array, " V"]:
        """What is added to the classes' logits."""
        return self.bias[...].astype(jnp.float32)

    def head_split(self) -> None:
        """Every device has all classes."""
        return


def norm_table(name: str, width: int, *path: str | int, bias: bool = True) -> dict[str, Entry]:
    """Where a layer norm's tensors go."""
    table: dict[str, Entry] = {f"{name}.weight": Target((*path, "scale"), (width,), "same")}
    if bias:
        table[f"{name}.bias"] = Target((*path, "bias"), (width,), "same")
    return table


def linear_table(
    name: str, out: int, into: int, *paths: Sequence[str | int], bias: bool = True, separator: str = "."
) -> dict[str, Entry]:
    """Where a linear's tensors go: one matrix, or one of several parameters, ``out`` rows each.

    Args:
        separator: between ``name`` and ``weight`` or ``bias``.
    """

    def entry(of_path: Callable[[Sequence[str | int]], Target]) -> Entry:
        parts = tuple(map(of_path, paths))
        return parts[0] if len(parts) == 1 else Fused(parts)

    table = {f"{name}{separator}weight": entry(lambda path: Target((*path, "kernel"), (out, into), "transpose"))}
    if bias:
        table[f"{name}{separator}bias"] = entry(lambda path: Target((*path, "bias"), (out,), "same"))
    return table
