"""``score-serve serve`` as a user runs it: one process that starts all others, and leaves none."""

from __future__ import annotations

import ipaddress
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import urljoin

import httpx
import psutil
import pytest

from serve_app.frontend import auth
from serve_app.local_ray import GRPC_ENV, free_port
from tests.tiny import make_llama
from tests.wire import BODY, SPLITS, connected, post, upgrade_is_ignored

pytestmark = pytest.mark.ray


def of_a_user() -> dict[str, str]:
    """The environment without what the tests set for Serve."""
    return {name: value for name, value in os.environ.items() if name not in GRPC_ENV}


@contextmanager
def launched(*arguments: str) -> Generator[subprocess.Popen[str]]:
    """Run the command in a process group of its own, as a terminal does."""
    command = [Path(sys.executable).with_name("score-serve"), "serve", "--engine", "fake", *arguments]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, process_group=0, env=of_a_user()
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def read_until(process: subprocess.Popen[str], wanted: str) -> list[str]:
    lines: list[str] = []
    assert process.stderr
    for line in process.stderr:
        lines.append(line)
        if wanted in line:
            return lines
    raise AssertionError(f"{wanted!r} is not in:\n{''.join(lines)}")


SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP]
"""From systemd and ``timeout``, Ctrl-C, and a terminal that closes. The whole group gets them, Ray's processes too."""
SOON = 30
"""Seconds that suffice on a busy machine; Ray itself waits 60 s for a Ray that is gone."""


def ended_by(process: subprocess.Popen[str], number: int) -> str:
    """Send the whole group a signal, and check that no process is left. Returns what was printed after it."""
    started = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, number)
    _, rest = process.communicate(timeout=SOON)
    _, alive = psutil.wait_procs(started, timeout=0)
    assert alive == []
    assert not any(word in rest for word in ("Traceback", "Error", "GCS", ".cc:", ".h:")), rest
    return rest


def open_to_others(process: subprocess.Popen[str]) -> set[int]:
    """The ports of the service and of all that it started on which another machine reaches them."""
    started = psutil.Process(process.pid)
    found: set[int] = set()
    for each in (started, *started.children(recursive=True)):
        for connection in each.net_connections("inet"):
            if connection.status == psutil.CONN_LISTEN:
                ip = ipaddress.ip_address(connection.laddr.ip)
                if not (getattr(ip, "ipv4_mapped", None) or ip).is_loopback:
                    found.add(connection.laddr.port)
    return found


def a_job_joins_the_service(process: subprocess.Popen[str], folder: Path) -> None:
    """Run a job that joins the service's Ray, in a user's environment. It says nothing of Ray."""
    (raylet,) = [each for each in psutil.Process(process.pid).children(recursive=True) if each.name() == "raylet"]
    (address,) = set(re.findall(r"--gcs-address=([\w.:]+)", " ".join(raylet.cmdline())))
    (folder / "in.jsonl").write_text('{"text": "the fox"}\n')
    command = [Path(sys.executable).with_name("score-serve"), "dataset", "in.jsonl", "-o", "out", "--app", "score"]
    done = subprocess.run(
        [*command, "--item", "{text}", "-l", " yes"],
        capture_output=True,
        text=True,
        cwd=folder,
        # Other tests may have a Ray of their own on this machine; to an address Ray sends no token by itself.
        env=of_a_user() | {"RAY_ADDRESS": address, "RAY_AUTH_MODE": "token"},
    )
    assert (done.returncode, done.stdout.split("\n")[0]) == (0, "rows      1 scored, 0 set aside"), done.stderr
    assert [line for line in done.stderr.splitlines() if " of 1 rows" not in line] == []


def refuses_later_requests(route: str) -> None:
    """Wait until the stopping service refuses new requests."""
    while (late := httpx.post(route, json=BODY, headers={"authorization": "Bearer a-key"})).status_code == 200:
        time.sleep(0.05)
    assert (late.status_code, late.json()["type"]) == (503, "ServiceUnavailableError")
    assert "shutting down" in late.json()["message"]


