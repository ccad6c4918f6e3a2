"""The host's free memory: of a container, and beside scorers that have not taken yet what they will."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from model.memory import PROCESS_BYTES
from serve_app import control_groups
from serve_app.contract import MemoryUse, ModelInfo
from serve_app.scorer import engines, host_memory
from serve_app.scorer.host_memory import Promise, opened
from serve_app.settings import ModelSettings
from tests.tiny import make_llama

GB = 1_000_000_000


def write(folder: Path, files: dict[str, object]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_text(f"{content}\n")


V1 = {"memory.limit_in_bytes": 4 * GB, "memory.usage_in_bytes": 3 * GB}
V2 = {"memory.max": 4 * GB, "memory.current": 3 * GB}


@pytest.mark.parametrize(("version", "files", "prefix"), [("", V2, ""), ("memory", V1, "total_")])
def test_a_containers_limit_bounds_what_is_free(
    version: str, files: dict[str, object], prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Of 4 GB 3 are in use, 1.5 of them files that the kernel gives back; 5% of the limit are left to Ray."""
    stat = f"{prefix}inactive_file {GB}\n{prefix}active_file {GB // 2}\nanon {GB}"
    write(tmp_path / version, {**files, "memory.stat": stat})
    monkeypatch.setattr(control_groups, "folders", lambda controller: [tmp_path / version] * (controller == "memory"))
    assert host_memory.free_bytes() == min(int(2.3 * GB), _of_host())


def _of_host() -> int:
    host = psutil.virtual_memory()
    return int(host.available - 0.05 * host.total)


@pytest.mark.parametrize("files", [{}, {"memory.max": "max", "memory.current": GB, "memory.stat": "anon 1"}])
def test_without_a_limit_the_host_alone_counts(
    files: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    write(tmp_path, files)
    monkeypatch.setattr(control_groups, "folders", lambda _: [tmp_path])
    assert host_memory.free_bytes() == pytest.approx(_of_host(), rel=0.1)


def test_a_groups_folders_are_its_own_and_those_around_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(control_groups, "GROUPS", tmp_path)
    found = list(control_groups.folders("memory"))
    assert found[-1] in (tmp_path, tmp_path / "memory")
    assert all(inner.parent == outer for inner, outer in itertools.pairwise(found) if inner.name != "memory")


@contextmanager
def another(folder: Path, promise: str) -> Iterator[int]:
    """A process that has made a promise, until the end of the ``with``; yields its id."""
    code = f"""
import pathlib, sys
from serve_app.scorer.host_memory import Promise, opened
from serve_app.settings import ModelSettings
from tests.tiny import make_llama
with opened(pathlib.Path({str(folder)!r})) as promises:
    promises.make({promise})
print("made", flush=True)
sys.stdin.read()
"""
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin
        assert process.stdout
        assert process.stdout.readline() == "made\n"
        yield process.pid
        process.stdin.close()


def test_what_others_were_promised_and_have_not_taken_is_not_free_until_they_end(tmp_path: Path):
    with another(tmp_path, "Promise(7, 'judge', 5_000_000_000, 4096)") as pid:
        memory = psutil.Process(pid).memory_info()
        taken = memory.rss - getattr(memory, "shared", 0)  # files that are mapped count as free
        with opened(tmp_path) as promises:
            assert promises.others == [Promise(7, "judge", 5 * GB, 4096)]
            assert promises.outstanding == pytest.approx(5 * GB - taken, abs=10_000_000)
            promises.make(Promise(7, "own", GB, 1))
        with opened(tmp_path) as promises:
            assert len(promises.others) == 1, "one's own promise is not another's"
    with opened(tmp_path) as promises:
        assert (promises.others, promises.outstanding) == ([], 0)
    assert [file.name for file in tmp_path.glob("*.json")] == [f"{os.getpid()}.json"]


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="only Linux says when a process started by no clock")
def test_a_step_of_the_clock_ends_no_promise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with another(tmp_path, "Promise(7, 'judge', 5_000_000_000, 4096)"):
        monkeypatch.setattr(psutil.Process, "create_time", lambda _: 0.0)
        with opened(tmp_path) as promises:
            assert promises.others == [Promise(7, "judge", 5 * GB, 4096)]


@pytest.fixture
def small_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A container with 670 MB free, and a folder for promises."""
    limit = int((PROCESS_BYTES + 50_000_000) / 0.95)
    write(
        tmp_path / "group",
        {"memory.max": limit, "memory.current": 0, "memory.stat": "inactive_file 0\nactive_file 0"},
    )
    monkeypatch.setattr(control_groups, "folders", lambda _: [tmp_path / "group"])
    monkeypatch.setattr(host_memory, "PROMISES", tmp_path / "promises")
    monkeypatch.setattr("model.engine.Engine.warmup", lambda *_: None)  # nothing is computed
    monkeypatch.setenv("SCORE_SERVE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "promises"


@pytest.mark.heavy
def test_scorers_of_a_service_choose_in_what_the_others_leave(small_container: Path, tmp_path: Path):
    settings = ModelSettings(model=str(make_llama(tmp_path / "model", context=65_536)))
    service, model = os.getppid(), engines.memory_key(settings)
    alone = engines.load_engine(settings).info
    assert alone.max_prompt_tokens == 32_768
    with opened(small_container) as promises:
        assert promises.others == []
    with another(small_container, f"Promise({service}, {model!r}, 0, 4096)"):
        assert engines.load_engine(settings, scorers=2).info.max_prompt_tokens == 4096, "as the other replica"
    with another(small_container, f"Promise({service}, 'other', 0, 4096)"):
        assert engines.load_engine(settings, scorers=2).info.max_prompt_tokens == 32_768, "it is the last"
    with (
        another(small_container, f"Promise({service + 1}, {model!r}, 5_000_000_000, 4096)"),
        pytest.raises(ValueError, match=r"of this host, and 0\.0 GB are free"),
    ):
        engines.load_engine(settings)


INFO = ModelInfo(
    vocab_size=9,
    max_prompt_tokens=24_576,
    context_length=262_144,
    dtype="float32",
    architecture="Qwen3ForCausalLM",
    platform="cpu",
    buckets=(),
    memory=MemoryUse(16_090_000_000, 1_160_000_000, 7_320_000_000, 24_704, 32_000_000_000),
)


def test_the_start_says_what_it_took_what_that_gives_and_what_to_set_for_more():
    assert engines.memory_line(INFO) == (
        "memory: weights 16.09 GB, workspace 1.16 GB, pages 7.32 GB of 32.0 GB free (by default pages take at most "
        "half of what weights and workspace leave); context 24,576 of the model's 262,144 tokens; the pages hold "
        "about 12 prompts of 2,048 tokens at once; for longer prompts set limits.max_prompt_tokens "
        "(--max-prompt-tokens), for more of them prefix_cache_gb (--prefix-cache-gb)"
    )
    assert engines.memory_line(replace(INFO, token_types=2)) == (
        "memory: weights 16.09 GB, workspace 1.16 GB of 32.0 GB free; context 24,576 of the model's 262,144 tokens"
    )
