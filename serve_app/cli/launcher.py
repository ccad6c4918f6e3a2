"""Ray, Serve and the service in one foreground process, for a laptop or a single host."""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import json
import logging
import math
import os
import re
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import httpx
from pydantic import ValidationError
from rich.console import Console

from serve_app import model_source
from serve_app.cli import ending, haproxy, process_limits
from serve_app.cli.ending import Ending
from serve_app.contract import MEMORY
from serve_app.errors import SelfTestError
from serve_app.frontend import auth
from serve_app.local_ray import APP_NAME, reason, set_environment, start_ray
from serve_app.schemas import ErrorResponse
from serve_app.settings import ServiceSettings
from serve_app.tasks.chat import ChatTemplate
from serve_app.tasks.checkpoint_files import CheckpointFiles
from serve_app.tasks.classify import CLASSIFY
from serve_app.tasks.profile_choice import ProfileChoice, applying, choose_profile
from serve_app.tasks.score import SCORE
from serve_app.tasks.systemone import SYSTEMONE
from serve_app.tasks.task import AnyTask
from serve_app.tasks.template_choice import choose
from serve_app.tasks.tokenizer import TextTokenizer

MIN_FREE_BYTES = 2 * 2**30
"""Free space for Ray's temporary files: logs and, if memory is short, requests."""

STOPPING = (signal.SIGTERM, signal.SIGHUP)
"""They stop the service as Ctrl-C does."""

_SCORER_LOG = re.compile(r"_Scorer-(.+)_[^_]+\.log$")
"""Name of a scorer's log, with the model's name if there are several (``app.build`` chooses it)."""

_WARNING = "warning: "
_LOGS = "logs: "
KEPT = (MEMORY, _WARNING, _LOGS)
"""Lines with one of these stay on the terminal."""

Say = Callable[[str], None]


class LaunchError(Exception):
    """The service cannot start. The message says why and what to do."""


def run(settings: ServiceSettings, *, host: str, port: int, fast_front: bool = True, access_log: bool = False) -> None:
    """Serve until SIGINT, SIGTERM or SIGHUP, then stop every process that was started.

    Args:
        fast_front: use HAProxy instead of Serve's own proxy where Ray has it. Requests take some milliseconds less.
            While the only front end is being replaced it answers 503 at once; Serve's proxy would let requests wait.
        access_log: log a line for each request.

    Raises:
        LaunchError: the port is taken, the disk is full, the settings do not fit the model, or a replica cannot start.
        LimitError: the system allows this user too few processes or open files.
        ApiKeyError: the API keys are unusable.
        ModelSourceError: the model is not available, or has no usable tokenizer.
    """
    console = Console(stderr=True, highlight=False)
    interrupt_on_signals()
    with (
        console.status("starting") as status,
        tempfile.TemporaryDirectory(prefix="haproxy-", ignore_cleanup_errors=True) as files,
    ):

        def say(line: str) -> None:
            """Update the last line on a terminal; print a new line elsewhere, and for what is worth keeping."""
            kept = any(word in line for word in KEPT)
            if not kept:
                status.update(line)
            if kept or not console.is_terminal:
                console.print(line, soft_wrap=True)

        proxy = _fast_front(Path(files), host, port, say) if fast_front else None
        set_environment(proxy)
        keys = auth.read_keys(settings.api_keys_file)
        check_port(host, port)
        if not keys and not is_loopback(host):
            console.print(
                f"warning: {host} is open to the network and there is no API key: anyone who reaches port {port} can "
                f"use the service; name a file of keys with --api-keys-file, or set {auth.VARIABLE}",
                soft_wrap=True,
            )
        check_disk(Path(tempfile.gettempdir()))
        scorers = sum(each.most_replicas for each in settings.models)
        examples: list[AnyTask] = []
        process_limits.check(settings.ingress_replicas + scorers, _cpus(settings))
        for each in settings.models:
            folder = model_source.resolve(each.model, each.revision, each.base, say=say)
            tokenizer = TextTokenizer.load(folder)
            template = choose(each, folder)
            try:
                profile = choose_profile(each, tokenizer, ChatTemplate.load(tokenizer), folder)
            except ValueError as error:
                raise LaunchError(str(error)) from error
            examples.append(example_task(CheckpointFiles(each.model, folder), profile))
            for choice, doubt in applying(template, profile):
                say(f"{each.name}: {choice}")
                if doubt:
                    console.print(f"warning: {each.name}: {doubt}", soft_wrap=True, markup=False)
            if each.trust_config:
                console.print(
                    f"warning: {each.name}: trust_config skips {', '.join(each.trust_config)} of config.json: if one "
                    "of them matters, all scores are wrong",
                    soft_wrap=True,
                    markup=False,
                )
        url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        own = haproxy.HOST if proxy and proxy.items() <= os.environ.items() else host
        with ending.watched() as end, _service(settings, own, port, say, end, access_log=access_log) as logs:
            end.at_end += [status.stop, partial(shutil.rmtree, files, ignore_errors=True)]
            wait_until_ready(url, logs, say)
            status.stop()
            names = ", ".join(each.name for each in settings.models)
            console.print(f"ready: {names} at {url} (Ctrl-C stops it); try:\n")
            console.out(example(examples[0], url, needs_key=bool(keys)))
            end.patient, end.code = True, 0
            try:
                signal.pause()
            except KeyboardInterrupt:
                with suppress(OSError):  # the terminal may be gone
                    say("stopping, after the requests in flight; Ctrl-C again drops them")
                drain(max(each.timeout_s for each in settings.models))


