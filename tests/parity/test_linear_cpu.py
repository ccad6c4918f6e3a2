"""The CPU's matmul kernels against float64."""

import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.config import Activation
from model.cpu import linear
from model.cpu.build import Kernels

pytestmark = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler is installed")


@pytest.fixture(params=["float32", "bfloat16"])
def dtype(request: pytest.FixtureRequest, kernels: Kernels) -> str:
    if request.param == "bfloat16" and not kernels.bfloat16:
        pytest.skip("built for a processor without bfloat16 instructions")
    return request.param


def normal(dtype: str, *shape: int, seed: int = 0) -> np.ndarray:
    """Random values of the dtype."""
    values = np.random.default_rng((seed, *shape)).normal(size=shape)
    return np.array(jnp.asarray(values, jnp.float32).astype(dtype))


# A new function for every call; else jax would reuse the program of another build.


def products(x: np.ndarray, *kernels: np.ndarray) -> list[np.ndarray]:
    widths = [kernel.shape[1] for kernel in kernels]
    packed = [jnp.asarray(linear.pack(kernel)) for kernel in kernels]
    return [np.asarray(y) for y in jax.jit(lambda x, kernels: linear.products(x, kernels, widths))(x, packed)]


@pytest.mark.parametrize("rows", [1, 13, 300])
def test_biases_are_added_to_products_and_before_the_gate(rows: int, dtype: str) -> None:
    """A product without one keeps its bits."""
    x, kernels = normal(dtype, rows, 96), [normal(dtype, 96, 100), normal(dtype, 96, 100, seed=1)]
    packed = [jnp.asarray(linear.pack(kernel)) for kernel in kernels]
    bias = normal("float32", 100)
    first, second = (
        np.asarray(y)
        for y in jax.jit(lambda *a: linear.products(a[0], a[1:3], (100, 100), biases=(None, a[3])))(x, *packed, bias)
    )
    wanted = products(x, *kernels)
    np.testing.assert_array_equal(first, wanted[0])
    np.testing.assert_array_equal(second, wanted[1] + bias)
    gates = jax.jit(lambda *a: linear.gated(*a[:3], 100, "silu", biases=(a[3], None)))(x, *packed, bias)
    through = ACTIVATIONS["silu"](wanted[0].astype(np.float64) + bias) * wanted[1]
    rounding = 2**-8 if dtype == "bfloat16" else 3e-6
    np.testing.assert_allclose(np.asarray(gates).astype(np.float64), through, rtol=rounding, atol=1e-6)


def gated(x: np.ndarray, gate: np.ndarray, up: np.ndarray, activation: Activation = "silu") -> np.ndarray:
    width, packed = gate.shape[1], [jnp.asarray(linear.pack(kernel)) for kernel in (gate, up)]
    return np.asarray(jax.jit(lambda x, kernels: linear.gated(x, *kernels, width, activation))(x, packed))


@pytest.mark.parametrize("rows", [*range(1, 14), 80, 1000])
def test_products_equal_float64(rows: int, dtype: str) -> None:
    """Some weights fill their last panel, and others do not."""
    x, kernels = normal(dtype, rows, 574), [normal(dtype, 574, width) for width in (576, 64, 1, 130)]
    for got, kernel in zip(products(x, *kernels), kernels, strict=True):
        wanted = x.astype(np.float64) @ kernel.astype(np.float64)
        assert got.dtype == np.float32
        magnitudes = np.abs(x).astype(np.float64) @ np.abs(kernel).astype(np.float64)
        assert np.abs(got - wanted).max() < 1e-4
        assert (np.abs(got - wanted) / magnitudes).max() < 4e-7  # a float32's last digit is 1.2e-7


