"""Phi-3, 3.5 and Phi-4: Llama's layer, with q, k, v and gate, up fused in the checkpoint, and partial rotary positions.

``longrope``: a prompt beyond the original context has other frequencies at all of its positions. Source: transformers'
``modeling_phi3``.
"""

import math
from dataclasses import replace

from model import decoder
from model.checkpoint import Fused, Targets
from model.config import ModelConfig, Rope, common_config, with_window
from model.families.llama import NORMS
from model.families.llama import Block as Block
from model.fields import IGNORED, NEUTRAL, ConfigError, Fields


def parse(fields: Fields) -> ModelConfig:
    rope, rotated = _rope(fields)
    config = common_config(fields, norm_eps=1e-5, rope=rope)
    rotary_width = int(config.head_width * rotated)
    if rotary_width % 2 or any(
        len(factors) != rotary_width // 2 for factors in (rope.short_factors, rope.long_factors) if factors
    ):
        raise ConfigError(
            f"{rotated} of head_dim {config.head_width} is rotated, {rotary_width} channels: that must be even, and "
            f"short_factor and long_factor must have a number for every two; they have {len(rope.short_factors)} and "
            f"{len(rope.long_factors)}"
        )
    config = replace(config, rotary_width=rotary_width)
    window = fields.integer_or_none("sliding_window", absent=None)
    config = with_window(config, fields, window, [True] * config.layers)
    fields.refuse_rest(ignored=IGNORED | {"auto_map"}, neutral={**NEUTRAL, "full_attn_mod": 1, "interpolate_factor": 1})
    return config


def _rope(fields: Fields) -> tuple[Rope, float]:
    """The rope, and which part of a head is rotated."""
    context_length = fields.integer("max_position_embeddings")
    original = fields.integer("original_max_position_embeddings", 4096)
    theta, rotated = fields.number("rope_theta", 1e4), fields.number("partial_rotary_factor", 1.0)
    keys = [key for key in ("rope_parameters", "rope_scaling") if key in fields]
    if not keys:
        return Rope(theta), rotated
    if len(keys) > 1:
        raise ConfigError("config.json has both rope_scaling and rope_parameters; keep rope_parameters")
    group = fields.group(keys[0])
    kind = group.text("rope_type", group.text("type", "default"))
    theta, rotated = group.number("rope_theta", theta), group.number("partial_rotary_factor", rotated)
    if kind == "default":
        rope = Rope(theta)
    elif kind in ("longrope", "su", "yarn"):  # the last two are older names, here alone
        # The key beside the group goes before the one within it.
        group.integer("original_max_position_embeddings", original)
        factor = group.number("factor", context_length / original)
        magnitude = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
        rope = Rope(
            theta,
            "longrope",
            original_context_length=original,
            short_factors=group.numbers("short_factor"),
            long_factors=group.numbers("long_factor"),
            magnitude=group.number("attention_factor", magnitude),
        )
    else:
        raise ConfigError(f"rope type {kind!r} is not implemented here; known: default, longrope")
    group.refuse_rest()
    return rope, rotated


FUSED = {
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
}
"""Name in a layer of the checkpoint -> Llama's names of what it holds."""


def weights(config: ModelConfig) -> Targets:
    linears = {**decoder.attention_linears(config), **decoder.mlp_linears(config)}
    fused = {name: [linears.pop(part) for part in parts] for name, parts in FUSED.items()}
    table = decoder.table(config, linears, NORMS)
    for layer in range(config.layers):
        for name, parts in fused.items():
            targets = tuple(decoder.kernel(layer, path, out, into) for path, out, into, _ in parts)
            table[f"model.layers.{layer}.{name}.weight"] = Fused(targets)
    return table
