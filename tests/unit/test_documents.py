"""The check of the documentation's examples finds wrong answers, and all links have a target."""

from __future__ import annotations

import re

import pytest

from tests.documents import FILES, ROOT, check, examples

SHOWN = '{"scores": [[0.84128, 0.15872]], "model": "demo", "usage": {"prompt_tokens_details": {"cached_tokens": 0}}}'


@pytest.mark.parametrize(
    ("old", "new"), [("0.84128", "0.84134"), ("0.15872", "0.158721"), ('"cached_tokens": 0', '"cached_tokens": 7')]
)
def test_last_digits_and_cached_tokens_may_differ(old: str, new: str):
    check(SHOWN.replace(old, new), SHOWN)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("0.84128", "0.8430"),
        ("0.15872", "null"),
        ("demo", "other"),
        ('"model"', '"name"'),
        ("]]", "], [0.5, 0.5]]"),
        ('"cached_tokens": 0', '"cached": 0'),
    ],
)
def test_any_other_difference_is_found(old: str, new: str):
    with pytest.raises(AssertionError):
        check(SHOWN.replace(old, new), SHOWN)


def test_lines_are_compared_by_their_words_and_numbers():
    check("sports 0.9941\n0.5000\n", "sports 0.9942\n0.5001\n")
    for wrong in ("sports 0.9951\n0.5000", "finance 0.9941\n0.5000", "sports 0.9941", "Sports"):
        with pytest.raises(AssertionError):
            check(wrong, "sports 0.9941\n0.5000")


def test_there_are_examples_in_every_document():
    assert {example.name.split(":")[0] for example in examples()} == set(FILES)


PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")),
]


@pytest.mark.parametrize("file", PAGES)
def test_links_have_a_target(file: str):
    text = (ROOT / file).read_text()
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]*))?\)", text):
        path = (ROOT / file).parent / target if target else ROOT / file
        assert path.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}, anchor


@pytest.mark.parametrize("file", PAGES)
def test_the_files_of_examples_exist(file: str):
    named = re.findall(r"\bexamples/[\w./-]*\w", (ROOT / file).read_text())
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_no_text_installs_the_other_project_of_this_name():
    """PyPI's score-serve is a stranger's."""
    texts = [
        *ROOT.glob("*.md"),
        *(file for at in ("docs", "configs", "serve_app", "model") for file in (ROOT / at).rglob("*")),
    ]
    files = [file for file in texts if file.suffix in (".md", ".py", ".yaml") or file.name == "Dockerfile"]
    assert len(files) > 100
    wrong = re.compile(r"(?<!llm-)score-serve\[|pip install '?score-serve\b")
    assert [str(file) for file in files if wrong.search(file.read_text())] == []
