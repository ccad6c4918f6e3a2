"""What a decoder is built from: ``ModelConfig``, and how the keys that the families share become one.

A family's own keys are read in its own file; ``model.families.registry`` says which file that is.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from model.contract import TOKEN_BITS
from model.fields import ConfigError, Fields

RopeKind = Literal["default", "linear", "dynamic", "llama3", "yarn", "longrope"]
Activation = Literal["silu", "gelu", "gelu_tanh"]
QkNorm = Literal["head", "projection"]

ACTIVATIONS: dict[str, Activation] = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
"""Name in ``config.json`` -> name here."""


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary position embedding.

    Attributes:
        theta: base of the frequencies.
        kind: ``linear`` divides all frequencies by ``factor``; ``llama3`` and ``yarn`` the low ones, and blend in
            between; ``longrope`` each by a factor of its own; ``dynamic`` none within the original context.
        factor: 1 for ``default``.
        low_freq_factor: ``llama3``: wavelengths above ``original_context_length`` over this are divided in full.
        high_freq_factor: ``llama3``: wavelengths below ``original_context_length`` over this are kept.
        original_context_length: tokens, before the context was extended.
        beta_fast: ``yarn``: frequencies that turn more often in the original context are kept.
        beta_slow: ``yarn``: frequencies that turn less often are divided in full.
        truncate: ``yarn``: both bounds are rounded outwards to whole channels.
        short_factors: ``longrope``: divisors in a prompt of up to ``original_context_length`` tokens, one a frequency.
        long_factors: ``longrope``: divisors in a longer prompt, at all of its positions.
        magnitude: ``yarn`` and ``longrope``: what cosines and sines are multiplied by.
    """

    theta: float
    kind: RopeKind = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    original_context_length: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()
    magnitude: float = 1.0


@dataclass(frozen=True, slots=True)
class Encoder:
    """What an encoder has that a decoder has not: every token sees the whole sequence, which is classified as one.

    Attributes:
        token_types: rows of the token types' embedding, for the texts of a pair or the types of a question; 0: there is
            none.
        positions: rows of the learned positions' embedding; 0: positions are rotary.
        first_position: the row of a sequence's first token.
        pad_token_id: a token that takes the row before the first, and is not counted in the positions of those after
            it; None: there is none.
        mean: the mean of all tokens is classified; otherwise the first token alone.
        norm_bias: the layer norms have biases.
        dense_bias: the layer before the classes has.
        more_layers: layers of another kind that follow, see ``families.laya``.
    """

    token_types: int = 0
    positions: int = 0
    first_position: int = 0
    pad_token_id: int | None = None
    mean: bool = False
    norm_bias: bool = True
    dense_bias: bool = True
    more_layers: int = 0


@dataclass(frozen=True, slots=True)
class Recurrence:
    """Gated DeltaNet, ``model.delta``, in the layers before each attention layer.

    Attributes:
        parts: recurrent layers before each attention layer.
        key_heads: of queries and keys.
        value_heads: of values and memories, a multiple of ``key_heads``.
        key_width: of one head.
        value_width: of one head.
        taps: tokens that the convolution sees, the last one itself included.
    """

    parts: int
    key_heads: int
    value_heads: int
    key_width: int
    value_width: int
    taps: int

    @property
    def values(self) -> int:
        """Channels of all value heads."""
        return self.value_heads * self.value_width

    @property
    def channels(self) -> int:
        """Channels of the convolution: queries, keys and values."""
        return 2 * self.key_heads * self.key_width + self.values


@dataclass(frozen=True, slots=True)
class DecisionHead:
    """A head that scores a question's options, ``model.decision_heads``.

    Attributes:
        kind: ``candidate``: Decision 2.0's; ``pointer``: kev's; ``marker``: Laya's.
        width: channels in which an option and its query are compared; the model's with a marker.
    """

    kind: Literal["candidate", "pointer", "marker"]
    width: int


