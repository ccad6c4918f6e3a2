"""Architectures that only wrap a family, models without their head, and heads that the tensors decide."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from model.families import heads, wrappers
from model.families.registry import BASES, CLASSIFIERS, from_hf
from model.fields import ConfigError
from model.tensors.adapters import Adapter
from model.tensors.folder import Opened
from tests.tiny_families import CONFIGS, WRAPPED, config_of, wrapped_config

ADAPTER = Adapter("mine", "base", True, 8, 16.0, {}, {}, False, ("score",))


class Held:
    """A tensor of which only the shape is asked."""

    dtype, file = "F32", "model.safetensors"

    def __init__(self, *shape: int) -> None:
        self.shape = shape

    def read(self, cut: tuple[slice, ...]) -> np.ndarray:
        raise NotImplementedError


def stored(*names: str, classes: int = 3, adapter: Adapter | None = None) -> Opened:
    return Opened(Path("folder"), {name: Held(classes, 48) for name in names}, [], adapter)


@pytest.mark.parametrize("architecture", WRAPPED)
def test_the_text_part_is_read_as_the_family_itself_would_be(architecture: str) -> None:
    family, wrapper = WRAPPED[architecture], wrappers.WRAPPERS[architecture]
    wrapped = wrapped_config(architecture)
    own = config_of(family) | {"architectures": [wrapper.text], "tie_word_embeddings": wrapper.tied}
    assert from_hf(wrapped) == from_hf(own)
    assert wrappers.note(wrapped) == f"the text part of {architecture} alone is used: it reads no images"
    assert wrappers.note(own) is None
    untied = from_hf({**wrapped, "tie_word_embeddings": False})
    assert not untied.tied_head


def test_keys_that_google_leaves_out_are_those_of_the_class() -> None:
    """The text part of gemma-3-4b-it as it is published: six keys."""
    from transformers import Gemma3TextConfig

    text = {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    }
    config = from_hf({**wrapped_config("Gemma3ForConditionalGeneration"), "text_config": text})
    whole = Gemma3TextConfig(**text).to_dict()
    assert config == from_hf({**whole, "architectures": ["Gemma3ForCausalLM"]})
    assert (config.vocab_size, config.heads, config.kv_heads, config.head_width) == (262_208, 8, 4, 256)
    none = {**wrapped_config("Gemma3ForConditionalGeneration"), "text_config": {"model_type": "gemma3_text"}}
    assert from_hf(none) == from_hf({**Gemma3TextConfig().to_dict(), "architectures": ["Gemma3ForCausalLM"]})


@pytest.mark.parametrize(
    ("architecture", "changes", "named"),
    [
        ("Gemma3ForConditionalGeneration", {"attention_multiplier": 2.0}, "attention_multiplier=2.0"),
        ("Gemma3ForConditionalGeneration", {"model_type": "gemma3n"}, "'gemma3n'"),
        ("Gemma3ForConditionalGeneration", {"text_config": None}, "text_config"),
        ("Gemma3ForConditionalGeneration", {"text_config": {"model_type": "gemma4_text"}}, "'gemma4_text'"),
        ("Mistral3ForConditionalGeneration", {"text_config": {"model_type": "ministral3"}}, "'ministral3'"),
    ],
)
def test_another_text_part_is_refused_by_name(architecture: str, changes: Mapping[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        from_hf({**wrapped_config(architecture), **changes})


@pytest.mark.parametrize(
    ("name", "model_type"), [("LLaMAForCausalLM", "llama"), ("YiForCausalLM", "Yi"), ("YiForCausalLM", "yi")]
)
def test_other_names_of_llama(name: str, model_type: str) -> None:
    config = {**config_of("llama"), "architectures": [name], "model_type": model_type}
    assert from_hf(config) == from_hf(config_of("llama"))
    code = {"auto_map": {"AutoModelForCausalLM": "modeling_yi.YiForCausalLM"}}
    assert from_hf({**config, **code}) == from_hf(config_of("llama"))
    with pytest.raises(ConfigError, match=f"{name}.*'mistral'.*contradict"):
        from_hf({**config, "model_type": "mistral"})


@pytest.mark.parametrize("family", [family for family in CONFIGS if family != "phi3-longrope"])
def test_a_model_without_its_head_takes_the_one_that_is_stored(family: str) -> None:
    causal = config_of(family)["architectures"][0]
    base = next(name for name, its in BASES.items() if its == causal)
    classifier = next((name for name, its in CLASSIFIERS.items() if its == causal), None)
    config = {**config_of(family), "architectures": [base]}
    assert from_hf(heads.decided(config, stored("lm_head.weight"))).architecture == causal
    if classifier is None:
        with pytest.raises(ConfigError, match=r"no tensor is a head \(lm_head.weight\)"):
            heads.decided(config, stored("score.weight"))
        return
    parsed = from_hf(heads.decided(config, stored("score.weight", classes=5)))
    assert (parsed.architecture, parsed.classes) == (classifier, 5)
    with pytest.raises(ConfigError, match="embedder"):
        heads.decided(config, stored("model.norm.weight"))
    with pytest.raises(ConfigError, match=f"{causal} or {classifier}"):
        heads.decided(config, stored("lm_head.weight", "score.weight"))
    with pytest.raises(ConfigError, match="without its head"):
        from_hf(config)


def test_base_names_are_those_of_transformers() -> None:
    import transformers

    for base, causal in BASES.items():
        head = getattr(transformers, causal)
        assert getattr(transformers, base).config_class is head.config_class or base == "Gemma3TextModel"


def test_an_adapter_of_a_classifier_makes_its_base_one() -> None:
    config = config_of("qwen2")
    parsed = from_hf(heads.decided(config, stored("score.weight", "lm_head.weight", classes=1, adapter=ADAPTER)))
    assert (parsed.architecture, parsed.classes) == ("Qwen2ForSequenceClassification", 1)
    with pytest.raises(ConfigError, match=r"mine.*score"):
        heads.decided(config, stored("lm_head.weight", adapter=ADAPTER))


@pytest.mark.parametrize(
    ("keys", "rows", "classes"),
    [
        ({"num_labels": 1, "id2label": {"0": "a", "1": "b"}}, 1, 1),
        ({"num_labels": 1, "id2label": {"0": "a", "1": "b"}}, 2, 2),
        ({"num_labels": 1, "id2label": {"0": "a", "1": "b"}}, 3, 2),  # then the tensor is refused by its shape
        ({"id2label": {"0": "a", "1": "b"}}, 1, 2),
        ({"num_labels": 3}, 3, 3),
    ],
)
def test_the_tensor_decides_where_the_keys_contradict_each_other(
    keys: Mapping[str, Any], rows: int, classes: int, caplog: pytest.LogCaptureFixture
) -> None:
    config = {**config_of("qwen2"), "architectures": ["Qwen2ForSequenceClassification"], **keys}
    with caplog.at_level(logging.WARNING, "model.families.heads"):
        assert from_hf(heads.decided(config, stored("score.weight", classes=rows))).classes == classes
    assert ("num_labels: 1; score.weight has" in caplog.text) == (len(keys) == 2 and rows < 3)


def test_the_text_part_of_an_unknown_model_may_be_one_of_these() -> None:
    with pytest.raises(ConfigError, match="save it as a model of its own"):
        from_hf({**config_of("llama"), "architectures": ["OtherForConditionalGeneration"]})