def adapted(
    x: np.ndarray, slots: np.ndarray, kernels: list[np.ndarray], factors: list[tuple[np.ndarray, np.ndarray]]
) -> tuple[list[np.ndarray], np.ndarray]:
    """The products with what adapters add, and those of the first two kernels gated.

    Args:
        factors: for each kernel A [slots, in, rank] and B [slots, rank, out].
    """
    rank, widths = factors[0][0].shape[2], [kernel.shape[1] for kernel in kernels]
    a = [jnp.asarray(np.stack([linear.pack_a(one) for one in each])) for each, _ in factors]
    b = [jnp.asarray(np.stack([linear.pack(one) for one in each])) for _, each in factors]
    packed = [jnp.asarray(linear.pack(kernel)) for kernel in kernels]

    def both(x: jax.Array, slots: jax.Array, packed: list[jax.Array], a: list[jax.Array], b: list[jax.Array]):
        inner = linear.reduced(x, slots, a, rank)
        whole = linear.products(x, packed, widths, linear.Added(slots, inner, b))
        two = linear.Added(slots, inner[:2], b[:2])
        return whole, linear.gated(x, packed[0], packed[1], widths[0], "silu", two)

    whole, gates = jax.jit(both)(x, jnp.asarray(slots, jnp.int32), packed, a, b)
    return [np.asarray(y) for y in whole], np.asarray(gates)


