"""The engine's real programs compile for TPUs, on a machine without one, at the expected cost.

Nothing runs here: libtpu compiles for a described topology, and its compiler refuses programs that the chip cannot run.
"""

import importlib.util
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import Mesh, SingleDeviceSharding
from typer.testing import CliRunner

from model import rotary_tpu
from model.attention_tpu import FOLD_TOKENS, OWN_ROW, STEP_PAGES, WIDE_FOLD_TOKENS, work
from model.computations import Kind
from model.config import ModelConfig
from model.contract import PAGE_TOKENS
from model.cost import Cost, program_cost
from model.families.registry import from_hf
from model.loading import without_weights
from model.plan import Shape
from model.programs import Programs
from model.sharding import divided, mesh
from model.sizes import BY_PLATFORM, Layout
from scripts.planning.bundles import Kernel, Rotary, fold_bundles, rotary_bundles
from scripts.planning.chips import CHIPS, devices
from scripts.planning.estimate import Workload, estimate, launches
from scripts.planning.plan import app
from tests.described_devices import QWEN3_06B_JSON, without_cache  # noqa: F401 - a fixture
from tests.tiny_encoders import COMMON, ENCODERS
from tests.tiny_families import config_of

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="NOTHING IS COMPILED FOR TPU: libtpu is not installed; the extras test and tpu-compile bring it",
)


QWEN3_06B = from_hf(QWEN3_06B_JSON)
V6E = CHIPS["v6e"].rates
LLAMA_31_8B = from_hf(
    {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 128_256,
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 14_336,
        "rms_norm_eps": 1e-5,
        "rope_theta": 5e5,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        "max_position_embeddings": 131_072,
    }
)
QWEN3_30B = from_hf(
    {
        "architectures": ["Qwen3MoeForCausalLM"],
        "vocab_size": 151_936,
        "hidden_size": 2048,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "max_position_embeddings": 40_960,
        "tie_word_embeddings": False,
    }
)
RANKING = Workload(query_tokens=2000, items=500, item_tokens=20)


def one(chip: str) -> Mesh:
    return mesh(1, 1, devices(chip, "1x1"))


