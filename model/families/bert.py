"""BERT, and XLM-RoBERTa, which has other positions and names: learned positions, norms after attention and MLP.

Source: transformers' ``modeling_bert`` and ``modeling_xlm_roberta``.
"""

from collections.abc import Mapping
from dataclasses import replace

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from model import encoder
from model.checkpoint import Entry, Target, Targets
from model.config import Activation, Encoder, ModelConfig, Rope, with_classes
from model.cpu import linear
from model.encoder import LayerNorm, encoder_of, linear_table, norm_table
from model.fields import IGNORED, NEUTRAL, ConfigError, Fields
from model.layers import Linear, activate
from model.lora import Rows

ACTIVATIONS: Mapping[str, Activation] = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}
"""Name in ``config.json`` -> name here."""
UNREAD = frozenset(
    {
        "hidden_dropout_prob", "attention_probs_dropout_prob", "output_past",
        "tie_word_embeddings",  # of the output head, which a classifier has not
        # Of Google's first files; transformers reads none of them.
        "directionality", "pooler_fc_size", "pooler_num_attention_heads", "pooler_num_fc_layers",
        "pooler_size_per_head", "pooler_type",
    }
)  # fmt: skip
FIXED = {"position_embedding_type": "absolute", "is_decoder": False}


def activation(fields: Fields, key: str) -> Activation:
    """The activation that a key names.

    Raises:
        ConfigError: it is not implemented.
    """
    name = fields.text(key, "gelu")
    if name not in ACTIVATIONS:
        raise ConfigError(f"{key} is {name!r}; implemented: {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def heads(fields: Fields) -> tuple[int, int, int]:
    """The model's width, its heads, and a head's width."""
    width, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    if width % heads:
        raise ConfigError(f"hidden_size {width} is not a multiple of num_attention_heads {heads}")
    return width, heads, width // heads


def classifier(config: ModelConfig, fields: Fields) -> ModelConfig:
    """``config`` with its classes; they are read from the whole sequence, whatever its last token is."""
    return replace(with_classes(config, fields, None), pad_token_id=None)


def parse(fields: Fields) -> ModelConfig:
    return _parse(fields, first_position=0, pad_token_id=None)


def parse_xlm_roberta(fields: Fields) -> ModelConfig:
    pad = fields.id_or_none("pad_token_id", absent=1)
    if pad is None:
        raise ConfigError("pad_token_id is null; the first token's position is the one after it: write 1")
    return _parse(fields, first_position=pad + 1, pad_token_id=pad)


def _parse(fields: Fields, *, first_position: int, pad_token_id: int | None) -> ModelConfig:
    width, number, head_width = heads(fields)
    positions = fields.integer("max_position_embeddings", 512)
    config = ModelConfig(
        architecture="",  # the registry's to say
        vocab_size=fields.integer("vocab_size"),
        width=width,
        layers=fields.integer("num_hidden_layers"),
        heads=number,
        kv_heads=number,
        head_width=head_width,
        ff_width=fields.integer("intermediate_size"),
        norm_eps=fields.number("layer_norm_eps", 1e-12),
        rope=Rope(1.0),
        rotary_width=0,
        context_length=positions - first_position,
        tied_head=False,
        attention_bias=True,
        output_bias=True,
        mlp_bias=True,
        activation=activation(fields, "hidden_act"),
        encoder=Encoder(
            token_types=fields.integer("type_vocab_size", 2),
            positions=positions,
            first_position=first_position,
            pad_token_id=pad_token_id,
        ),
    )
    fields.refuse_rest(ignored=(IGNORED - {"is_decoder"}) | UNREAD, neutral={**NEUTRAL, **FIXED})
    return classifier(config, fields)


class MLP(nnx.Module):
    """``down(activation(up(x)))``."""

    def __init__(self, config: ModelConfig, dtype: jnp.dtype) -> None:
        def made(into: int, out: int, axes: tuple[str, str]) -> Linear:
            shards, int8, packed = config.shards, config.int8, config.packed
            return Linear(into, out, bias=True, dtype=dtype, axes=axes, shards=shards, int8=int8, packed=packed)

        self.up = made(config.width, config.ff_width, ("embed", "mlp"))
        self.down = made(config.ff_width, config.width, ("mlp", "embed"))
        self.activation: Activation = config.activation

    def __call__(self, x: Float[Array, "M D"]) -> Float[Array, "M D"]:
        up, bias = self.up, self.up.float_bias()
        if not up.packed or bias is None:
            return self.down(activate(up(x), self.activation))
        return self.down(linear.activated(x.astype(up.dtype), up.kernel[...], bias, self.activation))


class Block(encoder.Block):
    def __init__(self, config: ModelConfig, *, dtype: jnp.dtype, implementation: str) -> None:
        super().__init__(config, dtype=dtype, implementation=implementation)
        self.attention_norm = LayerNorm(config, dtype)
        self.mlp = MLP(config, dtype)
        self.mlp_norm = LayerNorm(config, dtype)

    def pre_attention(self, x: Float[Array, "M D"]) -> Float[Array, "M D"]:
        return x

    def post_attention(
        self,
        x: Float[Array, "Q D"],
        attended: Float[Array, "Q D"],
        rows: Rows | None,  # noqa: ARG002
    ) -> Float[Array, "Q D"]:
        x = self.attention_norm(x, attended)
        return self.mlp_norm(x, self.mlp(x))


def weights(config: ModelConfig) -> Targets:
    return _weights(config, dense="pooler.dense", classes="classifier")


def weights_of_xlm_roberta(config: ModelConfig) -> Targets:
    return _weights(config, dense="classifier.dense", classes="classifier.out_proj")


def _weights(config: ModelConfig, *, dense: str, classes: str) -> Targets:
    width, ff = config.width, config.ff_width
    found, targets = encoder_of(config), dict[str, Entry]()
    for name, path, rows in (
        ("word", "embedding", config.vocab_size),
        ("position", "positions", found.positions),
        ("token_type", "types", found.token_types),
    ):
        targets[f"embeddings.{name}_embeddings.weight"] = Target((path,), (rows, width), "same")
    targets |= norm_table("embeddings.LayerNorm", width, "embedding_norm")
    for layer in range(config.layers):
        block, attention = f"encoder.layer.{layer}", ("blocks", layer, "attention")
        for name in ("query", "key", "value"):
            targets |= linear_table(f"{block}.attention.self.{name}", width, width, (*attention, name[0]))
        targets |= linear_table(f"{block}.attention.output.dense", width, width, (*attention, "o"))
        targets |= norm_table(f"{block}.attention.output.LayerNorm", width, "blocks", layer, "attention_norm")
        targets |= linear_table(f"{block}.intermediate.dense", ff, width, ("blocks", layer, "mlp", "up"))
        targets |= linear_table(f"{block}.output.dense", width, ff, ("blocks", layer, "mlp", "down"))
        targets |= norm_table(f"{block}.output.LayerNorm", width, "blocks", layer, "mlp_norm")
    targets |= linear_table(dense, width, width, ("dense",))
    targets[f"{classes}.weight"] = Target(("head",), (config.classes, width), "same")
    targets[f"{classes}.bias"] = Target(("bias",), (config.classes,), "same")
    return targets


IGNORED_TENSORS = (r"embeddings\.(position_ids|token_type_ids)", r"cls\..+", r"lm_head\..+")
"""Buffers of older files, and heads of what a classifier was made from."""
IGNORED_OF_XLM_ROBERTA = (*IGNORED_TENSORS, r"pooler\..+")
