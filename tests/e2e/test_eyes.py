"""Traces of a request in Ray Serve: log lines, spans, headers; on the fake engine."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from serve_app.app import build
from serve_app.settings import ModelSettings
from tests.local import service_of

pytestmark = pytest.mark.ray

SECRET = "the secret of the prompt"
TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
CALLER = "00f067aa0ba902b7"


@pytest.fixture(scope="module")
def client(deploy: Callable[[Any], httpx.Client], settings: ModelSettings) -> httpx.Client:
    return deploy(build(service_of(settings)))


@pytest.fixture(scope="module")
def logs(client: httpx.Client) -> Path:  # noqa: ARG001 - Ray runs, and writes there
    import ray

    return Path(ray._private.worker._global_node.get_session_dir_path()) / "logs" / "serve"


def spans(folder: Path) -> Iterator[dict[str, Any]]:
    """All spans that were written, as JSON objects."""
    decoder = json.JSONDecoder()
    for file in (folder / "spans").glob("*"):
        text = file.read_text().strip()
        while text:
            span, end = decoder.raw_decode(text)
            yield span
            text = text[end:].lstrip()


def test_a_trace_leads_from_the_proxy_to_the_device(client: httpx.Client, logs: Path):
    headers = {"traceparent": f"00-{TRACE}-{CALLER}-01", "x-request-id": "traced"}
    body = {"query": SECRET, "items": ["a", "b"], "labels": [" yes", " no"]}
    client.post("/v1/score", json=body).raise_for_status()  # asks for no trace
    client.post("/v1/score", json=body, headers=headers).raise_for_status()

    def found() -> dict[str, dict[str, Any]]:
        return {s["context"]["span_id"]: s for s in spans(logs) if s["context"]["trace_id"] == f"0x{TRACE}"}

    while not any(span["name"].startswith("proxy") for span in found().values()):  # this span ends last
        time.sleep(0.1)
    own = found()

    def above(span: dict[str, Any]) -> list[str]:
        """Names of the spans that contain this one, from the outermost."""
        outer = own.get(span["parent_id"])
        return [*above(outer), outer["name"]] if outer else [span["parent_id"]]

    places = {span["name"]: above(span) for span in own.values()}
    proxy = "proxy_http_request Ingress POST /v1/score"
    assert places[proxy] == [f"0x{CALLER}"]
    assert places["replica_handle_request Ingress __call__"] == [
        f"0x{CALLER}",
        proxy,
        "route_to_replica Ingress __call__",
    ]
    assert places["tokenise"][0] == f"0x{CALLER}"
    for stage in ("queue", "device"):
        assert places[stage][-2:] == ["route_to_replica Scorer score", "replica_handle_request Scorer score"]
        assert places[stage][0] == f"0x{CALLER}"
    ends = {span["name"]: span["end_time"] for span in own.values()}
    starts = {span["name"]: span["start_time"] for span in own.values()}
    assert starts["tokenise"] <= ends["tokenise"] <= starts["queue"] <= ends["queue"] == starts["device"]
    assert SECRET not in json.dumps(own)


def test_logs_are_json_with_request_ids_and_without_prompts(client: httpx.Client, logs: Path):
    asked = {"x-request-id": "look-for-me"}
    right = client.post("/v1/score", json={"query": SECRET, "items": ["a"], "labels": [" yes"]}, headers=asked)
    wrong = client.post("/v1/score", json={"query": SECRET, "items": ["a"], "labels": []}, headers=asked)
    assert [right.status_code, wrong.status_code] == [200, 400]
    assert right.headers.get_list("x-request-id") == wrong.headers.get_list("x-request-id") == ["look-for-me"]

    def found() -> list[dict[str, Any]]:
        lines = [json.loads(line) for file in logs.glob("*.log") for line in file.read_text().splitlines()]
        return [line for line in lines if line.get("request_id") == "look-for-me"]

    while len([line for line in found() if line.get("component_name") == "proxy"]) < 2:
        time.sleep(0.1)
    assert {line["deployment"] for line in found() if "deployment" in line} >= {"score_Ingress", "score_Scorer"}
    assert not any(SECRET in file.read_text() for file in logs.glob("*") if file.is_file())


def test_stages_are_timed_through_serve(client: httpx.Client):
    answer = client.post("/v1/score", json={"query": SECRET, "items": ["a"], "labels": [" yes"]})
    (header,) = answer.headers.get_list("server-timing")
    stages = [part.split(";")[0] for part in header.split(", ")]
    assert stages == ["tokenise", "queue", "device", "total"]
