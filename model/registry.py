"""Hugging Face architecture name -> how to read its config, build it and load its weights."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from flax import nnx

from model import llama
from model.checkpoint import Target
from model.config import ModelConfig


@dataclass(frozen=True, slots=True)
class Family:
    """One architecture.

    Attributes:
        ends: builds embedding, last norm and head, with zero weights; see ``llama.Ends`` for its methods.
        block: builds one layer with zero weights; see ``llama.Block``.
        weights: checkpoint tensor names -> places: of ``ends``, or ("blocks", layer, ...) of that layer.
        ignored: patterns of tensors that may be present and mean nothing here.
    """

    ends: Callable[..., nnx.Module]
    block: Callable[..., nnx.Module]
    weights: Callable[[ModelConfig], dict[str, Target]]
    ignored: Callable[[ModelConfig], tuple[str, ...]]


FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": Family(llama.Ends, llama.Block, llama.weights, llama.ignored),
}


@dataclass(frozen=True, slots=True)
class Abstract:
    """A model without its weights: how to merge it, and the shapes of its parameters.

    Attributes:
        ends: graph and state of ``Family.ends``.
        block: graph and state of one layer; all layers are alike.
    """

    ends: tuple[nnx.GraphDef[Any], nnx.State[Any, Any]]
    block: tuple[nnx.GraphDef[Any], nnx.State[Any, Any]]


def build(config: ModelConfig, *, dtype: jnp.dtype, implementation: str) -> tuple[Family, Abstract]:
    """The family and its modules, shapes only; the config parser has refused unknown names."""
    family = FAMILIES[config.architecture]
    ends = nnx.eval_shape(lambda: family.ends(config, dtype=dtype))
    block = nnx.eval_shape(lambda: family.block(config, dtype=dtype, implementation=implementation))
    return family, Abstract(nnx.split(ends), nnx.split(block))
