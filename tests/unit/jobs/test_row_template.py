"""Texts made from the columns of a row."""

from __future__ import annotations

import re

import pytest

from serve_app.jobs.row_template import RowTemplate


def test_columns_are_filled_in_one_pass_and_braces_in_values_are_text():
    template = RowTemplate("{title}: {{{body}}} {title}")
    assert template.columns == ("title", "body")
    assert template.fill({"title": "{body}", "body": "{{x}}", "more": 1}) == "{body}: {{{x}}} {body}"


def test_other_values_are_json():
    row = {"a": 3, "b": 0.5, "c": [1, "ä"], "d": {"e": None}, "f": False}
    assert RowTemplate("{a} {b} {c} {d} {f}").fill(row) == '3 0.5 [1, "ä"] {"e": null} false'


def test_a_name_is_only_a_name():
    for name in ("text.__class__", "text[0]", "text!r", "text:>10", "a b"):
        template = RowTemplate(f"{{{name}}}")
        assert template.columns == (name,)
        assert template.fill({name: "x", "text": "secret"}) == "x"
        with pytest.raises(ValueError, match=re.escape(f"{name} is missing")):
            template.fill({"text": "secret"})


@pytest.mark.parametrize(
    ("row", "said"), [({}, "text is missing"), ({"text": None}, "text is null"), ({"text": "a\ud800"}, "character 4")]
)
def test_a_row_without_a_text_is_reported(row: dict[str, str | None], said: str):
    with pytest.raises(ValueError, match=said):
        RowTemplate("> {text}").fill(row)


@pytest.mark.parametrize("text", ["{", "a}", "{a", "{}", "{a}}", "{{a}"])
def test_a_lone_brace_is_refused(text: str):
    with pytest.raises(ValueError, match=r"lone '[{}]+' at character"):
        RowTemplate(text)
