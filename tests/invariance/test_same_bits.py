"""On the CPU's kernels a sequence's values are the same bits whatever is beside it, in the batch and in the cache.

Everything here is ``==``, no tolerance: the reference is the sequence alone, over an empty cache.
"""

import asyncio
import itertools
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from model import loading
from model.contract import PAGE_TOKENS
from model.engine import Engine
from serve_app.contract import TokenBatch
from serve_app.frontend.service import ModelService
from serve_app.jobs.local_replicas import LocalReplicas
from serve_app.schemas import ScoreRequest
from serve_app.settings import Limits, ModelSettings
from serve_app.tasks.score import SCORE
from serve_app.tasks.systemone import SYSTEMONE, AnswerLine, SystemOneRequest
from serve_app.tasks.tokenizer import TextTokenizer
from tests.batches import reads_batch
from tests.invariance.rows import LABELS, VOCAB
from tests.tiny import YARN_SCALING, make_llama
from tests.tiny_families import make_family

pytestmark = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler is installed")

SMALL: dict[str, Any] = {"max_segment_tokens": 96, "call_tokens": 160, "chunks": (64, 96, 160)}
"""Prompts are cut more often, and there are fewer programs to compile."""
SMALL_POOL = 2**24
"""Bytes of pages. Forgetting makes them anew, and the default's would take a quarter of a second each time."""
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama in bfloat16": ("llama", {"dtype": "bfloat16"}),
    "biases, and windows of 20 in some layers": ("qwen2", SMALL),
    "windows of 21 in some layers, soft caps": ("gemma2", SMALL),
    "windows of 21 in some layers, soft caps, in bfloat16": ("gemma2", {"dtype": "bfloat16", **SMALL}),
    "windows of 130 in some layers, two ropes": ("gemma3", SMALL),
    "norms of queries and keys": ("olmo2", SMALL),
    "a second rope beyond 170 tokens": ("phi3-longrope", SMALL),
    "experts": ("qwen3_moe", SMALL),
    "gated DeltaNet": ("qwen3_5", SMALL),
    "gated DeltaNet in bfloat16": ("qwen3_5", {"dtype": "bfloat16", **SMALL}),
    "experts in bfloat16": ("qwen3_moe", {"dtype": "bfloat16", **SMALL}),
    "int8": ("llama", {"quantization": "int8", **SMALL}),
    "int8 in bfloat16": ("llama", {"quantization": "int8", "dtype": "bfloat16", **SMALL}),
    "one loop over the layers": ("llama", {"by_layer": False, **SMALL}),
}


SELDOM = {
    "biases, and windows of 20 in some layers",
    "windows of 130 in some layers, two ropes",
    "a second rope beyond 170 tokens",
    "norms of queries and keys",
    "one loop over the layers",
    "experts in bfloat16",
    "gated DeltaNet in bfloat16",
    "int8 in bfloat16",
    "windows of 21 in some layers, soft caps, in bfloat16",
}
"""Too long for every run; their parts are in others' rows."""
NAMES = [pytest.param(name, marks=pytest.mark.slow) if name in SELDOM else name for name in MODELS]


class Read(NamedTuple):
    """What a sequence is read for at one position: targets' values, and the top-1 token with its own."""

    values: tuple[float, ...]
    argmax: int
    argmax_value: float


Prompt = tuple[int, ...]
Answer = list[Read]


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Engine]:
    @cache
    def made(name: str) -> Engine:
        family, options = MODELS[name]
        folder = tmp_path_factory.mktemp("model")
        # Its YaRN is of an original context of 80 tokens.
        llama = partial(make_llama, folder, context=1024, rope_scaling=YARN_SCALING)
        made = llama() if family == "llama" else make_family(folder, family)
        return loading.load(made, implementation="native", prefix_cache_bytes=SMALL_POOL, **options)

    return made