def _fast_front(folder: Path, host: str, port: int, say: Say) -> Mapping[str, str] | None:
    """The environment for HAProxy, if it runs here."""
    found = haproxy.environment(folder, host, port)
    if found is None:
        say("HAProxy does not run here: requests go through Serve's own proxy, and take some milliseconds more")
    return found


def check_port(host: str, port: int) -> None:
    """Raise LaunchError unless a server can listen on this address."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            if isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL:
                remedy = "choose a --host that is an address of this machine: 127.0.0.1, or 0.0.0.0 for all of them"
            elif error.errno == errno.EACCES:
                remedy = "choose a --port from 1024 on, which needs no rights of the system's administrator"
            else:
                remedy = "stop what uses it, or choose another --port"
            raise LaunchError(f"cannot listen on {host}:{port} ({error.strerror}); {remedy}") from error


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server that listens on ``host``."""
    addresses = {str(found[4][0]) for found in socket.getaddrinfo(host, None)}
    return all(ipaddress.ip_address(address).is_loopback for address in addresses)


def check_disk(folder: Path) -> None:
    """Raise LaunchError if ``folder`` has too little space for Ray's files."""
    free = shutil.disk_usage(folder).free
    if free < MIN_FREE_BYTES:
        raise LaunchError(
            f"{folder} has {free / 2**30:.1f} GiB free and Ray needs {MIN_FREE_BYTES / 2**30:.0f}; "
            "free some space, or set TMPDIR to a folder on another disk"
        )


def check_chips(settings: ServiceSettings, nodes: list[Any]) -> None:
    """Raise LaunchError if this host lacks TPU chips, since no other host will join it."""
    for tpu, replicas in settings.replicas_on_chips(most=True).items():
        if lacking := tpu.lacking(replicas, nodes):
            raise LaunchError(f"{lacking}; change --tpu to the chips that exist, or ask for fewer replicas")


def wait_until_ready(url: str, logs: Path, say: Say) -> None:
    """Wait until the service can score, and report its progress.

    Raises:
        LaunchError: it cannot start.
    """
    from ray import serve
    from ray.serve.schema import ApplicationStatus

    news = log_lines(logs)
    while True:
        for line in news:
            if line is None:
                break
            say(line)
        application = serve.status().applications[APP_NAME]
        messages = [deployment.message for deployment in application.deployments.values() if deployment.message]
        if failed := [message for message in messages if "Error" in message]:
            raise LaunchError(f"the service did not start: {reason(failed[0])}")
        if application.status in (ApplicationStatus.DEPLOY_FAILED, ApplicationStatus.UNHEALTHY):
            raise LaunchError(f"the service did not start: {reason(application.message)}")
        if application.status == ApplicationStatus.RUNNING and _is_ready(url):
            return
        time.sleep(0.2)


def drain(timeout_s: float) -> None:
    """Stop the application when its requests are answered, after ``timeout_s`` at the latest, or at the next signal."""
    from ray import serve

    logging.disable()  # where Ray's processes had the signal, too, its calls fail

    async def close() -> None:
        """In an event loop, without which Serve makes no calls where HAProxy is in front."""
        await serve.get_app_handle(APP_NAME).broadcast("close").results_async(timeout_s=timeout_s)

    with suppress(KeyboardInterrupt):
        with suppress(Exception):
            # Serve stops idle scorers at once, while front ends may hold requests that have not reached them yet.
            asyncio.run(close())
        serve.delete(APP_NAME)


