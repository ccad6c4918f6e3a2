"""The gated delta rule with its convolution against transformers' chunked torch function, segment by segment."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.config import Recurrence
from model.cpu import build
from model.delta import Packed, Snapshots, mix

torch = pytest.importorskip("torch")

SIZES = Recurrence(parts=2, key_heads=2, value_heads=4, key_width=12, value_width=10, taps=4)
LENGTHS = (1, 2, 70, 3, 20, 1, 64)
"""Of segments; the last chunks of the third begin another, and the prefix leaves what the first tokens look back at."""
PREFIX = 75
CALL = 192


class Given:
    """Random inputs of a prefix and of segments after it, each of them whole."""

    def __init__(self, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.taps = rng.normal(0, 0.5, (SIZES.taps, SIZES.channels)).astype(np.float32)
        self.prefix, *self.segments = (self._one(rng, length) for length in (PREFIX, *LENGTHS))

    def _one(self, rng: np.random.Generator, length: int) -> tuple[np.ndarray, ...]:
        mixed = rng.normal(0, 1, (length, SIZES.channels))
        decays = -rng.uniform(0.001, 0.7, (length, SIZES.value_heads))
        rates = rng.uniform(0.05, 0.95, (length, SIZES.value_heads))
        return tuple(part.astype(np.float32) for part in (mixed, decays, rates))


def built() -> bool:
    kept: Any = jax.config
    folder = kept.jax_compilation_cache_dir
    return build.load(folder and Path(folder)) is not None


def by_transformers(given: Given, segment: tuple[np.ndarray, ...]) -> tuple[np.ndarray, np.ndarray]:
    """What the segment's tokens read after the prefix, and the memories after them."""
    from transformers.models.qwen3_5 import modeling_qwen3_5 as reference

    mixed, decays, rates = (np.concatenate(parts) for parts in zip(given.prefix, segment, strict=True))
    taps = torch.tensor(given.taps.T.copy())[:, None]
    rows = torch.nn.functional.pad(torch.tensor(mixed).T[None], (SIZES.taps - 1, 0))
    convolved = torch.nn.functional.silu(torch.nn.functional.conv1d(rows, taps, groups=SIZES.channels))[0].T
    keys = SIZES.key_heads * SIZES.key_width
    q, k, v = torch.split(convolved, [keys, keys, SIZES.values], dim=-1)
    rule: Any = reference.torch_chunk_gated_delta_rule
    read, memories = rule(
        q.reshape(1, len(mixed), SIZES.key_heads, -1),
        k.reshape(1, len(mixed), SIZES.key_heads, -1),
        v.reshape(1, len(mixed), SIZES.value_heads, -1),
        g=torch.tensor(decays)[None],
        beta=torch.tensor(rates)[None],
        output_final_state=True,
        use_qk_l2norm_in_kernel=True,
    )
    return read[0, PREFIX:].numpy(), memories[0].numpy()


def run(
    given: Given,
    segments: list[tuple[np.ndarray, ...]],
    snapshots: Snapshots,
    start: int,
    slots: tuple[int, int],
    **how: Any,
):
    """``mix`` of one call, jitted; segments after a prefix of ``start`` tokens."""
    lengths = [len(mixed) for mixed, *_ in segments]
    padding = CALL - sum(lengths)
    parts = [
        jnp.pad(np.concatenate(part), ((0, padding), (0, 0)), constant_values=9) for part in zip(*segments, strict=True)
    ]
    places = np.concatenate([start + np.arange(length) for length in lengths])
    numbers = np.pad(np.repeat(np.arange(len(lengths)), lengths), (0, padding), constant_values=-1)
    packed = Packed(
        jnp.asarray(numbers, jnp.int32)[None],
        jnp.asarray(np.pad(places, (0, padding)), jnp.int32),
        jnp.zeros(CALL, jnp.int32),
        jnp.asarray([start], jnp.int32),
        jnp.asarray([slots], jnp.int32),
        snapshots,
    )

    with jax.default_matmul_precision("highest"):
        return (_kept if how["keep"] else _read)(snapshots, packed._replace(snapshots=None), *parts, given.taps, **how)


def _mixed(snapshots: Snapshots, packed: Packed, *parts: Any, **how: Any) -> Any:
    return mix(*parts, packed._replace(snapshots=snapshots), jnp.int32(1), 1, sizes=SIZES, **how)


_read = jax.jit(_mixed, static_argnames=("native", "keep"))
_kept = jax.jit(_mixed, static_argnames=("native", "keep"), donate_argnums=0)


