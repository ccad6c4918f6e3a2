"""The same scores on every mesh, through the whole engine, on simulated devices of the CPU."""

import re
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from safetensors.numpy import save_file

from model import loading, sharding
from model.computations import Kind
from model.engine import Engine
from model.families.registry import from_hf
from model.fields import ConfigError, read_config
from tests.batches import label_batch, reads_batch
from tests.invariance.rows import LABELS, TOLERANCE, VOCAB, prompts, values, with_halved_head
from tests.reads import bytes_read
from tests.sharding.one_of_two import SIZES
from tests.tiny import make_llama
from tests.tiny_families import make_family
from tests.tiny_heads import candidate_head

MESHES = [(1, 1), (1, 2), (2, 1), (2, 2), (1, 4), (1, 8), (2, 4)]
"""data x model. The Llama below has two key/value heads: split, whole and copied. Nothing divides its 307 ids."""
SELDOM = [(1, 1), (2, 1), (1, 4)]
"""Too long for every run; larger ones hold them."""


def mesh(data: int, model: int) -> jax.sharding.Mesh:
    return sharding.mesh(data, model, jax.devices()[: data * model])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_llama(
        tmp_path_factory.mktemp("llama"),
        heads=8,
        head_width=6,
        ff=64,
        layers=2,
        attention_bias=True,
        mlp_bias=True,
        shards=2,
    )
    return with_halved_head(folder)


def everything(scorer: Engine) -> list[np.ndarray]:
    """Score cold, warm, chunked and packed; over the vocabulary and over labels alone; uneven batch sizes; argmax."""
    shared = prompts(7, seed=1, query=290, longest=30)
    found = [values(scorer, shared), values(scorer, shared)]
    found += [values(scorer, prompts(count, seed=count, longest=30)) for count in (1, 2, 3, 5)]
    labels = label_batch(shared[:3], [LABELS] * 3, vocab_logprobs=False)
    found.append(scorer.score(labels).values)
    texts = prompts(4, seed=9, longest=30)
    reads = [[(position, [position % VOCAB]) for position in range(len(tokens))] for tokens in texts]
    result = scorer.score(replace(reads_batch(texts, reads), argmax=True))
    return [*found, result.values, result.argmax, result.argmax_values]


@pytest.fixture(scope="module")
def wanted(folder: Path) -> tuple[list[np.ndarray], int]:
    """``everything`` on one device, and how many tokens were cached."""
    alone = loading.load(folder, **SIZES)
    return everything(alone), alone.stats.prefix_hit_tokens


@pytest.mark.parametrize(
    ("data", "model", "by_layer"),
    [
        *(pytest.param(*each, True, marks=pytest.mark.slow) for each in MESHES if each in SELDOM),
        *((*each, True) for each in MESHES if each not in SELDOM),
        (2, 4, False),
    ],
)
def test_every_mesh_gives_the_same_scores(
    folder: Path, wanted: tuple[list[np.ndarray], int], data: int, model: int, by_layer: bool
) -> None:
    spread = loading.load(folder, mesh=mesh(data, model), by_layer=by_layer, **SIZES)
    for mine, alone in zip(everything(spread), wanted[0], strict=True):
        np.testing.assert_allclose(mine, alone, rtol=0, atol=TOLERANCE)
    assert spread.stats.prefix_hit_tokens == wanted[1]


BY_TOKENS: dict[str, Any] = SIZES | {"by_layer": False, "by_tokens": True, "share_tokens": 16}


@pytest.mark.parametrize(("data", "model"), [pytest.param(1, 2, marks=pytest.mark.slow), (2, 4)])
def test_tokens_divided_among_devices_have_the_same_scores(
    folder: Path, wanted: tuple[list[np.ndarray], int], data: int, model: int
) -> None:
    spread = loading.load(folder, mesh=mesh(data, model), **BY_TOKENS)
    for mine, alone in zip(everything(spread), wanted[0], strict=True):
        np.testing.assert_allclose(mine, alone, rtol=0, atol=TOLERANCE)
    assert spread.stats.prefix_hit_tokens == wanted[1]


@pytest.mark.parametrize("family", ["gemma2", "qwen3_moe", pytest.param("olmo2", marks=pytest.mark.slow)])
def test_families_whose_layers_differ_have_the_same_scores_by_tokens(family: str, tmp_path: Path) -> None:
    """Norms after the sums, windows and a scaled embedding; experts; norms of all heads' queries as one vector."""
    folder = make_family(tmp_path / "model", family)
    asked = prompts(5, seed=3, query=90, longest=30)
    alone = values(loading.load(folder, **SIZES), asked)
    spread = values(loading.load(folder, mesh=mesh(1, 2), **BY_TOKENS), asked)
    np.testing.assert_allclose(spread, alone, rtol=0, atol=TOLERANCE)


