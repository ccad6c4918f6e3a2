"""The systems that the benchmark compares. Each runs in its own process and answers one variant at a time."""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any, Self

import httpx

from scripts.benchmarks import decisions
from scripts.benchmarks.server import Server, body, only_awake, peak_mib, reset_peak, service, vllm
from scripts.benchmarks.work import Request, Variant
from serve_app import model_source
from serve_app.batches import join, pack_labels
from serve_app.client import SHARED_BY_THREADS
from serve_app.contract import TokenBatch

if TYPE_CHECKING:
    from model.engine import Engine

NAIVE_ITEMS = 24
"""The padded batch of whole prompts is timed on this many items at most, and scaled: it would take minutes."""

Answer = list[list[list[float]]]
"""Log-probabilities, [request][item][label]."""
Run = Callable[[Variant], tuple[float, Answer]]
"""(seconds for the whole variant, its answer)."""


class System:
    """One system in its process.

    Raises:
        RuntimeError: from any method, if the process has ended; its output says why.
    """

    def __init__(self, name: str, dtype: str) -> None:
        context = get_context("spawn")
        self.name = name
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(name, dtype, theirs))
        self._process.start()
        theirs.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(BrokenPipeError):
            self._pipe.send(None)
        self._process.join(60)
        self._process.terminate()

    def wait(self) -> None:
        """Wait until it has loaded the model."""
        self._receive()

    def run(self, variant: Variant) -> tuple[float, Answer, int]:
        """Seconds for the whole variant, its answer, and the peak memory in MiB while it was computed."""
        self._pipe.send(variant)
        return self._receive()

    def _receive(self) -> Any:
        try:
            return self._pipe.recv()
        except EOFError:
            raise RuntimeError(f"{self.name} has ended, see above") from None


def _serve(system: str, dtype: str, pipe: Connection) -> None:
    """The process: load, report it, then answer variants until None arrives."""
    # A pipe that ends early means that the parent has ended.
    with contextlib.suppress(EOFError, BrokenPipeError), SYSTEMS[system](dtype) as (run, processes):
        pipe.send("ready")
        while (variant := pipe.recv()) is not None:
            for process in processes:
                reset_peak(process)
            seconds, answer = run(variant)
            # Of questions, all systems are compared by the options' probabilities.
            pairs = zip(variant.requests, answer, strict=True)
            answer = [decisions.probabilities(rows) if request.decision and rows else rows for request, rows in pairs]
            pipe.send((seconds, answer, sum(map(peak_mib, processes))))


def load_engine(dtype: str) -> Engine:
    """This project's engine with the demo model in this process, warmed up."""
    from model.loading import load
    from serve_app.scorer.engines import compiled_folder

    target = "bfloat16" if dtype == "bfloat16" else "float32"
    engine = load(model_source.resolve("demo"), dtype=target, compiled_folder=compiled_folder())
    engine.warmup()
    return engine


def token_batch(request: Request) -> TokenBatch:
    """A request as the engine takes it: one read an item, at its last token."""
    return pack_labels(request.prompts, [request.label_ids] * len(request.items_ids))


@contextlib.contextmanager
def _engine(dtype: str) -> Generator[tuple[Run, Sequence[int]]]:
    """This project's engine, in process."""
    engine = load_engine(dtype)

    def run(variant: Variant) -> tuple[float, Answer]:
        started = time.perf_counter()
        values = engine.score(join([token_batch(request) for request in variant.requests])).values
        seconds = time.perf_counter() - started
        answer: Answer = []
        for request in variant.requests:
            count = len(request.items_ids) * len(request.label_ids)
            answer.append(values[:count].reshape(len(request.items_ids), -1).tolist())
            values = values[count:]
        return seconds, answer

    yield run, [os.getpid()]


@contextlib.contextmanager
def _over_http(server: Server, ask: Callable[[httpx.Client, Request], list[list[float]]]) -> Generator[Run]:
    """Send a variant's requests at once."""
    with (
        httpx.Client(base_url=server.url, timeout=3600, limits=SHARED_BY_THREADS) as client,
        ThreadPoolExecutor(32) as pool,
    ):

        def run(variant: Variant) -> tuple[float, Answer]:
            started = time.perf_counter()
            answer = list(pool.map(lambda request: ask(client, request), variant.requests))
            return time.perf_counter() - started, answer

        yield run


@contextlib.contextmanager
def _http(dtype: str, *options: str) -> Generator[tuple[Run, Sequence[int]]]:
    """This project's service, asked with text.

    Args:
        options: of ``score-serve serve``.
    """

    def ask(client: httpx.Client, request: Request) -> list[list[float]]:
        path, asked = body(request)
        answer = client.post(path, json=asked).raise_for_status().json()
        if request.decision is None:
            return answer["token_logprobs"]
        return [[math.log(each["probability"]) for each in own["probabilities"]] for own in answer["answers"]]

    with service(dtype, *options) as server, _over_http(server, ask) as run:
        yield run, server.processes


