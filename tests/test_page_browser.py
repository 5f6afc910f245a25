"""Promises of the page in a real browser: it can be read and used by everybody, with and without a script, on a phone
and a desk, by keyboard; it is fresh or says that it is not; and no other site can use it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from desk import BROWSER, FLAGS, HOSTILE, Desk, address, drifting, furnish, served, steady

from monitor.actions import Acknowledgement, Verdict
from monitor.events import Projection

FAULTS = (Path(__file__).parent / "accessible.js").read_text()
BESIDE = r"""() => [...document.querySelectorAll('body *')]
  .filter((e) => !e.closest('.scroll, svg, .hidden, .skip, .off, .word') && e.checkVisibility())
  .filter((e) => e.getBoundingClientRect().right > document.documentElement.clientWidth + 1)
  .map((e) => e.outerHTML.slice(0, 160))"""
LOOK = "document.dispatchEvent(new Event('visibilitychange'))"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if BROWSER is None:
        pytest.skip("there is no Chromium here")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=BROWSER, args=FLAGS)
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Desk]:
    with served(tmp_path_factory.mktemp("house"), keys=True) as desk:
        furnish(desk)
        yield desk


@contextmanager
def tab(browser: Any, width: int = 1280, height: int = 800, **options: Any) -> Iterator[Any]:
    """A tab in a fresh profile, which fails if the page complained, or asked anybody else for anything."""
    context = browser.new_context(viewport={"width": width, "height": height}, **options)
    context.set_default_timeout(60_000)
    page = context.new_page()
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("dialog", lambda dialog: (said.append("a dialog"), dialog.dismiss()))
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.said, page.asked = said, asked
    try:
        yield page
    finally:
        context.close()


def log_in(page: Any, desk: Desk, scope: str = "act") -> None:
    page.goto(desk.url)
    page.get_by_label("Key, as").fill(desk.tokens[scope])
    page.get_by_role("button", name="Open").click()


def test_everybody_can_read_and_hit_everything(browser: Any, house: Desk) -> None:
    with tab(browser) as page:
        page.goto(f"{house.url}/sessions/falls")
        assert page.evaluate(FAULTS) == []
        log_in(page, house)
        paths = ["/", "/?page=2", "/?deployment=nowhere", "/sessions/falls", "/sessions/seen", "/sessions/calm"]
        paths += ["/sessions/learning", "/sessions/hostile%20deployment", "/sessions/none", "/?done=acknowledged"]
        paths += [address(name) for name in (HOSTILE[0], HOSTILE[6], HOSTILE[15], HOSTILE[16], ".")]
        for path in paths:
            page.goto(house.url + path)
            for shut in page.locator("details:not([open]) > summary").all():
                shut.click()
            # 320 is a desk's page at 400 %, as WCAG has it (1.4.10).
            for width, scheme in ((1280, "light"), (1280, "dark"), (390, "dark"), (320, "light")):
                page.set_viewport_size({"width": width, "height": 800})
                page.emulate_media(color_scheme=scheme)
                assert page.evaluate(FAULTS) == [], (path, width, scheme)
                assert page.evaluate(BESIDE) == [], (path, width)
                assert page.evaluate("document.documentElement.scrollWidth") == width, path
                assert page.locator(f"svg.chart.{'wide' if width < 700 else 'narrow'}:visible").count() == 0
        # A status of 401 or 404 is told on the console; what the policy forbids, and errors, would be, too.
        assert [text for text in page.said if "401" not in text and "404" not in text] == []
        assert all(url.startswith(house.url) for url in page.asked)


def test_the_checker_finds_what_is_wrong(browser: Any, house: Desk) -> None:
    with tab(browser) as page:
        log_in(page, house)
        page.goto(f"{house.url}/sessions/falls")
        for spoil, told in (
            ("document.querySelector('h1').style.color = '#bbc'", "contrast"),
            ("document.querySelector('select').labels[0].remove()", "no label"),
            ("document.querySelector('button').textContent = ''", "no name"),
            ("document.body.append(document.querySelector('h1').cloneNode(true))", "not one h1"),
        ):
            page.evaluate(spoil)
            assert any(told in fault for fault in page.evaluate(FAULTS)), told


def test_the_keyboard_is_enough(browser: Any, tmp_path: Path) -> None:
    with served(tmp_path, keys=True) as desk, tab(browser) as page:
        desk.fold(drifting("falls") + steady("calm"))
        page.goto(desk.url)
        page.locator("#key:focus").wait_for()
        page.keyboard.type(desk.tokens["act"])
        page.keyboard.press("Enter")
        page.wait_for_selector(".rows")
        focus_on(page, "falls")
        page.keyboard.press("Enter")
        page.wait_for_selector(".title")
        focus_on(page, "Acknowledge")
        page.keyboard.press("Enter")
        assert "Acknowledged" in page.get_by_role("status").inner_text()
        page.wait_for_url(f"{desk.url}/sessions/falls")
        assert list(desk.acted()) == [f"acknowledge/{desk.session('falls').episode_id}"]
        page.goto(desk.url)
        page.keyboard.press("Tab")
        page.keyboard.press("Enter")  # the link past the head
        assert page.evaluate("document.activeElement.id") == "main"


def focus_on(page: Any, text: str) -> None:
    """Tab until something that says so has the focus, and can be seen to have it."""
    for _ in range(40):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.innerText").strip() == text:
            ring = "e => [e, e.closest('.row') ?? e].some((one) => getComputedStyle(one).outlineStyle !== 'none')"
            assert page.evaluate(f"({ring})(document.activeElement)")
            return
    raise AssertionError(f"no way to {text}")


def test_it_needs_no_script(browser: Any, tmp_path: Path) -> None:
    with served(tmp_path, keys=True) as desk, tab(browser, java_script_enabled=False) as page:
        desk.fold(drifting(HOSTILE[0]) + steady("calm") + steady("other", deployment="new"))
        log_in(page, desk)
        page.get_by_text("Change", exact=True).click()
        page.get_by_label("Deployment").select_option("new")
        page.get_by_role("button", name="Show").click()
        assert page.locator(".row").count() == 1
        page.get_by_text("Change", exact=True).click()
        page.get_by_label("Or one conversation").fill(HOSTILE[0])
        page.get_by_role("button", name="Open").click()
        verdict = page.locator("form", has=page.get_by_role("heading", name="What you found"))
        verdict.get_by_label("Why").fill("a <b>poem</b>")
        verdict.get_by_role("button", name="False alarm").click()
        assert "A false alarm: it is healthy, says act's key: a <b>poem</b>." in page.locator("main").inner_text()
        assert desk.acted() == {f"verdict/{HOSTILE[0]}": Verdict("healthy", None, "a <b>poem</b>")}
        assert page.locator("noscript meta").count() == 1
        page.get_by_role("button", name="Log out").click()
        page.goto(desk.url)
        assert page.get_by_role("heading", name="Show your key").is_visible()


def test_it_keeps_fresh_and_disturbs_nobody(browser: Any, tmp_path: Path) -> None:
    turns: list[Projection] = drifting("falls", 9)
    with tab(browser) as page:
        with served(tmp_path, keys=False) as desk:
            desk.fold(turns[:2] + steady("calm"))
            page.goto(desk.url)
            assert "No conversation is drifting now" in page.inner_text("h1")
            page.get_by_role("link", name="falls").focus()
            desk.fold(turns[2:8])
            page.evaluate(LOOK)
            page.locator("h1", has_text="1 conversation is drifting now").wait_for()
            assert "1 drifting" in page.title()
            assert page.evaluate("document.activeElement.innerText") == "falls"
            page.get_by_role("link", name="falls").click()
            note = page.get_by_label("Why, in a few words").first
            note.fill("half a word")
            replies = page.locator("svg.chart.wide :is(circle, path)")
            before = replies.count()
            desk.fold(turns[8:])
            page.evaluate(LOOK)
            replies.nth(before).wait_for()
            assert note.input_value() == "half a word" and note.evaluate("e => e === document.activeElement")
            page.locator("#stale").wait_for(state="hidden")
            assert page.said == []
        page.evaluate(LOOK)  # nobody is there any more
        page.get_by_text("The server does not answer").wait_for()


def test_somebody_who_follows_a_link_from_elsewhere_stays_in(browser: Any, house: Desk) -> None:
    with tab(browser) as page, elsewhere(house) as other:
        page.goto(other)
        page.get_by_role("link").click()
        page.get_by_role("heading", name="Show your key").wait_for()  # nobody is in: it asks, once
        page.get_by_label("Key, as").fill(house.tokens["read"])
        page.get_by_role("button", name="Open").click()
        page.get_by_role("heading", name="a/b/../c").wait_for()
        page.goto(other)
        page.get_by_role("link").click()
        page.get_by_role("heading", name="a/b/../c").wait_for()
        assert page.url == f"{house.url}/sessions/a%2Fb%2F..%2Fc"


def test_another_site_can_do_nothing(browser: Any, house: Desk) -> None:
    before = house.acted()
    with tab(browser) as page, elsewhere(house) as other:
        log_in(page, house)
        page.goto(other)
        for form in ("act", "logout", "login"):
            page.goto(other)
            page.locator(f"form#{form} button").click()
            page.get_by_text("this came from another site").wait_for()
        page.goto(other)
        assert page.evaluate("document.querySelector('iframe').contentDocument") is None
        page.goto(house.url)
        assert page.locator(".rows").is_visible()
    assert house.acted() == before
    assert isinstance(before[f"acknowledge/{house.session('seen').episode_id}"], Acknowledgement)


@contextmanager
def elsewhere(desk: Desk) -> Iterator[str]:
    """Another site: `localhost` and `127.0.0.1` are two, whatever the ports."""

    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            forms = "".join(
                f'<form id="{name}" method="post" action="{desk.url}/{name}"><input name="do" value="unsure">'
                f'<input name="conversation" value="falls"><button>send</button></form>'
                for name in ("act", "logout", "login")
            )
            link = f'<a href="{desk.url}{address("a/b/../c")}">an alert</a>'
            body = f'<!doctype html>{link}{forms}<iframe src="{desk.url}/"></iframe>'.encode()
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Page)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://localhost:{server.server_port}/"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