def test_large_calls_send_shares_of_tokens_in_place_of_sums(folder: Path) -> None:
    """No sum over devices is left in the layers, and small calls are as before."""
    spread = loading.load(folder, mesh=mesh(1, 4), **BY_TOKENS | {"share_tokens": 32})
    programs: Any = spread._programs  # pyright: ignore[reportPrivateUsage]
    ladder = sorted(spread._layout.ladder, key=lambda shape: shape.tokens)  # pyright: ignore[reportPrivateUsage]
    large, small = ladder[-1], ladder[0]
    assert small.tokens < large.tokens == 4 * 32
    found = re.compile(r"= \S+ (all-\w+|reduce-scatter|collective-permute)(?:-start)?\(")
    sent = Counter(found.findall(programs.compiler.get(Kind.SEGMENTS, large).as_text()))
    # Two layers, the first in a loop. Each sends shares before q, k, v (the last one before its reads' queries, too)
    # and before the MLP, and sums after attention and after the MLP; three times, both ways.
    assert sent.pop("collective-permute") == (4 + 5) * 3 * 2
    # The embedding's rows, the last layer's reads, and the hidden states at the end.
    assert sent == {"reduce-scatter": 2, "all-gather": 1}
    assert set(found.findall(programs.compiler.get(Kind.SEGMENTS, small).as_text())) == {"all-reduce"}


