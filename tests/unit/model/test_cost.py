"""Costs counted in a compiled program: each trip of a loop, no on-chip memory, and of kernels only their number."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from model.cost import Ragged, Rates, Schedule, dot_flops, hlo_cost

HLO = """
HloModule jit_f, is_scheduled=true

%cut (param_0: bf16[5,64,128], param_1: s32[]) -> bf16[64,128] {
  %param_0 = bf16[5,64,128]{2,1,0:T(8,128)(2,1)} parameter(0)
  %param_1 = s32[]{:T(128)} parameter(1)
  ROOT %slice.1 = bf16[1,64,128]{2,1,0:T(8,128)(2,1)} dynamic-slice(%param_0, %param_1), dynamic_slice_sizes={1,64,128}
}

%body (arg: (s32[], f32[60,100])) -> (s32[], f32[60,100]) {
  %arg = (s32[]{:T(128)}, f32[60,100]{1,0:T(8,128)}, bf16[5,64,128]{2,1,0:T(8,128)(2,1)}) parameter(0)
  %n = s32[]{:T(128)S(1)} get-tuple-element(%arg), index=0
  %x = f32[60,100]{1,0:T(8,128)} get-tuple-element(%arg), index=1
  %w = bf16[5,64,128]{2,1,0:T(8,128)(2,1)} get-tuple-element(%arg), index=2
  %layer = bf16[64,128]{1,0:T(8,128)(2,1)S(1)} fusion(%w, %n), kind=kLoop, calls=%cut, SLICED
  %fused_attention.1 = f32[60,100]{1,0:T(8,128)} custom-call(%x, %layer), custom_call_target="tpu_custom_call"
  ROOT %out = (s32[]{:T(128)}, f32[60,100]{1,0:T(8,128)}) tuple(%n, %fused_attention.1, %w)
}

ENTRY %main (x: f32[60,100], w: bf16[5,64,128]) -> f32[60,100] {
  %x.1 = f32[60,100]{1,0:T(8,128)} parameter(0)
  %w.1 = bf16[5,64,128]{2,1,0:T(8,128)(2,1)} parameter(1)
  %zero = s32[]{:T(128)} constant(0)
  %init = (s32[]{:T(128)}, f32[60,100]{1,0:T(8,128)}) tuple(%zero, %x.1, %w.1)
  %loop = (s32[]{:T(128)}, f32[60,100]{1,0:T(8,128)}) while(%init), condition=%less, body=%body
  %y = f32[60,100]{1,0:T(8,128)} get-tuple-element(%loop), index=1
  %sum = f32[60,100]{1,0:T(8,128)} all-reduce(%y), replica_groups={{0,1}}, to_apply=%add
  ROOT %copy = f32[60,100]{1,0:T(8,128)S(1)} copy(%sum), backend_config={"window_config":{"estimated_cycles":"90"}}
}
""".replace(
    "SLICED",
    'metadata={op_name="jit(f)/while/body/slice" stack_frame_id=2}, '
    'backend_config={"window_config":{"estimated_cycles":"700","iteration_bounds":["2"]}}',
)
X = 64 * 128 * 4
"""Bytes of f32[60,100] with its padding to tiles of 8 x 128."""
LAYER = 64 * 128 * 2
RATES = Rates(1e6, 1e5, 1e3)
PRODUCT = """
%product (param_0: bf16[512,1024], param_1: bf16[1024,256]) -> f32[512,256] {
  %a = bf16[512,1024]{1,0:T(8,128)(2,1)} parameter(0)
  %b = bf16[1024,256]{1,0:T(8,128)(2,1)} parameter(1)
  %c = f32[512,256]{0,1:T(8,128)} convolution(%a, %b), dim_labels=bf_io->bf
  ROOT %d = f32[512,256]{0,1:T(8,128)} negate(%c)
}

