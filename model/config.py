"""``config.json`` of a Hugging Face checkpoint -> ``ModelConfig``, by allow-list.

A key that nobody reads would give wrong scores with no error. So each key is read, or ignored on purpose, or stands at
the value that changes nothing; any other is refused by name.
"""

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

RopeKind = Literal["default", "linear", "llama3"]


class ConfigError(ValueError):
    """The config asks for something that is not implemented, or contradicts itself. The message names the keys."""


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary position embedding.

    Attributes:
        theta: base of the frequencies.
        kind: ``linear`` divides all frequencies by ``factor``; ``llama3`` the low ones, and blends in between.
        factor: 1 for ``default``.
        low_freq_factor: ``llama3``: wavelengths above ``original_context_length`` over this are divided in full.
        high_freq_factor: ``llama3``: wavelengths below ``original_context_length`` over this are kept.
        original_context_length: ``llama3``: tokens, before the context was extended.
    """

    theta: float
    kind: RopeKind = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    original_context_length: int = 0


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The sizes and constants of a decoder. Letters as in ``model``.

    Attributes:
        architecture: Hugging Face name, ``LlamaForCausalLM``.
        vocab_size: V, rows of the output head.
        width: D.
        layers: L.
        heads: N, a multiple of ``kv_heads``.
        kv_heads: K.
        head_width: H; not always ``width / heads``.
        ff_width: F.
        norm_eps: added to the mean square in RMS norm.
        context_length: tokens, the longest prompt the model was made for.
        tied_head: the output head is the embedding.
        attention_bias: on q, k, v and the output projection.
        mlp_bias: on all three projections.
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
    attention_bias: bool
    mlp_bias: bool


IGNORED = {
    # About the file.
    "architectures", "model_type", "transformers_version", "_name_or_path", "_attn_implementation_autoset",
    "unsloth_fixed",
    "is_decoder",
    # Ours to choose.
    "torch_dtype", "dtype", "use_cache",
    # The tokenizer's, and generation's.
    "bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "sep_token_id", "decoder_start_token_id",
    "max_length", "min_length", "do_sample", "temperature", "top_k", "top_p", "repetition_penalty",
    # A classification head's.
    "id2label", "label2id",
    # Training's.
    "initializer_range", "attention_dropout",
}  # fmt: skip
"""Keys that no scoring depends on, in any family."""

NEUTRAL: Mapping[str, object] = {
    "is_encoder_decoder": False,
    "add_cross_attention": False,
    "tie_encoder_decoder": False,
    "chunk_size_feed_forward": 0,
    "output_attentions": False,
    "output_hidden_states": False,
    "return_dict": True,
    "return_dict_in_generate": False,
    "torchscript": False,
    "use_bfloat16": False,
    "pruned_heads": {},
}
"""Keys that may be present at the one value that changes nothing, in any family."""


class Fields:
    """A config that remembers which of its keys were read, so that the others can be refused.

    A null counts as absent: it is how transformers writes a setting that is off.
    """

    def __init__(self, values: Mapping[str, Any], where: str = "config.json") -> None:
        self._values = {key: value for key, value in values.items() if value is not None}
        self._where = where
        self._read: set[str] = set()

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def integer(self, key: str, default: int | None = None) -> int:
        """At least 1."""
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f"{self._where}: {key} is {value!r}; it must be an integer of at least 1")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """Above 0 and finite."""
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
            raise ConfigError(f"{self._where}: {key} is {value!r}; it must be a finite number above 0")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self._get(key, default)
        if not isinstance(value, bool):
            raise ConfigError(f"{self._where}: {key} is {value!r}; it must be true or false")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        value = self._get(key, default)
        if not isinstance(value, str):
            raise ConfigError(f"{self._where}: {key} is {value!r}; it must be a string")
        return value

    def group(self, key: str) -> "Fields":
        """The fields of a nested object."""
        value = self._get(key, None)
        if not isinstance(value, dict):
            raise ConfigError(f"{self._where}: {key} is {value!r}; it must be an object")
        return Fields(cast("dict[str, Any]", value), f"{self._where}: {key}")

    def refuse_rest(self, *, ignored: Collection[str] = (), neutral: Mapping[str, object] | None = None) -> None:
        """Refuse every key that was not read, is not ignored, and is not at its neutral value.

        Raises:
            ConfigError: naming all of them with their values.
        """
        neutral = neutral or {}
        rest = [
            f"{key}={value!r}" + (f" (only {neutral[key]!r} is implemented)" if key in neutral else "")
            for key, value in sorted(self._values.items())
            if key not in self._read and key not in ignored and not (key in neutral and neutral[key] == value)
        ]
        if rest:
            raise ConfigError(
                f"{self._where} has settings that this program does not implement, so that its scores would be wrong: "
                + "; ".join(rest)
            )

    def _get(self, key: str, default: object) -> object:
        self._read.add(key)
        value = self._values.get(key, default)
        if value is None:
            raise ConfigError(f"{self._where} lacks {key}")
        return value


def read_config(folder: Path) -> dict[str, Any]:
    """``config.json`` as it stands.

    Raises:
        ConfigError: it is absent or is not a JSON object.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{folder} has no config.json; name a folder in Hugging Face layout") from None
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{path} holds {type(config).__name__}; it must be a JSON object")
    return cast("dict[str, Any]", config)