def test_ctrl_c_waits_for_the_last_request_and_leaves_no_process(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The user's folder has modules with the names of ours and of packages, which no process may import."""
    for name in ("model", "serve_app", "ray", "tokenizers", "numpy", "jax"):
        (tmp_path / f"{name}.py").write_text("raise RuntimeError('the user's own module was imported')")
    (tmp_path / "judge").symlink_to(model_folder)
    monkeypatch.chdir(tmp_path)
    port = free_port()
    monkeypatch.setenv(auth.VARIABLE, "a-key")  # reaches the front end through Ray
    with launched("--model", "./judge", "--port", str(port), "--access-log") as process:
        said = read_until(process, "curl")
        (logs,) = [Path(line.split()[1]) for line in said if line.startswith("logs: ")]
        assert any("programs are ready" in line for line in said)
        words = shlex.split(said[-1])
        body = json.loads(words[words.index("-d") + 1])
        assert httpx.post(words[1], json=body).status_code == 401
        answer = httpx.post(words[1], json=body, headers={"authorization": "Bearer a-key"})
        assert answer.status_code == 200
        assert [round(sum(row), 6) for row in answer.json()["scores"]] == [1, 1]
        assert open_to_others(process) == set()
        a_job_joins_the_service(process, tmp_path)
        started = psutil.Process(process.pid).children(recursive=True)
        (raylet,) = [child for child in started if child.name() == "raylet"]
        assert raylet.environ()["MALLOC_ARENA_MAX"] == "2"
        assert {child.nice() for child in started} == {psutil.Process().nice()}
        head, body = post("Authorization: Bearer a-key")
        with connected(words[1]) as wire:
            wire.send(head + body[:5])
            time.sleep(1)
            os.killpg(process.pid, signal.SIGINT)  # like Ctrl-C in a terminal, which reaches the whole group
            read_until(process, "stopping")
            refuses_later_requests(words[1])
            probes = {path: httpx.get(urljoin(words[1], path)).status_code for path in ("/health", "/ready")}
            assert probes == {"/health": 200, "/ready": 503}
            time.sleep(3)  # idle scorers would have left
            wire.send(body[5:])
            status, answer = wire.answer()
            assert (status, len(answer["scores"])) == (200, 2)
        _, rest = process.communicate(timeout=SOON)
        assert process.returncode == 0, rest
        assert "Traceback" not in rest
    _, alive = psutil.wait_procs(started, timeout=10)
    assert alive == []
    # The logs outlive the service, and have the requests.
    (front_end,) = logs.glob("replica_*Ingress*.log")
    assert re.search(r"POST /v1/score 401 .*\n(.*\n)*.*POST /v1/score 200 ", front_end.read_text())
    shutil.rmtree(logs)


def test_calls_by_grpc_take_large_jobs_and_outlive_a_replica_but_not_ray(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
):
    """The job is 36 MB, above gRPC's usual 4 MiB. And gRPC would use a proxy of the environment for this host, too."""
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    port, ask = free_port(), {"query": [*range(1000)], "label_token_ids": [1]}
    with (
        launched("--model", str(model_folder), "--port", str(port), "--replicas", "2", "--host", "0.0.0.0") as process,
        httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60, trust_env=False) as client,
    ):
        read_until(process, "curl")
        large = client.post("/v1/score", json=ask | {"items": [[i] for i in range(9000)]})
        assert (large.status_code, len(large.json()["scores"])) == (200, 9000)
        children = psutil.Process(process.pid).children(recursive=True)
        scorers = [child for child in children if "ServeReplica:score:Scorer" in " ".join(child.cmdline())]
        assert [child.environ()["RAY_SERVE_USE_GRPC_BY_DEFAULT"] for child in scorers] == ["1", "1"]
        assert open_to_others(process) == {port}
        scorers[0].kill()
        assert [client.post("/v1/score", json=ask | {"items": [[i]]}).status_code for i in range(20)] == [200] * 20
        # If Ray dies by itself, the command ends with the reason.
        started = psutil.Process(process.pid).children(recursive=True)
        (raylet,) = [child for child in started if child.name() == "raylet"]
        raylet.kill()
        _, rest = process.communicate(timeout=SOON)
        assert process.returncode == 1
        assert rest.splitlines()[-1].startswith("error: Ray's own processes have ended")
        assert "Traceback" not in rest
    _, alive = psutil.wait_procs(started, timeout=0)
    assert alive == []


