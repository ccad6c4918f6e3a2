"""The verdict on pip-audit's answers: findings fail, an unreachable service does not, and both are reported."""

from __future__ import annotations

import json
from typing import Any

import pytest

from scripts.audit import verdict

FINE: dict[str, Any] = {"name": "numpy", "version": "2.1.0", "vulns": []}
UNKNOWN: dict[str, Any] = {
    "name": "torch",
    "skip_reason": "Dependency not found on PyPI and could not be audited: torch (2.13.0+cpu)",
}
EDITABLE: dict[str, Any] = {"name": "llm-score-serve", "skip_reason": "distribution marked as editable"}
BAD: dict[str, Any] = {
    "name": "pyyaml",
    "version": "5.3.1",
    "vulns": [{"id": "PYSEC-2021-142", "fix_versions": ["5.4"], "aliases": [], "description": "..."}],
}


def answer(*packages: dict[str, Any]) -> str:
    return json.dumps({"dependencies": packages, "fixes": []})


def test_no_finding():
    assert verdict(answer(FINE, EDITABLE), "", {}) == (False, ["audited 1 packages"])


def test_a_finding_fails_with_its_remedy():
    failed, lines = verdict(answer(FINE, BAD), "Found 1 known vulnerability in 1 package", {})
    assert failed
    assert lines[1].startswith("pyyaml 5.3.1: PYSEC-2021-142, fixed in 5.4; update it")


def test_a_finding_with_a_reason_does_not_fail_and_is_shown():
    failed, lines = verdict(answer(FINE, BAD), "", {"PYSEC-2021-142": "no YAML of others is loaded"})
    assert not failed
    assert lines[1] == "pyyaml 5.3.1: PYSEC-2021-142, accepted: no YAML of others is loaded"
    assert verdict(answer(BAD), "", {"PYSEC-2021-143": "another"}).failed


def test_packages_that_were_not_looked_up_are_named():
    assert verdict(answer(FINE, UNKNOWN), "", {}).lines[1].endswith("unknown to the advisory service: torch")


@pytest.mark.parametrize(
    ("output", "trouble", "said"),
    [
        ("", "Traceback ...\nConnectionError: Could not connect to PyPI's vulnerability feed\n", "Could not connect"),
        ("", "", "no output"),
        ("{}", "", "no output"),
        # A mirror with packages only: pip-audit itself says "No known vulnerabilities found".
        (answer(UNKNOWN, EDITABLE), "No known vulnerabilities found", "knows none of the 1 packages"),
    ],
)
def test_an_unreachable_service_is_reported_and_nothing_fails(output: str, trouble: str, said: str):
    failed, (line,) = verdict(output, trouble, {})
    assert not failed
    assert line.startswith("NOT AUDITED")
    assert said in line