def of_random_lengths(rng: np.random.Generator, longest: int) -> list[Prompt]:
    """Prompts like those of requests: a state and its questions, a query and its items, short ones, long ones."""

    def some(count: int) -> Prompt:
        return tuple(rng.integers(0, VOCAB, count).tolist())

    state, query, document = some(min(300, longest - 70)), some(int(rng.integers(30, 140))), some(longest - 60)
    questions = [state + some(int(rng.integers(30, 70))) for _ in range(6)]
    items = [query + some(int(rng.integers(1, 40))) for _ in range(8)]
    same_word = [query + query[:3] + some(int(rng.integers(1, 9))) for _ in range(4)]
    documents = [document + some(int(rng.integers(1, 60))) for _ in range(2)] + [document[:-5]]
    around = [state[: PAGE_TOKENS + more] for more in (-1, 0, 1)] + [state[:64], state[:65]]
    return [*questions, *items, *same_word, *documents, *around, *(some(n) for n in (1, 2, 7, 64, 90, 131))]


def asked(sequences: Sequence[Prompt], reads: Sequence[Sequence[int]]) -> TokenBatch:
    batch = reads_batch(sequences, [[(position, LABELS) for position in own] for own in reads])
    return replace(batch, argmax=True)


def answers(scorer: Engine, batch: TokenBatch) -> list[Answer]:
    result = scorer.score(batch)
    reads = zip(result.values.reshape(-1, len(LABELS)), result.argmax, result.argmax_values, strict=True)
    read = [Read(tuple(values.tolist()), int(top), float(highest)) for values, top, highest in reads]
    counts = np.bincount(batch.read_sequences, minlength=batch.num_sequences)
    return [list(itertools.islice(each, count)) for each in [iter(read)] for count in counts]


def forget(scorer: Engine) -> None:
    scorer._forget_prefixes()  # pyright: ignore[reportPrivateUsage]


@pytest.mark.parametrize("name", NAMES)
def test_a_sequence_has_the_bits_that_it_has_alone(name: str, engines: Callable[[str], Engine]) -> None:
    """Among any others, in any order, after a prefix that is cold, warm or prefilled in pieces, with several reads."""
    scorer, rng = engines(name), np.random.default_rng(len(name))
    longest = min(1000, scorer.info.max_prompt_tokens)
    sequences = of_random_lengths(rng, longest)
    reads = [
        sorted({len(tokens) - 1, *rng.integers(0, len(tokens), rng.integers(0, 3)).tolist()}) for tokens in sequences
    ]
    alone: list[Answer] = []
    for tokens, own in zip(sequences, reads, strict=True):
        forget(scorer)
        alone += answers(scorer, asked([tokens], [own]))
    for _ in range(5):
        if rng.random() < 0.4:
            forget(scorer)
        if rng.random() < 0.5:
            ahead = sequences[rng.integers(len(sequences))]
            scorer.score(replace(reads_batch([ahead[: int(rng.integers(1, len(ahead) + 1))]], [[]]), keep=True))
        chosen = rng.permutation(len(sequences))[: int(rng.integers(1, len(sequences) + 1))].tolist()
        batch = asked([sequences[i] for i in chosen], [reads[i] for i in chosen])
        if rng.random() < 0.5:
            batch = replace(
                batch, common=np.tile(np.int32([rng.integers(0, 140), rng.integers(1, 500)]), (len(chosen), 1))
            )
        assert answers(scorer, batch) == [alone[i] for i in chosen]


@pytest.mark.parametrize("name", ["llama", "llama in bfloat16"])
def test_items_among_400_have_the_bits_that_they_have_alone(name: str, engines: Callable[[str], Engine]) -> None:
    scorer, rng = engines(name), np.random.default_rng(400)
    query = rng.integers(0, VOCAB, 150).tolist()
    items = [(*query, *rng.integers(0, VOCAB, rng.integers(1, 40)).tolist()) for _ in range(400)]
    last = [[len(tokens) - 1] for tokens in items]
    forget(scorer)
    together = answers(scorer, asked(items, last))
    order = rng.permutation(400).tolist()
    assert answers(scorer, asked([items[i] for i in order], [last[i] for i in order])) == [together[i] for i in order]
    for i in range(0, 400, 23):
        if i % 2:
            forget(scorer)
        assert answers(scorer, asked([items[i]], [last[i]])) == [together[i]]


