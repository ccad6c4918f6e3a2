"""ModernBERT: norms before attention and MLP, a gated MLP, and rotary positions of two kinds, for layers that see all
and for those that see a window on both sides.

The first layer has no norm before attention: the embedding's is in its place. Source: transformers'
``modeling_modernbert``.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from model import decoder, encoder
from model.attention import Layer
from model.checkpoint import Entry, Target, Targets
from model.config import Encoder, ModelConfig, Rope, rope_group
from model.encoder import LayerNorm, linear_table, norm_table
from model.families.bert import activation, classifier, heads
from model.fields import IGNORED, NEUTRAL, ConfigError, Fields
from model.layers import activate, standardized
from model.lora import Rows

UNREAD = frozenset(
    {
        "embedding_dropout", "mlp_dropout", "classifier_dropout", "initializer_cutoff_factor", "cls_token_id",
        "deterministic_flash_attn", "reference_compile", "repad_logits_with_grad",
        "tie_word_embeddings", "decoder_bias", "sparse_prediction", "sparse_pred_ignore_index",  # the output head's
        "layer_norm_eps", "position_embedding_type",  # of the first files; transformers reads neither
    }
)  # fmt: skip
KINDS = ("full_attention", "sliding_attention")
THETAS = {"full_attention": ("global_rope_theta", 160_000.0), "sliding_attention": ("local_rope_theta", 10_000.0)}
"""Kind of layer -> the older key of its rope's base, and the base without either key."""


def parse(fields: Fields) -> ModelConfig:
    config = layers_of(fields)
    fields.refuse_rest(ignored=IGNORED | UNREAD, neutral=NEUTRAL)
    return classifier(config, fields)


def layers_of(fields: Fields) -> ModelConfig:
    """The model without what is made of its last layer's output."""
    width, number, head_width = heads(fields)
    layers, context = fields.integer("num_hidden_layers"), fields.integer("max_position_embeddings", 8192)
    every = fields.integer("global_attn_every_n_layers", 3)
    kinds = fields.texts("layer_types", [KINDS[layer % every > 0] for layer in range(layers)])
    if len(kinds) != layers or not set(KINDS).issuperset(kinds):
        raise ConfigError(f"layer_types is {kinds}; it must name {layers} layers, each {' or '.join(KINDS)}")
    pooling = fields.text("classifier_pooling", "cls")
    if pooling not in ("cls", "mean"):
        raise ConfigError(f"classifier_pooling is {pooling!r}; implemented: cls, mean")
    if (head := activation(fields, "classifier_activation")) != "gelu":
        raise ConfigError(f"classifier_activation is {head!r}; implemented: gelu")
    rope, local = (_rope(fields, kind, context) for kind in KINDS)
    bias = fields.flag("attention_bias", False)
    return ModelConfig(
        architecture="",  # the registry's to say
        vocab_size=fields.integer("vocab_size"),
        width=width,
        layers=layers,
        heads=number,
        kv_heads=number,
        head_width=head_width,
        ff_width=fields.integer("intermediate_size"),
        norm_eps=fields.number("norm_eps", 1e-5),
        rope=rope,
        local_rope=local,
        context_length=context,
        tied_head=False,
        attention_bias=bias,
        output_bias=bias,
        mlp_bias=fields.flag("mlp_bias", False),
        activation=activation(fields, "hidden_activation"),
        window=fields.integer("local_attention", 128) // 2 + 1,
        sliding=tuple(kind == "sliding_attention" for kind in kinds),
        encoder=Encoder(
            mean=pooling == "mean",
            norm_bias=fields.flag("norm_bias", False),
            dense_bias=fields.flag("classifier_bias", False),
        ),
    )


def _rope(fields: Fields, kind: str, context: int) -> Rope:
    """The rope of one kind of layer, from v5's ``rope_parameters`` or the older keys."""
    key, default = THETAS[kind]
    theta = fields.number(key, default)
    if "rope_parameters" not in fields:
        return Rope(theta)
    ropes = fields.group("rope_parameters")
    rope = rope_group(ropes.group(kind), theta, context) if kind in ropes else Rope(theta)
    if rope.kind != "default":
        raise ConfigError(f"rope_parameters: {kind} is of the type {rope.kind!r}; implemented here: default")
    return rope


