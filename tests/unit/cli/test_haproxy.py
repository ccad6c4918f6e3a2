"""HAProxy as the launcher starts it. The real program runs, with a configuration like Serve's."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest
from ray.serve._private.haproxy_templates import HAPROXY_CONFIG_TEMPLATE

from serve_app.cli import haproxy
from serve_app.local_ray import free_port

CONFIG = """
defaults
    mode http
    timeout connect 1s
    timeout client 1s
    timeout server 1s
    errorfile 503 /nowhere
frontend prometheus
    bind :{metrics}
    http-request return status 200
frontend http_frontend
    bind 127.0.0.1:{service}
    default_backend front_ends
backend front_ends
listen stats
  bind *:{stats}
  stats enable
"""
STARTS = "import subprocess, sys; print(subprocess.Popen(sys.argv[1:]).pid, flush=True); input()"


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with a short path; the environment names no other HAProxy, as it does after a start in this process."""
    monkeypatch.delenv("RAY_SERVE_HAPROXY_BINARY_PATH", raising=False)
    with tempfile.TemporaryDirectory() as found:
        yield Path(found)


def test_serve_writes_the_line_that_is_given_the_address():
    (line,) = [line for line in HAPROXY_CONFIG_TEMPLATE.splitlines() if "{{ config.frontend_port }}" in line]
    assert line == "    bind {{ config.frontend_host }}:{{ config.frontend_port }}"


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "::", "::1"])
def test_only_the_service_is_open_a_missing_front_end_is_a_503_and_it_ends_with_its_parent_and_not_by_ctrl_c(
    host: str, folder: Path
):
    config, ports = folder / "haproxy.cfg", {name: free_port() for name in ("metrics", "service", "stats")}
    found = haproxy.environment(folder, host, ports["service"])
    assert found is not None
    config.write_text(CONFIG.format(**ports))
    command = [sys.executable, "-c", STARTS, found["RAY_SERVE_HAPROXY_BINARY_PATH"], "-db", "-f", str(config)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        proxy = psutil.Process(int(parent.stdout.readline()))
        while len(listening := [each.laddr for each in proxy.net_connections() if each.status == "LISTEN"]) < 3:
            assert proxy.status() != psutil.STATUS_ZOMBIE
            time.sleep(0.02)
        hosts = {address.port: address.ip for address in listening}
        assert hosts == {ports["metrics"]: "127.0.0.1", ports["stats"]: "127.0.0.1", ports["service"]: host}
        assert proxy.name() == "haproxy"
        near = "[::1]" if host == "::1" else "127.0.0.1"  # "::" takes both
        assert httpx.get(f"http://{near}:{ports['service']}").status_code == 503  # Serve's 500 would end retries
        assert os.getpgid(proxy.pid) != os.getpgid(parent.pid)
        parent.send_signal(signal.SIGKILL)
        psutil.wait_procs([proxy], timeout=10)
        assert not proxy.is_running()


def test_where_it_does_not_run_serves_own_proxy_is_used(folder: Path, monkeypatch: pytest.MonkeyPatch):
    assert haproxy.environment(folder / ("x" * 80), "127.0.0.1", 8000) is None  # no such folder
    (deep := folder / ("x" * 60)).mkdir()
    assert haproxy.environment(deep, "127.0.0.1", 8000) is None  # paths of sockets are short
    monkeypatch.setenv("RAY_SERVE_HAPROXY_BINARY_PATH", "/bin/false")
    assert haproxy.environment(folder, "127.0.0.1", 8000) is None


def test_its_own_ports_are_none_that_a_connection_can_take() -> None:
    lowest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    for _ in range(20):
        one, other = haproxy.quiet_ports(2)
        assert one != other
        assert 1024 <= min(one, other) <= max(one, other) < lowest
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", one))
        assert not haproxy._is_free(one)
        assert haproxy._is_free(other)