ENTRY %main (x: bf16[512,1024], w: bf16[1024,256]) -> f32[512,256] {
  %x = bf16[512,1024]{1,0:T(8,128)(2,1)} parameter(0)
  %w = bf16[1024,256]{1,0:T(8,128)(2,1)} parameter(1)
  ROOT %y = f32[512,256]{0,1:T(8,128)} fusion(%x, %w), kind=kOutput, calls=%product, \
backend_config={"window_config":{"estimated_cycles":"EXPECTED"}}
}
"""


def test_bytes_follow_loops_cuts_and_memory_spaces() -> None:
    cost, kernels = hlo_cost(HLO, trips=5, rates=RATES)
    # Each trip copies one layer of the stack into on-chip memory; then the sum is read, written and read once more.
    assert cost.bytes == 5 * LAYER + 2 * X + X
    assert cost.collective_bytes == X
    assert cost.waited == X / 2e3  # two links of 1,000 bytes a cycle
    assert kernels == 5


def test_a_loop_runs_as_often_as_its_text_says() -> None:
    """As XLA notes it, or as its counter is compared with."""
    loop = "while(%init), condition=%less, body=%body"
    noted = HLO.replace(loop, loop + ', backend_config={"known_trip_count":{"n":"7"},"window_config":{}}')
    assert hlo_cost(noted, trips=5, rates=RATES) == hlo_cost(HLO, trips=7, rates=RATES)
    condition = """
%less (arg.1: (s32[], f32[60,100])) -> pred[] {
  %arg.1 = (s32[]{:T(128)}, f32[60,100]{1,0:T(8,128)}) parameter(0)
  %bound = s32[]{:T(128)} constant(3)
  %m = s32[]{:T(128)} get-tuple-element(%arg.1), index=0
  ROOT %before = pred[]{:T(512)} compare(%m, %bound), direction=LT
}
"""
    assert hlo_cost(condition + HLO, trips=5, rates=RATES) == hlo_cost(HLO, trips=3, rates=RATES)


def test_expected_cycles_follow_loops_and_are_named() -> None:
    """A fusion's own operations are not counted again."""
    cost, _ = hlo_cost(HLO, trips=5, rates=RATES)
    assert cost.cycles == {"slice (layer)": 5 * 700, "copy": 90}
    assert (cost * 2 + cost).cycles == {"slice (layer)": 15 * 700, "copy": 270}


@pytest.mark.parametrize(("expected", "taken"), [(300, 300), (200, 2 * 512 * 1024 * 256 / RATES.flops)])
def test_a_product_takes_no_fewer_cycles_than_the_matrix_units_need(expected: int, taken: float) -> None:
    cost, _ = hlo_cost(PRODUCT.replace("EXPECTED", str(expected)), trips=1, rates=RATES)
    assert cost.cycles == {"y": pytest.approx(taken)}
    assert cost.modelled == expected
    batched = PRODUCT.replace("dim_labels=bf_io->bf", "dim_labels=0bf_0io->0bf")
    cost, _ = hlo_cost(batched.replace("EXPECTED", str(expected)), trips=1, rates=RATES)
    assert cost.cycles == {"y": expected}


def test_an_operation_takes_the_bundles_of_its_finished_program() -> None:
    """Those of its loop as often as that runs; and no less than its bytes need."""

    def finished(name: str, operands: Sequence[str], shapes: Sequence[str]) -> Schedule | None:
        assert (operands, shapes) == (("x", "w"), ["bf16[512,1024]", "bf16[1024,256]", "f32[512,256]"])
        return Schedule(once=7, each=100, seldom=20) if name == "y" else None

    text = PRODUCT.replace('"EXPECTED"', '"50","iteration_bounds":["2","1","3"]')
    cost, _ = hlo_cost(text, trips=1, rates=RATES, finished=finished)
    assert (cost.cycles, cost.modelled, cost.counted) == ({"y": 7 + 6 * 100 + 2 * 20}, 50, 647)
    moved = 2 * (512 * 1024 + 1024 * 256) + 4 * 512 * 256
    cost, _ = hlo_cost(text, trips=1, rates=Rates(1e6, 1e3, 1e3), finished=finished)
    assert cost.cycles == {"y": moved / 1e3}