@pytest.mark.parametrize("rank", [16, 48])
@pytest.mark.parametrize("rows", [1, 13, 300])
def test_products_with_each_rows_own_adapter_equal_float64(rows: int, rank: int, dtype: str) -> None:
    x, kernels = normal(dtype, rows, 96), [normal(dtype, 96, width) for width in (100, 100, 1)]
    kernels[1] = normal(dtype, 96, 100, seed=1)
    factors = [(normal(dtype, 5, 96, rank), normal(dtype, 5, rank, kernel.shape[1])) for kernel in kernels]
    slots = np.random.default_rng(0).integers(-1, 5, rows)
    slots[rows // 2 :] = np.sort(slots[rows // 2 :])  # runs of one adapter, and none
    whole, gates = adapted(x, slots, kernels, factors)
    for number, (got, kernel, (a, b)) in enumerate(zip(whole, kernels, factors, strict=True)):
        wide = x.astype(np.float64)
        inner = np.einsum("ri,rik->rk", wide, a.astype(np.float64)[slots])
        wanted = (
            wide @ kernel.astype(np.float64)
            + np.einsum("rk,rko->ro", inner, b.astype(np.float64)[slots]) * (slots >= 0)[:, None]
        )
        rounding = 0.5 if dtype == "bfloat16" else 1e-3  # of x A, which is up to 40, times the sum of B
        assert np.abs(got - wanted).max() < rounding
        (plain,) = products(x, kernel)
        np.testing.assert_array_equal(got[slots < 0], plain[slots < 0])
        if (slots >= 0).any():
            assert np.abs(got - plain)[slots >= 0].max() > 1, number
    wanted = ACTIVATIONS["silu"](whole[0].astype(np.float64)) * whole[1]
    np.testing.assert_allclose(gates.astype(np.float64), wanted, rtol=2**-8 if dtype == "bfloat16" else 3e-6, atol=1e-6)
    for row in {0, rows // 2, rows - 1}:
        alone, gate = adapted(x[row : row + 1], slots[row : row + 1], kernels, factors)
        for got, among in zip([*alone, gate], [*whole, gates], strict=True):
            np.testing.assert_array_equal(got[0], among[row])


SCALE = math.sqrt(2 / math.pi)
ACTIVATIONS = {
    "silu": lambda x: x / (1 + np.exp(-x)),
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(SCALE * (x + 0.044715 * x**3))),
    "gelu": lambda x: 0.5 * x * np.vectorize(math.erfc)(-x / math.sqrt(2)),
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("rows", "width"), [(5, 64), (7, 100), (301, 576)])
def test_gated_equals_float64_after_the_products(rows: int, width: int, activation: Activation, dtype: str) -> None:
    x, gate, up = normal(dtype, rows, 48), normal(dtype, 48, width), normal(dtype, 48, width, seed=1)
    got = gated(x, gate, up, activation)
    gates, ups = (y.astype(np.float64) for y in products(x, gate, up))
    assert gates.max() > 12  # far from 0 on both sides, and near it
    assert gates.min() < -12
    wanted = ACTIVATIONS[activation](gates) * ups
    assert got.dtype == dtype
    rounding = 2**-8 if dtype == "bfloat16" else 3e-6
    # Far below 0, 1 + tanh is the small difference of two numbers near 1.
    absolute = {"silu": 1e-30, "gelu_tanh": 1e-5, "gelu": 1e-5}[activation]
    np.testing.assert_allclose(got.astype(np.float64), wanted, rtol=rounding, atol=absolute)


def activated(x: np.ndarray, kernel: np.ndarray, bias: np.ndarray, activation: Activation) -> np.ndarray:
    packed = jnp.asarray(linear.pack(kernel))
    return np.asarray(jax.jit(lambda *a: linear.activated(*a, activation))(x, packed, bias))


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
@pytest.mark.parametrize(("rows", "width"), [(5, 64), (7, 100), (301, 576)])
def test_activated_equals_float64_after_the_product(rows: int, width: int, activation: Activation, dtype: str) -> None:
    x, kernel, bias = normal(dtype, rows, 48), normal(dtype, 48, width), normal("float32", width)
    x[3] = 0
    got = activated(x, kernel, bias, activation)
    wanted = ACTIVATIONS[activation](products(x, kernel)[0].astype(np.float64) + bias)
    assert got.dtype == dtype
    rounding = 2**-8 if dtype == "bfloat16" else 3e-6
    np.testing.assert_allclose(got.astype(np.float64), wanted, rtol=rounding, atol=3e-6)
    np.testing.assert_array_equal(activated(x[2:5], kernel, bias, activation), got[2:5])


@pytest.mark.parametrize(("rows", "width"), [(1, 6), (70, 100), (1100, 384)])
@pytest.mark.usefixtures("kernels")
def test_layer_norms_equal_float64(rows: int, width: int) -> None:
    x, scale, bias = normal("float32", rows, width) + 2, normal("float32", width), normal("float32", width, seed=1)
    through = jax.jit(lambda *a: linear.layer_norms(*a, 0.01))
    wanted = x.astype(np.float64) - x.mean(axis=1, keepdims=True, dtype=np.float64)
    wanted = wanted / np.sqrt((wanted**2).mean(axis=1, keepdims=True) + 0.01) * scale + bias
    got = np.asarray(through(x, scale, bias))
    np.testing.assert_allclose(got, wanted, rtol=3e-6, atol=3e-6)
    np.testing.assert_array_equal(np.asarray(through(x[-1:], scale, bias)), got[-1:])
    more = normal("float32", rows, width, seed=2)
    of_sum = jax.jit(lambda x, more, *a: linear.layer_norms(x, *a, 0.01, more))(x - more, more, scale, bias)
    np.testing.assert_array_equal(np.asarray(of_sum), np.asarray(through(x - more + more, scale, bias)))


def test_a_row_has_the_same_bits_among_any_others(dtype: str) -> None:
    x, kernel = normal(dtype, 101, 96), normal(dtype, 96, 70)
    (among,) = products(x, kernel)
    for first, last in ((0, 1), (50, 53), (90, 101)):
        (alone,) = products(x[first:last], kernel)
        np.testing.assert_array_equal(alone, among[first:last])


def test_a_broken_row_harms_only_itself(dtype: str) -> None:
    x, kernel = normal(dtype, 12, 96), normal(dtype, 96, 70)
    whole = np.concatenate([*products(x, kernel), gated(x, kernel, kernel)], axis=1)
    for value in (np.nan, np.inf):
        spoilt = x.copy()
        spoilt[4] = value
        got = np.concatenate([*products(spoilt, kernel), gated(spoilt, kernel, kernel)], axis=1)
        assert not np.isfinite(got[4]).any()
        np.testing.assert_array_equal(np.delete(got, 4, axis=0), np.delete(whole, 4, axis=0))


def test_rows_of_zeros_give_zeros(dtype: str) -> None:
    x, kernel = normal(dtype, 40, 96), normal(dtype, 96, 70)
    whole = np.concatenate([*products(x, kernel), gated(x, kernel, kernel)], axis=1)
    zeros = x.copy()
    zeros[3:30:2] = 0
    zeros[8:26] = -0.0
    zeros[8, 95] = x[8, 95]  # all but one
    got = np.concatenate([*products(zeros, kernel), gated(zeros, kernel, kernel)], axis=1)
    empty = ~zeros.any(axis=1)
    assert not got[empty].any()
    assert got[8].all()
    rest = ~empty
    rest[8] = False
    np.testing.assert_array_equal(got[rest], whole[rest])


def argmax(x: np.ndarray, head: np.ndarray, softcap: float | None = None) -> list[np.ndarray]:
    return [np.asarray(y) for y in jax.jit(lambda x, head: linear.argmax(x, head, softcap))(x, head)]


@pytest.fixture(params=["float32", "bfloat16"])
def head_dtype(request: pytest.FixtureRequest, kernels: Kernels) -> str:  # noqa: ARG001
    """A head is multiplied in both on all processors."""
    return request.param


@pytest.mark.parametrize("softcap", [None, 8.0])
@pytest.mark.parametrize(("rows", "vocabulary"), [(1, 5), (2, 1000), (17, 385), (130, 2000)])
def test_normalizers_and_highest_logits_equal_float64(
    rows: int, vocabulary: int, softcap: float | None, head_dtype: str
) -> None:
    x, head = normal(head_dtype, rows, 96), normal(head_dtype, vocabulary, 96)
    head[vocabulary // 2] *= 4  # a logit far above the others, now and then
    logits = x.astype(np.float64) @ head.astype(np.float64).T
    if softcap is not None:
        logits = softcap * np.tanh(logits / softcap)
    highest = logits.max(axis=1)
    wanted = highest + np.log(np.exp(logits - highest[:, None]).sum(axis=1))
    got, ids, logit = found = argmax(x, head, softcap)
    np.testing.assert_allclose(got, wanted, rtol=5e-7, atol=2e-6)
    np.testing.assert_allclose(logit, highest, rtol=5e-7, atol=2e-6)
    np.testing.assert_allclose(np.take_along_axis(logits, ids[:, None], axis=1)[:, 0], highest, rtol=5e-7, atol=2e-6)
    for row in (0, rows - 1):
        for own, all_rows in zip(argmax(x[row : row + 1], head, softcap), found, strict=True):
            np.testing.assert_array_equal(own, all_rows[row : row + 1])


def test_of_equal_logits_the_first_is_found(head_dtype: str) -> None:
    x, head = normal(head_dtype, 70, 96), normal(head_dtype, 500, 96)
    _, once, _ = argmax(x, head)
    _, again, _ = argmax(x, np.concatenate([head, head]))
    np.testing.assert_array_equal(again, once)


def top(
    x: np.ndarray, head: np.ndarray, count: int, softcap: float | None = None, scale: float = 1, most: int | None = None
) -> list[np.ndarray]:
    """The normalisers, ids and logits.

    Args:
        most: that the program has room for; None: as many as ``count``.
    """
    wanted, room = jnp.asarray([count, len(x)], jnp.int32), most or count
    call = jax.jit(lambda x, head, wanted, scale: linear.top(x, head, wanted, scale, room, softcap))
    normalizers, ids, logits = call(x, head, wanted, jnp.float32(scale))
    return [np.asarray(y) for y in (normalizers, ids[:, :count], logits[:, :count])]


@pytest.mark.parametrize(
    ("rows", "vocabulary", "count", "softcap"), [(1, 5, 5, 8.0), (17, 385, 300, 8.0), (130, 9000, 40, None)]
)
def test_the_highest_logits_equal_float64(
    rows: int, vocabulary: int, count: int, softcap: float | None, head_dtype: str
) -> None:
    x, head = normal(head_dtype, rows, 96), normal(head_dtype, vocabulary, 96)
    logits = x.astype(np.float64) @ head.astype(np.float64).T
    if softcap is not None:
        logits = softcap * np.tanh(logits / softcap)
    scaled = logits / 2
    got, ids, found = top(x, head, count, softcap, scale=0.5, most=count + 3)
    highest = scaled.max(axis=1)
    np.testing.assert_allclose(
        got, highest + np.log(np.exp(scaled - highest[:, None]).sum(axis=1)), rtol=5e-7, atol=2e-6
    )
    # Some are small differences of large products.
    np.testing.assert_allclose(found, -np.sort(-scaled, axis=1)[:, :count], rtol=5e-7, atol=1e-5)
    np.testing.assert_allclose(found, np.take_along_axis(scaled, ids.astype(int), axis=1), rtol=5e-7, atol=1e-5)
    assert all(len(set(row)) == count for row in ids.tolist())
    assert (np.diff(found, axis=1) <= 0).all()
    for own, all_rows in zip(top(x[rows - 1 :], head, count, softcap, scale=0.5), (got, ids, found), strict=True):
        np.testing.assert_array_equal(own, all_rows[rows - 1 :])


def test_of_equal_logits_the_first_are_among_the_highest(head_dtype: str) -> None:
    """Whichever threads see them, and wherever the head's blocks end."""
    x, head = normal(head_dtype, 70, 96), normal(head_dtype, 500, 96)
    _, once, _ = top(x, head, 20)
    _, many, logits = top(x, np.concatenate([head] * 12), 240)
    np.testing.assert_array_equal(many[:, ::12], once)
    np.testing.assert_array_equal(
        many.reshape(70, 20, 12) - once[:, :, None], np.tile(500 * np.arange(12), (70, 20, 1))
    )
    assert (np.diff(logits.reshape(70, 20, 12)) == 0).all()
    _, some, _ = top(x, np.concatenate([head] * 12), 18)
    np.testing.assert_array_equal(some, many[:, :18])


def test_a_scale_of_one_and_the_highest_change_no_normalizer(head_dtype: str) -> None:
    x, head = normal(head_dtype, 70, 96), normal(head_dtype, 5000, 96)
    normalizers, ids, highest = argmax(x, head, 8.0)
    got, top_ids, top_logits = top(x, head, 7, 8.0)
    np.testing.assert_array_equal(got, normalizers)
    np.testing.assert_array_equal(top_ids[:, 0], ids)
    np.testing.assert_array_equal(top_logits[:, 0], highest)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("width", [1, 7, 48, 576, 1030])
def test_dots_equal_float64(width: int) -> None:
    a, b = normal("float32", 300, width), normal("float32", 300, width, seed=1)
    got = np.asarray(jax.jit(lambda a, b: linear.dots(a, b))(a, b))
    magnitudes = (np.abs(a).astype(np.float64) * np.abs(b)).sum(axis=1)
    assert (np.abs(got - (a.astype(np.float64) * b).sum(axis=1)) / magnitudes).max() < 4e-7


def test_a_broken_state_has_no_normalizer_and_harms_no_other(head_dtype: str) -> None:
    x, head = normal(head_dtype, 9, 96), normal(head_dtype, 500, 96)
    whole, _, whole_highest = argmax(x, head)
    x[4] = np.nan
    got, ids, highest = argmax(x, head)
    assert np.isnan(got[4])
    assert np.isnan(highest[4])
    assert 0 <= ids[4] < 500
    np.testing.assert_array_equal(np.delete(highest, 4), np.delete(whole_highest, 4))
    np.testing.assert_array_equal(np.delete(got, 4), np.delete(whole, 4))


def test_a_dtype_without_instructions_is_refused(kernels: Kernels) -> None:
    if kernels.bfloat16:
        pytest.skip("this build has bfloat16 instructions")
    with pytest.raises(jax.errors.JaxRuntimeError, match="not multiplied on this processor"):
        products(normal("bfloat16", 2, 8), normal("bfloat16", 8, 8))
