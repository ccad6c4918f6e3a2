"""Hugging Face architecture name -> how to read its config, build it and load its weights."""

from collections.abc import Callable
from dataclasses import dataclass

import jax.numpy as jnp
from flax import nnx

from model import llama
from model.checkpoint import Target
from model.config import ModelConfig


@dataclass(frozen=True, slots=True)
class Family:
    """One architecture.

    Attributes:
        module: builds the model with zero weights; called abstractly, so nothing is allocated.
        weights: checkpoint tensor names -> places in the module.
        ignored: patterns of tensors that may be present and mean nothing here.
    """

    module: Callable[..., nnx.Module]
    weights: Callable[[ModelConfig], dict[str, Target]]
    ignored: Callable[[ModelConfig], tuple[str, ...]]


FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": Family(llama.Llama, llama.weights, llama.ignored),
}


def build(config: ModelConfig, *, dtype: jnp.dtype, implementation: str) -> tuple[Family, nnx.Module]:
    """The family and an abstract module (shapes only) of a config; the config parser has refused unknown names."""
    family = FAMILIES[config.architecture]
    module = nnx.eval_shape(lambda: family.module(config, dtype=dtype, implementation=implementation))
    return family, module