ALIKE = """
%first (param_0: f32[64,128], param_1: f32[64,128]) -> f32[64,128] {
  %a = f32[64,128]{1,0:T(8,128)} parameter(0)
  %b = f32[64,128]{1,0:T(8,128)} parameter(1)
  ROOT %c = f32[64,128]{1,0:T(8,128)} add(%a, %b), metadata={op_name="jit(f)/add"}
}

%second (param_0.1: f32[64,128], param_1.1: f32[64,128]) -> f32[64,128] {
  %g = f32[64,128]{1,0:T(8,128)} parameter(0)
  %h = f32[64,128]{1,0:T(8,128)} parameter(1)
  ROOT %k = f32[64,128]{1,0:T(8,128)} add(%g, %h), metadata={op_name="jit(g)/add"}
}

ENTRY %main (x: f32[64,128], w: f32[64,128]) -> f32[64,128] {
  %x = f32[64,128]{1,0:T(8,128)} parameter(0)
  %w = f32[64,128]{1,0:T(8,128)} parameter(1)
  %y = f32[64,128]{1,0:T(8,128)} fusion(%x, %w), kind=kLoop, calls=%first, \
backend_config={"window_config":{"estimated_cycles":"700","iteration_bounds":["2"]}}
  ROOT %z = f32[64,128]{1,0:T(8,128)} fusion(%y, %w), kind=kLoop, calls=%second, \
backend_config={"window_config":{"estimated_cycles":"700","iteration_bounds":["2"]}}
}
"""


@pytest.mark.parametrize(
    ("change", "alike"),
    [
        (("", ""), True),
        (("add(%g, %h)", "add(%g, %g)"), False),
        (("add(%g, %h)", "multiply(%g, %h)"), False),
        (("T(8,128)} fusion(%y", "T(8,128)S(1)} fusion(%y"), False),
        (('["2"]}}\n}', '["4"]}}\n}'), False),
    ],
)
def test_of_operations_that_are_alike_one_is_finished(change: tuple[str, str], alike: bool) -> None:
    """libtpu writes no program of the second, whose parts have other names."""
    assert change[0] in ALIKE
    text, program = ALIKE.replace(*change), Schedule(once=7, each=500)
    cost, _ = hlo_cost(text, trips=1, rates=RATES, finished=lambda name, *_: program if name == "y" else None)
    assert cost.cycles == {"y": 1007, "z": 1007 if alike else 700}
    assert cost.counted == sum(cost.cycles.values()) - (0 if alike else 700)


@pytest.mark.parametrize(
    ("collective", "sent"),
    [
        ("all-reduce(%y), replica_groups={{0,1,2,3},{4,5,6,7}}", 2 * 3 / 4),
        ("all-reduce(%y), replica_groups=[2,4]<=[8]", 2 * 3 / 4),
        ("all-reduce-start(%y), replica_groups={{0,1,2,3,4,5,6,7}}", 2 * 7 / 8),
        ("all-gather(%y), replica_groups={{0,1,2,3}}", 3),
        ("reduce-scatter(%y), replica_groups={{0,1,2,3}}", 3 / 4),
        ("collective-permute(%y), source_target_pairs={{0,1},{1,0}}", 1),
    ],
)
def test_a_collective_goes_around_a_ring(collective: str, sent: float) -> None:
    """In a sum every chip passes on all parts but one, twice: first to be added up, then as sums."""
    text = HLO.replace("all-reduce(%y), replica_groups={{0,1}}", collective)
    assert hlo_cost(text, trips=5, rates=RATES)[0].collective_bytes == sent * X


SENDS = """
ENTRY %main (x: f32[60,100]) -> f32[60,100] {
  %x = f32[60,100]{1,0:T(8,128)} parameter(0)
  %right = (f32[60,100]{1,0:T(8,128)}) collective-permute-start(%x), source_target_pairs={{0,1},{1,2},{2,0}}
  %left = (f32[60,100]{1,0:T(8,128)}) collective-permute-start(%x), source_target_pairs={{1,0},{2,1},{0,2}}
  %beside = f32[60,100]{1,0:T(8,128)S(1)} copy(%x), backend_config={"window_config":{"estimated_cycles":"20"}}
  %right.1 = f32[60,100]{1,0:T(8,128)} collective-permute-done(%right)
  %left.1 = f32[60,100]{1,0:T(8,128)} collective-permute-done(%left)
  %again = (f32[60,100]{1,0:T(8,128)}) collective-permute-start(%right.1), source_target_pairs={{0,1},{1,2},{2,0}}
  %long = f32[60,100]{1,0:T(8,128)S(1)} copy(%x), backend_config={"window_config":{"estimated_cycles":"90"}}
  ROOT %again.1 = f32[60,100]{1,0:T(8,128)} collective-permute-done(%again)
}
"""


