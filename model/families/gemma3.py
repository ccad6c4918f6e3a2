"""Gemma 3, text: Gemma 2's layer with a norm of each head's queries and keys, and two ropes.

Five of six layers slide, with a rope of their own of a smaller base; the soft cap on scores is gone. Source:
transformers' ``modeling_gemma3``.
"""

from dataclasses import replace

from model.config import ModelConfig, Rope, common_config, rope_group, with_window
from model.families.gemma2 import NOTES, constants
from model.families.gemma2 import Block as Block
from model.families.gemma2 import weights as weights
from model.fields import IGNORED, NEUTRAL, ConfigError, Fields


def parse(fields: Fields) -> ModelConfig:
    rope, local_rope = _ropes(fields)
    config = common_config(
        fields,
        kv_heads=4,
        rope=rope,
        local_rope=local_rope,
        qk_norm="head",
        logit_softcap=fields.number_or_none("final_logit_softcapping", absent=None),
        **constants(fields),
    )
    window = fields.integer_or_none("sliding_window", absent=4096)
    # transformers v5 writes the key with an underscore before it, and reads it only without.
    pattern = fields.integer("sliding_window_pattern", 6)
    config = with_window(config, fields, window, [(layer + 1) % pattern > 0 for layer in range(config.layers)])
    fields.refuse_rest(ignored=IGNORED | NOTES | {"_sliding_window_pattern"}, neutral=NEUTRAL)
    return config if config.sliding else replace(config, local_rope=None)


def _ropes(fields: Fields) -> tuple[Rope, Rope]:
    """The ropes of full and of sliding layers, from v4's keys or v5's groups."""
    context_length = fields.integer("max_position_embeddings")
    theta, local = fields.number("rope_theta", 1e6), fields.number("rope_local_base_freq", 1e4)

    def one(group: Fields, theta: float) -> Rope:
        # transformers looks for YaRN's truncate beside the ropes' groups, where no config has it.
        return replace(rope_group(group, theta, context_length), truncate=True)

    if "rope_parameters" not in fields:
        return one(fields.group("rope_scaling"), theta) if "rope_scaling" in fields else Rope(theta), Rope(local)
    if "rope_scaling" in fields:
        raise ConfigError("config.json has both rope_scaling and rope_parameters; keep rope_parameters")
    groups = fields.group("rope_parameters")
    ropes = one(groups.group("full_attention"), theta), one(groups.group("sliding_attention"), local)
    groups.refuse_rest()
    return ropes
