"""The compose file with Prometheus and Grafana, and the systemd unit: their fields are known, and they fit together."""

from __future__ import annotations

import configparser
import json
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any, Literal

import pytest
import typer
import yaml
from pydantic import BaseModel, ConfigDict, Field

from serve_app.cli import main
from serve_app.settings import ModelSettings

CONFIGS = Path(__file__).parents[2] / "configs"
COMPOSE = CONFIGS / "compose"
UNIT = CONFIGS / "systemd" / "score-serve.service"


class Strict(BaseModel):
    """Refuses fields that the Compose specification may have, but these files do not need."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Build(Strict):
    context: str
    dockerfile: str
    target: str


class Healthcheck(Strict):
    test: list[str]
    interval: str
    timeout: str
    start_period: str


class Service(Strict):
    build: Build | None = None
    image: str | None = Field(default=None, pattern=r"^[a-z/]+:v?\d+\.\d+\.\d+$")
    command: list[str] | None = None
    ports: list[str]
    volumes: list[str]
    environment: dict[str, str] = {}
    shm_size: str | None = None
    ulimits: dict[str, int] = {}
    stop_grace_period: str | None = None
    restart: Literal["unless-stopped"]
    depends_on: list[str] = []
    healthcheck: Healthcheck | None = None


class Compose(Strict):
    name: str
    services: dict[str, Service]
    volumes: dict[str, None]


def read(name: str) -> Any:
    return yaml.safe_load((COMPOSE / name).read_text())


@pytest.fixture
def compose() -> Compose:
    return Compose.model_validate(read("compose.yaml"))


def options_of(command: list[str]) -> None:
    """Parse the words of ``score-serve``, without running it."""
    own: Any = typer.main.get_command(main.app)
    name, *words = command
    own.get_command(None, name).make_context(name, words)


def test_ports_are_for_this_machine_and_mounts_exist(compose: Compose):
    for service in compose.services.values():
        assert all(port.startswith("127.0.0.1:") for port in service.ports)
        assert (service.build is None) != (service.image is None)
        for volume in service.volumes:
            source = volume.split(":")[0]
            assert source in compose.volumes if "/" not in source else (COMPOSE / source).exists(), volume
        assert {*service.depends_on} <= compose.services.keys()


def test_the_service_is_built_from_the_checkout_and_its_command_parses(compose: Compose):
    own = compose.services["score-serve"]
    assert own.build
    assert (COMPOSE / own.build.context / own.build.dockerfile).is_file()
    assert f"AS {own.build.target}\n" in (CONFIGS / "Dockerfile").read_text()
    assert own.command
    assert own.command[0] == "score-serve"
    options_of(own.command[1:])
    assert own.stop_grace_period == "11m"
    assert ModelSettings().timeout_s < 11 * 60


def test_prometheus_scrapes_the_service_and_grafana_shows_prometheus(compose: Compose):
    (job,) = read("prometheus.yaml")["scrape_configs"]
    ((host, port),) = (target.split(":") for target in job["static_configs"][0]["targets"])
    assert host in compose.services
    assert any(each.endswith(f":{port}") for each in compose.services[host].ports)
    (source,) = read("datasource.yaml")["datasources"]
    host, port = source["url"].removeprefix("http://").split(":")
    assert any(each.endswith(f":{port}") for each in compose.services[host].ports)
    dashboard = json.loads((CONFIGS / "grafana" / "score-serve.json").read_text())
    assert dashboard["templating"]["list"][0]["query"] == source["type"]
    (provider,) = read("dashboards.yaml")["providers"]
    assert f"../grafana:{provider['options']['path']}:ro" in compose.services["grafana"].volumes


def unit() -> configparser.ConfigParser:
    parser = configparser.ConfigParser(interpolation=None, strict=True)
    parser.optionxform = str  # pyright: ignore[reportAttributeAccessIssue]
    parser.read(UNIT)
    return parser


def test_the_unit_runs_a_command_that_parses_and_waits_for_requests():
    service = unit()["Service"]
    program, *words = shlex.split(service["ExecStart"])
    assert program.endswith("/score-serve")
    options_of(words)
    assert (service["KillMode"], service["TimeoutStopSec"]) == ("mixed", "11min")


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="NO SYSTEMD: the unit is not verified")
def test_systemd_finds_no_fault_in_the_unit(tmp_path: Path):
    text = UNIT.read_text()
    copy = tmp_path / UNIT.name
    copy.write_text(text.replace("/opt/score-serve/.venv/bin/score-serve", "/bin/true"))  # it must exist

    def verified() -> subprocess.CompletedProcess[str]:
        command = ["systemd-analyze", "verify", "--man=no", str(copy)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    done = verified()
    own = [line for line in done.stderr.splitlines() if UNIT.name in line]
    assert (done.returncode, own) == (0, []), done.stderr
    copy.write_text(copy.read_text().replace("KillMode=mixed", "KillMode=gently"))
    assert "kill mode" in verified().stderr
