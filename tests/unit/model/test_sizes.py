"""The layout that follows from a model and the platform's sizes."""

import jax.numpy as jnp
import numpy as np
import pytest

from model.families.registry import from_hf
from model.sizes import Sizes, layout

SMALL = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 1024,
}


@pytest.mark.parametrize(("implementation", "kept"), [("native", 306), ("paged", 256)])
def test_a_partial_page_costs_the_tokens_that_are_read_of_it(implementation: str, kept: int) -> None:
    """Four items follow two pages and 50 tokens: ``native`` reads 50 tokens of the third page, ``paged`` all of it."""
    laid = layout(from_hf(SMALL), Sizes(), dtype=jnp.dtype(jnp.float32), implementation=implementation)
    query = np.arange(306) % 100
    sequences = [np.array([*query, item, *range(19)], np.int32) for item in range(4)]
    (group,) = laid.groups(sequences, [[325]] * 4)
    assert (group.prefix_length, len(group.segments)) == (kept, 4)
