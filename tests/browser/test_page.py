"""The page at ``/`` and the API documentation in a real browser, on the fake engine: the form for scores."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.sync_api import Page, Response, Route, expect

from tests.served import KEY, Served

PHONE = {"width": 320, "height": 640}
ITEMS = ["the quick brown fox", "is this text positive", "over the lazy dog"]
SCORE = "/#score"
ROWS = "main:not([hidden]) .rows"
STATUS = "main:not([hidden]) .status"
ERROR = "main:not([hidden]) section .error"
WARNING = "main:not([hidden]) section .warning"

Open = Callable[..., Page]


def ask(page: Page, *, items: list[str] = ITEMS, labels: str = "yes, no", query: str = "q: ") -> Response:
    """Fill the form, and wait for its answer."""
    page.uncheck("#live")
    page.uncheck("#item_first")
    page.fill("#query", query)
    page.fill("#items", "\n".join(items))
    page.fill("#labels", labels)
    return press(page)


def press(page: Page) -> Response:
    """Press "Score", and wait until the answer is shown.

    What the page asked by itself before may be answered later.
    """
    with page.expect_request("**/v1/score") as asked:
        page.get_by_role("button", name="Score", exact=True).click()
    answer = asked.value.response()
    assert answer
    page.wait_for_selector(f"{ROWS}[aria-busy=false]")
    return answer


def sent(answer: Response) -> dict[str, Any]:
    return json.loads(answer.request.post_data or "")


def percentages(page: Page) -> list[list[float]]:
    """The percentages beside the bars, row by row."""
    rows = page.locator(f"{ROWS} > li").all()
    return [[float(text.strip("<%")) for text in row.locator("dd").all_inner_texts()] for row in rows]


def test_bars_are_the_services_scores(open_page: Open, served: Served):
    page = open_page(served.url + SCORE)
    answer = ask(page, labels="yes, by no means,")
    body = {"query": "q: ", "items": ITEMS, "labels": [" yes", " by no means"], "apply_softmax": True}
    wanted = httpx.post(f"{served.url}/v1/score", json=body).json()["scores"]
    assert page.locator(".item").all_inner_texts() == ITEMS
    assert percentages(page) == [[pytest.approx(100 * share, abs=0.051) for share in row] for row in wanted]
    widths = page.locator(".bar").evaluate_all("bars => bars.map(b => b.firstChild.offsetWidth / b.offsetWidth)")
    assert widths == pytest.approx([share for row in wanted for share in row], abs=0.02)
    assert page.locator("dt").all_inner_texts() == ["yes", "by no means"] * 3
    usage = answer.json()["usage"]
    status = page.inner_text(STATUS)
    assert "3 items in " in status
    assert f" ms · {usage['prompt_tokens']} prompt tokens" in status
    assert f"{usage['prompt_tokens_details']['cached_tokens']} cached" in status
    assert "fake-judge" in page.inner_text("#model")


def test_switches_become_fields(open_page: Open, served: Served):
    page = open_page(served.url + SCORE)
    asked = sent(ask(page))
    assert (asked["apply_softmax"], asked["item_first"]) == (True, False)
    page.uncheck("#softmax")
    page.check("#item_first")
    answer = press(page)
    assert (sent(answer)["apply_softmax"], sent(answer)["item_first"]) == (False, True)
    assert all(sum(row) < 1 for row in answer.json()["scores"])


def test_the_label_mass_is_over_the_whole_vocabulary(open_page: Open, served: Served):
    page = open_page(served.url + SCORE)
    page.check("#softmax")
    ask(page)
    page.uncheck("#softmax")
    plain = press(page).json()["scores"]
    page.check("#softmax")
    press(page)
    masses = page.locator(f"{ROWS} summary").all_inner_texts()
    for text, row in zip(masses, plain, strict=True):
        assert float(text.split()[2].removesuffix("%")) == pytest.approx(100 * sum(row), rel=0.1, abs=0.06)


def test_a_warning_is_shown_when_all_labels_are_unlikely(open_page: Open, served: Served):
    """The bars do not show it, since they compare the labels with each other."""
    words = ["yes", "no", "text", "fox", "dog", "quick", "the", "lazy", "over", "brown"]
    body = {"query": "q: ", "items": ITEMS, "labels": [f" {word}" for word in words]}
    rows = httpx.post(f"{served.url}/v1/score", json=body).json()["scores"]
    masses = dict(zip(words, zip(*rows, strict=True), strict=True))
    low = next(word for word in words if max(masses[word]) < 0.01)
    page = open_page(served.url + SCORE)
    ask(page, labels=low)
    least, most = (
        f"{100 * share:.1g}%" if share > 1e-5 else "<0.001%" for share in (min(masses[low]), max(masses[low]))
    )
    said = page.inner_text(WARNING)
    assert f"The labels together hold only {least} to {most} of the probability" in said
    for advice in ("query", "chat template", "other labels", "labels without a space before them"):
        assert advice in said
    assert page.locator(".weak").count() == len(ITEMS)
    some = next(word for word in words if min(masses[word]) < 0.01 < max(masses[word]))
    ask(page, labels=some)
    few = sum(mass < 0.01 for mass in masses[some])
    assert page.inner_text(WARNING).startswith(f"For {few} of {len(ITEMS)} items the labels together hold only")
    assert page.locator(".weak").count() == few
    ask(page, labels=", ".join(words))
    assert min(map(sum, rows)) > 0.01
    assert page.locator(WARNING).is_hidden()
    assert page.locator(".weak").count() == 0
    page.uncheck("#spaced")
    ask(page, labels=low)
    ask(page, labels="yes, yes")  # an error has no scores to warn about
    assert page.locator(WARNING).is_hidden()


def test_a_model_with_classes_shows_them_and_is_asked_for_no_labels(open_page: Open, judge: Served):
    page = open_page(judge.url)
    expect(page.locator("#labels")).to_be_hidden()
    page.uncheck("#live")
    page.fill("#items", "\n".join(ITEMS))
    page.fill("#query", "q: ")
    for softmax in (True, False):
        page.set_checked("#softmax", softmax)
        answer = press(page)
        body = {"model": "fake-judge", "query": "q: ", "items": ITEMS, "item_first": False, "apply_softmax": softmax}
        assert (answer.status, sent(answer)) == (200, body)
        assert page.locator("dt").all_inner_texts() == ["class 0", "class 1", "class 2"] * 3
        scores = httpx.post(f"{judge.url}/v1/score", json=body).json()["scores"]
        scale = 100 if softmax else 1  # logits are shown as they are
        assert percentages(page) == [
            [pytest.approx(scale * value, abs=scale * 0.0051) for value in row] for row in scores
        ]
        assert ("%" in page.inner_text(ROWS)) == softmax
    assert page.locator(ERROR).is_hidden()
    assert page.locator(WARNING).is_hidden()
    page.select_option("#sort", label="class 1")
    order = sorted(range(3), key=lambda item: -scores[item][1])
    assert page.locator(".item").all_inner_texts() == [ITEMS[item] for item in order]
    page.locator(f"{ROWS} summary").first.click()
    page.wait_for_selector(".tokens span")


def test_rows_can_be_sorted_by_a_label(open_page: Open, served: Served):
    page = open_page(served.url + SCORE)
    items = [f"{word} {number}" for number in range(6) for word in ("fox", "dog")]
    scores = ask(page, items=items).json()["scores"]
    page.select_option("#sort", label="no")
    order = sorted(range(len(items)), key=lambda item: -scores[item][1])
    assert order != list(range(len(items)))
    assert page.locator(".item").all_inner_texts() == [items[item] for item in order]
    press(page)  # the choice is kept for the next answer
    assert page.locator(".item").all_inner_texts() == [items[item] for item in order]
    page.select_option("#sort", label="given order")
    assert page.locator(".item").all_inner_texts() == items


def test_the_models_tokens_are_shown(open_page: Open, served: Served):
    page = open_page(served.url + SCORE)
    ask(page, query="the\n", items=["quick \u72d0"])
    page.click(f"{ROWS} summary")
    page.wait_for_selector(".tokens span")
    pieces = page.locator(".tokens span")
    assert "".join(pieces.all_inner_texts()).startswith("the\u23cequick\u2423")
    ids = httpx.post(f"{served.url}/tokenize", json={"prompt": "the\nquick \u72d0"}).json()["tokens"]
    assert pieces.evaluate_all("all => all.map(token => token.title)") == [f"token {i}" for i in ids]


def test_it_scores_as_one_types_and_the_last_answer_stays(open_page: Open, served: Served):
    page = open_page(served.url + SCORE)
    ask(page)
    page.check("#live")
    held: list[Route] = []
    page.route("**/v1/score", lambda route: held.append(route), times=1)
    with page.expect_request("**/v1/score"):
        page.fill("#items", "the first thought")
    with page.expect_response("**/v1/score"):
        page.fill("#items", "the second thought")
    page.wait_for_selector(f"{ROWS}[aria-busy=false]")
    held[0].abort()
    assert page.locator(".item").all_inner_texts() == ["the second thought"]
    page.fill("#items", "\n \n")
    expect(page.locator(STATUS)).to_contain_text("Write some items")
    assert page.locator(ERROR).is_hidden()


def test_it_works_by_keyboard(open_page: Open, served: Served):
    page = open_page(served.url + SCORE)
    ask(page)
    page.locator("h1").click()
    reached: list[str] = []
    for _ in range(20):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("(e => e.id || e.textContent)(document.activeElement)"))
    assert reached[:18] == [
        "model", "Decide", "Score", "Rerank", "API", "Film reviews", "Support", "Topics",
        "query", "item_first", "items", "file", "labels", "spaced", "softmax", "Score", "live", "sort",
    ]  # fmt: skip
    assert "Label mass" in reached[18]
    page.focus("#query")
    page.keyboard.type("again ")
    with page.expect_request("**/v1/score") as request:
        page.keyboard.press("Control+Enter")
    assert "again" in json.loads(request.value.post_data or "")["query"]
    page.focus("#labels")
    with page.expect_request("**/v1/score"):
        page.keyboard.press("Enter")
    page.focus("#softmax")
    page.keyboard.press("Space")
    assert not page.is_checked("#softmax")
    page.get_by_role("button", name="Topics").focus()
    page.keyboard.press("Enter")
    assert page.input_value("#items").startswith("Headline: The striker")


@pytest.mark.parametrize("path", [SCORE, "/docs"])
def test_it_fits_a_phone(open_page: Open, served: Served, path: str):
    page = open_page(served.url + path, PHONE)
    if path == SCORE:
        ask(page, items=["a" * 200, "b " * 100], labels="yes, no")
        page.locator(f"{ROWS} summary").first.click()
        page.wait_for_selector(".tokens span")
    else:
        page.wait_for_selector(".opblock")
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    assert page.evaluate("document.querySelector('meta[name=viewport]').content").startswith("width=device-width")


@pytest.mark.parametrize(
    "wrong", [{"labels": "yes, yes"}, {"items": ["good", "x" * 5000]}], ids=["labels twice", "a long item"]
)
def test_errors_are_shown_in_the_services_words(open_page: Open, served: Served, wrong: dict[str, Any]):
    page = open_page(served.url + SCORE)
    answer = ask(page, **wrong)
    assert answer.status == 400
    assert page.inner_text(ERROR) == answer.json()["message"]
    field = "#items" if "items" in wrong else "#labels"
    assert page.get_attribute(field, "aria-invalid") == "true"
    ask(page)
    assert page.locator(ERROR).is_hidden()
    assert page.get_attribute(field, "aria-invalid") is None


def test_a_service_that_has_gone_is_told(open_page: Open, served: Served):
    page = open_page(served.url + SCORE)
    ask(page)
    page.route("**/tokenize", lambda route: route.abort())
    page.route("**/v1/score", lambda route: route.abort())
    page.get_by_role("button", name="Score", exact=True).click()
    page.wait_for_selector(f"{ERROR}:not([hidden])")
    assert "cannot be reached" in page.inner_text(ERROR)


def test_an_api_key_is_asked_for_where_one_is_needed(open_page: Open, served: Served, locked: Served):
    assert open_page(served.url + SCORE).locator("#key").is_hidden()
    page = open_page(locked.url + SCORE)
    page.wait_for_selector("#key:focus")
    assert "needs an API key" in page.inner_text(ERROR)
    page.keyboard.type("wrong")
    page.keyboard.press("Enter")
    expect(page.locator(ERROR)).to_contain_text("invalid API key")
    page.fill("#key", KEY)
    ask(page)
    assert len(percentages(page)) == 3
    assert "fake-judge" in page.inner_text("#model")
    page.reload()  # kept as long as the tab is open
    expect(page.locator("#model")).to_contain_text("fake-judge")
    assert page.locator("#key").is_hidden()


def test_items_are_text_and_never_markup(open_page: Open, served: Served):
    page = open_page(served.url + SCORE)
    hostile = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"
    ask(page, items=[hostile], labels="yes, no")
    assert page.locator(".item").all_inner_texts() == [hostile]
    assert page.locator(f"{ROWS} img, {ROWS} script").count() == 0
    assert page.title() == "score-serve"


def test_many_items_are_shown_in_part_until_all_are_asked_for(open_page: Open, served: Served):
    page = open_page(served.url + SCORE)
    ask(page, items=[f"fox {number}" for number in range(230)])
    assert page.locator(f"{ROWS} > li").count() == 200
    page.get_by_role("button", name="Show all 230").click()
    assert page.locator(f"{ROWS} > li").count() == 230


def test_rows_of_many_items_are_shown_as_they_come(open_page: Open, served: Served):
    page = open_page(served.url + SCORE)
    items = [f"fox {number}" for number in range(120)]
    page.evaluate(
        """() => {
          const status = document.querySelector("main[data-tab=score] .status");
          window.said = [];
          new MutationObserver(() => said.push([status.textContent,
            document.querySelectorAll("main[data-tab=score] .rows > li").length]))
            .observe(status, {childList: true, characterData: true, subtree: true});
        }"""
    )
    answer = ask(page, items=items)
    assert sent(answer)["stream"] is True
    partial = [(text, rows) for text, rows in page.evaluate("said") if " of 120 items" in text]
    assert partial[0][0] == "1 of 120 items"
    assert page.inner_text("main[data-tab=score] .status").startswith("120 items in")
    body = {name: value for name, value in sent(answer).items() if name != "stream"}
    wanted = httpx.post(f"{served.url}/v1/score", json=body).json()["scores"]
    assert percentages(page) == [[pytest.approx(100 * share, abs=0.051) for share in row] for row in wanted]
    assert '"stream"' not in page.locator("main[data-tab=score] pre.curl").text_content()
    ask(page, labels="yes, yes", items=items)  # an error before the first row
    assert page.locator(ERROR).is_visible()


def test_a_csv_file_gives_the_items_and_takes_the_scores(open_page: Open, served: Served):
    page = open_page(served.url + SCORE)
    page.uncheck("#live")
    content = '\ufeffid,text\r\n1,"the ""fox"", quick"\r\n2,"two\nlines"\r\n3,dog'
    page.set_input_files("#file", {"name": "in.csv", "mimeType": "text/csv", "buffer": content.encode()})
    page.wait_for_selector("#column:not([hidden])")
    items = ['the "fox", quick', "two lines", "dog"]
    assert page.input_value("#items").split("\n") == items
    page.select_option("#column", "id")
    assert page.input_value("#items").split("\n") == ["1", "2", "3"]
    answer = ask(page, items=items).json()
    with page.expect_download() as saved:
        page.get_by_role("button", name="Save as CSV").click()
    rows = [*csv.reader(io.StringIO(Path(saved.value.path()).read_text("utf-8"), newline=""))]
    assert rows[0] == ["item", "yes", "no", "label_mass"]
    assert [row[0] for row in rows[1:]] == items
    assert [[float(value) for value in row[1:]] for row in rows[1:]] == [
        [*scores, mass] for scores, mass in zip(answer["scores"], answer["label_mass"], strict=True)
    ]


def test_no_percentage_is_long(open_page: Open, served: Served):
    page = open_page(served.url + SCORE)
    wanted = {0: "0.0%", 1e-9: "<0.001%", 2e-5: "0.002%", 0.0004: "0.04%", 0.5: "50.0%"}
    shown = "shares => import('./static/common.js').then(({percent}) => shares.map(share => percent(share)))"
    assert page.evaluate(shown, [*wanted]) == [*wanted.values()]


def test_the_documentation_needs_no_other_server(open_page: Open, served: Served, locked: Served):
    page = open_page(f"{served.url}/docs")
    page.wait_for_selector(".opblock")
    assert "/v1/score" in page.inner_text("#swagger-ui")
    assert page.get_by_role("button", name="Authorize").count() == 0
    page = open_page(f"{locked.url}/docs")
    page.wait_for_selector(".opblock")
    assert page.get_by_role("button", name="Authorize").count() == 1
