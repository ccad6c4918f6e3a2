"""The systems that the benchmark compares. Each runs in a process of its own and answers one variant at a time."""

from __future__ import annotations

import contextlib
import os
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from scripts.bench_work import Request, Variant
from serve_app import model_source

NAIVE_ITEMS = 24
"""The padded batch of whole prompts is timed on this many items at most, and scaled: it would take minutes."""

Answer = list[list[list[float]]]
Run = Callable[[Variant], tuple[float, Answer, int]]
"""(seconds for the whole variant, log-probabilities [request][item][label], peak MiB)."""


def serve_commands(system: str, dtype: str, pipe: Connection) -> None:
    """The process's life: load, say so, then answer variants until told None."""
    with SYSTEMS[system](dtype) as run:
        pipe.send("ready")
        while (variant := pipe.recv()) is not None:
            pipe.send(run(variant))


def _own_peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


@contextlib.contextmanager
def _engine(dtype: str) -> Iterator[Run]:
    """This project's engine, in process."""
    from serve_app.scorer import compiled_folder

    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(compiled_folder()))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    from model.engine import load
    from serve_app.batches import join
    from serve_app.contract import TokenBatch

    engine = load(model_source.resolve("demo"), dtype="bfloat16" if dtype == "bfloat16" else "float32")
    engine.warmup()

    def batch(request: Request) -> TokenBatch:
        prompts, labels = request.prompts, request.label_ids
        count = len(prompts)
        return TokenBatch(
            tokens=np.concatenate([np.asarray(prompt, np.int32) for prompt in prompts]),
            offsets=np.cumsum([0, *map(len, prompts)]).astype(np.int64),
            read_sequences=np.arange(count, dtype=np.int32),
            read_positions=np.array([len(prompt) - 1 for prompt in prompts], np.int32),
            targets=np.tile(np.asarray(labels, np.int32), count),
            target_offsets=np.arange(count + 1, dtype=np.int64) * len(labels),
        )

    def run(variant: Variant) -> tuple[float, Answer, int]:
        started = time.perf_counter()
        values = engine.score(join([batch(request) for request in variant.requests])).values
        seconds = time.perf_counter() - started
        answer: Answer = []
        for request in variant.requests:
            count = len(request.items_ids) * len(request.label_ids)
            answer.append(values[:count].reshape(len(request.items_ids), -1).tolist())
            values = values[count:]
        return seconds, answer, _own_peak()

    yield run


@contextlib.contextmanager
def _http(dtype: str) -> Iterator[Run]:
    """This project's service as ``score-serve serve`` starts it, asked over HTTP with text where there is text."""
    import httpx
    import psutil

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "serve_app.cli", "serve", "--dtype", dtype, "--port", str(port)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            url = f"http://127.0.0.1:{port}"
            while process.poll() is None:
                with contextlib.suppress(httpx.TransportError):
                    if httpx.get(f"{url}/ready", timeout=60).status_code == 200:
                        break
                time.sleep(0.5)
            else:
                raise RuntimeError("the service did not start; run scripts/serve to see why")
            scorers = [
                child
                for child in psutil.Process(process.pid).children(recursive=True)
                if "ServeReplica:score:Scorer" in " ".join(child.cmdline())
            ]
            with httpx.Client(base_url=url, timeout=3600) as client, ThreadPoolExecutor(32) as pool:

                def ask(request: Request) -> list[list[float]]:
                    kind = "text" if request.items_text else "ids"
                    body = {
                        "query": getattr(request, f"query_{kind}"),
                        "items": getattr(request, f"items_{kind}"),
                        "label_token_ids": request.label_ids,
                        "return_token_logprobs": True,
                    }
                    return client.post("/v1/score", json=body).raise_for_status().json()["token_logprobs"]

                def run(variant: Variant) -> tuple[float, Answer, int]:
                    started = time.perf_counter()
                    answer = list(pool.map(ask, variant.requests))
                    seconds = time.perf_counter() - started
                    return seconds, answer, max(child.memory_info().rss for child in scorers) // 2**20

                yield run
        finally:
            process.terminate()


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
def _hf_naive(dtype: str) -> Iterator[Run]:
    """transformers: whole prompts in padded batches of 8; the query is computed for every item."""
    torch, model = _torch_model(dtype)

    def run(variant: Variant) -> tuple[float, Answer, int]:
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
        return seconds, answer, _own_peak()

    yield run


@contextlib.contextmanager
def _hf_prefix(dtype: str) -> Iterator[Run]:
    """transformers: the query's keys and values once, expanded over batches of 50 items; the head at last positions."""
    torch, model = _torch_model(dtype)
    from transformers import DynamicCache

    def run(variant: Variant) -> tuple[float, Answer, int]:
        answer: Answer = []
        started = time.perf_counter()
        for request in variant.requests:
            query = torch.tensor([request.query_ids])
            cached = model.model(input_ids=query, use_cache=True).past_key_values
            rows: list[list[float]] = []
            for at in range(0, len(request.items_ids), 50):
                ids, mask, last = _padded(torch, request.items_ids[at : at + 50])
                expanded = DynamicCache(
                    [
                        (layer.keys.expand(len(ids), -1, -1, -1), layer.values.expand(len(ids), -1, -1, -1))
                        for layer in cached.layers
                    ]
                )
                full = torch.cat([torch.ones(len(ids), query.shape[1], dtype=mask.dtype), mask], dim=1)
                hidden = model.model(input_ids=ids, attention_mask=full, past_key_values=expanded).last_hidden_state
                rows += _read(torch, model, hidden, last, request.label_ids)
            answer.append(rows)
        return time.perf_counter() - started, answer, _own_peak()

    yield run


SYSTEMS: dict[str, Callable[[str], contextlib.AbstractContextManager[Run]]] = {
    "engine": _engine,
    "http": _http,
    "hf-naive": _hf_naive,
    "hf-prefix": _hf_prefix,
}