@contextlib.contextmanager
def _vllm(dtype: str) -> Generator[tuple[Run, Sequence[int]]]:
    """vLLM with its prefix cache, asked with text: by its own scoring route, which answers for the first label alone.

    Decisions are answered with a model of the demo's sizes, see ``decisions.qwen3_folder``: those answers are not
    returned, since no other system has its weights.
    """

    def ask(client: httpx.Client, request: Request) -> list[list[float]]:
        if request.decision is not None:
            asked = decisions.as_systemone(request.decision)
            answers = client.post("/v1/systemone", json=asked).raise_for_status().json()["answers"]
            if any(set(each["probabilities"]) != set(decisions.OPTIONS) for each in answers.values()):
                raise RuntimeError("vLLM did not answer every question with all its options")
            return []
        asked = body(request)[1] | {"apply_softmax": False}
        del asked["return_token_logprobs"]
        answer = client.post("/generative_scoring", json=asked).raise_for_status().json()
        return [[math.log(item["score"])] for item in answer["data"]]

    with contextlib.ExitStack() as stack:
        running: dict[bool, Run] = {}
        processes: list[int] = []

        def run(variant: Variant) -> tuple[float, Answer]:
            decides = variant.requests[0].decision is not None
            if decides not in running:  # it starts in two to three minutes
                folder = decisions.qwen3_folder() if decides else model_source.resolve("demo")
                server = stack.enter_context(vllm(folder, dtype))
                processes[:] = server.processes
                client = stack.enter_context(_over_http(server, ask))
                running[decides] = stack.enter_context(only_awake(client, server.processes))
            return running[decides](variant)

        yield run, processes


def _torch_model(dtype: str) -> tuple[Any, Any]:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_grad_enabled(False)
    folder = model_source.resolve("demo")
    return torch, AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()


def _padded(torch: Any, rows: list[list[int]]) -> tuple[Any, Any, Any]:
    """Right-padded ids, their mask, and each row's last position."""
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    lengths = torch.tensor([len(row) for row in rows])
    return ids, (torch.arange(width)[None] < lengths[:, None]).long(), lengths - 1


def _read(torch: Any, model: Any, hidden: Any, last: Any, labels: list[int]) -> list[list[float]]:
    """Label log-probabilities at each row's last position."""
    logits = model.lm_head(hidden[torch.arange(len(hidden)), last]).float()
    return torch.log_softmax(logits, -1)[:, labels].tolist()


@contextlib.contextmanager
def _hf_naive(dtype: str) -> Generator[tuple[Run, Sequence[int]]]:
    """transformers: whole prompts in padded batches of 8; the query is computed for every item."""
    torch, model = _torch_model(dtype)

    def run(variant: Variant) -> tuple[float, Answer]:
        seconds, answer = 0.0, []
        for request in variant.requests:
            prompts = request.prompts[:NAIVE_ITEMS]
            rows: list[list[float]] = []
            started = time.perf_counter()
            for at in range(0, len(prompts), 8):
                ids, mask, last = _padded(torch, prompts[at : at + 8])
                hidden = model.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
                rows += _read(torch, model, hidden, last, request.label_ids)
            seconds += (time.perf_counter() - started) * len(request.items_ids) / len(prompts)
            answer.append(rows)
        return seconds, answer

    yield run, [os.getpid()]


@contextlib.contextmanager
def _hf_prefix(dtype: str) -> Generator[tuple[Run, Sequence[int]]]:
    """transformers: the query's keys and values once, expanded over batches of 50 items; the head at last positions.

    Items are batched by length: in W6's own order the padding would be three quarters of the work.
    """
    torch, model = _torch_model(dtype)
    from transformers import DynamicCache

    def run(variant: Variant) -> tuple[float, Answer]:
        answer: Answer = []
        started = time.perf_counter()
        for request in variant.requests:
            query = torch.tensor([request.query_ids])
            cached = model.model(input_ids=query, use_cache=True).cache
            order = sorted(range(len(request.items_ids)), key=lambda i: len(request.items_ids[i]))
            rows: dict[int, list[float]] = {}
            for at in range(0, len(order), 50):
                batch = order[at : at + 50]
                ids, mask, last = _padded(torch, [request.items_ids[i] for i in batch])
                expanded = DynamicCache(
                    [
                        (layer.keys.expand(len(ids), -1, -1, -1), layer.values.expand(len(ids), -1, -1, -1))
                        for layer in cached.layers
                    ]
                )
                full = torch.cat([torch.ones(len(ids), query.shape[1], dtype=mask.dtype), mask], dim=1)
                hidden = model.model(input_ids=ids, attention_mask=full, cache=expanded).last_hidden_state
                rows |= zip(batch, _read(torch, model, hidden, last, request.label_ids), strict=True)
            answer.append([rows[i] for i in range(len(order))])
        return time.perf_counter() - started, answer

    yield run, [os.getpid()]


SYSTEMS: dict[str, Callable[[str], contextlib.AbstractContextManager[tuple[Run, Sequence[int]]]]] = {
    "engine": _engine,
    "http": _http,
    "http-serve-proxy": lambda dtype: _http(dtype, "--no-fast-front"),
    "vllm": _vllm,
    "hf-naive": _hf_naive,
    "hf-prefix": _hf_prefix,
}