@pytest.mark.parametrize("name", NAMES)
def test_a_read_has_the_bits_of_the_last_read_of_the_cut_prompt(name: str, engines: Callable[[str], Engine]) -> None:
    """What follows a token says nothing about it; not so where a prompt's length chooses its rope."""
    scorer = engines(name)
    tokens = tuple(np.random.default_rng(5).integers(0, VOCAB, 170 if "rope beyond" in name else 330).tolist())
    positions = [p for p in (0, 1, 62, 63, 64, 77, 127, 128, 129, 200, 201, 329) if p < len(tokens)]
    forget(scorer)
    [together] = answers(scorer, asked([tokens], [positions]))
    for position, read in zip(positions, together, strict=True):
        forget(scorer)
        assert answers(scorer, asked([tokens[: position + 1]], [[position]])) == [[read]]


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
async def test_a_request_is_answered_with_the_same_bits_alone_and_beside_20_others(
    dtype: Any, model_folder: Path
) -> None:
    """Through the service: texts, a queue whose batches are small, and a softmax or the whole vocabulary."""
    engine = loading.load(model_folder, dtype=dtype, implementation="native", prefix_cache_bytes=SMALL_POOL)
    settings = ModelSettings(
        model=str(model_folder),
        dtype=dtype,
        max_batch_tokens=600,
        timeout_s=600,
        limits=Limits(max_queued_tokens=100_000),
    )
    rng = np.random.default_rng(20)
    words = ["Yes", "No", "the", "in", "other", "tourist", "Yesterday", "he", "a"]

    def text(count: int) -> str:
        return " ".join(rng.choice(words, count))

    queries = [text(25), text(70)]
    requests = [
        ScoreRequest(
            query=queries[number % 2] if number % 3 else text(30),
            items=[text(int(rng.integers(1, 12))) for _ in range(int(rng.integers(1, 9)))],
            labels=[" Yes", " No", " the other"],
            apply_softmax=bool(number % 4),
        )
        for number in range(21)
    ]

    asked = SystemOneRequest.model_validate(
        {
            "state": text(40),
            "questions": {text(2): {"type": "noul", "instructions": text(count)} for count in range(3, 12)}
            | {"team": {"type": "choice", "criteria": dict.fromkeys(words)}},
            "permutations": 3,
        }
    )

    async def scores(service: ModelService, request: ScoreRequest) -> Any:
        return (await service.answer(SCORE, request, request_id="one")).scores

    async def streamed(service: ModelService) -> dict[str, Any]:
        events = service.stream(SYSTEMONE, asked, request_id="one")
        return {line.id: line.answer async for some in events for line in some if isinstance(line, AnswerLine)}

    async def started() -> tuple[ModelService, LocalReplicas]:
        replicas = LocalReplicas(engine, settings)
        return ModelService(settings, TextTokenizer.load(model_folder), engine.info, replicas), replicas

    service, replicas = await started()
    try:
        alone: list[Any] = []
        for request in requests:
            forget(engine)
            alone.append(await scores(service, request))
        for _ in range(2):  # then with what is cached
            order = rng.permutation(len(requests)).tolist()
            together = await asyncio.gather(*(scores(service, requests[i]) for i in order))
            assert together == [alone[i] for i in order]
        forget(engine)
        whole = (await service.answer(SYSTEMONE, asked, request_id="one")).answers
        assert await streamed(service) == whole
        forget(engine)
        both = await asyncio.gather(streamed(service), *(scores(service, request) for request in requests[:3]))
        assert both == [whole, *alone[:3]]
    finally:
        service.close()
        await replicas.queue.close()
