"""docs/settings.md is what the code says, and names every variable that the code reads."""

from __future__ import annotations

import re

import pytest
from pydantic import BaseModel

from scripts import settings_page
from scripts.settings_page import VARIABLES, page
from tests.documents import ROOT

pytestmark = pytest.mark.heavy  # loads the model package

READ = re.compile(r"environ(?:\.get|\.setdefault)?[(\[]\s*\"([A-Z_]+)\"")


def test_the_page_is_current():
    assert settings_page.PAGE.read_text("utf-8") == page(), "run: python -m scripts.settings_page"


def test_every_variable_that_the_code_reads_is_named():
    files = [file for folder in ("serve_app", "model") for file in (ROOT / folder).rglob("*.py")]
    read = {name for file in files for name in READ.findall(file.read_text("utf-8"))}
    assert len(read) >= 8
    set_by_the_code = {"RAY_USAGE_STATS_ENABLED"}
    assert read - VARIABLES.keys() - set_by_the_code == set()


def test_a_setting_without_a_text_is_refused(monkeypatch: pytest.MonkeyPatch):
    class Silent(BaseModel):
        quiet: int = 0

    monkeypatch.setitem(settings_page.SECTIONS, "silent", (Silent, ""))
    with pytest.raises(ValueError, match="the setting quiet has no text"):
        page()
