"""Shared fixtures: a small tokenizer, the service in this process on the fake engine, and one Ray cluster."""

from __future__ import annotations

import tests.environment  # noqa: F401 - first

# isort: split
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import hypothesis
import pytest

from scripts.simulation.cluster import start_cluster
from serve_app import model_source
from serve_app.client import SHARED_BY_THREADS
from serve_app.frontend.auth import ApiKeys
from serve_app.frontend.models import Models
from serve_app.frontend.routes import create_app
from serve_app.frontend.service import ModelService
from serve_app.jobs.local_replicas import LocalReplicas
from serve_app.local_ray import APP_NAME, free_port
from serve_app.scorer.fake_engine import FakeEngine
from serve_app.settings import ModelSettings
from serve_app.tasks.tokenizer import TextTokenizer
from tests.local import CONTEXT, VOCAB_SIZE, DirectReplicas, save_tokenizer
from tests.served import KEY, Served, serving
from tests.tiny import make_llama

# An example may take long on a busy machine; that is no reason to fail.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")

TESTS = Path(__file__).parent
WITH_RAY = "e2e", "faults", "slices"

if TYPE_CHECKING:
    from ray.cluster_utils import Cluster

    from model.engine import Engine


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--service-url", help="run tests/boundary against this running service instead of the fake")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("ray") and item.path.relative_to(TESTS).parts[0] not in WITH_RAY:
            raise pytest.UsageError(f"{item.nodeid} needs Ray: scripts/test looks for such tests in {WITH_RAY} alone")


@pytest.fixture(scope="session", autouse=True)
def _ctrl_c_works() -> None:
    """Handle SIGINT: a shell's background jobs ignore it, and so would all processes that tests start."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    """A tokenizer that adds no BOS, like SmolLM's."""
    return TextTokenizer.load(save_tokenizer(tmp_path_factory.mktemp("plain"), adds_bos=False))


@pytest.fixture(scope="session")
def bos_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    """A tokenizer that adds a BOS, like Llama's."""
    return TextTokenizer.load(save_tokenizer(tmp_path_factory.mktemp("bos"), adds_bos=True))


@pytest.fixture
def settings() -> ModelSettings:
    return ModelSettings(model="fake-judge", aliases=("judge",), engine="fake", max_batch_tokens=1024, timeout_s=60)


@pytest.fixture
async def service(settings: ModelSettings, tokenizer: TextTokenizer) -> AsyncIterator[ModelService]:
    """The whole service without HTTP and Serve."""
    engine = FakeEngine(VOCAB_SIZE, CONTEXT)
    replicas = LocalReplicas(engine, settings)
    service = ModelService(settings, tokenizer, engine.info, replicas)
    yield service
    service.close()
    await replicas.queue.close()


@pytest.fixture(scope="session")
def fake_service(tokenizer: TextTokenizer) -> Iterator[ModelService]:
    """The service without a queue: it may be asked from any event loop."""
    engine = FakeEngine(VOCAB_SIZE, CONTEXT)
    service = ModelService(
        ModelSettings(model="fake-judge", engine="fake"), tokenizer, engine.info, DirectReplicas(engine)
    )
    yield service
    service.close()


@pytest.fixture(scope="session")
def served(fake_service: ModelService) -> Iterator[Served]:
    """The service on a real HTTP server."""
    services = Models(fake_service)  # one for all requests, as in a front end
    with serving(create_app(lambda: services)) as served:
        yield served


@pytest.fixture(scope="session")
def judge(tokenizer: TextTokenizer) -> Iterator[Served]:
    """The service on a real HTTP server, with a model that has three classes."""
    engine = FakeEngine(VOCAB_SIZE, CONTEXT, classes=3)
    service = ModelService(
        ModelSettings(model="fake-judge", engine="fake"), tokenizer, engine.info, DirectReplicas(engine)
    )
    services = Models(service)
    with serving(create_app(lambda: services)) as served:
        yield served
    service.close()


@pytest.fixture(scope="session")
def locked(fake_service: ModelService, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The service on a real HTTP server, which needs ``KEY``."""
    file = tmp_path_factory.mktemp("keys") / "keys"
    file.write_text(KEY)
    services = Models(fake_service)
    with serving(create_app(lambda: services, keys=ApiKeys(str(file)))) as served:
        yield served


@pytest.fixture(scope="session")
def demo_engine() -> Engine:
    """The demo model in float32; programs compile as they are needed."""
    from model import loading

    return loading.load(model_source.resolve("demo"))


@pytest.fixture(scope="session")
def families(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Engine]]:
    """The folder and the engine of a family's tiny checkpoint, made once, with programs for 64 tokens."""

    @cache
    def made(family: str) -> tuple[Path, Engine]:
        from model import loading
        from tests.tiny_families import make_family

        folder = make_family(tmp_path_factory.mktemp(family), family)
        scorer = loading.load(folder, max_segment_tokens=32, call_tokens=64, chunks=(64,), prefix_cache_bytes=2**21)
        scorer.warmup()  # several programs at a time
        return folder, scorer

    return made


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama checkpoint with a tokenizer."""
    return make_llama(tmp_path_factory.mktemp("tiny-llama"), tokenizer=True)


@pytest.fixture(scope="session")
def nodes() -> Iterator[Cluster]:
    """One Ray cluster in this process tree for all tests that need one. It has one node; tests may add others."""
    import ray

    yield start_cluster(8, _system_config={"metrics_report_interval_ms": 500})
    ray.shutdown()


@pytest.fixture(scope="session")
def cluster(nodes: Cluster) -> str:  # noqa: ARG001 - Serve runs on it
    """The address of Serve, which runs on that cluster."""
    from ray import serve

    port = free_port()
    serve.start(
        http_options={"host": "127.0.0.1", "port": port},
        proxy_location="HeadOnly",
        logging_config={"encoding": "JSON"},
    )
    return f"http://127.0.0.1:{port}"


@pytest.fixture(scope="module")
def deploy(cluster: str) -> Iterator[Callable[[Any], httpx.Client]]:
    """Deploy an application in place of the last one. Returns a client of it."""
    from ray import serve

    with httpx.Client(base_url=cluster, timeout=120, limits=SHARED_BY_THREADS) as client:

        def run(application: Any) -> httpx.Client:
            serve.run(application, name=APP_NAME, logging_config={"encoding": "JSON"})
            return client

        yield run
    serve.delete(APP_NAME)
