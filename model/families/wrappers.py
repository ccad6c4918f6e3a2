"""Architectures that only wrap a family: other names of it, and models for images whose text part it is."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, cast

from model.fields import IGNORED, NEUTRAL, ConfigError, Fields


@dataclass(frozen=True, slots=True)
class Alias:
    """Another name of an architecture.

    Attributes:
        architecture: the name that transformers has.
        model_types: what ``model_type`` may be in such a ``config.json``.
    """

    architecture: str
    model_types: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Wrapper:
    """A model whose text part is that of a family.

    Attributes:
        model_type: of its ``config.json``.
        text: the text part's architecture.
        text_type: ``model_type`` of its ``text_config``.
        defaults: of keys that published files leave out of ``text_config``, by its class in transformers.
        fixed: keys of ``text_config`` that its class does not read, and what they would have to be.
        of_images: keys that concern images alone.
        tied: whether the output head is the embedding, where the key is absent.
    """

    model_type: str
    text: str
    text_type: str
    of_images: frozenset[str]
    defaults: Mapping[str, Any] = field(default_factory=dict[str, Any])
    fixed: Mapping[str, Any] = field(default_factory=dict[str, Any])
    tied: bool = True


ALIASES = {
    "LLaMAForCausalLM": Alias("LlamaForCausalLM", ("llama",)),  # of transformers' first weeks with Llama
    "YiForCausalLM": Alias("LlamaForCausalLM", ("Yi", "yi", "llama")),  # its code is Llama's with two other names
}

_IMAGES = frozenset({"vision_config", "image_token_index", "image_token_id"})
_GEMMA3 = Wrapper(
    "gemma3",
    "Gemma3ForCausalLM",
    "gemma3_text",
    _IMAGES | {"mm_tokens_per_image"} | {f"{at}_token_{kind}" for at in ("boi", "eoi") for kind in ("index", "id")},
    defaults={
        "vocab_size": 262_208,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "max_position_embeddings": 131_072,
    },
    fixed={"final_logit_softcapping": None},
)
_QWEN3_5 = Wrapper(
    "qwen3_5",
    "Qwen3_5ForCausalLM",
    "qwen3_5_text",
    _IMAGES | {"video_token_id", "vision_start_token_id", "vision_end_token_id", "language_model_only"},
    tied=False,
)
WRAPPERS = {
    "Qwen3_5MoeForConditionalGeneration": replace(
        _QWEN3_5, model_type="qwen3_5_moe", text="Qwen3_5MoeForCausalLM", text_type="qwen3_5_moe_text"
    ),
    "Qwen3_5ForConditionalGeneration": _QWEN3_5,
    "Qwen3_5ForSequenceClassification": replace(_QWEN3_5, text="Qwen3_5TextForSequenceClassification"),
    "Gemma3ForConditionalGeneration": _GEMMA3,
    "Gemma3ForSequenceClassification": Wrapper(
        "gemma3", "Gemma3TextForSequenceClassification", "gemma3_text", _GEMMA3.of_images, _GEMMA3.defaults
    ),
    "Mistral3ForConditionalGeneration": Wrapper(
        "mistral3",
        "MistralForCausalLM",
        "mistral",
        _IMAGES | {"multimodal_projector_bias", "projector_hidden_act", "spatial_merge_size", "vision_feature_layer"},
    ),
}

_OF_ALL = ("quantization_config", "id2label", "label2id", "num_labels")
"""Keys beside ``text_config`` that concern the text part."""


def name_of(config: Mapping[str, Any]) -> str | None:
    """The architecture that a ``config.json`` names, if it names one."""
    names: object = config.get("architectures")
    if not isinstance(names, list) or len(cast("list[object]", names)) != 1:
        return None
    name = cast("list[object]", names)[0]
    return name if isinstance(name, str) else None


def unwrapped(config: Mapping[str, Any], trusted: Collection[str] = ()) -> dict[str, Any]:
    """``config.json`` as the family would have it that it only wraps; any other as it is.

    Args:
        trusted: keys that the user says change nothing, see ``Fields``.

    Raises:
        ConfigError: the text part is of another family, or there is an unknown key beside it.
    """
    name = name_of(config)
    model_type = config.get("model_type")
    if alias := ALIASES.get(name or ""):
        if model_type not in (None, *alias.model_types):
            raise ConfigError(f"architectures is [{name!r}] and model_type {model_type!r}: they contradict each other")
        own = {key: value for key, value in config.items() if key not in ("model_type", "auto_map")}
        return {**own, "architectures": [alias.architecture]}
    if wrapper := WRAPPERS.get(name or ""):
        if model_type not in (None, wrapper.model_type):
            raise ConfigError(f"architectures is [{name!r}] and model_type {model_type!r}: they contradict each other")
        return _text_part(config, wrapper, trusted)
    return dict(config)


def _text_part(config: Mapping[str, Any], wrapper: Wrapper, trusted: Collection[str]) -> dict[str, Any]:
    fields = Fields(config, trusted=trusted)
    fields.group("text_config")
    text: dict[str, Any] = config["text_config"]
    if (found := text.get("model_type") or wrapper.text_type) != wrapper.text_type:
        raise ConfigError(
            f"{name_of(config)}: text_config has the model_type {found!r}, and only {wrapper.text_type!r} is "
            "implemented as its text part"
        )
    # transformers reads this key beside text_config alone.
    tied = fields.flag("tie_word_embeddings", wrapper.tied)
    fields.refuse_rest(ignored=IGNORED | wrapper.of_images | set(_OF_ALL), neutral=NEUTRAL)
    shared = {key: config[key] for key in _OF_ALL if key in config}
    own = {"architectures": [wrapper.text], "tie_word_embeddings": tied}
    return {**wrapper.defaults, **text, **shared, **wrapper.fixed, **own}


def note(config: Mapping[str, Any]) -> str | None:
    """What a user should know: that a text part alone is used."""
    name = name_of(config)
    return f"the text part of {name} alone is used: it reads no images" if name in WRAPPERS else None
