"""The page's form for decisions, in a real browser, on the fake engine."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any, Literal

import httpx
import pytest
from playwright.sync_api import Page, Response, Route, expect

from tests.served import KEY, Served

DECIDE = "/#decide"
ROWS = "main:not([hidden]) .rows"
STATUS = "main:not([hidden]) .status"
ERROR = "main:not([hidden]) section .error"
CARDS = "#questions > li"
REQUEST: dict[str, Any] = {
    "model": "fake-judge",
    "state": "It's the lazy dog's \\ \"fox\" \u72d0\nover",
    "questions": {
        "refund?": {"type": "noul", "instructions": "Is it so?", "criteria": {"true": "it is so"}},
        "plain": {"type": "noul", "instructions": "And now?"},
        "topic": {"type": "choice", "instructions": "Which?", "criteria": {"10": "ten", "the 'fox'": None, "2": None}},
        "how": {"type": "score", "instructions": "How lazy?", "criteria": ["not", "a bit", "very"]},
    },
    "permutations": 2,
    "on_error": "item",
}
"""Quotes of shells and of Python, and names that JavaScript would put into another order."""

Open = Callable[..., Page]


def press(page: Page) -> Response:
    """Press "Decide", and wait for the answer and until it is shown."""
    with page.expect_request("**/v1/systemone") as asked:  # what was asked before may be answered later
        page.get_by_role("button", name="Decide", exact=True).click()
    answer = asked.value.response()
    assert answer
    page.wait_for_selector(f"{ROWS}[aria-busy=false]")
    return answer


def sent(answer: Response) -> dict[str, Any]:
    return json.loads(answer.request.post_data or "")


@pytest.fixture
def page(open_page: Open, served: Served) -> Page:
    """With no questions."""
    page = open_page(served.url + DECIDE)
    page.wait_for_selector(f"{ROWS}[aria-busy=false]")
    clear(page)
    return page


def clear(page: Page) -> None:
    while page.locator(CARDS).count():
        page.locator(f"{CARDS} [data-do=remove]").first.click()


def write(page: Page, request: dict[str, Any]) -> None:
    """Write a request into the form, as a user does."""
    page.fill("#state", request["state"])
    page.fill("#permutations", str(request.get("permutations", 1)))
    for name, question in request["questions"].items():
        page.click(f"[data-add={question['type']}]")
        card = page.locator(CARDS).last
        card.locator(".id").fill(name)
        card.locator(".instructions").fill(question.get("instructions", ""))
        criteria = question.get("criteria", {})
        if question["type"] == "noul":
            card.locator(".yes").fill(criteria.get("true", ""))
            card.locator(".no").fill(criteria.get("false", ""))
            continue
        described = criteria.items() if isinstance(criteria, dict) else [(level, None) for level in criteria]
        for number, (option, description) in enumerate(described):
            if number >= card.locator(".options > li").count():
                card.locator("[data-do=add]").click()
            row = card.locator(".options > li").nth(number)
            row.locator(".name").fill(option)
            if description is not None:
                row.locator(".description").fill(description)


def ordered(text: str) -> Any:
    """JSON with the order of what is in its objects."""
    return json.loads(text, object_pairs_hook=lambda pairs: pairs)


def test_the_form_becomes_the_request_and_bars_the_answer(page: Page, served: Served):
    write(page, REQUEST)
    answer = press(page)
    assert ordered(answer.request.post_data or "") == ordered(json.dumps(REQUEST))
    wanted = httpx.post(f"{served.url}/v1/systemone", json=REQUEST).raise_for_status().json()
    answers = wanted["answers"]
    shares = [
        [answers["refund?"]["noul"], 1 - answers["refund?"]["noul"]],
        [answers["plain"]["noul"], 1 - answers["plain"]["noul"]],
        list(answers["topic"]["probabilities"].values()),
        list(answers["how"]["probabilities"].values()),
    ]
    rows = page.locator(f"{ROWS} > li").all()
    for row, own in zip(rows, shares, strict=True):
        shown = [float(text.strip("<%")) for text in row.locator("dd").all_inner_texts()]
        assert shown == [pytest.approx(100 * share, abs=0.051) for share in own]
        tops = row.locator(".bar > div").evaluate_all("bars => bars.map(bar => bar.className)")
        assert tops.index("top") == own.index(max(own))
    names = [row.locator("dt").all_inner_texts() for row in rows]
    assert names == [["yes", "no"], ["yes", "no"], ["10", "the 'fox'", "2"], ["not", "a bit", "very"]]
    assert page.locator(f"{ROWS} h3").all_inner_texts() == list(REQUEST["questions"])
    assert [own["x_permutations"] for own in answers.values()][1:] == [1, 2, 2]
    outcomes = page.locator(f"{ROWS} .outcome").all_inner_texts()
    assert outcomes[2:] == [answers["topic"]["choice"], f"{answers['how']['score']:.2f} of 2"]
    assert outcomes[0] == ("no" if answers["refund?"]["noul"] < 0.5 else "yes")
    for row, own in zip(rows, answers.values(), strict=True):
        note = row.locator(".note").inner_text()
        mass = re.search(r"label mass <?([\d.]+)%", note)
        assert mass
        assert float(mass[1]) == pytest.approx(100 * own["x_label_mass"], rel=0.1, abs=0.06)
        assert ("confidence" in note) == ("confidence" in own)
        assert ("2 orders" in note) == (own["x_permutations"] == 2)
        assert (row.locator(".low").count() == 1) == (own["x_label_mass"] < 0.5)
    status = page.inner_text(STATUS)
    assert status.startswith("4 questions in ")
    assert f" ms \u00b7 {wanted['usage']['input_tokens']} input tokens, " in status
    assert status.endswith(f"{answer.json()['x_cached_tokens']:,} cached")


def test_a_state_in_json_is_sent_as_it_is(page: Page):
    write(page, REQUEST | {"questions": {"plain": REQUEST["questions"]["plain"]}})
    expect(page.locator("#kind")).to_have_text("sent as text")
    for text in ('{"b": 12345678901234567890, "1": 1.0}', "[1, null]"):
        page.fill("#state", text)
        expect(page.locator("#kind")).to_have_text("sent as JSON")
        assert f'"state": {text}' in (press(page).request.post_data or "")
    for text in ("[not JSON]", "17", "null", '"text"'):
        page.fill("#state", text)
        expect(page.locator("#kind")).to_have_text("sent as text")
        assert sent(press(page))["state"] == text


@pytest.mark.parametrize("language", ["curl", "python"])
def test_the_snippets_send_the_same_request(page: Page, served: Served, language: str):
    write(page, REQUEST)
    wanted = press(page).json()
    page.locator("main:not([hidden]) summary", has_text=re.compile(language, re.IGNORECASE)).click()
    code = page.locator(f"main:not([hidden]) pre.{language}").inner_text()
    command = [sys.executable, "-c", code] if language == "python" else ["sh", "-c", f"{code} -sS"]
    said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    got = ast.literal_eval(said) if language == "python" else json.loads(said)
    assert got["answers"] == wanted["answers"]
    assert served.url in code


def test_python_takes_every_json_state(page: Page):
    state = {"a\\/b": [True, False, None, 1.5e3, -0.0], "true": "null \u2028 \U0001f600 \"'\\\n", "": {}}
    page.click("[data-add=noul]")
    page.fill("#state", '{"slash": "\\/", "pair": "\\ud83d\\ude00", "own": ' + json.dumps(state) + "}")
    press(page)
    call = ast.parse(page.locator("main:not([hidden]) pre.python").text_content() or "").body[1]
    assert isinstance(call, ast.Assign)
    assert isinstance(call.value, ast.Call)
    (body,) = [word.value for word in call.value.keywords if word.arg == "json"]
    assert ast.literal_eval(body)["state"] == {"slash": "/", "pair": "\U0001f600", "own": state}


def test_no_snippet_and_no_link_holds_the_key(open_page: Open, locked: Served):
    page = open_page(locked.url + DECIDE)
    page.wait_for_selector("#key:focus")
    page.keyboard.type(KEY)
    page.keyboard.press("Enter")
    expect(page.locator(f"{ROWS} > li")).to_have_count(3)
    for language in ("curl", "python"):
        code = page.locator(f"main:not([hidden]) pre.{language}").text_content() or ""
        assert "SCORE_SERVE_API_KEY" in code
        assert KEY not in code
    page.reload()
    expect(page.locator(f"{ROWS} > li")).to_have_count(3)
    assert "SCORE_SERVE_API_KEY" in (page.locator("main:not([hidden]) pre.curl").text_content() or "")


def test_a_link_holds_the_whole_form(page: Page, served: Served):
    write(page, REQUEST)
    page.locator(CARDS).nth(1).locator("[data-do=up]").click()
    body = press(page).request.post_data
    assert list(sent_questions(body)) == ["plain", "refund?", "topic", "how"]
    link = page.url
    other = page.context.new_page()
    with other.expect_response("**/v1/systemone") as got:
        other.goto(link)
    assert got.value.request.post_data == body
    expect(other.locator(f"{ROWS} > li")).to_have_count(4)
    other.fill("#state", "another state")
    other.wait_for_url(lambda url: url != link)
    other.reload()
    expect(other.locator("#state")).to_have_value("another state")
    other.click("nav a[href='#score']")
    expect(other.locator("#query")).to_be_visible()
    other.fill("#query", "kept ")
    other.wait_for_url(re.compile("#score=.{200}"))
    other.click("nav a[href='#decide']")
    expect(other.locator("#state")).to_have_value("another state")
    other.goto(f"{served.url}/#score")
    other.go_back()
    expect(other.locator("#state")).to_have_value("another state")


def sent_questions(body: str | None) -> dict[str, Any]:
    return json.loads(body or "")["questions"]


@pytest.mark.parametrize(
    "end", ["=%%%", "=AAAA", "=eyJxdWVzdGlvbnMiOjF9", "=bnVsbA", "=eyJxdWVzdGlvbnMiOlt7Im9wdGlvbnMiOlsxXX1dfQ"]
)
def test_a_broken_link_shows_an_example(open_page: Open, served: Served, end: str):
    page = open_page(served.url + DECIDE + end)
    expect(page.locator(f"{ROWS} > li")).to_have_count(3)


def test_errors_are_shown_beside_their_questions(page: Page):
    write(page, REQUEST)
    card = page.locator(CARDS).nth(2)
    for _ in range(2):
        card.locator("[data-do=drop]").last.click()
    answer = press(page)
    assert answer.status == 422
    (detail,) = answer.json()["detail"]
    assert detail["loc"][:3] == ["body", "questions", "topic"]
    assert card.locator(".error").inner_text() == detail["msg"] == page.inner_text(ERROR)
    assert page.locator(f"{CARDS} .error:visible").count() == 1
    assert page.evaluate("document.activeElement.closest('.card')?.querySelector('.id').value") == "topic"
    page.locator(CARDS).nth(1).locator(".instructions").fill("")
    card.locator("[data-do=add]").click()
    card.locator(".name").last.fill("one more")
    (detail,) = press(page).json()["detail"]
    assert detail["loc"] == ["body", "questions", "plain"]
    assert page.locator(CARDS).nth(1).locator(".error").inner_text() == detail["msg"]
    assert card.locator(".error").is_hidden()
    page.locator(CARDS).nth(1).locator(".instructions").fill("And now?")
    press(page)
    assert page.locator("main .error:visible, main [aria-invalid]").count() == 0


def test_a_question_without_an_answer_leaves_the_others_theirs(page: Page):
    write(page, REQUEST)
    page.locator(CARDS).nth(1).locator(".instructions").fill("too long " * 40_000)
    answer = press(page)
    assert answer.status == 200
    answers = answer.json()["answers"]
    assert answers["plain"]["type"] == "error"
    assert page.locator(f"{ROWS} h3").all_inner_texts() == list(REQUEST["questions"])
    rows = page.locator(f"{ROWS} > li")
    assert rows.nth(1).locator(".outcome").inner_text() == "no answer"
    assert rows.nth(1).locator(".refused").inner_text() == answers["plain"]["x_error"]["message"]
    assert [row.locator("dd").count() for row in rows.all()] == [2, 0, 3, 3]
    assert page.locator(f"{ROWS} .refused").count() == 1


def test_names_that_a_json_object_cannot_hold_twice(page: Page):
    write(page, REQUEST)
    page.locator(CARDS).nth(1).locator(".id").fill("refund?")
    page.get_by_role("button", name="Decide", exact=True).click()
    expect(page.locator(ERROR)).to_contain_text("Two questions are called refund?")
    expect(page.locator(CARDS).nth(1).locator(".id")).to_have_attribute("aria-invalid", "true")
    page.locator(CARDS).nth(1).locator(".id").fill("plain")
    page.locator(CARDS).nth(2).locator(".name").first.fill("2")
    page.get_by_role("button", name="Decide", exact=True).click()
    expect(page.locator(ERROR)).to_contain_text("Two options")
    clear(page)
    page.get_by_role("button", name="Decide", exact=True).click()
    expect(page.locator(STATUS)).to_have_text("Add a question.")


def test_a_low_label_mass_is_told_and_a_high_one_is_not(page: Page):
    masses = iter([0.31, 0.97])

    def answer(route: Route) -> None:
        own = {"type": "noul", "noul": 0.75, "x_label_mass": next(masses), "x_permutations": 1, "x_reads": []}
        route.fulfill(
            json={"model": "m", "answers": {"question_1": own}, "usage": {"input_tokens": 1, "output_tokens": 0}}
        )

    page.route("**/v1/systemone", answer)
    page.click("[data-add=noul]")
    press(page)
    assert "Low label mass" in page.inner_text(f"{ROWS} .low")
    assert "label mass 31.0%" in page.inner_text(f"{ROWS} .note")
    press(page)
    assert page.locator(f"{ROWS} .low").count() == 0
    assert "cached" not in page.inner_text(STATUS)


def test_many_options_are_folded(page: Page):
    page.click("[data-add=choice]")
    page.fill("#state", "")
    names = [f"q{number}" for number in range(16)]
    field = page.locator(f"{CARDS} .name").first
    field.evaluate(
        """(field, text) => {
            const clipboardData = new DataTransfer();
            clipboardData.setData("text", text);
            field.dispatchEvent(new ClipboardEvent("paste", {clipboardData, bubbles: true, cancelable: true}));
        }""",
        "\n".join(names),
    )
    page.locator("[data-do=drop]").last.click()  # the empty one that was there
    answer = press(page)
    assert list(sent(answer)["questions"]["question_1"]["criteria"]) == names
    probabilities = answer.json()["answers"]["question_1"]["probabilities"]
    shown = sorted(names, key=lambda name: -probabilities[name])
    assert page.locator(f"{ROWS} dt:visible").all_inner_texts() == shown[:12]
    page.click(f"{ROWS} summary")
    assert page.locator(f"{ROWS} dt:visible").all_inner_texts() == shown


def test_it_works_by_keyboard(page: Page):
    page.focus("[data-add=choice]")
    page.keyboard.press("Enter")
    page.keyboard.type("Which?")  # the new question has the focus
    page.keyboard.press("Tab")
    page.keyboard.type("red")
    page.keyboard.press("Enter")
    page.keyboard.type("green")
    page.keyboard.press("Enter")  # makes a third option
    page.keyboard.type("blue")
    page.focus("[data-add=noul]")
    page.keyboard.press("Space")
    page.keyboard.type("Is it?")
    for _ in range(2):  # the button that would move it down does nothing
        page.keyboard.press("Shift+Tab")
    assert page.evaluate("document.activeElement.dataset.do") == "up"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.dataset.do") == "down"  # it is the first now
    with page.expect_request("**/v1/systemone") as request:
        page.keyboard.press("Control+Enter")
    questions = sent_questions(request.value.post_data)
    assert [own["instructions"] for own in questions.values()] == ["Is it?", "Which?"]
    assert list(questions["question_1"]["criteria"]) == ["red", "green", "blue"]
    page.locator(CARDS).first.locator("[data-do=remove]").press("Enter")
    assert page.evaluate("document.activeElement.className") == "id"
    for field in page.locator("input:visible, select:visible, textarea:visible, button:visible").all():
        assert field.evaluate("field => field.labels?.length || field.ariaLabel || field.textContent.trim()")


def test_the_kind_of_a_question_can_change(page: Page):
    page.click("[data-add=noul]")
    page.fill(f"{CARDS} .instructions", "How?")
    page.select_option(f"{CARDS} .type", "score")
    for place, level in enumerate(("low", "high")):
        page.locator(f"{CARDS} .name").nth(place).fill(level)
    assert sent(press(page))["questions"]["question_1"]["criteria"] == ["low", "high"]
    page.select_option(f"{CARDS} .type", "choice")
    assert sent(press(page))["questions"]["question_1"]["criteria"] == {"low": None, "high": None}
    page.select_option(f"{CARDS} .type", "noul")
    assert sent(press(page))["questions"]["question_1"] == {"type": "noul", "instructions": "How?"}


def test_it_fits_a_phone(page: Page):
    page.set_viewport_size({"width": 320, "height": 640})
    write(page, REQUEST | {"state": "w" * 300})
    page.locator(CARDS).nth(2).locator(".name").first.fill("n" * 100)
    page.locator(CARDS).nth(0).locator(".id").fill("i" * 100)
    press(page)
    page.locator("main:not([hidden]) .snippets summary").first.click()
    assert page.evaluate("document.documentElement.scrollWidth") <= 320
    schemes: tuple[Literal["light", "dark"], ...] = ("light", "dark")
    for scheme in schemes:
        page.emulate_media(color_scheme=scheme)
        light = page.evaluate("getComputedStyle(document.body).backgroundColor").startswith("rgb(24")
        assert light == (scheme == "light")


def test_what_a_state_or_an_option_says_is_never_markup(page: Page):
    hostile = "<img src=x onerror=\"document.title='owned'\">"
    write(
        page, {"state": hostile, "questions": {hostile: {"type": "choice", "criteria": {hostile: hostile, "b": None}}}}
    )
    press(page)
    assert page.locator(f"{ROWS} h3").inner_text() == hostile
    assert page.locator(f"{ROWS} dt").first.inner_text() == hostile
    assert page.locator("main img").count() == 0
    assert page.title() == "score-serve"


def test_the_copy_buttons_copy(page: Page, served: Served):
    page.context.grant_permissions(["clipboard-read", "clipboard-write"], origin=served.url)
    page.click("[data-add=noul]")
    press(page)
    page.locator("main:not([hidden]) summary", has_text="curl").click()
    page.get_by_role("button", name="Copy the curl command").click()
    expect(page.get_by_role("button", name="Copy the curl command")).to_have_text("Copied")
    assert page.evaluate("navigator.clipboard.readText()") == page.inner_text("main:not([hidden]) pre.curl")
    page.get_by_role("button", name="Copy link").click()
    expect(page.locator("[data-copy=link]:visible")).to_have_text("Copied")
    assert page.evaluate("navigator.clipboard.readText()") == page.url


def test_documents_are_ranked(open_page: Open, served: Served):
    page = open_page(f"{served.url}/#rerank")
    texts = ["the quick fox", "<b>lazy</b> dog", "over"]
    page.fill("#wanted", "fox")
    page.fill("#documents", "\n".join(texts))
    with page.expect_response("**/v1/rerank") as got:
        page.get_by_role("button", name="Rerank", exact=True).click()
    page.wait_for_selector(f"{ROWS}[aria-busy=false]")
    results = got.value.json()["results"]
    assert page.locator(".item:visible").all_inner_texts() == [texts[each["index"]] for each in results]
    assert page.locator("dd:visible").all_inner_texts() == [f"{each['relevance_score']:.4f}" for each in results]
    page.fill("#documents", "\n")
    page.get_by_role("button", name="Rerank", exact=True).click()
    expect(page.locator(STATUS)).to_have_text("Write some documents.")
