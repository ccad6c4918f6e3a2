"""``score-serve dataset`` as a user runs it: a process that is killed midway, and the same command again."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from typer.testing import CliRunner

from serve_app.cli import launcher, main
from tests.served import Served

if TYPE_CHECKING:
    from ray.cluster_utils import Cluster

pytestmark = pytest.mark.ray

ROWS = 240
OPTIONS = ["--query", "{film}: ", "--item", "{text}", "-l", " yes", "-l", " no", "--softmax", "--block-rows", "4"]


def killed_midway(command: list[str], out: Path) -> None:
    """Run the command in a process of its own, and kill that once five blocks are written."""
    start = [sys.executable, "-c", "from serve_app.cli.main import main; main()"]
    with subprocess.Popen([*start, *command], stderr=subprocess.PIPE) as process:
        while process.poll() is None and len([*out.glob("done/*.json")]) < 5:
            time.sleep(0.005)
        process.kill()
        assert process.wait() == -9, process.stderr and process.stderr.read()
    assert 5 <= len([*out.glob("done/*.json")]) < ROWS // 4
    assert not (out / "summary.json").exists()


def written(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for part in sorted(out.glob("part-*")) for line in part.read_text().splitlines()]


def test_after_a_kill_the_same_command_finishes_and_no_row_is_lost_or_doubled(
    served: Served,
    nodes: Cluster,  # noqa: ARG001 - the second run uses it
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    source = [{"id": i, "film": f"film {i // 3}", "text": f"the fox saw {i}"} for i in range(ROWS)]
    source[7]["text"] = "x" * 1_000  # longer than the model's context
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in source))
    out = tmp_path / "out"
    monkeypatch.chdir(tmp_path)  # Ray's workers run elsewhere
    command = ["dataset", "in.jsonl", "-o", "out", *OPTIONS, "--url", served.url]
    killed_midway(command, out)

    monkeypatch.setattr(launcher, "interrupt_on_signals", lambda: None)
    runner = CliRunner(env={"COLUMNS": "200"})
    another = runner.invoke(main.app, [*command, "--label-mass"])
    assert another.exit_code == 1
    assert "was started with request.return_label_mass = false, and this job has true" in another.stderr

    again = runner.invoke(main.app, command)
    assert again.exit_code == 0, again.stderr
    assert "resuming: " in again.stderr
    assert f"{ROWS - 1} scored, 1 set aside" in again.stdout
    found = written(out)
    assert [row["id"] for row in found] == [row["id"] for row in source if row["id"] != 7]
    prompts = [f"{row['film']}: {row['text']}" for row in found]
    body = {"items": prompts, "labels": [" yes", " no"], "apply_softmax": True}
    answer = httpx.post(f"{served.url}/v1/score", json=body).json()
    assert [row["scores"] for row in found] == answer["scores"]
    (bad,) = map(json.loads, (out / "bad" / "part-000001.jsonl").read_text().splitlines())
    assert (bad["row"], bad["values"]["id"]) == (8, 7)
    assert "this model reads at most 256" in bad["reason"]
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["rows"], summary["bad"], summary["blocks"]) == (ROWS - 1, 1, ROWS // 4)
    assert summary["prompt_tokens"] == answer["usage"]["prompt_tokens"]


def test_a_killed_job_of_a_teacher_finishes_with_the_logprobs_that_the_service_answers(
    served: Served,
    nodes: Cluster,  # noqa: ARG001 - the second run uses it
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    source = [{"id": i, "text": f"the fox saw {i}" + " again" * (i % 7)} for i in range(ROWS)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in source))
    out = tmp_path / "out"
    monkeypatch.chdir(tmp_path)  # Ray's workers run elsewhere
    command = ["dataset", "in.jsonl", "-o", "out", "--item", "{text}", "--logprobs", "top-4", "--url", served.url]
    command += ["--block-rows", "4"]
    killed_midway(command, out)

    monkeypatch.setattr(launcher, "interrupt_on_signals", lambda: None)
    again = CliRunner(env={"COLUMNS": "200"}).invoke(main.app, command)
    assert again.exit_code == 0, again.stderr
    assert "resuming: " in again.stderr
    found = written(out)
    assert [row["id"] for row in found] == [row["id"] for row in source]
    body = {"input": [row["text"] for row in source], "top": 4}
    answers = httpx.post(f"{served.url}/v1/logprobs", json=body).json()["data"]
    for row, answer in zip(found, answers, strict=True):
        assert len(row["logprobs"]) == len(row["token_ids"]) > 1
        for column in ("token_ids", "logprobs", "top_ids", "top_logprobs"):
            assert row[column] == answer[column]


@pytest.mark.slow
def test_100_000_rows_are_scored_in_bounded_memory(tmp_path: Path):
    import psutil

    rng = random.Random(0)
    words = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog"]
    with (tmp_path / "in.jsonl").open("w") as file:
        for i in range(100_000):
            text = " ".join(rng.choices(words, k=rng.randrange(5, 20)))
            file.write(json.dumps({"id": i, "film": f"film {i // 20}", "text": text}) + "\n")
    out = tmp_path / "out"
    command = ["dataset", str(tmp_path / "in.jsonl"), "-o", str(out), "--model", "demo", "--engine", "fake"]
    options = ["--query", "{film}: ", "--item", "{text}", "-l", " yes", "-l", " no", "--softmax", "--workers", "2"]
    code = (
        f"import sys; sys.argv = {['score-serve', *command, *options]!r}; from serve_app.cli.main import main; main()"
    )
    most: dict[bool, int] = {False: 0, True: 0}  # memory of all processes together, in the first and in the second half
    with subprocess.Popen([sys.executable, "-c", code]) as process:
        while process.poll() is None:
            second_half = len([*out.glob("done/*.json")]) > 50
            used = 0
            for one in (psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)):
                with suppress(psutil.NoSuchProcess):
                    used += one.memory_info().rss
            most[second_half] = max(most[second_half], used)
            time.sleep(0.2)
    assert process.returncode == 0
    assert json.loads((out / "summary.json").read_text())["rows"] == 100_000
    assert most[True] < 1.1 * most[False]
    assert most[True] < 4 * 2**30