def check_the_wire(url: str) -> None:
    """Check what HTTP libraries send besides plain requests, on the port itself."""
    for split in SPLITS.values():
        upgrade_is_ignored(url, "h2c", split)
        upgrade_is_ignored(url, "websocket", split)
    late = httpx.post(
        url + "/v1/score", json={"items": [[1]], "label_token_ids": [2]}, headers={"x-request-timeout-seconds": "1e-6"}
    )
    assert (late.status_code, late.json()["type"]) == (504, "TimeoutError")
    late = httpx.post(
        url + "/v1/completions", json={"prompt": [1], "max_tokens": 1}, headers={"x-request-timeout-seconds": "1e-6"}
    )
    assert (late.status_code, late.json()["error"]["type"]) == (504, "TimeoutError")


def test_serves_own_proxy_gives_our_answers_until_a_second_ctrl_c(model_folder: Path):
    port = free_port()
    page = ("--cors-origin", "https://page.example")
    with launched("--model", str(model_folder), "--port", str(port), "--no-fast-front", *page) as process:
        read_until(process, "curl")
        url = f"http://127.0.0.1:{port}"
        assert open_to_others(process) == set()
        check_the_wire(url)
        head = httpx.head(url + "/health", headers={"origin": "https://page.example"})
        assert (head.status_code, head.content, head.headers["content-length"]) == (200, b"", "15")
        assert head.headers["access-control-allow-origin"] == "https://page.example"
        wish = {"origin": "https://page.example", "access-control-request-method": "POST"}
        assert httpx.options(url + "/v1/score", headers=wish).status_code == 200
        with connected(url) as wire:
            wire.send(b"".join(post()))
            wire.socket.shutdown(socket.SHUT_WR)
            assert wire.answer()[0] == 200
            assert wire.ends()
        # A second Ctrl-C does not wait for a request that is still incomplete.
        with connected(url) as wire:
            head, body = post()
            wire.send(head + body[:5])
            time.sleep(1)
            process.send_signal(signal.SIGINT)
            read_until(process, "stopping")
            refuses_later_requests(url + "/v1/score")
            ended_by(process, signal.SIGINT)
        assert process.returncode == 0


@pytest.mark.slow
def test_haproxy_in_front_gives_the_same_answers(model_folder: Path):
    port = free_port()
    with launched("--model", str(model_folder), "--port", str(port)) as process:
        read_until(process, "curl")
        body = {"query": [1], "items": [[2], [3]], "label_token_ids": [4, 5], "apply_softmax": True}
        url = f"http://127.0.0.1:{port}"
        right = httpx.post(url + "/v1/score", json=body, headers={"x-request-id": "mine"})
        assert right.status_code == 200
        assert right.headers.get_list("x-request-id") == ["mine"]
        wrong = httpx.post(url + "/v1/score", json=body | {"temperature": -1})
        assert (wrong.status_code, wrong.json()["param"]) == (400, "temperature")
        check_the_wire(url)
        children = psutil.Process(process.pid).children(recursive=True)
        process.terminate()
        process.communicate(timeout=60)
    _, alive = psutil.wait_procs(children, timeout=10)
    assert alive == []


@pytest.mark.slow  # every run has the same signal for the whole group
def test_it_can_be_terminated_while_it_starts(model_folder: Path):
    with launched("--model", str(model_folder), "--port", str(free_port())) as process:
        read_until(process, "starting the service")
        started = psutil.Process(process.pid).children(recursive=True)
        process.terminate()
        _, rest = process.communicate(timeout=60)
        assert process.returncode == 130, rest
        assert "Traceback" not in rest
    _, alive = psutil.wait_procs(started, timeout=10)
    assert alive == []


@pytest.mark.parametrize(
    ("when", "number"),
    [
        *(("starting Ray", each) for each in SIGNALS),
        ("starting the service", signal.SIGTERM),
        *(pytest.param("starting the service", each, marks=pytest.mark.slow) for each in SIGNALS[1:]),
    ],
)
def test_a_signal_to_the_whole_group_ends_the_start(when: str, number: int, model_folder: Path):
    with launched("--model", str(model_folder), "--port", str(free_port())) as process:
        read_until(process, when)
        ended_by(process, number)
        assert process.returncode == 130


