"""The server's page in a real browser: Chromium, which Playwright drives.

Skipped where either is missing: `pip install '.[browser]'`, and Chromium or Chrome (`SX_GGUF_TEST_CHROMIUM` names it).
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from served import HTTP, Serving, serving

from selfextend_gguf.models import TINY_MODEL
from selfextend_gguf.server.app import Settings

BROWSERS = (os.environ.get("SX_GGUF_TEST_CHROMIUM"), "chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, (shutil.which(name) for name in BROWSERS if name)), None)
TEMPLATE = "{% for m in messages %}{{ m.content }}\n{% endfor %}"
TEXT = "And it came to pass in those days, that there went out a decree. " * 20  # five trained contexts
MILLISECONDS = 60_000  # to wait for anything


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("no Chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def server() -> Iterator[Serving]:
    with serving({"tiny": TINY_MODEL}, ctx=4096, cache=2**28, chat_template=TEMPLATE) as server:
        yield server


@pytest.fixture
def page(browser: Any, server: Serving) -> Iterator[Any]:
    yield from opened(browser, server)


def opened(browser: Any, server: Serving) -> Iterator[Any]:
    """A new page, which must not make the browser complain."""
    context = browser.new_context()
    page = context.new_page()
    page.set_default_timeout(MILLISECONDS)
    complaints: list[str] = []
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("console", lambda line: complaints.append(line.text) if line.type == "error" else None)
    page.goto(server.url)
    yield page
    context.close()
    # The browser reports what the page deals with (statuses, lost connections), and what a test makes it refuse.
    assert not [line for line in complaints if not re.search("status of 4|Content Security Policy|ERR_FAILED", line)]


def drop(page: Any, name: str, content: str) -> None:
    """Drop a file onto the page, as a mouse would."""
    transfer = page.evaluate_handle(
        """([name, content]) => {
            const transfer = new DataTransfer();
            transfer.items.add(new File([content], name));
            return transfer;
        }""",
        [name, content],
    )
    page.dispatch_event("main", "drop", {"dataTransfer": transfer})


def until(page: Any, condition: str) -> None:
    """Wait for a condition. (Playwright's own way evaluates a text in the page, which the page forbids.)"""
    for _ in range(MILLISECONDS // 50):
        if page.evaluate(condition):
            return
        page.wait_for_timeout(50)
    raise AssertionError(f"never: {condition}")


def answer(page: Any, number: int = 1) -> str:
    """The text of the answer of that number, when it is given."""
    until(
        page,
        f"document.querySelectorAll('article.answer').length === {number} && document.getElementById('stop').disabled",
    )
    return str(page.locator("article.answer span").nth(number - 1).inner_text())


def limit_answers(page: Any, n: int) -> None:
    """This model never ends an answer: let each have at most `n` tokens."""

    def shorten(route: Any) -> None:
        route.continue_(post_data={**route.request.post_data_json, "max_tokens": n, "temperature": 0})

    page.route("**/v1/chat/completions", shorten)


def test_a_document_is_dropped_read_and_asked_about(page, server):
    limit_answers(page, 12)
    until(page, "document.getElementById('facts').textContent.includes('group size')")
    facts = page.inner_text("#facts")
    props = HTTP.get(f"{server.url}/props").json()
    assert facts == (
        f"context 4,096 tokens, trained on 256; group size {props['self_extend']['group_size']}, "
        f"neighbor window {props['self_extend']['neighbor_window']}"
    )
    drop(page, "luke.txt", TEXT)
    page.wait_for_selector(f"text=luke.txt, {len(TEXT):,} tokens")
    page.evaluate(
        """() => { window.seen = [];
            new MutationObserver(() => window.seen.push(document.getElementById('left').textContent))
                .observe(document.getElementById('left'), {childList: true}); }"""
    )
    page.fill("#question", "What went out?")
    page.click("#ask")
    said = answer(page)
    body = {"messages": [{"role": "user", "content": f"{TEXT}\n\nWhat went out?"}], "max_tokens": 12, "temperature": 0}
    wanted = HTTP.post(f"{server.url}/v1/chat/completions", json=body).json()
    assert said == wanted["choices"][0]["message"]["content"].strip("\n")
    assert page.inner_text("#used") == f"{wanted['usage']['total_tokens']:,} of 4,096 tokens used"
    seen = page.evaluate("window.seen")
    assert len(seen) >= 2
    assert all(re.fullmatch(r"read [\d,]+ of [\d,]+ tokens(, \d+ (s|min) left)?", line) for line in seen)
    assert not page.is_visible("#reading")


def test_stop_regenerate_and_a_new_conversation(page):
    limit_answers(page, 2000)
    page.fill("#question", "And")
    page.press("#question", "Enter")
    until(page, "document.querySelector('article.answer span')?.textContent.length > 20")
    page.press("#question", "Escape")
    stopped = answer(page)
    assert 20 < len(stopped) < 2000
    page.unroute_all()
    limit_answers(page, 5)
    page.click("#again")
    until(page, "document.querySelector('article.answer span').textContent.length <= 6")
    assert len(answer(page)) <= 5
    page.fill("#question", "So")
    page.click("#ask")
    answer(page, 2)
    page.click("#new")
    assert page.locator("article").count() == 0
    assert page.inner_text("#used") == ""


def test_a_question_before_the_server_has_said_what_it_serves(page):
    held: list[Any] = []
    page.route("**/v1/models", lambda route: held.append(route))
    page.reload()
    limit_answers(page, 5)
    page.fill("#question", "And")
    page.press("#question", "Enter")
    until(page, "!document.getElementById('stop').disabled")
    assert page.locator("[role=alert]").count() == 0
    held[0].continue_()
    assert len(answer(page)) == 5
    # A server that was not there: the error is told, the question stays, and the next try succeeds.
    page.unroute("**/v1/models")
    page.route("**/v1/models", lambda route: route.abort(), times=2)
    page.reload()
    page.fill("#question", "And")
    page.press("#question", "Enter")
    until(page, "document.querySelector('[role=alert]') && document.getElementById('stop').disabled")
    assert page.input_value("#question") == "And"
    page.unroute("**/v1/models")
    page.press("#question", "Enter")
    assert len(answer(page)) == 5


def test_nothing_that_is_said_is_html(page):
    limit_answers(page, 3)
    evil = "<script>document.title = 'owned'</script><img src=x onerror=\"document.title = 'owned'\">"
    drop(page, "<b>evil</b>.txt", evil)
    page.wait_for_selector("#documents li")
    assert page.inner_text("#documents li").startswith("<b>evil</b>.txt")
    page.fill("#question", evil)
    page.click("#ask")
    answer(page)
    assert evil in page.inner_text("article.asked")
    assert page.locator("article b, article img, article script").count() == 0
    assert page.title() == "sx-gguf"
    policy = page.request.get(page.url).headers["content-security-policy"]
    assert "default-src 'none'" in policy
    with page.expect_console_message(lambda line: "Content Security Policy" in line.text):  # were it HTML all the same
        page.evaluate("html => document.querySelector('main').insertAdjacentHTML('beforeend', html)", evil)
    assert page.title() == "sx-gguf"


def test_errors_are_told_and_nothing_is_lost(page):
    drop(page, "empty.txt", "")
    page.wait_for_selector("[role=alert] >> text=empty.txt is empty")
    drop(page, "long.txt", "x" * 5000)
    page.wait_for_selector("text=long.txt, 5,000 tokens")
    page.fill("#question", "Why?")
    page.click("#ask")
    page.wait_for_selector("[role=alert] >> text=maximum context length is 4096 tokens")
    assert page.input_value("#question") == "Why?"
    page.click("[aria-label='Remove long.txt']")
    assert page.locator("#documents li").count() == 0


def test_keyboard_alone(page):
    """Everything can be reached by Tab, and has a name."""
    reached = []
    for _ in range(12):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id"))
    assert {"new", "conversation", "question", "ask", "file"} <= set(reached)
    nameless = page.evaluate(
        """() => [...document.querySelectorAll('button, input, textarea, select, progress')].filter(e =>
            !(e.labels?.length || e.textContent.trim() || e.getAttribute('aria-label'))).map(e => e.id)"""
    )
    assert nameless == []


def test_dark_and_light(page):
    colours = []
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        colours.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert colours == ["rgb(251, 251, 249)", "rgb(23, 24, 26)"]


def test_a_key_is_asked_for(browser):
    with serving({"tiny": TINY_MODEL}, ctx=1024, settings=Settings(keys=["secret"]), chat_template=TEMPLATE) as server:
        pages = opened(browser, server)
        page = next(pages)
        for key in ("wrong", "secret"):
            page.wait_for_selector("#lock[open]")
            page.fill("#key", key)
            page.press("#key", "Enter")
            page.wait_for_timeout(300)
        until(page, "document.getElementById('facts').textContent.includes('context 1,024')")
        assert not page.is_visible("#lock")
        assert list(pages) == []


def test_the_page_needs_no_browser_to_be_served(server):
    response = HTTP.get(server.url)
    assert response.status_code == 200
    assert "<title>sx-gguf</title>" in response.text
    assert HTTP.head(server.url).status_code == 200
    assert not re.search(r"https?://", response.text)  # nothing is fetched from elsewhere


def test_documents_of_all_kinds(server, tmp_path: Path):
    def text_of(name: str, content: bytes) -> tuple[int, dict[str, Any]]:
        response = HTTP.post(f"{server.url}/extras/document", params={"name": name}, content=content)
        return response.status_code, response.json()

    assert text_of("a.txt", b"caf\xe9 au lait, d\xe9j\xe0 vu, \xe0 la carte, No\xebl") == (
        200,
        {"name": "a.txt", "text": "café au lait, déjà vu, à la carte, Noël"},
    )
    assert text_of("a.html", b"<html><body><p>One</p></body></html>")[1]["text"].strip() == "One"
    status, body = text_of("a.bin", b"\x00\x01\x02" * 50)
    assert (status, body["error"]["message"]) == (400, "a.bin is binary, no text")
    assert text_of("a.txt", b"")[0] == 400
    assert HTTP.post(f"{server.url}/extras/document", content=b"x").status_code == 400
