"""Laya: ModernBERT, followed by layers of the kind that torch calls ``TransformerEncoderLayer``, and a head that gives
each of a question's options a logit.

A sequence is one question with its options and the state. What ModernBERT makes of it gets the embedding of the
question's type, the same for all tokens. Options are read at the markers before them (``decision_heads.MarkerHead``).
Source: DecisionModel in NandhaKishorM/laya, laya/common.py at 8ef5b2d.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from model import decision_heads, decoder, encoder
from model.attention import AttentionContext, Layer, MaskSpec, attend
from model.checkpoint import Target, Targets
from model.config import DecisionHead, Encoder, ModelConfig
from model.decision_heads import Norm
from model.decoder import AllAngles, projection
from model.encoder import linear_table, norm_table
from model.families import modernbert
from model.fields import IGNORED, NEUTRAL, ConfigError, Fields
from model.inputs import Inputs
from model.layers import Linear, each

TYPES = 3
"""Of questions: choice, score and noul, in this order."""
_HEAD_WIDTH = 64


def parse(fields: Fields) -> ModelConfig:
    config = modernbert.layers_of(fields)
    found, more = encoder.encoder_of(config), fields.count("head_layers", 2)
    if more and config.head_width != _HEAD_WIDTH:
        raise ConfigError(
            f"hidden_size {config.width} in {config.heads} heads; implemented are heads of {_HEAD_WIDTH}, which the "
            "layers that follow have"
        )
    fields.refuse_rest(ignored=IGNORED | modernbert.UNREAD, neutral=NEUTRAL)
    fields.notes.append("answers are read by a marker head: only the decision routes score")
    return replace(
        config,
        encoder=Encoder(token_types=TYPES, norm_bias=found.norm_bias, more_layers=more),
        decision_head=DecisionHead("marker", config.width),
        pad_token_id=None,
    )


class _Layer(nnx.Module):
    """Attention of all tokens to all, without positions, and an MLP; a norm before each."""

    def __init__(self, config: ModelConfig, dtype: jnp.dtype) -> None:
        def linear(into: int, out: int, axes: tuple[str, str]) -> Linear:
            return projection(config, dtype, into, out, bias=True, axes=axes)

        width, heads, ff_width = config.width, config.heads * _HEAD_WIDTH, 4 * config.width // config.shards
        self.attention_norm, self.mlp_norm = Norm(config), Norm(config)
        self.q = linear(width, heads, ("embed", "heads"))
        self.k, self.v = (linear(width, heads, ("embed", "kv_heads")) for _ in "kv")
        self.o = linear(heads, width, ("heads", "embed"))
        self.up, self.down = linear(width, ff_width, ("embed", "mlp")), linear(ff_width, width, ("mlp", "embed"))

    def __call__(
        self, x: Float[Array, "M D"], context: AttentionContext, layer: Layer, implementation: str
    ) -> Float[Array, "M D"]:
        """The layer's output.

        Args:
            layer: one that the page pool has; nothing is read there.
            implementation: of attention, see ``model.attention``.
        """
        q, k, v = (y.reshape(len(x), -1, _HEAD_WIDTH) for y in each((self.q, self.k, self.v), self.attention_norm(x)))
        q, k, v = (y.astype(self.q.dtype) for y in (q * _HEAD_WIDTH**-0.5, k, v))
        attended = attend(q, k, v, context, layer, MaskSpec(causal=False), implementation=implementation)
        x = x + self.o(attended.reshape(len(x), -1))
        return x + self.down(jax.nn.relu(self.up(self.mlp_norm(x))))


class Ends(encoder.Embedding):
    def __init__(self, config: ModelConfig, *, dtype: jnp.dtype) -> None:
        super().__init__(config, dtype=dtype)
        self.last_norm = encoder.LayerNorm(config, dtype)
        for number in range(encoder.encoder_of(config).more_layers):
            setattr(self, f"layer_{number}", _Layer(config, dtype))
        self.decision_head = decision_heads.build(config)

    def typed(self, x: Float[Array, "M D"], tokens: Array) -> Float[Array, "M D"]:  # noqa: ARG002
        """The tokens' embeddings alone: their types' follow the last layer."""
        return x

    def last_layer(
        self,
        block: decoder.Block,
        x: Float[Array, "M D"],
        angles: AllAngles,
        context: AttentionContext,
        layer: Layer,
        inputs: Inputs,
    ) -> Float[Array, "R D"]:
        """The output of the layers that follow ModernBERT's, at the markers."""
        x = self.last_norm(block(x, angles, context, layer)[0])
        x = super().typed(x, inputs.tokens)
        for number in range(encoder.encoder_of(self.config).more_layers):
            x = getattr(self, f"layer_{number}")(x, context, layer, block.implementation)
        return x[inputs.reads]

    def norm(self, hidden: Float[Array, "R D"]) -> Float[Array, "R D"]:
        """What the head reads: the same."""
        return hidden


def weights(config: ModelConfig) -> Targets:
    width = config.width
    targets = modernbert.weights_of_layers(config, "encoder")
    for number in range(encoder.encoder_of(config).more_layers):
        source, own = f"head.layers.{number}", f"layer_{number}"
        targets |= linear_table(
            f"{source}.self_attn.in_proj", width, width, *((own, name) for name in "qkv"), separator="_"
        )
        targets |= linear_table(f"{source}.self_attn.out_proj", width, width, (own, "o"))
        targets |= linear_table(f"{source}.linear1", 4 * width, width, (own, "up"))
        targets |= linear_table(f"{source}.linear2", width, 4 * width, (own, "down"))
        targets |= norm_table(f"{source}.norm1", width, own, "attention_norm")
        targets |= norm_table(f"{source}.norm2", width, own, "mlp_norm")
    targets["type_emb.weight"] = Target(("types",), (TYPES, width), "same")
    targets |= norm_table("scorer.0", width, "decision_head", "marker_norm")
    targets |= linear_table("scorer.1", width, width, ("decision_head", "dense"))
    targets["scorer.3.weight"] = Target(("decision_head", "scalar"), (1, width), "same")
    targets["scorer.3.bias"] = Target(("decision_head", "bias"), (1,), "same")
    return targets


IGNORED_TENSORS = (r"act_head\..*", "temperature")
"""Of a second head, which says whether to act, and what ``rl_agent_config.json`` says, too."""