def log_lines(folder: Path) -> Iterator[str | None]:
    """Yield the lines of the scorers' logs, without end; None when there is nothing new.

    With several models each line begins with the model's name, and a warning with "warning: ".
    """
    read: dict[Path, int] = {}
    while True:
        for path in sorted(folder.glob("replica_*Scorer*.log")):
            model = _SCORER_LOG.search(path.name)
            prefix = f"{model[1]}: " if model else ""
            with path.open() as file:
                file.seek(read.get(path, 0))
                while (line := file.readline()).endswith("\n"):
                    read[path] = file.tell()
                    level, _, said = line.partition(" -- ")
                    if said:
                        yield (_WARNING if level.startswith("WARNING") else "") + prefix + said.strip()
        yield None


def example_task(files: CheckpointFiles, profile: ProfileChoice) -> AnyTask:
    """The task that a model is tried with: one that it can do."""
    if profile.profile.option:  # its head reads options, and there are no next-token probabilities
        return SYSTEMONE
    return CLASSIFY if files.has_classes else SCORE


def example(task: AnyTask, url: str, *, needs_key: bool = False) -> str:
    """A request that works, as a shell command."""
    key = f' -H "Authorization: Bearer ${auth.VARIABLE}"' if needs_key else ""
    return f"curl {url}{task.paths[0]} -H 'Content-Type: application/json'{key} -d '{json.dumps(task.example)}'\n"


def _cpus(settings: ServiceSettings) -> int:
    """The CPUs to start Ray with, at least those that the replicas ask for, so that a small laptop runs them, too."""
    asked = settings.ingress_replicas * settings.ingress_cpus
    asked += sum(each.most_replicas * each.scorer_cpus for each in settings.models)
    return max(os.cpu_count() or 1, math.ceil(asked))


def _is_ready(url: str) -> bool:
    try:
        response = httpx.get(f"{url}/ready", timeout=60, trust_env=False)
    except httpx.TransportError:
        return False
    with suppress(ValidationError):
        error = ErrorResponse.model_validate_json(response.content)
        if error.type == SelfTestError.type:
            raise LaunchError(f"the service did not start: {error.message}")
    return response.status_code == 200


@contextmanager
def _service(
    settings: ServiceSettings, host: str, port: int, say: Say, end: Ending, *, access_log: bool
) -> Generator[Path]:
    """Ray, Serve and the application; yields the folder of the replicas' logs."""
    # Ray takes a second to import: --help and user errors come first.
    import ray
    from ray import serve
    from ray.exceptions import RayError

    from serve_app.app import build

    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    say("starting Ray")
    logs = tempfile.mkdtemp(prefix="score-serve-logs-")  # stays, for whoever looks for the reason of a failure
    say(f"{_LOGS}{logs}")
    try:
        start_ray(_cpus(settings))
        end.watch_ray()
        check_chips(settings, ray.nodes())
        quiet = {"log_level": "WARNING", "enable_access_log": False}
        http = {"host": host, "port": port}
        try:
            serve.start(http_options=http, logging_config=quiet)  # pyright: ignore[reportUnknownMemberType]
        except (RayError, TimeoutError) as error:
            raise LaunchError(
                "Ray Serve's proxy did not start, and the machine may be too busy for it: start again when it is less, "
                f"or with --no-fast-front. Ray says: {reason(str(error))}"
            ) from error
        say("starting the service")
        serve.run_many(  # pyright: ignore[reportUnknownMemberType]
            [
                serve.RunTarget(
                    build(settings),
                    name=APP_NAME,
                    logging_config={"logs_dir": logs, "enable_access_log": access_log},
                )
            ],
            wait_for_ingress_deployment_creation=False,
            wait_for_applications_running=False,
        )
        yield Path(logs)
    finally:
        # One more Ctrl-C must not leave processes behind.
        for each in (signal.SIGINT, *STOPPING):
            signal.signal(each, signal.SIG_IGN)
        logging.disable()
        end.stopping()
        ray.shutdown()  # pyright: ignore[reportUnknownMemberType]


def interrupt_on_signals() -> None:
    """Make SIGTERM and SIGHUP do what Ctrl-C does; where nohup has SIGHUP ignored, it stays so.

    An interrupt in a finalizer or in a fork's callbacks would be printed and lost; it comes again a moment later.
    """
    report = sys.__unraisablehook__

    def interrupt_again(unraisable: sys.UnraisableHookArgs) -> None:
        if not issubclass(unraisable.exc_type, KeyboardInterrupt):
            report(unraisable)
            return
        again = threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGTERM))
        again.daemon = True
        again.start()

    sys.unraisablehook = interrupt_again

    def interrupt(_signal: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    for each in STOPPING:
        if signal.getsignal(each) != signal.SIG_IGN:
            signal.signal(each, interrupt)