def empty() -> Snapshots:
    inputs = jnp.zeros((4, 3, SIZES.parts, SIZES.taps - 1, SIZES.channels))
    return Snapshots(inputs, jnp.zeros((4, 3, SIZES.parts, SIZES.value_heads, SIZES.key_width, SIZES.value_width)))


def after_prefix(given: Given, pieces: list[int], *, native: bool) -> Snapshots:
    """The prefix's snapshot in slot 2, through slot 3, computed in pieces of so many tokens."""
    snapshots, start, begin = empty(), 0, 0
    for number, length in enumerate(pieces):
        end = 2 if number == len(pieces) - 1 else 3
        piece = tuple(part[start : start + length] for part in given.prefix)
        _, snapshots = run(given, [piece], snapshots, start, (begin, end), native=native, keep=True)
        start, begin = start + length, end
    assert start == PREFIX
    return snapshots


@pytest.fixture(scope="module", params=["the CPU's kernel", "by XLA"])
def native(request: pytest.FixtureRequest) -> bool:
    if request.param == "by XLA":
        return False
    if not built():
        pytest.skip("no C++ compiler is installed")
    return True


def test_segments_after_a_prefix_in_pieces_equal_transformers(native: bool) -> None:
    given = Given()
    snapshots = after_prefix(given, [2, 1, 65, 7], native=native)
    memories = np.array(snapshots.memories)
    assert not memories[0].any(), "what is before the first token stays zeros"
    assert not memories[:, [0, 2]].any()
    assert not memories[:, :, 0].any()
    wanted = [by_transformers(given, segment) for segment in given.segments]
    _, left = by_transformers(given, tuple(part[:0] for part in given.prefix))
    np.testing.assert_allclose(memories[2, 1, 1], left, rtol=0, atol=1e-5)
    read, kept = run(given, given.segments, snapshots, PREFIX, (2, 0), native=native, keep=False)
    assert kept is None
    np.testing.assert_allclose(read[: sum(LENGTHS)], np.concatenate([each for each, _ in wanted]), rtol=0, atol=1e-5)
    assert not np.array(read[sum(LENGTHS) :]).any(), "padding reads nothing"


def test_a_token_that_is_not_finite_spoils_no_other_segment(native: bool) -> None:
    given = Given(1)
    snapshots = after_prefix(given, [PREFIX], native=native)
    clean, _ = run(given, given.segments, snapshots, PREFIX, (2, 0), native=native, keep=False)
    given.segments[2][0][5] = np.nan
    broken, _ = run(given, given.segments, snapshots, PREFIX, (2, 0), native=native, keep=False)
    first, last = sum(LENGTHS[:2]), sum(LENGTHS[:3])
    assert np.isnan(broken[first + 5]).all()
    np.testing.assert_array_equal(np.delete(broken, np.s_[first:last], 0), np.delete(clean, np.s_[first:last], 0))


def test_what_a_broken_prefix_leaves_to_the_convolution_spoils_the_first_tokens(native: bool) -> None:
    given = Given(1)
    given.prefix[0][-2] = np.nan
    snapshots = after_prefix(given, [PREFIX], native=native)
    read, _ = run(given, given.segments, snapshots, PREFIX, (2, 0), native=native, keep=False)
    offsets = np.concatenate([np.arange(length) for length in LENGTHS])
    spoilt = np.isnan(np.array(read[: sum(LENGTHS)])).all(axis=(1, 2))
    if native:  # there it stays in the memory, too
        assert spoilt.all()
    else:
        np.testing.assert_array_equal(spoilt, offsets < SIZES.taps - 2)


def test_the_kernel_s_bits_do_not_depend_on_where_a_prefix_is_cut() -> None:
    if not built():
        pytest.skip("no C++ compiler is installed")
    given = Given(2)
    whole, cut = (after_prefix(given, pieces, native=True) for pieces in ([PREFIX], [2, 1, 65, 7]))
    for one, other in zip(whole, cut, strict=True):
        np.testing.assert_array_equal(one[2], other[2])
    together, _ = run(given, given.segments, whole, PREFIX, (2, 0), native=True, keep=False)
    at = 0
    for segment, length in zip(given.segments, LENGTHS, strict=True):
        alone, _ = run(given, [segment], cut, PREFIX, (2, 0), native=True, keep=False)
        np.testing.assert_array_equal(alone[:length], together[at : at + length])
        at += length
