"""What an engine's start says."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import pytest

from model.fields import ConfigError
from model.loading import prepare
from serve_app.frontend.info import info
from serve_app.frontend.service import ModelService
from serve_app.scorer import engines
from serve_app.settings import ModelSettings
from serve_app.tasks.tokenizer import TextTokenizer
from tests.local import DirectReplicas
from tests.tiny import make_llama


def said(steps: list[float]) -> list[str]:
    """The log lines when programs are compiled at these times, in seconds."""
    lines: list[str] = []
    now = [0.0]
    progress = engines.progress_log(lines.append, lambda: now[0])
    for done, now[0] in enumerate(steps, 1):
        progress(done, len(steps), f"keep {done}")
    return lines


def test_a_long_start_logs_every_few_seconds_what_is_left():
    lines = said([float(number) for number in range(1, 70)])
    assert lines[0].startswith("preparing the model's programs: 3 of 69, about 65 s left (the first start compiles")
    assert len(lines) == 22
    assert "66 of 69, about 5 s left" in lines[-1]
    assert "about 2 min left" in said([3.0 + 20 * number for number in range(13)])[1]


def test_a_quick_start_logs_nothing():
    assert said([0.04 * number for number in range(70)]) == []


def test_a_trusted_key_is_skipped_by_its_name_and_told(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """The user's last resort for a key that is unknown: without it the model does not start."""
    folder = make_llama(tmp_path / "judge", layers=1, vocab=271, context=64, tokenizer=True)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"layer_scale": 3}))
    with pytest.raises(ConfigError, match=r"layer_scale=3\. Skip by trust_config only"):
        engines._load_model(ModelSettings(model=str(folder)))  # pyright: ignore[reportPrivateUsage]
    settings = ModelSettings(model=str(folder), trust_config=("layer_scale",))
    engine = engines._load_model(settings)  # pyright: ignore[reportPrivateUsage]
    note = "keys of config.json that trust_config skips, unread: layer_scale=3"
    assert f"judge: {note}" in caplog.messages
    service = ModelService(settings, TextTokenizer.load(folder), engine.info, DirectReplicas(engine), folder=folder)
    assert info(service, ["judge"]).notes == [note]


@pytest.mark.parametrize(
    ("platform", "set_to", "dtype", "why"),
    [
        ("cpu", None, "float32", "the default on cpu; dtype (--dtype) sets another"),
        ("tpu", None, "bfloat16", "the default on tpu; dtype (--dtype) sets another"),
        ("gpu", None, "bfloat16", "the default on gpu; dtype (--dtype) sets another"),
        ("tpu", "float32", "float32", "as set"),
    ],
)
def test_the_dtype_is_the_platforms_and_the_reason_is_told(
    platform: str, set_to: Any, dtype: str, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """No weights are read: this machine has only one of the platforms."""
    folder = make_llama(tmp_path, layers=1, vocab=271, context=64)
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    settings = ModelSettings(model=str(folder), dtype=set_to)
    assert prepare(folder, dtype=settings.dtype, implementation="paged").model.dtype == dtype
    assert settings.dtype_reason(platform) == why


def test_the_start_and_info_tell_the_dtype_and_why(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    folder = make_llama(tmp_path / "judge", layers=1, vocab=271, context=64, tokenizer=True)
    settings = ModelSettings(model=str(folder))
    with caplog.at_level("INFO", "ray.serve"):
        engine = engines.load_engine(settings)
    assert "weights are float32: the default on cpu; dtype (--dtype) sets another" in caplog.messages
    service = ModelService(settings, TextTokenizer.load(folder), engine.info, DirectReplicas(engine), folder=folder)
    told = info(service, ["judge"])
    assert (told.dtype, told.dtype_reason) == ("float32", "the default on cpu; dtype (--dtype) sets another")


def test_a_scorer_with_chips_may_lock_as_much_memory_as_it_is_allowed():
    """In a process of its own, whose limit is a container's. Root raises it; another user goes up to it."""
    script = (
        "import resource\n"
        "from serve_app.scorer.engines import raise_locked_memory\n"
        "resource.setrlimit(resource.RLIMIT_MEMLOCK, (4096, 65536))\n"
        "raise_locked_memory()\n"
        "print(*resource.getrlimit(resource.RLIMIT_MEMLOCK))"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    soft, hard = map(int, found.stdout.split())
    assert soft == hard
    assert hard in (65_536, resource.RLIM_INFINITY)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (None, "--fibers_default_thread_stack_size=2097152"),
        ("--xla_a=1", "--xla_a=1 --fibers_default_thread_stack_size=2097152"),
        ("--fibers_default_thread_stack_size=1", "--fibers_default_thread_stack_size=1"),
    ],
)
def test_libtpu_has_deep_stacks_unless_somebody_chose(
    before: str | None, after: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That it needs them is shown by compiling an encoder in ``tests/tpu_compile``."""
    monkeypatch.setenv("LIBTPU_INIT_ARGS", before or "")
    if before is None:
        monkeypatch.delenv("LIBTPU_INIT_ARGS")
    engines.deepen_libtpu_stacks()
    assert os.environ["LIBTPU_INIT_ARGS"] == after