def from_hf(config: Mapping[str, Any]) -> ModelConfig:
    """Read by the architecture's own parser, and refuse what it did not read.

    Args:
        config: ``config.json``; transformers v4's keys (``rope_theta``, ``rope_scaling``, ``torch_dtype``) and v5's
            (``rope_parameters``, ``dtype``) alike.

    Raises:
        ConfigError: an architecture, key, value or rope type that is not implemented, or sizes that do not fit.
    """
    names = config.get("architectures")
    for architecture, parse in PARSERS.items():
        if names == [architecture]:
            return parse(Fields(config))
    raise ConfigError(f"architectures is {names!r}; implemented: {', '.join(PARSERS)} (exactly one)")


def _llama(fields: Fields) -> ModelConfig:
    width, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    kv_heads = fields.integer("num_key_value_heads", heads)
    if heads % kv_heads:
        raise ConfigError(f"num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}")
    context_length = fields.integer("max_position_embeddings")
    if (activation := fields.text("hidden_act", "silu")) != "silu":
        raise ConfigError(f"hidden_act is {activation!r}; implemented: silu")
    config = ModelConfig(
        architecture="LlamaForCausalLM",
        vocab_size=fields.integer("vocab_size"),
        width=width,
        layers=fields.integer("num_hidden_layers"),
        heads=heads,
        kv_heads=kv_heads,
        head_width=_head_width(fields, width, heads),
        ff_width=fields.integer("intermediate_size"),
        norm_eps=fields.number("rms_norm_eps", 1e-6),
        rope=_rope(fields, context_length),
        context_length=context_length,
        tied_head=fields.flag("tie_word_embeddings", False),
        attention_bias=fields.flag("attention_bias", False),
        mlp_bias=fields.flag("mlp_bias", False),
    )
    fields.refuse_rest(
        # The last two are notes for other programs, in SmolLM2's own config.json.
        ignored=IGNORED | {"is_llama_config", "transformers.js_config"},
        neutral={**NEUTRAL, "pretraining_tp": 1, "rope_interleaved": False},
    )
    return config


def _head_width(fields: Fields, width: int, heads: int) -> int:
    if "head_dim" not in fields and width % heads:
        raise ConfigError(
            f"hidden_size {width} is not a multiple of num_attention_heads {heads}, and head_dim is absent"
        )
    head_width = fields.integer("head_dim", width // heads)
    if head_width % 2:
        raise ConfigError(f"head_dim is {head_width}; rotary positions need an even number")
    return head_width


def _rope(fields: Fields, context_length: int) -> Rope:
    """From v4's ``rope_theta`` and ``rope_scaling``, or v5's ``rope_parameters``; if both are there they must agree."""
    theta = fields.number("rope_theta", 10_000.0)
    ropes = [
        _rope_group(fields.group(key), theta, context_length)
        for key in ("rope_parameters", "rope_scaling")
        if key in fields
    ]
    if not ropes:
        return Rope(theta)
    if ropes[0] != ropes[-1] or ("rope_theta" in fields and ropes[0].theta != theta):
        raise ConfigError("rope_theta, rope_scaling and rope_parameters contradict each other; keep rope_parameters")
    return ropes[0]


def _rope_group(group: Fields, theta: float, context_length: int) -> Rope:
    kind = group.text("rope_type", group.text("type", "default"))
    theta = group.number("rope_theta", theta)
    if kind == "default":
        rope = Rope(theta)
    elif kind == "linear":
        rope = Rope(theta, "linear", group.number("factor"))
    elif kind == "llama3":
        rope = Rope(
            theta,
            "llama3",
            group.number("factor"),
            group.number("low_freq_factor"),
            group.number("high_freq_factor"),
            group.integer("original_max_position_embeddings", context_length),
        )
    else:
        raise ConfigError(f"rope type {kind!r} is not implemented; known: default, linear, llama3")
    group.refuse_rest(neutral={"partial_rotary_factor": 1.0})
    return rope


PARSERS: dict[str, Callable[[Fields], ModelConfig]] = {"LlamaForCausalLM": _llama}
"""Architecture -> its parser: what it reads is handled, the rest it ignores by name or refuses."""
