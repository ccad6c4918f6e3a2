"""Hugging Face architecture name -> how to read its config, build it and load its weights."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp
from flax import nnx

from model import decoder, encoder
from model.checkpoint import Targets
from model.config import ModelConfig, with_classes
from model.families import (
    bert,
    gemma,
    gemma2,
    gemma3,
    laya,
    llama,
    mistral,
    modernbert,
    olmo2,
    phi3,
    qwen2,
    qwen3,
    qwen3_5,
    qwen3_5_moe,
    qwen3_moe,
)
from model.families.wrappers import ALIASES, WRAPPERS, unwrapped
from model.fields import ConfigError, Fields
from model.tensors.quantised import methods

Ends = decoder.EmbeddingAndHead | encoder.EmbeddingAndClassifier | laya.Ends
"""What is before the first layer and after the last."""


@dataclass(frozen=True, slots=True)
class Family:
    """One architecture.

    Attributes:
        model_type: of its ``config.json``, by which transformers chooses the class.
        parse: reads the keys of ``config.json`` that are handled; it ignores the others by name or refuses them.
        block: builds one layer with zero weights, see ``decoder.Block``.
        weights: checkpoint tensor names -> places: in ``decoder.EmbeddingAndHead``, or ("blocks", layer, ...).
        pad_token_id: its config's value where the key is absent.
        classifies: its head is ``score.weight``, read at a prompt's last token that is not ``pad_token_id``.
        ends: builds the first and last steps with zero weights.
        ignored: patterns of tensors, beside ``decoder.ignored``, that may be there and mean nothing.
    """

    model_type: str
    parse: Callable[[Fields], ModelConfig]
    block: Callable[..., decoder.Block]
    weights: Callable[[ModelConfig], Targets]
    pad_token_id: int | None = None
    classifies: bool = False
    ends: Callable[..., Ends] = decoder.EmbeddingAndHead
    ignored: tuple[str, ...] = ()


GENERATIVE: dict[str, Family] = {
    "GemmaForCausalLM": Family("gemma", gemma.parse, gemma.Block, gemma.weights, pad_token_id=0),
    "Gemma2ForCausalLM": Family("gemma2", gemma2.parse, gemma2.Block, gemma2.weights, pad_token_id=0),
    "Gemma3ForCausalLM": Family("gemma3_text", gemma3.parse, gemma3.Block, gemma3.weights, pad_token_id=0),
    "LlamaForCausalLM": Family("llama", llama.parse, llama.Block, llama.weights),
    "MistralForCausalLM": Family("mistral", mistral.parse, mistral.Block, mistral.weights),
    "Olmo2ForCausalLM": Family("olmo2", olmo2.parse, olmo2.Block, olmo2.weights, pad_token_id=1),
    "Phi3ForCausalLM": Family("phi3", phi3.parse, phi3.Block, phi3.weights, pad_token_id=32_000),
    "Qwen2ForCausalLM": Family("qwen2", qwen2.parse, qwen2.Block, qwen2.weights),
    "Qwen3ForCausalLM": Family("qwen3", qwen3.parse, qwen3.Block, qwen3.weights),
    "Qwen3_5ForCausalLM": Family("qwen3_5_text", qwen3_5.parse, qwen3_5.Block, qwen3_5.weights),
    "Qwen3_5MoeForCausalLM": Family("qwen3_5_moe_text", qwen3_5_moe.parse, qwen3_5_moe.Block, qwen3_5_moe.weights),
    "Qwen3MoeForCausalLM": Family("qwen3_moe", qwen3_moe.parse, qwen3_moe.Block, qwen3_moe.weights),
}
_TEXT_ALONE = {
    "Gemma3ForCausalLM": "Gemma3Text",
    "Qwen3_5ForCausalLM": "Qwen3_5Text",
    "Qwen3_5MoeForCausalLM": "Qwen3_5MoeText",
}
"""Architectures whose other classes in transformers are called otherwise, and how their names begin."""


def _named(suffix: str) -> dict[str, str]:
    """Each family's class with another ending -> its causal one."""
    return {_TEXT_ALONE.get(name, name.removesuffix("ForCausalLM")) + suffix: name for name in GENERATIVE}