class Block(encoder.Block):
    def __init__(self, config: ModelConfig, *, dtype: jnp.dtype, implementation: str) -> None:
        super().__init__(config, dtype=dtype, implementation=implementation)
        self.attention_norm = LayerNorm(config, dtype)
        self.mlp_norm = LayerNorm(config, dtype)
        self.mlp = decoder.gated_mlp(config, dtype)

    def attention_input(self, x: Float[Array, "M D"], layer: Layer) -> Float[Array, "M D"]:
        return jnp.where(jnp.asarray(layer) == 0, x, self.attention_norm(x))

    def post_attention(
        self,
        x: Float[Array, "Q D"],
        attended: Float[Array, "Q D"],
        rows: Rows | None,  # noqa: ARG002
    ) -> Float[Array, "Q D"]:
        x = x + attended
        return x + self.mlp(self.mlp_norm(x))

    def finished(self, x: Float[Array, "M D"]) -> Float[Array, "M D"]:
        """The last norm without its scales: they are the same for all tokens, and may follow the mean."""
        return standardized(x, self.config.norm_eps, native=self.config.native)


class Ends(encoder.EmbeddingAndClassifier):
    def __init__(self, config: ModelConfig, *, dtype: jnp.dtype) -> None:
        super().__init__(config, dtype=dtype)
        self.last_norm = LayerNorm(config, dtype)
        self.dense_norm = LayerNorm(config, dtype)

    def norm(self, hidden: Float[Array, "R D"]) -> Float[Array, "R D"]:
        return self.dense_norm(activate(self.dense(self.last_norm.scaled(hidden)), "gelu"))


def weights(config: ModelConfig) -> Targets:
    width, found = config.width, encoder.encoder_of(config)
    targets = weights_of_layers(config, "model")
    targets |= linear_table("head.dense", width, width, ("dense",), bias=found.dense_bias)
    targets |= norm_table("head.norm", width, "dense_norm", bias=found.norm_bias)
    targets["classifier.weight"] = Target(("head",), (config.classes, width), "same")
    targets["classifier.bias"] = Target(("bias",), (config.classes,), "same")
    return targets


def weights_of_layers(config: ModelConfig, prefix: str) -> dict[str, Entry]:
    """The table of the embedding, the layers and the last norm, whose names begin with ``prefix``."""
    width, ff, of_norms = config.width, config.ff_width, encoder.encoder_of(config).norm_bias
    embeddings = f"{prefix}.embeddings"
    targets: dict[str, Entry] = {
        f"{embeddings}.tok_embeddings.weight": Target(("embedding",), (config.vocab_size, width), "same"),
        **norm_table(f"{embeddings}.norm", width, "embedding_norm", bias=of_norms),
        **norm_table(f"{prefix}.final_norm", width, "last_norm", bias=of_norms),
    }
    for layer in range(config.layers):
        source, block = f"{prefix}.layers.{layer}", ("blocks", layer)
        attention, mlp = (*block, "attention"), (*block, "mlp")
        if layer:
            targets |= norm_table(f"{source}.attn_norm", width, *block, "attention_norm", bias=of_norms)
        qkv = [(*attention, name) for name in "qkv"]
        targets |= linear_table(f"{source}.attn.Wqkv", width, width, *qkv, bias=config.attention_bias)
        targets |= linear_table(f"{source}.attn.Wo", width, width, (*attention, "o"), bias=config.output_bias)
        targets |= norm_table(f"{source}.mlp_norm", width, *block, "mlp_norm", bias=of_norms)
        targets |= linear_table(f"{source}.mlp.Wi", ff, width, (*mlp, "gate"), (*mlp, "up"), bias=config.mlp_bias)
        targets |= linear_table(f"{source}.mlp.Wo", width, ff, (*mlp, "down"), bias=config.mlp_bias)
    return targets


IGNORED_TENSORS = (r"decoder\.(weight|bias)",)
"""Of the output head that a classifier was made from."""
