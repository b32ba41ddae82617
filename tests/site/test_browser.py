"""The site in a real browser: Debian's Chromium, served from this machine, nothing else reachable."""

from __future__ import annotations

import functools
import http.server
import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

webdriver = pytest.importorskip("selenium.webdriver")
PAGES = ("index.html", "methods.html", "models.html", "papers/judged.html", "papers/waiting.html")
NOTEBOOKS = ("notebooks/judged.html", "notebooks/waiting.html")
WIDTHS = (400, 1280)
CONTRAST = 4.5  # of text against what is behind it: WCAG 2.2, level AA


@pytest.fixture(scope="module")
def address(site) -> Iterator[str]:
    """Where the site is served."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments: object) -> None:
            pass

    handler = functools.partial(Quiet, directory=site)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator[webdriver.Chrome]:
    """A headless Chromium that keeps a log of its console and its requests."""
    programs = shutil.which("chromium"), shutil.which("chromedriver")
    if None in programs:
        pytest.skip("no chromium and chromedriver: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = programs[0]
    for argument in (
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--no-first-run",
        f"--user-data-dir={tmp_path_factory.mktemp('chromium')}",
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    service = webdriver.ChromeService(executable_path=programs[1])
    with webdriver.Chrome(options=options, service=service) as driver:
        driver.get("about:blank")  # away from the browser's own first page
        yield driver


def show(browser, address: str, page: str, width: int = 1280, scheme: str = "light") -> None:
    """Open a page afresh in a window of `width` CSS pixels."""
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    feature = {"name": "prefers-color-scheme", "value": scheme}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    browser.get("about:blank")
    browser.get(f"{address}/{page}")


def requests(browser) -> list[str]:
    """What the browser asked for since the last call."""
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    return [
        message["params"]["request"]["url"]
        for message in messages
        if message["method"] == "Network.requestWillBeSent"
    ]


def visible(browser, selector: str) -> list[str]:
    """The texts of the elements that can be seen."""
    return [e.text for e in browser.find_elements("css selector", selector) if e.is_displayed()]


@pytest.mark.parametrize("page", PAGES + NOTEBOOKS)
def test_no_error_and_no_request_off_the_site(browser, address, page):
    browser.get_log("browser"), browser.get_log("performance")
    show(browser, address, page)
    browser.execute_script("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert [entry["message"] for entry in browser.get_log("browser")] == []
    asked = [url for url in requests(browser) if not url.startswith(("data:", "about:"))]
    assert asked
    assert all(url.startswith(address) for url in asked), asked


@pytest.mark.parametrize("page", PAGES + NOTEBOOKS)
def test_every_picture_loads_and_is_described(browser, address, page):
    show(browser, address, page)
    broken = browser.execute_async_script(
        """
        const done = arguments[0];
        const pictures = [...document.images];
        document.querySelectorAll("details").forEach((fold) => (fold.open = true));
        pictures.forEach((picture) => (picture.loading = "eager"));
        Promise.allSettled(pictures.map((picture) => picture.decode())).then(() => done(
          pictures.filter((p) => !p.naturalWidth || !p.alt).map((p) => p.src)));
        """
    )
    assert broken == []
    if "judged" in page:
        assert browser.find_elements("css selector", "img")


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("page", PAGES + NOTEBOOKS)
def test_nothing_scrolls_sideways(browser, address, page, width):
    show(browser, address, page, width)
    browser.execute_script("document.querySelectorAll('details').forEach(d => d.open = true)")
    wide = browser.execute_script("return document.documentElement.scrollWidth")
    assert wide <= width


@pytest.mark.parametrize("page", NOTEBOOKS)
def test_mathematics_is_set(browser, address, page):
    show(browser, address, page)
    assert len(browser.find_elements("css selector", ".notebook .katex")) == 2
    assert len(browser.find_elements("css selector", ".notebook .katex-display")) == 1
    assert not browser.find_elements("css selector", ".katex-error")
    assert "$" not in browser.find_element("id", "notebook").text
    fonts = browser.execute_async_script(
        "const done = arguments[0];"
        "document.fonts.ready.then((all) => done([...all].filter("
        "(f) => f.status === 'loaded').map((f) => f.family)))"
    )
    assert any("KaTeX" in font for font in fonts)


def test_code_is_folded_until_asked_for(browser, address):
    show(browser, address, "notebooks/judged.html")
    assert visible(browser, ".code pre") == []
    browser.find_element("id", "unfold").click()
    assert "print(6 * 7)" in visible(browser, ".code pre")[0]
    assert browser.find_element("id", "unfold").get_attribute("aria-pressed") == "true"


def test_a_question_is_answered_by_one_search(browser, address):
    show(browser, address, "index.html")
    assert len(visible(browser, ".paper h2")) == 2
    browser.find_element("id", "q").send_keys("Does judged keep the scores?")
    assert visible(browser, ".paper h2") == ["judged"]
    (claim,) = visible(browser, ".claims li")
    assert claim.split("\n") == ["reproduced", "Toy attention keeps the score of dense attention"]
    assert browser.find_element("id", "status").text == "1 of 2 papers, 1 claim"


def test_a_search_without_an_answer_says_so(browser, address):
    show(browser, address, "index.html")
    browser.find_element("id", "q").send_keys("giraffe")
    assert visible(browser, ".paper h2") == []
    assert browser.find_element("id", "none").is_displayed()


def test_filters_and_sorting(browser, address):
    show(browser, address, "index.html")

    def choose(name: str, value: str) -> None:
        browser.find_element("css selector", f"#{name} option[value='{value}']").click()

    def press(verdict: str) -> None:
        browser.find_element("css selector", f"input[value='{verdict}']").click()

    press("out of reach")
    assert visible(browser, ".claims a") == ["It is three times as fast at 128k tokens"] * 2
    press("out of reach")
    press("inconclusive")
    assert visible(browser, ".paper h2") == []
    choose("profile", "cpu")
    assert visible(browser, ".paper h2") == ["judged"]
    assert visible(browser, ".answer")[0].startswith("Inconclusive: ")
    press("inconclusive")
    choose("profile", "best")
    assert visible(browser, ".paper h2") == ["judged", "waiting"]
    choose("sort", "held")
    assert visible(browser, ".paper h2")[0] == "judged"


def test_a_view_can_be_linked(browser, address):
    show(browser, address, "index.html#q=judged&verdict=reproduced")
    assert browser.find_element("id", "q").get_attribute("value") == "judged"
    assert len(visible(browser, ".claims li")) == 2


def test_marks_have_names_and_controls_have_labels(browser, address):
    show(browser, address, "index.html")
    names = [
        mark.get_attribute("aria-label")
        for mark in browser.find_elements("css selector", ".paper:first-child .marks svg")
    ]
    assert names == ["reproduced", "reproduced", "out of reach"]
    unnamed = [
        control.get_attribute("outerHTML")
        for control in browser.find_elements("css selector", "input, select, button")
        if not control.accessible_name
    ]
    assert unnamed == []


def test_the_keyboard_reaches_everything(browser, address):
    show(browser, address, "index.html")
    body = browser.find_element("css selector", "body")
    reached = set()
    for _ in range(40):
        body.send_keys("\ue004")  # Tab
        body = browser.switch_to.active_element
        reached.add(body.get_attribute("id") or body.get_attribute("value") or body.tag_name)
    assert {"q", "reproduced", "not run", "family", "profile", "sort", "a", "summary"} <= reached


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("page", PAGES + NOTEBOOKS)
def test_text_stands_out_from_its_ground(browser, address, page, scheme):
    show(browser, address, page, scheme=scheme)
    script = Path(__file__).with_name("contrast.js").read_text()
    pairs = browser.execute_script(script)
    assert len(pairs) > 2
    weak = [pair for pair in pairs if pair["contrast"] < CONTRAST]
    assert weak == []