CLASSIFIERS = {
    name: causal
    for name, causal in _named("ForSequenceClassification").items()
    if causal != "Qwen3_5MoeForCausalLM"  # transformers has none
}
"""Architecture -> the causal one with the same layers."""
BASES = _named("Model")
"""Architecture without a head -> the causal one with the same layers."""
ENCODERS: dict[str, Family] = {
    "BertForSequenceClassification": Family(
        "bert",
        bert.parse,
        bert.Block,
        bert.weights,
        ends=encoder.EmbeddingAndClassifier,
        ignored=bert.IGNORED_TENSORS,
    ),
    "XLMRobertaForSequenceClassification": Family(
        "xlm-roberta",
        bert.parse_xlm_roberta,
        bert.Block,
        bert.weights_of_xlm_roberta,
        ends=encoder.EmbeddingAndClassifier,
        ignored=bert.IGNORED_OF_XLM_ROBERTA,
    ),
    "ModernBertForSequenceClassification": Family(
        "modernbert",
        modernbert.parse,
        modernbert.Block,
        modernbert.weights,
        ends=modernbert.Ends,
        ignored=modernbert.IGNORED_TENSORS,
    ),
    "LayaDecisionModel": Family(
        "modernbert", laya.parse, modernbert.Block, laya.weights, ends=laya.Ends, ignored=laya.IGNORED_TENSORS
    ),
}
"""Classifiers and decision models whose layers are no causal model's."""
FAMILIES = {
    **GENERATIVE,
    **{name: replace(GENERATIVE[causal], classifies=True) for name, causal in CLASSIFIERS.items()},
    **ENCODERS,
}

KNOWN = (*FAMILIES, *ALIASES, *WRAPPERS)
"""All architectures that are loaded, those that only wrap another included."""


@dataclass(frozen=True, slots=True)
class Abstract:
    """A model without its weights: how to merge it, and the shapes of its parameters.

    Attributes:
        ends: graph and state of ``Ends``.
        block: graph and state of one layer; all layers are alike.
    """

    ends: tuple[nnx.GraphDef[Any], nnx.State[Any, Any]]
    block: tuple[nnx.GraphDef[Any], nnx.State[Any, Any]]


def from_hf(config: Mapping[str, Any], trusted: Collection[str] = ()) -> ModelConfig:
    """Read a config by the architecture's own parser, and refuse what it did not read.

    Args:
        config: ``config.json``; transformers v4's keys (``rope_theta``, ``rope_scaling``, ``torch_dtype``) and v5's
            (``rope_parameters``, ``dtype``) alike.
        trusted: keys that the user says change nothing, see ``Fields``.

    Raises:
        ConfigError: an architecture, key, value or rope type that is not implemented, or sizes that do not fit.
    """
    config = unwrapped(config, trusted)
    names = config.get("architectures")
    for architecture, family in FAMILIES.items():
        if names == [architecture]:
            if (config.get("model_type") or family.model_type) != family.model_type:
                raise ConfigError(
                    f"architectures is [{architecture!r}] and model_type {config['model_type']!r}, by which "
                    f"transformers chooses the model: they contradict each other. Write {family.model_type!r}, or the "
                    "architecture of the other, whichever the weights are of"
                )
            methods.check(config)
            fields = Fields(config, trusted=trusted)
            parsed = replace(family.parse(fields), architecture=architecture, notes=tuple(fields.notes))
            return with_classes(parsed, fields, family.pad_token_id) if family.classifies else parsed
    raise ConfigError(f"architectures is {names!r}; implemented: {', '.join(KNOWN)} (exactly one).{_hint(names)}")


def _hint(names: object) -> str:
    """What may help with an architecture that is not known."""
    name = str(names)
    if any(base in name for base in BASES):
        return " A model without its head is loaded by the head that is stored beside it"
    if "ForConditionalGeneration" in name:
        return (
            " If the text part of this model is one of them, save it as a model of its own: transformers' "
            "AutoModelForCausalLM.from_pretrained(MODEL).save_pretrained(FOLDER) writes it where it can"
        )
    return ""


def build(config: ModelConfig, *, dtype: jnp.dtype, implementation: str) -> tuple[Family, Abstract]:
    """The family and its modules, shapes only; the config parser has refused unknown names."""
    family = FAMILIES[config.architecture]
    ends = nnx.eval_shape(lambda: family.ends(config, dtype=dtype))
    block = nnx.eval_shape(lambda: family.block(config, dtype=dtype, implementation=implementation))
    return family, Abstract(nnx.split(ends), nnx.split(block))
