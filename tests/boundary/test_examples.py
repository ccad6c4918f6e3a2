"""The programs in examples/ run as their texts say, outside the checkout, against the fake engine's service."""

from __future__ import annotations

import csv
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.documents import ROOT
from tests.served import Served

EXAMPLES = ROOT / "examples"
RUN = {
    "rag_rerank.py": [],
    "guard.py": ["--threshold", "0.2"],
    "judge.py": [str(EXAMPLES / "reviews.csv"), "--plot", "judge.png"],
    "pandas_scores.py": [str(EXAMPLES / "reviews.csv"), "scored.csv"],
}


def run(name: str, served: Served, folder: Path) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT / "clients" / "python")}
    command = [sys.executable, str(EXAMPLES / name), *RUN[name], "--url", served.url]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_program_is_run():
    assert {path.name for path in EXAMPLES.glob("*.py")} == RUN.keys()
    assert all(name in (EXAMPLES / "README.md").read_text() for name in RUN)


def test_candidates_are_ranked(served: Served, tmp_path: Path):
    ranked, prompt = run("rag_rerank.py", served, tmp_path).split("\n\n", 1)
    scores = [float(line.split()[0]) for line in ranked.splitlines()]
    assert scores == sorted(scores, reverse=True)
    assert len(scores) == 2
    assert prompt.endswith("Question: Who painted the Mona Lisa?\n")


def test_a_message_without_a_score_is_held(served: Served, tmp_path: Path):
    lines = run("guard.py", served, tmp_path).splitlines()
    assert len(lines) == 4
    assert lines[-1].endswith("held, it has no score")  # longer than the model's context
    for line in lines[:3]:
        verdict, probability = re.fullmatch(r".*  (held|through), (0\.\d+)", line).groups()  # pyright: ignore
        assert verdict == ("held" if float(probability) >= 0.2 else "through")


@pytest.mark.heavy  # needs matplotlib
def test_the_judge_is_calibrated_on_rows_that_it_is_not_measured_on(served: Served, tmp_path: Path):
    printed = run("judge.py", served, tmp_path)
    assert re.search(r"found on 16 rows: temperature \d\.\d+, threshold 0\.\d+\nright on 16 others: \d+%", printed)
    assert len(re.findall(r"^loss \d\.\d+, calibration error \d\.\d+ at \d\.\d+$", printed, re.MULTILINE)) == 2
    assert (tmp_path / "judge.png").read_bytes().startswith(b"\x89PNG")


def test_a_data_frame_comes_back_with_a_column_for_each_label(served: Served, tmp_path: Path):
    pytest.importorskip("pandas")
    run("pandas_scores.py", served, tmp_path)
    with (tmp_path / "scored.csv").open(newline="") as file:
        rows = [*csv.DictReader(file)]
    with (EXAMPLES / "reviews.csv").open(newline="") as file:
        given = [*csv.DictReader(file)]
    assert [(row["id"], row["text"], row["label"]) for row in rows] == [(r["id"], r["text"], r["label"]) for r in given]
    for row in rows:
        assert float(row["positive"]) + float(row["negative"]) == pytest.approx(1)
        assert row["found"] == max(("positive", "negative"), key=lambda label: float(row[label]))
