"""Log lines of an engine's start, without a model."""

from __future__ import annotations

from serve_app.scorer import engines


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
