"""New versions and other settings under load: no request fails, and none meets an engine that is not warm."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from model.tensors.adapters import CONFIG, WEIGHTS
from serve_app.app import build
from serve_app.local_ray import APP_NAME
from serve_app.settings import ModelSettings
from tests.faults.conftest import ITEMS, actors, application, under_load, wait_for
from tests.local import service_of
from tests.processes import replica_processes

pytestmark = pytest.mark.ray

BODY = {"query": [1], "items": ITEMS, "label_token_ids": [1, 2]}


def asking(client: httpx.Client) -> Callable[[], Any]:
    return lambda: client.post("/v1/score", json=BODY).raise_for_status().json()["scores"]


def pids(deployment: str) -> set[int]:
    return {process.pid for process in replica_processes(deployment)}


@pytest.mark.parametrize(
    ("update", "most"),
    [
        # Two scorers at most: one old one answers while the other's successor starts.
        pytest.param({"scorer_replicas": 2}, 2, id="in turn"),
        # Three for a while: both old ones answer until a new one is warm.
        pytest.param({"scorer_replicas": 2, "max_surge_percent": 1}, 3, id="beside", marks=pytest.mark.slow),
        # From two to one, in one step.
        pytest.param({"max_surge_percent": 1}, 2, id="fewer", marks=pytest.mark.slow),
    ],
)
def test_a_redeploy_under_load_fails_no_request_and_no_engine_is_asked_before_it_is_warm(
    update: dict[str, int],
    most: int,
    deploy: Callable[[Any], httpx.Client],
    settings: ModelSettings,
    tmp_path: Path,
):
    client = deploy(application(settings.model_copy(update={"scorer_replicas": 2})))
    version, gate = settings.model_copy(update={**update, "aliases": ("new",)}), tmp_path / "gate"
    with under_load(asking(client)) as load, ThreadPoolExecutor(1) as background:
        load.wait_for_more(20)
        old = pids("Scorer") | pids("Ingress")
        deploying = background.submit(deploy, application(version, gate=gate))
        wait_for(lambda: len(pids("Scorer") - old) > 0)
        load.wait_for_more(40)  # none of them from the one that is starting
        assert len(pids("Scorer")) <= most
        assert pids("Scorer") & old
        gate.touch()
        deploying.result()
        wait_for(lambda: old.isdisjoint(pids("Scorer") | pids("Ingress")))
        assert "new" in client.get("/v1/info").json()["names"]
    assert load.failures == []


@pytest.mark.slow
def test_a_version_that_cannot_start_leaves_the_old_one_at_work(
    deploy: Callable[[Any], httpx.Client], settings: ModelSettings
):
    two = settings.model_copy(update={"scorer_replicas": 2})
    client = deploy(application(two))
    fronts = pids("Ingress")
    for percent, left in ((1, 2), (0, 1)):
        scorers = pids("Scorer")
        with under_load(asking(client)) as load:
            load.wait_for_more(20)
            broken = {"model": "/no/model", "engine": "jax", "max_surge_percent": percent}
            with pytest.raises(RuntimeError, match="failed"):
                deploy(build(service_of(two.model_copy(update=broken))))
            wait_for(lambda: len(pids("Scorer") & scorers) == len(pids("Scorer")) == left)  # noqa: B023 - at once
            load.wait_for_more(50)
        assert load.failures == []
        assert pids("Ingress") == fronts


def test_settings_that_need_no_restart_change_under_load_and_wrong_ones_do_no_harm(
    cluster: str, settings: ModelSettings, tmp_path: Path
):
    from ray.serve.context import _get_global_client
    from ray.serve.schema import ServeDeploySchema

    name = settings.name
    settings = settings.model_copy(update={"max_adapters": 1})

    def apply(*overrides: dict[str, Any]) -> None:
        """Deploy as ``serve deploy`` does from a file."""
        application = {
            "name": APP_NAME,
            "import_path": "serve_app.app:build",
            "args": service_of(settings).model_dump(exclude_unset=True),
            "deployments": list(overrides),
        }
        controller = _get_global_client()
        controller.deploy_apps(ServeDeploySchema.model_validate({"applications": [application]}))
        controller._wait_for_application_running(APP_NAME)

    def change(**live: Any) -> None:
        apply({"name": "Scorer", "user_config": live}, {"name": "Ingress", "user_config": {name: live}})

    with httpx.Client(base_url=cluster, timeout=60) as client:
        apply()
        wait_for(lambda: client.get("/ready").status_code == 200)
        running = pids("Scorer") | pids("Ingress")
        with under_load(asking(client)) as load:
            # The default of max_queued_tokens follows the measured speed, so it would differ from time to time.
            change(limits={"max_items": 60, "max_queued_tokens": 100_000}, timeout_s=33, aliases=["judge"])
            wait_for(lambda: client.get("/v1/info").json()["limits"]["max_items"] == 60)
            info = client.get("/v1/info?model=judge").json()
            assert info["limits"]["timeout_s"] == 33
            assert client.post("/v1/score", json={**BODY, "items": [*ITEMS, [5]]}).status_code == 413
            load.wait_for_more(20)
            change(limits={"max_items": 10**6}, dtype="bfloat16")
            load.wait_for_more(20)
            assert client.get("/v1/info").json() == info
            apply({"name": "Ingress", "user_config": {"nobody": {"timeout_s": 5}}})
            load.wait_for_more(20)
            assert client.get("/v1/info").json() == info
            apply()
            wait_for(lambda: client.get("/v1/info").json()["limits"]["max_items"] == settings.limits.max_items)
            assert client.get("/v1/info?model=judge").status_code == 404
            plain = client.post("/v1/score", json=BODY).json()["scores"]
            for adapter in ("formal", "kind"):  # in the only slot, one after the other
                (tmp_path / adapter).mkdir()
                for file in (CONFIG, WEIGHTS):  # the fake engine does not read them
                    (tmp_path / adapter / file).touch()
                change(adapters={adapter: str(tmp_path / adapter)})
                body = {**BODY, "model": adapter}
                wait_for(lambda: client.post("/v1/score", json=body).status_code == 200)  # noqa: B023 - called at once
                assert client.post("/v1/score", json=body).json()["scores"] != plain
                load.wait_for_more(20)
            assert client.post("/v1/score", json={**BODY, "model": "formal"}).status_code == 404
            apply()
            wait_for(lambda: client.post("/v1/score", json={**BODY, "model": "kind"}).status_code == 404)
        assert load.failures == []
        assert pids("Scorer") | pids("Ingress") == running
        assert len(actors("Scorer")) == 1
