"""The hops of a request, from its Server-Timing header."""

from __future__ import annotations

import pytest

from scripts.benchmarks.hops import split
from serve_app.timing import DEVICE, QUEUE, TOKENISE, Timings


def test_the_hops_of_a_request_are_its_whole_time():
    timings = Timings()
    for stage, seconds in ((TOKENISE, 0.001), (QUEUE, 0.002), (DEVICE, 0.004)):
        timings.add(stage, seconds)
    header = timings.header().rsplit(",", 1)[0] + ", total;dur=9.0"
    hops = split(12.0, header)
    whole, over = hops.pop("whole"), hops.pop("over the engine's time")
    assert (whole, over) == (12.0, 8.0)
    assert sum(hops.values()) == pytest.approx(whole)
    assert split(3.0, "") == {"whole": 3.0}