STARTS_RAY = """
import os, signal, threading
from serve_app.local_ray import start_ray

got, seen, over = [], set(), threading.Event()

def ours(number, frame):
    got.append(number)

def watch():
    while not over.wait(0.02):
        seen.add(signal.getsignal(signal.SIGTERM))

signal.signal(signal.SIGTERM, ours)
watcher = threading.Thread(target=watch)
watcher.start()
try:
    start_ray(1)
finally:
    over.set()
watcher.join()
assert seen == {ours}, seen
os.kill(os.getpid(), signal.SIGTERM)
print(got)
"""


def test_ray_starts_without_its_own_handler_of_sigterm():
    result = subprocess.run([sys.executable, "-c", STARTS_RAY], capture_output=True, text=True, env=of_a_user())
    assert (result.returncode, result.stdout) == (0, "[15]\n"), result.stderr
    assert "SIGTERM" not in result.stderr  # what the handler from C++ prints


@pytest.mark.parametrize(
    "number", [each if each == signal.SIGTERM else pytest.param(each, marks=pytest.mark.slow) for each in SIGNALS]
)
def test_a_signal_to_the_whole_group_ends_a_service_with_requests_in_flight(number: int, model_folder: Path):
    port = free_port()
    body = {"query": [1], "items": [[*range(300)]] * 50, "label_token_ids": [4, 5]}
    answers: list[int] = []

    def ask_on() -> None:
        with suppress(httpx.TransportError), httpx.Client(timeout=SOON) as client:
            while True:
                answers.append(client.post(f"http://127.0.0.1:{port}/v1/score", json=body).status_code)

    with launched("--model", str(model_folder), "--port", str(port)) as process, ThreadPoolExecutor() as threads:
        read_until(process, "curl")
        callers = [threads.submit(ask_on) for _ in range(4)]
        while len(answers) < 20:
            time.sleep(0.05)
        assert {*answers} == {200}
        rest = ended_by(process, number)
        assert process.returncode == 0
        assert rest.startswith("stopping")
        assert ("the signal reached Ray, too" in rest) == (number != signal.SIGINT)  # Ray's processes ignore SIGINT
        for caller in callers:
            caller.result()


def test_a_model_without_a_tokenizer_ends_it_with_the_reason(model_folder: Path, tmp_path: Path):
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in model_folder.iterdir():
        if not path.name.startswith("tokenizer"):
            (broken / path.name).write_bytes(path.read_bytes())
    with launched("--model", str(broken), "--port", str(free_port())) as process:
        _, output = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "error: no tokenizer can be loaded" in output
    assert "Traceback" not in output


def test_a_scorer_that_cannot_load_its_weights_ends_the_start_with_the_reason(tmp_path: Path):
    weights = make_llama(tmp_path / "broken", tokenizer=True) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    with launched("--model", str(weights.parent), "--engine", "jax", "--port", str(free_port())) as process:
        _, output = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "error: the service did not start: CheckpointError" in output
    assert "not whole safetensors files: model.safetensors" in output
    assert "Traceback" not in output


@pytest.mark.slow  # the launcher takes the same way as with broken weights
def test_a_scorer_that_dies_while_it_starts_ends_the_start(model_folder: Path):
    """The system kills a process in the same way when memory is short."""
    with launched("--model", str(model_folder), "--port", str(free_port())) as process:
        read_until(process, "starting the service")
        launcher = psutil.Process(process.pid)
        while process.poll() is None:
            with suppress(psutil.Error):
                for child in launcher.children(recursive=True):
                    with suppress(psutil.Error):
                        if "ServeReplica:score:Scorer" in " ".join(child.cmdline()):
                            child.kill()
            time.sleep(0.05)
        _, output = process.communicate(timeout=SOON)
    assert process.returncode == 1
    assert "error: the service did not start: ActorDiedError" in output
    assert "Traceback" not in output


def test_a_taken_port_and_a_missing_model_are_errors_before_anything_starts(tmp_path: Path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with launched("--port", str(taken.getsockname()[1])) as process:
            _, output = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "--port" in output
    with launched("--model", str(tmp_path / "nothing"), "--port", str(free_port())) as process:
        _, output = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "nothing" in output
    assert "starting Ray" not in output
