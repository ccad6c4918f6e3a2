"""The layout that follows from a model and the platform's sizes."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

from model import plan
from model.families.registry import from_hf
from model.sizes import BY_PLATFORM, Sizes, layout

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


@pytest.mark.parametrize(
    ("width", "ff_width", "heads", "prefix", "expected"),
    [
        (1024, 3072, 16, 2000, ["32x128", "32x128", "16x128", "4x128"]),  # Qwen3-0.6B
        (1024, 3072, 16, 8000, ["8x512", "8x512", "4x512"]),
        (4096, 14336, 32, 8000, ["8x512", "8x512", "4x512"]),  # Llama-3.1-8B
        (4096, 14336, 32, 128, ["6x768", "6x768", "8x128"]),  # by its matmuls alone
    ],
)
def test_bins_are_wider_where_attention_is_a_small_part_of_a_layer_or_each_token_sees_a_long_prefix(
    width: int, ff_width: int, heads: int, prefix: int, expected: list[str]
) -> None:
    """500 items of 20: six to a bin of 128, which leaves 8 free, 25 to one of 512, which leaves 12,
    or 38 to one of 768, which leaves 8."""
    config = from_hf(
        SMALL
        | {
            "hidden_size": width,
            "intermediate_size": ff_width,
            "num_attention_heads": heads,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 16384,
        }
    )
    laid = layout(config, BY_PLATFORM["tpu"], dtype=jnp.dtype(jnp.bfloat16), implementation="fused")
    segments = plan.Segments.of([plan.Segment(number, prefix, prefix + 20, 1) for number in range(500)])
    assert [str(call.shape) for call in laid.calls([plan.Group(0, prefix, segments)])] == expected


@pytest.mark.parametrize(
    ("shards", "by_tokens", "most", "chunk"),
    [(4, False, 4608, 2048), (4, True, 4608, 4096), (8, True, 8448, 8192), (8, False, 4608, 2048)],
)
def test_calls_are_large_enough_to_be_divided_among_devices(
    shards: int, by_tokens: bool, most: int, chunk: int
) -> None:
    config = from_hf(SMALL | {"max_position_embeddings": 2**14})
    part = replace(config, heads=1, kv_heads=1, shards=shards, by_tokens=by_tokens)
    laid = layout(part, BY_PLATFORM["tpu"], dtype=jnp.dtype(jnp.bfloat16), implementation="fused")
    assert (max(shape.tokens for shape in laid.ladder), laid.sizes.chunks[-1]) == (most, chunk)
    assert laid.divided_tokens == 1024 * shards


def test_a_fold_s_tokens_see_a_bin_up_to_its_last() -> None:
    whole, folded = (plan.Costs(call=0, attention=0.001, fold=fold) for fold in (None, 256))
    for width, positions in [(128, 128), (256, 256), (512, 384), (1024, 640)]:
        shape = plan.Shape(width, 1)
        assert whole.of(shape) == pytest.approx(width * (1 + 0.001 * width))
        assert folded.of(shape) == pytest.approx(width * (1 + 0.001 * positions))


def test_a_prefix_makes_all_tokens_dearer() -> None:
    costs, shape = plan.Costs(call=560, attention=0.001, fold=256), plan.Shape(512, 8)
    unit = 1 + 2000 * 0.001
    assert unit * costs.over(2000).of(shape) == pytest.approx(costs.of(shape) + 4096 * 2000 * 0.001)