@pytest.mark.parametrize(
    ("change", "waited"),
    [
        # 32.768 cycles for each array over its link: 20 of the first two are hidden, and all of the third.
        (("", ""), X / 1e3 - 20),
        # To the same chips they go one after the other.
        (("{{1,0},{2,1},{0,2}}", "{{0,1},{1,2},{2,0}}"), 2 * X / 1e3 - 20),
        (('"90"', '"30"'), 2 * X / 1e3 - 50),
    ],
)
def test_a_chip_waits_for_what_has_not_arrived_beside_its_operations(change: tuple[str, str], waited: float) -> None:
    cost, _ = hlo_cost(SENDS.replace(*change), trips=1, rates=Rates(1e6, 1e6, 1e3))
    assert cost.collective_bytes == 3 * X
    assert cost.waited == pytest.approx(waited)
    assert (cost * 3 + cost).waited == pytest.approx(4 * waited)


def test_matrix_products_of_a_loop_count_as_often_as_it_runs() -> None:
    def looped(w: jax.Array, x: jax.Array) -> jax.Array:
        return lax.fori_loop(0, 5, lambda n, x: x @ lax.dynamic_index_in_dim(w, n, keepdims=False), x)

    def written_out(w: jax.Array, x: jax.Array) -> jax.Array:
        for n in range(5):
            x = x @ w[n]
        return x

    arguments = jax.ShapeDtypeStruct((5, 128, 128), jnp.float32), jax.ShapeDtypeStruct((64, 128), jnp.float32)
    loop, plain = (jax.jit(function).trace(*arguments) for function in (looped, written_out))
    counted = plain.lower().compile().cost_analysis()
    assert counted is not None
    assert dot_flops(loop.jaxpr) == dot_flops(plain.jaxpr) == pytest.approx(counted["flops"], rel=0.01)
    assert dot_flops(loop.jaxpr, trips=False) == dot_flops(plain.jaxpr) / 5


def test_experts_products_are_told_by_their_shapes_and_tiles() -> None:
    """They are neither counted as attention nor as operations that read the experts of all layers."""
    product = (
        '%ragged-dot-none.2 = f32[60,100]{1,0:T(8,128)} custom-call(%x, %w), custom_call_target="tpu_custom_call", '
        "operand_layout_constraints={s32[1]{0}, s32[6145]{0}, bf16[1000,256]{1,0}, bf16[640,256,300]{2,1,0}}, "
        'frontend_attributes={mosaic_fusion_entry_point="true",ragged_dot_tiling="256,256,128"}'
    )
    text = HLO.replace("  %fused_attention.1 =", f"  {product}\n  %fused_attention.1 =")
    cost, kernels = hlo_cost(text, trips=5, rates=RATES)
    ragged = Ragged(1000, 640, 256, 300, (256, 256, 128))
    assert (cost.ragged, kernels) == ({ragged: 5}, 5)
    assert cost.bytes == hlo_cost(HLO, trips=5, rates=RATES)[0].bytes
    assert (cost * 2 + cost).ragged == {ragged: 15}
    # Four tiles of rows, and one more for each expert that begins within one; three parts of the kernel's width.
    assert ragged.visits(128) == (4 + 127) * 3
    assert ragged.bytes(128) == 2 * 128 * 256 * 300 + 2 * 3 * 1000 * 256 + 4 * 1000 * 300
    rounded = text.replace("%ragged-dot-none.2 = f32[", "%ragged-dot-none.2 = bf16[")
    (of_rounded,) = hlo_cost(rounded, trips=5, rates=RATES)[0].ragged
    assert of_rounded.bytes(128) == ragged.bytes(128) - 2 * 1000 * 300


def test_experts_products_count_a_row_once() -> None:
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((64, 8), (5, 8, 16))]
    sizes = jax.ShapeDtypeStruct((5,), jnp.int32)
    assert dot_flops(jax.jit(lax.ragged_dot).trace(*arguments, sizes).jaxpr) == 2 * 64 * 8 * 16