def test_every_program_is_launched_under_one_lock(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two threads on one mesh enqueue collectives in one order on all its devices, or these would wait for each other
    for ever: while one thread launches, the head's programs included, no other does. It waits outside."""
    spread = loading.load(folder, mesh=mesh(2, 4), **SIZES)
    batches = [prompts(7, seed=seed, query=290, longest=30) for seed in (1, 2)]
    wanted = [values(spread, batch) for batch in batches]
    compiler, lock = spread._programs.compiler, spread._launching  # pyright: ignore[reportPrivateUsage]
    unlocked: list[Kind] = []
    get, fetch = compiler.get, jax.device_get
    fetched_locked: list[bool] = []

    def watched(kind: Kind, size: Any) -> Any:
        program = get(kind, size)

        def launch(*arguments: Any) -> Any:
            if not holding.is_mine():
                unlocked.append(kind)
            return program(*arguments)

        return launch

    def fetching(arrays: Any) -> Any:
        fetched_locked.append(holding.is_mine())
        return fetch(arrays)

    holding = Holding(lock)
    monkeypatch.setattr(spread, "_launching", holding)
    monkeypatch.setattr(compiler, "get", watched)
    monkeypatch.setattr(jax, "device_get", fetching)
    with ThreadPoolExecutor(2) as threads:
        found = list(threads.map(lambda number: values(spread, batches[number % 2]), range(8)))
    assert not unlocked
    assert fetched_locked == [False] * 8
    for number, each in enumerate(found):
        np.testing.assert_allclose(each, wanted[number % 2], rtol=0, atol=TOLERANCE)


class Holding:
    """A lock that knows which thread has it."""

    def __init__(self, lock: Any) -> None:
        self._lock, self._owner = lock, 0

    def __enter__(self) -> None:
        self._lock.acquire()
        self._owner = threading.get_ident()

    def __exit__(self, *_: object) -> None:
        self._owner = 0
        self._lock.release()

    def is_mine(self) -> bool:
        return self._owner == threading.get_ident()


def test_bfloat16_is_no_further_from_float32_on_a_mesh(folder: Path, wanted: tuple[list[np.ndarray], int]) -> None:
    """Devices exchange sums in bfloat16, yet the error is about one device's, which comes from rounded operands."""
    errors: list[float] = []
    for over in (mesh(1, 1), mesh(1, 4)):
        scorer = loading.load(folder, mesh=over, dtype="bfloat16", **SIZES)
        errors.append(float(np.abs(values(scorer, prompts(7, seed=1, query=290, longest=30)) - wanted[0][0]).mean()))
    assert 0 < errors[1] < 1.5 * errors[0]


def test_parameters_and_pages_are_split(folder: Path) -> None:
    """Parameters are split by the rules, and the pool by key/value heads; no split array is held whole."""
    spread = loading.load(folder, mesh=mesh(2, 4), **SIZES)
    programs: Any = spread._programs  # pyright: ignore[reportPrivateUsage]
    block = programs.weights.layers[0]
    specs = {
        "attention.q": (None, "model"),
        "attention.k": (None, "model"),
        "attention.o": ("model", None),
        "mlp.gate": (None, "model"),
        "mlp.down": ("model", None),
    }
    for path, wanted in specs.items():
        branch, leaf = path.split(".")
        kernel = block[branch][leaf]["kernel"][...]
        assert isinstance(kernel.sharding, NamedSharding)
        assert (*kernel.sharding.spec,) == wanted, path
    parts = [*block["mlp"]["up"]["kernel"][...].addressable_shards]
    assert {part.data.shape for part in parts} == {(48, 16)}
    assert block["attention"]["k"]["kernel"][...].shape == (48, 4 * 6)  # two heads, each twice
    assert programs.weights.ends["embedding"][...].addressable_shards[0].data.shape == (77, 48)
    pool = spread._pool  # pyright: ignore[reportPrivateUsage]
    assert pool.shape[3] == 4
    assert {part.data.shape[3] for part in pool.addressable_shards} == {1}
    result = programs.normalizer(programs.none_collected(), np.zeros(32, np.int32))
    assert result.sharding.is_fully_replicated


def test_two_sums_a_layer_and_no_weight_is_gathered(folder: Path) -> None:
    spread = loading.load(folder, mesh=mesh(1, 4), **SIZES)
    programs: Any = spread._programs  # pyright: ignore[reportPrivateUsage]
    shape = spread._layout.ladder[-1]  # pyright: ignore[reportPrivateUsage]
    text = programs.compiler.get(Kind.LAYER, shape).as_text()
    collectives = re.findall(r"= \S+ (all-\w+|reduce-scatter|collective-permute)(?:-start)?\(", text)
    assert collectives == ["all-reduce", "all-reduce"]
    # One sum for the embedding, one of the head's logits; a maximum and a sum of exponentials for the normaliser.
    for kind, size, count in ((Kind.EMBED, shape.tokens, 1), (Kind.TARGETS, 64, 1), (Kind.NORMALIZER, 32, 2)):
        text = programs.compiler.get(kind, size).as_text()
        assert len(re.findall(r"= \S+ all-reduce(?:-start)?\(", text)) == count, kind
        assert "all-gather" not in text


@pytest.mark.slow
@pytest.mark.parametrize(("data", "model", "by_layer"), [(2, 2, True), (1, 2, False)])
def test_a_decision_head_gives_the_same_logits(tmp_path: Path, data: int, model: int, by_layer: bool) -> None:
    folder = make_llama(tmp_path / "decides", heads=8, head_width=6, ff=64, layers=2)
    save_file(candidate_head(48), folder / "decision_head.safetensors")
    texts, ends = prompts(3, seed=4, query=200, longest=40), (3, 60, 150)
    reads = [[*((end, [0]) for end in ends), (len(tokens) - 1, [])] for tokens in texts]
    batch = reads_batch(texts, reads, vocab_logprobs=False)
    alone = loading.load(folder, **SIZES).score(batch).values
    spread = loading.load(folder, mesh=mesh(data, model), by_layer=by_layer, **SIZES)
    np.testing.assert_allclose(spread.score(batch).values, alone, rtol=0, atol=TOLERANCE)
    assert np.ptp(alone) > 1


def test_no_more_is_read_than_the_devices_hold(folder: Path) -> None:
    """At most one device's part of one parameter is read at once."""
    with bytes_read() as read:
        loading.load(folder, mesh=mesh(1, 8), **SIZES)
    embedding = 307 * 48 * 4
    assert max(read) <= -(-embedding // 8) + 48 * 4


def test_sizes_that_cannot_be_divided_are_refused(folder: Path) -> None:
    config = from_hf(read_config(folder))
    with pytest.raises(
        ConfigError, match="LlamaForCausalLM's 8 attention heads cannot be divided among 3 devices; use 1 or 2"
    ):
        sharding.divided(config, 3)
    with pytest.raises(ConfigError, match=r"a mesh of 2 x 3 .* takes 6 devices and there are 8"):
        sharding.mesh(2, 3)


@pytest.mark.parametrize(
    ("columns", "rows", "is_ring"),
    [(2, 2, True), (2, 4, True), (4, 2, True), (3, 4, True), (4, 4, True), (3, 3, False)],
)
def test_chips_of_a_model_are_in_a_ring_of_links(columns: int, rows: int, is_ring: bool) -> None:
    chips = [SimpleNamespace(coords=(x, y, 0)) for y in range(rows) for x in range(columns)]
    found = sharding.ring(chips)
    assert sorted(chip.coords for chip in found) == sorted(chip.coords for chip in chips)
    steps = zip(found, (*found[1:], found[0]), strict=True)
    distances = [sum(abs(a - b) for a, b in zip(one.coords, other.coords, strict=True)) for one, other in steps]
    assert (set(distances) == {1}) == is_ring
    if not is_ring:
        assert found == chips


def test_cores_of_one_chip_stay_together() -> None:
    """A v3's chip is two devices at one place."""
    cores = [SimpleNamespace(coords=(x, y, 0), core=core) for y in range(2) for x in range(2) for core in range(2)]
    assert sharding.ring(cores) == cores


def test_a_function_of_each_devices_part_is_compiled_once_for_all_parameters_of_a_shape():
    """As int8 is: a model has hundreds of matrices of a few shapes."""
    traced: list[tuple[int, ...]] = []

    def halved(part: jax.Array) -> jax.Array:
        traced.append(part.shape)
        return part / 2

    split = NamedSharding(mesh(1, 4), sharding.RULES.spec("mlp", None))
    for number in range(3):
        array = jax.device_put(np.full((8, 3), number, np.float32), split)
        result = sharding.by_device(halved, array)
        np.testing.assert_array_equal(result, np.full((8, 3), number / 2))
        assert result.sharding == split
    assert traced == [(2, 3)]