@pytest.mark.slow
def test_loops_and_on_chip_arrays_are_counted_rightly() -> None:
    """A loop's cost is that of the same program written out, and a large array costs its bytes."""
    here = SingleDeviceSharding(devices("v6e", "1x1")[0])

    def shape(*dims: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(dims, jnp.bfloat16, sharding=here)

    def step(x: jax.Array, w: jax.Array) -> jax.Array:
        return jax.nn.silu(x @ w) @ w.T

    def looped(w: jax.Array, x: jax.Array) -> jax.Array:
        return lax.fori_loop(0, 5, lambda n, x: step(x, lax.dynamic_index_in_dim(w, n, keepdims=False)), x)

    def written_out(w: jax.Array, x: jax.Array) -> jax.Array:
        for n in range(5):
            x = step(x, w[n])
        return x

    weights, x = shape(5, 1024, 4096), shape(2048, 1024)
    costs = []
    for function in (looped, written_out):
        traced = jax.jit(function).trace(weights, x)
        costs.append(program_cost(traced, traced.lower().compile(), trips=5, rates=V6E)[0])
    loop, plain = costs
    assert loop.flops == pytest.approx(5 * 2 * 2 * 2048 * 1024 * 4096, rel=0.02)
    assert loop.flops == pytest.approx(plain.flops, rel=0.02)
    # Values between the products stay on the chip: only the input, the result and the weights move, the weights once
    # for both of a step's products or once for each.
    ends, stack = 2 * 2 * 2048 * 1024, 2 * 5 * 1024 * 4096
    for cost in (loop, plain):
        assert ends + stack <= cost.bytes < 1.05 * (ends + 2 * stack)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_plan_of_ranking_on_one_v6e(tmp_path: Path) -> None:
    """The planner's command with Qwen3-0.6B's sizes: a cold query of 2,000 tokens, 500 items of 20 tokens."""
    (tmp_path / "config.json").write_text(json.dumps(QWEN3_06B_JSON))
    told, picture = tmp_path / "plan.json", tmp_path / "plan.png"
    command = [sys.executable, "-m", "scripts.planning.plan", str(tmp_path), "--price", "2.7"]
    # A process of its own, since libtpu reads its flags once.
    result = subprocess.run(
        [*command, "--json", str(told), "--plot", str(picture)], capture_output=True, text=True, timeout=1200
    )
    assert result.returncode == 0, result.stderr
    assert "nothing ran on a TPU" in " ".join(result.stdout.split())
    found = json.loads(told.read_text())
    assert found["fits"]
    assert found["bytes_per_chip"]["weights"] == pytest.approx(2 * 596e6, rel=0.01)
    assert found["floor_seconds"] == pytest.approx(17e-3, rel=0.05)
    assert found["roofline_seconds"] <= 1.25 * found["floor_seconds"]
    # The finished programs and the host take nearly twice as long as the roofline.
    parts = [found[f"{part}_seconds"] for part in ("operations", "attention", "transfer", "host")]
    assert found["expected_seconds"] == pytest.approx(sum(parts) - found["hidden_seconds"])
    assert found["operations_seconds"] <= 18.6e-3
    assert found["modelled_seconds"] <= 24e-3
    assert found["counted_share"] >= 0.95
    assert found["attention_seconds"] <= 17.8e-3
    assert found["items_per_s_per_chip"] == pytest.approx(500 / found["expected_seconds"])
    assert len(found["dearest"]) == 10
    assert found["chips_needed"] == 1
    assert found["price_per_million_items"] == pytest.approx(2.7e6 / 3600 / found["items_per_s_per_chip"])
    # No matrix of scores: in each layer it would be 500 * 20 * 2,000 of them for each of 16 heads, written and read in
    # float32; all that moves, the weights for every launch among it, is less than half of that.
    assert found["bytes_moved"] < 28 * 2 * 4 * 16 * 500 * 20 * 2000 / 2
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_an_8b_model_and_a_long_query_fit_eight_v6e() -> None:
    found = estimate(LLAMA_31_8B, "v6e", "2x4", Workload(query_tokens=8000, items=500, item_tokens=20), data=1)
    assert found.missing_bytes == 0
    assert found.bytes_per_chip["weights"] == pytest.approx(16.06e9 / 8, rel=0.01)
    assert found.roofline_seconds
    assert found.collective_seconds
    assert found.floor_seconds < found.roofline_seconds - found.collective_seconds < 1.3 * found.floor_seconds


@pytest.mark.parametrize(
    "family",
    [
        "gemma2",
        pytest.param("gemma3", marks=pytest.mark.slow),
        pytest.param("phi3-longrope", marks=pytest.mark.slow),
        "qwen3_moe",
    ],
)
def test_windows_caps_ropes_and_experts_compile(family: str) -> None:
    config = from_hf(config_of(family))
    programs, laid = without_weights(config, one("v6e"), BY_PLATFORM["tpu"])
    traced = programs.compiler.trace(Kind.SEGMENTS, laid.ladder[0])
    cost, kernels = program_cost(traced, traced.lower().compile(), trips=config.layers - 1, rates=V6E)
    assert kernels == config.layers
    products = [product for product in cost.ragged if product.groups == config.layers * config.experts]
    assert len(products) == len(cost.ragged) == (4 if config.experts else 0)
    # Of each layer gate, up and down; the last layer's are of the reads alone.
    assert sum(cost.ragged.values()) == 3 * config.layers if config.experts else True


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_plan_of_a_mixture_on_four_v6e() -> None:
    """Qwen3-30B-A3B, split over all. No layer's experts are copied, and balance hardly matters."""
    found = estimate(QWEN3_30B, "v6e", "2x2", RANKING, data=1)
    assert found.missing_bytes == 0
    assert found.expected is not None
    assert found.expected.experts <= found.expected.experts_worst <= 1.05 * found.expected.experts
    assert not [name for name, _ in found.expected.dearest if "squeeze" in name]


def assert_no_scores_move(cost: Cost, whole: ModelConfig, programs: Programs, laid: Layout, call: Shape) -> None:
    """Check that attention over a prefix of 8,000 tokens is fused.

    Else it would write and read a float32 matrix of scores in each layer. That alone is more than all that a layer
    moves besides its weights, including the kernel's copies.
    """
    part = divided(whole, programs.model.config.shards)
    _, copied = work(call.tokens, call.width, part.heads, laid.pool, 8000, None)
    ends = 2 * part.vocab_size * part.width * (1 if part.tied_head else 2) // part.shards
    beside_weights = (cost.bytes - (programs.weight_bytes - ends)) / part.layers + copied
    assert beside_weights < 2 * 4 * call.tokens * part.heads * 8000


@pytest.mark.parametrize(
    ("config", "chip", "call", "most"),
    [
        pytest.param(QWEN3_06B, "v5e", Shape(256, 2), 430, id="qwen3-0.6b-v5e"),
        pytest.param(LLAMA_31_8B, "v6e", Shape(256, 2), 1_370, id="llama-3.1-8b-v6e", marks=pytest.mark.slow),
    ],
)
def test_programs_fit_one_chip_and_attention_is_fused(config: ModelConfig, chip: str, call: Shape, most: float) -> None:
    """``most``: cycles that libtpu may expect for a token in a layer, beside the attention kernel's."""
    programs, laid = without_weights(config, one(chip), BY_PLATFORM["tpu"], max_prompt_tokens=8192)
    traced = programs.compiler.trace(Kind.SEGMENTS, call)
    compiled = traced.lower().compile()
    memory = compiled.memory_analysis()
    used = memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.output_size_in_bytes
    assert used <= CHIPS[chip].hbm_bytes
    assert "[<=" not in compiled.as_text(), "a dynamic shape"
    cost, kernels = program_cost(traced, compiled, trips=config.layers - 1, rates=CHIPS[chip].rates)
    assert kernels == config.layers
    assert_no_scores_move(cost, config, programs, laid, call)
    assert most / 1.05 < sum(cost.cycles.values()) / call.tokens / config.layers < most


@pytest.mark.parametrize(
    ("chip", "own", "prefix", "mixed"),
    [
        pytest.param("v5e", 4.4, 4.4, 6.6, id="v5e", marks=pytest.mark.slow),
        pytest.param("v6e", 3.0, 2.25, 3.9, id="v6e"),
    ],
)
def test_the_kernel_takes_no_more_bundles_for_a_thousand_scores(
    chip: str, own: float, prefix: float, mixed: float
) -> None:
    """Over keys of the queries' own bins, over a step of the prefix, and of one of several. Bars are lowered with the
    kernel.
    """
    width, groups = 256, 2
    found = fold_bundles(Kernel(chip, width, groups, 128, windowed=False, softcap=None))
    of_step = groups / 1000 * STEP_PAGES * PAGE_TOKENS
    at_once = OWN_ROW / (2 * 128)
    assert 0.95 * own < found.own / (at_once / 1000 * FOLD_TOKENS * width) < own
    assert 0.95 * prefix < found.prefix / (of_step * WIDE_FOLD_TOKENS[0]) < prefix
    assert found.mixed / (of_step * FOLD_TOKENS) < mixed


@pytest.mark.slow
@pytest.mark.parametrize(("groups", "width"), [(2, 768), (2, 384), (4, 768)])
def test_bins_that_fill_no_whole_tile_take_as_many_bundles_over_a_prefix(groups: int, width: int) -> None:
    """Their tiles have 768 tokens, which are folded at once. Of 256 at once, 1,000 scores take 2.84 and 2.19."""
    found = fold_bundles(Kernel("v6e", width, groups, 128, windowed=False, softcap=None))
    assert found.prefix / (groups / 1000 * STEP_PAGES * PAGE_TOKENS * 768) < 2.2


@pytest.mark.parametrize(
    ("chip", "most"), [pytest.param("v5e", 0.82, id="v5e", marks=pytest.mark.slow), pytest.param("v6e", 0.44, id="v6e")]
)
def test_norm_and_positions_take_no_more_bundles_for_a_head(chip: str, most: float) -> None:
    """A head of 128 channels of one token, of 16 heads of queries and 8 of keys. Bars are lowered with the kernel."""
    found = rotary_bundles(Rotary(chip, 16, 8, 128, 128, normed=True))
    assert 0.95 * most < found / (24 * rotary_tpu.FOLD_TOKENS) < most
    assert 0 < rotary_bundles(Rotary(chip, 4, 1, 128, 128, normed=False)) < found / 4  # a slice's share of the heads


@pytest.mark.parametrize(
    ("config", "topology"),
    [
        (QWEN3_06B, "2x2"),
        pytest.param(LLAMA_31_8B, "4x4", marks=pytest.mark.slow),
        pytest.param(QWEN3_06B, "4x4", marks=pytest.mark.slow),
        pytest.param(LLAMA_31_8B, "2x2", marks=pytest.mark.slow),
    ],
)
def test_programs_compile_for_slices_and_their_attention_is_fused(config: ModelConfig, topology: str) -> None:
    """The topology 4x4 has four hosts."""
    chips = devices("v6e", topology)
    assert len({chip.process_index for chip in chips}) == {"2x2": 1, "4x4": 4}[topology]
    programs, laid = without_weights(config, mesh(1, len(chips), chips), BY_PLATFORM["tpu"], max_prompt_tokens=8192)
    traced = programs.compiler.trace(Kind.SEGMENTS, laid.ladder[0])
    compiled = traced.lower().compile()
    memory = compiled.memory_analysis()
    used = memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.output_size_in_bytes
    assert used <= CHIPS["v6e"].hbm_bytes
    cost, kernels = program_cost(traced, compiled, trips=config.layers - 1, rates=V6E)
    assert kernels == config.layers
    # A ring passes on twice all parts but one of the embedding, and of two sums in each layer, the last one's of a few
    # rows: bfloat16, never a float32 residual stream.
    one_sum = 2 * (1 - 1 / len(chips)) * 2 * laid.ladder[0].tokens * config.width
    sums = 1 + 2 * (config.layers - 1)
    assert sums <= cost.collective_bytes / one_sum <= sums + 2
    assert_no_scores_move(cost, config, programs, laid, laid.ladder[0])
    assert "[<=" not in compiled.as_text(), "a dynamic shape"


@pytest.mark.slow
def test_a_slice_computes_while_shares_of_tokens_travel() -> None:
    """Chips would wait for all of it if they summed after each half of a layer."""
    chips = devices("v6e", "2x2")
    config = replace(LLAMA_31_8B, layers=4)
    programs, laid = without_weights(config, mesh(1, 4, chips), BY_PLATFORM["tpu"], max_prompt_tokens=8192)
    for kind, size in ((Kind.SEGMENTS, Shape(128, 32)), (Kind.PREFILL, laid.sizes.chunks[-1])):
        traced = programs.compiler.trace(kind, size)
        compiled = traced.lower().compile()
        cost, kernels = program_cost(traced, compiled, trips=config.layers - 1, rates=V6E)
        assert kernels >= config.layers - 1
        assert cost.waited < 0.5 * cost.collective_bytes / (2 * V6E.link)
        assert cost.waited < 0.25 * sum(cost.cycles.values())


@pytest.mark.parametrize(
    ("arguments", "changes", "said"),
    [
        (
            ["--topology", "2x4", "--data", "1"],
            {"num_attention_heads": 12, "num_key_value_heads": 4},
            "12 attention heads cannot be divided among 8 devices; use 1 or 2 or 3 or 4 or 6",
        ),
        (
            ["--topology", "2x4", "--data", "3"],
            {},
            "8 chips cannot be divided among 3 calls at once; use a divisor of 8",
        ),
        (["--topology", "3x5"], {}, "libtpu knows no topology v6e:3x5"),
        (["--chip", "v7"], {}, "'v7' is not one of v5e, v5p, v6e"),
        (["--query-tokens", "40941"], {}, "the prompts have 40,961 tokens; this model reads at most 40,960"),
        ([], {"architectures": ["OtherForCausalLM"]}, "implemented: GemmaForCausalLM"),
    ],
)
def test_plans_that_cannot_be_made_are_refused(
    arguments: list[str], changes: dict[str, object], said: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(QWEN3_06B_JSON | changes))
    result = CliRunner().invoke(app, [str(tmp_path), *arguments], env={"COLUMNS": "200"})
    assert result.exit_code != 0
    assert said in " ".join(result.output.split())


MINILM_L6 = {
    "architectures": ["BertForSequenceClassification"],
    "model_type": "bert",
    "vocab_size": 30_522,
    "hidden_size": 384,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "intermediate_size": 1536,
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "num_labels": 1,
}


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_plan_of_an_encoder(tmp_path: Path) -> None:
    """64 pairs of 16 and 200 tokens with MiniLM-L6's sizes: each is computed whole, and no prefix is kept."""
    (tmp_path / "config.json").write_text(json.dumps(MINILM_L6))
    told, sizes = tmp_path / "plan.json", ["--query-tokens", "16", "--items", "64", "--item-tokens", "200"]
    result = CliRunner().invoke(app, [str(tmp_path), *sizes, "--json", str(told)])
    assert result.exit_code == 0, result.output
    found = json.loads(told.read_text())
    assert found["fits"]
    assert found["bytes_per_chip"]["weights"] == pytest.approx(2 * 22.7e6, rel=0.01)
    assert found["bytes_per_chip"]["prefix_cache"] < 2e6
    whole = 64 * 216 * (5 * 24 * 384**2 + 4 * 384**2 + 5 * 4 * 384 * 216)
    assert found["floor_seconds"] * CHIPS["v6e"].flops == pytest.approx(whole, rel=0.01)
    assert {name.split()[0] for name in found["launches"]} == {"segments", "targets"}
    assert found["expected_seconds"] > found["roofline_seconds"] > found["floor_seconds"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ENCODERS)
def test_an_encoder_compiles_for_one_chip_and_for_four(kind: str) -> None:
    config, chips = from_hf({**COMMON, **ENCODERS[kind]}), devices("v6e", "2x2")
    for over in (mesh(1, 1, chips[:1]), mesh(2, 2, chips)):
        programs, laid = without_weights(config, over, BY_PLATFORM["tpu"])
        traced = programs.compiler.trace(Kind.SEGMENTS, laid.ladder[0])
        _, kernels = program_cost(traced, traced.lower().compile(), trips=config.layers - 1, rates=V6E)
        assert kernels == 0  # attention is XLA's


def test_a_plan_that_does_not_fit_is_reported_without_compiling() -> None:
    found = estimate(LLAMA_31_8B, "v5e", "1x1", RANKING)
    weights = found.bytes_per_chip["weights"]
    assert weights == pytest.approx(16.06e9, rel=0.01)
    assert found.missing_bytes == weights + found.bytes_per_chip["prefix_cache"] - 16e9
    assert found.roofline_seconds is None


def test_launches_are_the_planner_s() -> None:
    _, laid = without_weights(QWEN3_06B, one("v6e"), BY_PLATFORM["tpu"], max_prompt_tokens=8192)
    found = launches(QWEN3_06B, laid, RANKING.request())
    segments = {launch: count for launch, count in found.items() if launch.kind == "segments"}
    assert {launch.prefix_length for launch in segments} <= {1920, 2000}
    # Six items of 20 fill 120 of the 128 positions of a bin.
    assert sum(launch.size.tokens * count for launch, count in segments.items()) <= 1.08 * 500 * 20
    assert sum(launch.size * count for launch, count in found.items() if launch.kind == "prefill") == 2048
