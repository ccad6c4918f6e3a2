"""Qwen 3.5, 3.6 and 3.8, text: gated DeltaNet in most layers, and gated attention in every few.

The layers up to and with one of attention are one block, so that all blocks are alike. Norms are Gemma's, which store
their scales less 1; but not that of what a memory gives. Source: transformers' ``modeling_qwen3_5``.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from model import decoder, delta
from model.attention import NATIVE, AttentionContext, Layer, attend
from model.checkpoint import Target, Targets
from model.config import ModelConfig, Recurrence, Rope, common_config
from model.decoder import AllAngles, KeysValues
from model.delta import Snapshots
from model.families import llama
from model.fields import IGNORED, NEUTRAL, ConfigError, Fields
from model.layers import Angles, Linear, RMSNorm, each
from model.lora import Rows

LINEAR, FULL = "linear_attention", "full_attention"


def parse(fields: Fields) -> ModelConfig:
    return hybrid(fields)


def hybrid(
    fields: Fields,
    *,
    ignored: Collection[str] = (),
    neutral: Mapping[str, object] | None = None,
    **constants: Any,
) -> ModelConfig:
    """The config of layers of both kinds.

    Args:
        ignored, neutral: what else than here, see ``Fields.refuse_rest``.
        constants: of the layers' MLPs, see ``common_config``.
    """
    rope, rotated = _rope(fields)
    bias = fields.flag("attention_bias", False)
    config = common_config(
        fields,
        kv_heads=4,
        head_width=256,
        rope=rope,
        attention_bias=bias,
        output_bias=bias,
        qk_norm="head",
        norm_offset=1.0,
        **constants,
    )
    rotary_width = int(config.head_width * rotated)
    if rotary_width < 2 or rotary_width % 2:
        raise ConfigError(
            f"partial_rotary_factor {rotated} of head_dim {config.head_width} is {rotary_width} channels; "
            "it must be an even number of them"
        )
    parts = _parts(fields, config.layers)
    recurrence = Recurrence(
        parts,
        key_heads=fields.integer("linear_num_key_heads", 16),
        value_heads=fields.integer("linear_num_value_heads", 32),
        key_width=fields.integer("linear_key_head_dim", 128),
        value_width=fields.integer("linear_value_head_dim", 128),
        taps=fields.integer("linear_conv_kernel_dim", 4),
    )
    if recurrence.value_heads % recurrence.key_heads:
        raise ConfigError(
            f"linear_num_value_heads {recurrence.value_heads} is not a multiple of linear_num_key_heads "
            f"{recurrence.key_heads}"
        )
    if fields.count("mtp_num_hidden_layers", 0):
        fields.notes.append("the layers that predict further tokens (mtp) are not loaded: nothing is generated")
    fields.refuse_rest(
        ignored=IGNORED | {"mtp_use_dedicated_embeddings", *ignored},
        neutral={
            **NEUTRAL,
            "mlp_only_layers": [],
            "attn_output_gate": True,
            "output_gate_type": "swish",
            "mamba_ssm_dtype": "float32",
            **(neutral or {}),
        },
    )
    layers = config.layers // (parts + 1)
    return replace(config, layers=layers, rotary_width=rotary_width, recurrence=recurrence)


def _parts(fields: Fields, layers: int) -> int:
    """Recurrent layers before each of attention."""
    interval = fields.integer("full_attention_interval", 4)
    kinds = fields.texts("layer_types", [LINEAR if (layer + 1) % interval else FULL for layer in range(layers)])
    parts = kinds.index(FULL) if FULL in kinds else 0
    if not parts or kinds != ([LINEAR] * parts + [FULL]) * (layers // (parts + 1)):
        raise ConfigError(
            f"layer_types is {kinds}; implemented are {layers} layers in which the same number of {LINEAR} comes "
            f"before each {FULL}, which is the last"
        )
    return parts


def _rope(fields: Fields) -> tuple[Rope, float]:
    """The rope, and which part of a head is rotated.

    Positions of images have three numbers, and sections of the channels turn by one each: in text the three are equal.
    """
    theta, rotated = fields.number("rope_theta", 1e4), fields.number("partial_rotary_factor", 0.25)
    if "rope_scaling" in fields and "rope_parameters" in fields:
        raise ConfigError("config.json has both rope_scaling and rope_parameters; keep rope_parameters")
    key = "rope_scaling" if "rope_scaling" in fields else "rope_parameters"
    if key not in fields:
        return Rope(theta), rotated
    group = fields.group(key)
    kind = group.text("rope_type", group.text("type", "default"))
    if kind not in ("default", "mrope"):
        raise ConfigError(f"rope type {kind!r} is not implemented here; known: default, mrope")
    theta, rotated = group.number("rope_theta", theta), group.number("partial_rotary_factor", rotated)
    group.refuse_rest(ignored={"mrope_section", "mrope_interleaved"})
    return Rope(theta), rotated


class GatedAttention(decoder.Attention):
    """Attention whose query projection gives each head a gate, too, for what it attends to."""

    def __init__(self, config: ModelConfig, dtype: jnp.dtype, implementation: str) -> None:
        super().__init__(config, dtype, implementation)
        out = 2 * config.heads * config.head_width
        self.q = decoder.projection(
            config, dtype, config.width, out, bias=config.attention_bias, axes=("embed", "heads")
        )

    def gated(
        self, x: Float[Array, "M D"], angles: Angles, rows: Rows | None
    ) -> tuple[Float[Array, "M N W"], Float[Array, "M NH"], Float[Array, "M K W"], Float[Array, "M K H"]]:
        """Queries, gates, keys and values of all tokens."""
        both, k, v = each((self.q, self.k, self.v), x, rows)
        q, gate = self._split(both)
        q, k = self._rotated([self._queries(q), self._keys(k)], angles)
        return q, gate, k, self._values(v)

    def gated_queries(
        self, x: Float[Array, "M D"], angles: Angles, rows: Rows | None
    ) -> tuple[Float[Array, "M N W"], Float[Array, "M NH"]]:
        """Queries and gates."""
        q, gate = self._split(self.q(x, rows))
        return self._rotated([self._queries(q)], angles)[0], gate

    def _split(self, both: Float[Array, "M 2NH"]) -> tuple[Float[Array, "M NH"], Float[Array, "M NH"]]:
        heads = both.reshape(len(both), self.config.heads, 2, self.config.head_width)
        return heads[:, :, 0].reshape(len(both), -1), heads[:, :, 1].reshape(len(both), -1)

    def gated_output(
        self, attended: Float[Array, "M N H"], gate: Float[Array, "M NH"], rows: Rows | None
    ) -> Float[Array, "M D"]:
        return self.o(attended.reshape(len(gate), -1).astype(jnp.float32) * jax.nn.sigmoid(gate), rows)


class DeltaNet(nnx.Module):
    """Gated DeltaNet, see ``model.delta``."""

    def __init__(self, config: ModelConfig, sizes: Recurrence, dtype: jnp.dtype, implementation: str) -> None:
        self.config, self.sizes = config, sizes
        self.native = implementation == NATIVE
        self.mixed = _linear(config, dtype, config.width, sizes.channels)
        self.gate = _linear(config, dtype, config.width, sizes.values)
        self.rate = _linear(config, dtype, config.width, sizes.value_heads)
        self.step = _linear(config, dtype, config.width, sizes.value_heads)
        # Few numbers, and what they decide is multiplied up over thousands of tokens.
        self.taps = nnx.Param(jnp.zeros((sizes.channels, 1, sizes.taps), jnp.float32), axes=(None, None, None))
        self.fading = nnx.Param(jnp.zeros((sizes.value_heads,), jnp.float32), axes=(None,))
        self.step_bias = nnx.Param(jnp.zeros((sizes.value_heads,), jnp.float32), axes=(None,))
        self.norm = RMSNorm(sizes.value_width, eps=config.norm_eps, dtype=dtype, native=config.native)
        self.out = _linear(config, dtype, sizes.values, config.width)

    def __call__(
        self, x: Float[Array, "M D"], context: AttentionContext, layer: Layer, part: int, *, keep: bool
    ) -> tuple[Float[Array, "M D"], Snapshots | None]:
        """The layer's output, and the snapshots with this layer's if these are kept."""
        rows = context.adapters
        mixed, gate, rate, step = each((self.mixed, self.gate, self.rate, self.step), x, rows)
        decays = -jnp.exp(self.fading[...])[None] * jax.nn.softplus(step + self.step_bias[...][None])
        assert context.snapshots is not None, "a hybrid has them"
        assert context.slots is not None, "each prefix has its own"
        packed = delta.Packed(
            context.segments,
            context.positions,
            context.prefixes,
            context.prefix_lengths,
            context.slots,
            context.snapshots,
        )
        read, kept = delta.mix(
            mixed,
            decays,
            jax.nn.sigmoid(rate),
            self.taps[...][:, 0].T,
            packed,
            layer,
            part,
            sizes=self.sizes,
            native=self.native,
            keep=keep,
        )
        normed = self.norm(read.reshape(-1, self.sizes.value_width)).reshape(gate.shape)
        return self.out(normed * jax.nn.silu(gate), rows), kept


class RecurrentLayer(nnx.Module):
    """One layer of gated DeltaNet, and its MLP."""

    def __init__(
        self, config: ModelConfig, dtype: jnp.dtype, delta_net: DeltaNet, mlp: Callable[[Array, Rows | None], Array]
    ) -> None:
        self.delta_norm = decoder.norm(config, config.width, dtype)
        self.delta = delta_net
        self.mlp_norm = decoder.norm(config, config.width, dtype)
        self.mlp = mlp

    def __call__(
        self, x: Float[Array, "M D"], context: AttentionContext, layer: Layer, part: int, *, keep: bool
    ) -> tuple[Float[Array, "M D"], Snapshots | None]:
        """The next layer's input, and the snapshots with this layer's if these are kept."""
        read, kept = self.delta(self.delta_norm(x), context, layer, part, keep=keep)
        x = x + read
        return x + self.mlp(self.mlp_norm(x), context.adapters), kept


class Block(llama.Block):
    """Recurrent layers, and the layer of attention after them."""

    def __init__(self, config: ModelConfig, *, dtype: jnp.dtype, implementation: str) -> None:
        super().__init__(config, dtype=dtype, implementation=implementation)
        sizes = config.recurrence
        assert sizes is not None, "``parse`` has read it"
        self.recurrent = nnx.List(
            [
                RecurrentLayer(
                    config, dtype, DeltaNet(config, sizes, dtype, implementation), self.feed_forward(config, dtype)
                )
                for _ in range(sizes.parts)
            ]
        )
        self.attention = GatedAttention(config, dtype, implementation)

    def __call__(
        self, x: Float[Array, "M D"], angles: AllAngles, context: AttentionContext, layer: Layer
    ) -> tuple[Float[Array, "M D"], KeysValues]:
        x, _ = self._recurrent(x, context, layer, keep=False)
        return self._attended(x, angles, context, layer)

    def keep(
        self, x: Float[Array, "M D"], angles: AllAngles, context: AttentionContext, layer: Layer
    ) -> tuple[Float[Array, "M D"], KeysValues, Snapshots | None]:
        x, kept = self._recurrent(x, context, layer, keep=True)
        return *self._attended(x, angles, context, layer), kept

    def keep_last(
        self, x: Float[Array, "M D"], angles: AllAngles, context: AttentionContext, layer: Layer
    ) -> tuple[KeysValues, Snapshots | None]:
        x, kept = self._recurrent(x, context, layer, keep=True)
        return self.keys_values(x, angles, layer, context.adapters), kept

    def forward_reads(
        self,
        x: Float[Array, "M D"],
        angles: AllAngles,
        context: AttentionContext,
        layer: Layer,
        reads: Int[Array, " R"],
    ) -> Float[Array, "R D"]:
        x, _ = self._recurrent(x, context, layer, keep=False)
        (cos, sin), inputs = self._layer_angles(angles, layer), self.pre_attention(x)
        rows = context.adapters
        k, v = self.attention.keys_values(inputs, (cos, sin), rows)
        rows = rows and rows.at(reads)
        q, gate = self.attention.gated_queries(inputs[reads], (cos[reads], sin[reads]), rows)
        spec = self._mask_spec(layer)
        attended = attend(q, k, v, context, layer, spec, implementation=self.implementation, reads=reads)
        return self.post_attention(x[reads], self.attention.gated_output(attended, gate, rows), rows)

    def _attended(
        self, x: Float[Array, "M D"], angles: AllAngles, context: AttentionContext, layer: Layer
    ) -> tuple[Float[Array, "M D"], KeysValues]:
        rows = context.adapters
        q, gate, k, v = self.attention.gated(self.pre_attention(x), self._layer_angles(angles, layer), rows)
        attended = attend(q, k, v, context, layer, self._mask_spec(layer), implementation=self.implementation)
        return self.post_attention(x, self.attention.gated_output(attended, gate, rows), rows), decoder.stacked(k, v)

    def _recurrent(
        self, x: Float[Array, "M D"], context: AttentionContext, layer: Layer, *, keep: bool
    ) -> tuple[Float[Array, "M D"], Snapshots | None]:
        """What comes out of the recurrent layers, and the snapshots with theirs if these are kept."""
        for part, one in enumerate(self.recurrent):
            x, kept = one(x, context, layer, part, keep=keep)
            if kept is not None:
                context = context._replace(snapshots=kept)
        return x, context.snapshots if keep else None


def _linear(config: ModelConfig, dtype: jnp.dtype, into: int, out: int) -> Linear:
    """A projection of a recurrent layer. On a mesh each device computes all of it."""
    return decoder.projection(config, dtype, into, out, axes=("embed", "embed"))


def weights(config: ModelConfig) -> Targets:
    return table(config, _of_layer(decoder.mlp_linears(config), {}))


def table(config: ModelConfig, mlp: Mapping[str, Target]) -> Targets:
    """Tensor names -> places.

    Args:
        mlp: what every layer has after its memories or its attention, by the name in a layer of the checkpoint.
    """
    sizes = config.recurrence
    assert sizes is not None, "``parse`` has read it"
    table = decoder.table(replace(config, layers=0), {}, {})
    attention = decoder.attention_linears(config)
    path, heads, width, bias = attention["self_attn.q_proj"]
    attention["self_attn.q_proj"] = (path, 2 * heads, width, bias)
    head_norms = {f"self_attn.{name}": (f"attention.{name}", config.head_width) for name in ("q_norm", "k_norm")}
    attends = _of_layer(attention, {name: (path, width) for name, path in llama.NORMS.items()} | head_norms)
    recurs = _recurrent(config, sizes)
    for layer in range(config.layers * (sizes.parts + 1)):
        block, part = divmod(layer, sizes.parts + 1)
        place, own = ((), attends) if part == sizes.parts else (("recurrent", part), recurs)
        for name, target in (*own.items(), *mlp.items()):
            table[f"model.layers.{layer}.{name}"] = replace(target, path=("blocks", block, *place, *target.path))
    return table


def _recurrent(config: ModelConfig, sizes: Recurrence) -> dict[str, Target]:
    width = config.width
    linears = {
        "linear_attn.in_proj_qkv": ("delta.mixed", sizes.channels, width, False),
        "linear_attn.in_proj_z": ("delta.gate", sizes.values, width, False),
        "linear_attn.in_proj_b": ("delta.rate", sizes.value_heads, width, False),
        "linear_attn.in_proj_a": ("delta.step", sizes.value_heads, width, False),
        "linear_attn.out_proj": ("delta.out", width, sizes.values, False),
    }
    norms = {
        "input_layernorm": ("delta_norm", width),
        "post_attention_layernorm": ("mlp_norm", width),
        "linear_attn.norm": ("delta.norm", sizes.value_width),
    }
    return _of_layer(linears, norms) | {
        "linear_attn.conv1d.weight": Target(("delta", "taps"), (sizes.channels, 1, sizes.taps), "same"),
        "linear_attn.A_log": Target(("delta", "fading"), (sizes.value_heads,), "same"),
        "linear_attn.dt_bias": Target(("delta", "step_bias"), (sizes.value_heads,), "same"),
    }


def _of_layer(linears: decoder.Linears, norms: Mapping[str, tuple[str, int]]) -> dict[str, Target]:
    """Name in a layer of the checkpoint -> place in a layer of the model.

    Args:
        norms: name -> path, and channels.
    """
    targets: dict[str, Target] = {}
    for name, (path, out, into, bias) in linears.items():
        targets[f"{name}.weight"] = Target((*path.split("."), "kernel"), (out, into), "transpose")
        if bias:
            targets[f"{name}.bias"] = Target((*path.split("."), "bias"), (out,), "same")
    for name, (path, size) in norms.items():
        targets[f"{name}.weight"] = Target((*path.split("."), "scale"), (size,), "same")
    return targets