@dataclass(frozen=True, slots=True)
class Lora:
    """Room for LoRA adapters beside the weights, see ``model.lora``.

    Attributes:
        slots: adapters that are on the device at once.
        rank: the largest; adapters of a lower one are filled up with zeros.
    """

    slots: int
    rank: int


MOST_TOKENS = 2**TOKEN_BITS // 2
"""The most tokens of a vocabulary: with some ropes the prefix cache knows each by two ids (``Engine``)."""


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The sizes and constants of a decoder. Letters as in ``model``.

    Attributes:
        architecture: Hugging Face name, ``LlamaForCausalLM``.
        vocab_size: V, rows of the embedding, and of the output head of a causal model.
        width: D.
        layers: L; of a hybrid those of attention, each with the recurrent ones before it, which are one block.
        heads: N, a multiple of ``kv_heads``.
        kv_heads: K.
        head_width: H; not always ``width / heads``.
        ff_width: F; of one expert, where there are experts.
        norm_eps: added to the mean square in RMS norm.
        context_length: tokens, the longest prompt the model was made for.
        tied_head: the output head is the embedding.
        attention_bias: on q, k and v.
        output_bias: on attention's output projection.
        mlp_bias: on all three projections.
        activation: of the MLP's gate.
        attention_scale: of the scores; None: 1 / sqrt(H).
        attention_softcap: bound c of the scores s, which become c * tanh(s / c); None: none.
        logit_softcap: the same for the output head's logits.
        qk_norm: queries and keys are normed, by head or as one vector, before they are rotated; None: they are not.
        norm_offset: added to the stored scale of every norm.
        embedding_scale: multiplies the embedding at the model's entry.
        recurrence: of a hybrid; None: all layers are of attention.
        rotary_width: channels of a head that are rotated, the first ones; None: all.
        window: tokens that a sliding layer sees back, itself included; 0: all.
        sliding: for each layer, whether it is a sliding one; empty: none is.
        local_rope: of sliding layers; None: ``rope``, as all others.
        experts: 0: the MLP is one.
        experts_per_token: that a token goes through.
        norm_expert_weights: the weights of a token's experts are made to sum to 1.
        shared_ff_width: F of the expert that all tokens go through; 0: there is none.
        ragged: experts multiply by ``lax.ragged_dot``, which TPUs have a kernel for.
        classes: of a sequence-classification head; 0: the model is causal.
        pad_token_id: classes are read at a prompt's last token that is another; None: at its last.
        encoder: None: the model is a decoder.
        decision_head: what its hidden states are read by, in place of an output head; None: by the output head.
        shards: devices that every layer is split over; heads, key/value heads and F are one device's.
        by_tokens: between layers a device holds a share of a call's tokens, see ``model.overlap``.
        int8: the kernels of attention and MLP are stored so, see ``layers.quantized``.
        native: sums over a token's channels, and over the vocabulary, are those of ``cpu.linear``.
        packed: matmuls are, too, with kernels stored packed.
        lora: room for adapters that requests choose; None: there are none.
        notes: what a user should know about how the config was read.
    """

    architecture: str
    vocab_size: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_width: int
    ff_width: int
    norm_eps: float
    rope: Rope
    context_length: int
    tied_head: bool
    attention_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    activation: Activation = "silu"
    attention_scale: float | None = None
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    qk_norm: QkNorm | None = None
    norm_offset: float = 0.0
    embedding_scale: float = 1.0
    recurrence: Recurrence | None = None
    rotary_width: int | None = None
    window: int = 0
    sliding: tuple[bool, ...] = ()
    local_rope: Rope | None = None
    experts: int = 0
    experts_per_token: int = 0
    norm_expert_weights: bool = False
    shared_ff_width: int = 0
    ragged: bool = False
    classes: int = 0
    pad_token_id: int | None = None
    encoder: Encoder | None = None
    decision_head: DecisionHead | None = None
    shards: int = 1
    by_tokens: bool = False
    int8: bool = False
    native: bool = False
    packed: bool = False
    lora: Lora | None = None
    notes: tuple[str, ...] = field(default=(), compare=False)


def common_config(
    fields: Fields,
    *,
    rope: Rope | None = None,
    kv_heads: int | None = None,
    head_width: int | None = None,
    ff_key: str = "intermediate_size",
    ff_width: int | None = None,
    norm_eps: float = 1e-6,
    tied_head: bool = False,
    activation_key: str = "hidden_act",
    activation: str = "silu",
    **constants: Any,
) -> ModelConfig:
    """Read the keys that all families have.

    Args:
        rope: where the family reads its keys itself.
        kv_heads: what the family's class in transformers takes where the key is absent; None: all heads, as for null.
        head_width: the same; None: D / N.
        ff_width: the same, for the key ``ff_key``; None: it must be there.
        norm_eps: the same.
        tied_head: the same.
        activation: the same, for the key ``activation_key``.
        constants: the rest of ``ModelConfig``, which the family knows or has read.

    Raises:
        ConfigError: a key is absent or wrong, or sizes do not fit.
    """
    width, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    kv_heads = fields.integer_or_none("num_key_value_heads", absent=kv_heads) or heads
    if heads % kv_heads:
        raise ConfigError(f"num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}")
    activation = fields.text(activation_key, activation)
    if activation not in ACTIVATIONS:
        raise ConfigError(f"{activation_key} is {activation!r}; implemented: {', '.join(ACTIVATIONS)}")
    context_length = fields.integer("max_position_embeddings")
    rope = rope or rope_of(fields, context_length)
    return ModelConfig(
        architecture="",  # the registry's to say
        vocab_size=_vocab_size(fields),
        width=width,
        layers=fields.integer("num_hidden_layers"),
        heads=heads,
        kv_heads=kv_heads,
        head_width=_head_width(fields, width, heads, head_width),
        ff_width=fields.integer(ff_key, ff_width),
        norm_eps=fields.number("rms_norm_eps", norm_eps),
        rope=rope,
        context_length=_context(fields, rope, context_length),
        tied_head=fields.flag("tie_word_embeddings", tied_head),
        activation=ACTIVATIONS[activation],
        **constants,
    )


def _vocab_size(fields: Fields) -> int:
    size = fields.integer("vocab_size")
    if size > MOST_TOKENS:
        raise ConfigError(f"vocab_size is {size}; the prefix cache tells at most {MOST_TOKENS} tokens apart")
    return size


def with_window(config: ModelConfig, fields: Fields, window: int | None, sliding: Sequence[bool]) -> ModelConfig:
    """``config`` with sliding layers: those of ``layer_types``, or of ``sliding`` where the key is absent.

    Args:
        window: None: no layer may slide.
    """
    kinds = ["sliding_attention" if slides else "full_attention" for slides in sliding]
    kinds = fields.texts("layer_types", kinds if window else ["full_attention"] * config.layers)
    known = {"full_attention"} | ({"sliding_attention"} if window else set())
    if len(kinds) != config.layers or not known.issuperset(kinds):
        raise ConfigError(
            f"layer_types is {kinds}; it must name {config.layers} layers, each {' or '.join(sorted(known))}, "
            f"with a sliding window of {window}"
        )
    if window is None or "sliding_attention" not in kinds:
        return config
    sliding = tuple(kind == "sliding_attention" for kind in kinds)
    return replace(config, window=window if window < config.context_length else 0, sliding=sliding)


def with_classes(config: ModelConfig, fields: Fields, pad_token_id: int | None) -> ModelConfig:
    """``config`` with a classification head in place of the output head: never tied, and without a cap on its logits.

    Args:
        pad_token_id: what the family's class in transformers takes where the key is absent.
    """
    default = fields.integer("num_labels", 2)
    classes = fields.size("id2label") if "id2label" in fields else default
    pad = fields.id_or_none("pad_token_id", absent=pad_token_id)
    return replace(config, classes=classes, tied_head=False, logit_softcap=None, pad_token_id=pad)


def _head_width(fields: Fields, width: int, heads: int, absent: int | None) -> int:
    if absent is None and "head_dim" not in fields and width % heads:
        raise ConfigError(
            f"hidden_size {width} is not a multiple of num_attention_heads {heads}, and head_dim is absent"
        )
    head_width = fields.integer("head_dim", absent or width // heads)
    if head_width % 2:
        raise ConfigError(f"head_dim is {head_width}; rotary positions need an even number")
    return head_width


def _context(fields: Fields, rope: Rope, tokens: int) -> int:
    """Tokens of the longest prompt, which a rope may change.

    YaRN's are those of the original context times its factor: model cards say which keys to add to a config, and to
    leave ``max_position_embeddings`` as it is.
    """
    if rope.kind == "yarn":
        return max(tokens, round(rope.factor * rope.original_context_length))
    if rope.kind == "dynamic":
        fields.notes.append(
            f"the longest prompt has {rope.original_context_length} tokens: beyond the original context, a dynamic "
            "rope's frequencies depend on the prompt's length, and prompts could share no prefix"
        )
        return rope.original_context_length
    return tokens


def rope_of(fields: Fields, context_length: int) -> Rope:
    """Read v4's ``rope_theta`` and ``rope_scaling``, or v5's ``rope_parameters``; if both are there they must agree."""
    theta = fields.number("rope_theta", 10_000.0)
    beside = fields.integer_or_none("original_max_position_embeddings", absent=None)
    ropes = [
        rope_group(fields.group(key), theta, context_length, beside)
        for key in ("rope_parameters", "rope_scaling")
        if key in fields
    ]
    if not ropes:
        return Rope(theta)
    if ropes[0] != ropes[-1] or ("rope_theta" in fields and ropes[0].theta != theta):
        raise ConfigError("rope_theta, rope_scaling and rope_parameters contradict each other; keep rope_parameters")
    return ropes[0]


def rope_group(group: Fields, theta: float, context_length: int, original: int | None = None) -> Rope:
    """Read one rope.

    Args:
        theta: where the group has none.
        context_length: of the model.
        original: the original context as it stands beside the group: it goes before the one within.
    """
    kind = group.text("rope_type", group.text("type", "default"))
    theta = group.number("rope_theta", theta)
    within = group.integer("original_max_position_embeddings", context_length)
    original = original or within
    match kind:
        case "default":
            rope = Rope(theta)
        case "linear":
            rope = Rope(theta, "linear", group.number("factor"))
        case "dynamic":
            # transformers reads max_position_embeddings alone. Up to the smaller of the two nothing is scaled.
            original = min(original, context_length)
            rope = Rope(theta, "dynamic", group.number("factor"), original_context_length=original)
        case "llama3":
            low, high = group.number("low_freq_factor"), group.number("high_freq_factor")
            rope = Rope(theta, "llama3", group.number("factor"), low, high, original)
        case "yarn":
            rope = _yarn(group, theta, context_length, original)
        case _:
            raise ConfigError(f"rope type {kind!r} is not implemented; known: default, linear, dynamic, llama3, yarn")
    group.refuse_rest(neutral={"partial_rotary_factor": 1.0})
    return rope


def _yarn(group: Fields, theta: float, context_length: int, original: int) -> Rope:
    """Read YaRN's keys as transformers does: a null is an absent key, and zeros are not taken for one.

    Source: ``_compute_yarn_parameters``. ``finetuned`` is a note of the method's authors on how a model was made.
    """
    factor = group.number_or_none("factor", absent=None) or context_length / original
    sharpness, spread = (group.number_or_none(key, absent=None) for key in ("mscale", "mscale_all_dim"))
    magnitude = _yarn_magnitude(factor)
    if sharpness and spread:
        magnitude = _yarn_magnitude(factor, sharpness) / _yarn_magnitude(factor, spread)
    group.flag("finetuned", True)
    return Rope(
        theta,
        "yarn",
        factor,
        original_context_length=original,
        beta_fast=group.number("beta_fast", 32.0),
        beta_slow=group.number("beta_slow", 1.0),
        truncate=group.flag("truncate", True),
        magnitude=group.number("attention_factor", magnitude),
    )


def _yarn_magnitude(factor: float, weight: float = 1.0) -> float:
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0
