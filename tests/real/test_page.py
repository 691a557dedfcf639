"""The live page in Debian's Chromium, beside a demo that trains: its numbers, the network, who can use it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, Route, sync_playwright

CHROMIUM = shutil.which("chromium")
pytestmark = [
    pytest.mark.real,
    pytest.mark.timeout(300),
    pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's chromium"),
]
AXE = (Path(__file__).parent.parent / "support" / "axe" / "axe.min.js").read_text()
START_S, ROUNDS_S = 120.0, 90.0
#: figures by name, the label of the progress bar, and the newest round's row
SHOWN = """() => [
    Object.fromEntries(
        [...document.querySelectorAll("[data-figure]")].map((one) => [one.dataset.figure, one.innerText])),
    document.querySelector("#progress-label").innerText,
    document.querySelector("#rounds tr").innerText,
]"""
PHONE = {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Of the page of a demo that has trained a few rounds, and goes on."""
    root = tmp_path_factory.mktemp("page")
    command = [sys.executable, "-m", "hypha.cli.hypha", "demo", "--workers", "2", "--rounds", "2000"]
    log = root / "demo.log"
    with log.open("wb") as output:
        demo = subprocess.Popen(
            [*command, "--dir", str(root / "demo"), "--output", str(root / "model")],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )
    try:
        mark = "The live page of the job: http://"
        ends = time.monotonic() + START_S
        while mark not in log.read_text():
            assert demo.poll() is None, log.read_text()
            assert time.monotonic() < ends, log.read_text()
            time.sleep(0.1)
        found = log.read_text().partition(mark)[2].partition("/")[0]
        while status(found)["round"] < 3:
            assert time.monotonic() < ends + ROUNDS_S, log.read_text()
            time.sleep(0.2)
        yield found
    finally:
        demo.terminate()
        demo.wait(30)


def status(address: str) -> dict[str, Any]:
    with urllib.request.urlopen(f"http://{address}/status", timeout=10) as answer:
        found: dict[str, Any] = json.load(answer)
        return found


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        # root needs it; the page is our own
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


class Visit:
    """A page that is open, what it asked the network for, and what its console said."""

    def __init__(self, browser: Browser, address: str, **options: Any) -> None:
        self.address = address
        self.asked: list[str] = []
        self.said: list[str] = []
        self.context: BrowserContext = browser.new_context(**options)
        self.context.route("**/*", self._route)
        self.page: Page = self.context.new_page()
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.goto(f"http://{address}/", wait_until="domcontentloaded")
        self.page.wait_for_selector("#rounds tr:nth-child(3)")

    def _route(self, route: Route) -> None:
        self.asked.append(route.request.url)
        if self.foreign(route.request.url):
            route.abort()
        else:
            route.continue_()

    def foreign(self, url: str) -> bool:
        return not url.startswith(f"http://{self.address}/")


@pytest.fixture
def visits(browser: Browser, address: str) -> Iterator[Any]:
    opened: list[Visit] = []

    def visit(**options: Any) -> Visit:
        opened.append(Visit(browser, address, **options))
        return opened[-1]

    yield visit
    for one in opened:
        one.context.close()
        # whatever a test does: nothing is asked of anybody else, and nothing is refused or broken
        assert [url for url in one.asked if one.foreign(url)] == []
        assert one.said == []


def test_the_numbers_are_the_schedulers(visits: Any, address: str) -> None:
    visit = visits()
    ends = time.monotonic() + ROUNDS_S
    while True:
        before = status(address)
        # all at one moment
        shown, label, row = visit.page.evaluate(SHOWN)
        after = status(address)
        # a round may end meanwhile, and the page is told half a second later
        same = before["round"] == after["round"] and label == f"Round {after['round']} of {after['rounds']}"
        if same and row.split()[0] == str(after["round"]):
            break
        assert time.monotonic() < ends, (label, row, after)
    assert {name: shown[name] for name in ("loss", "samples", "workers", "leases", "providers")} == {
        "loss": f"{after['loss']:.4f}",
        "samples": f"{after['samples']:,}",
        "workers": "2",
        "leases": "3",
        "providers": "1",
    }
    peers = sorted(f"{worker['name']} (…{worker['peer'][-8:]})" for worker in after["workers"])
    rows = visit.page.locator("#workers tr").all_inner_texts()
    assert sorted(row.partition("\t")[0] for row in rows) == peers
    assert all(one.startswith("worker-") for one in peers)
    assert visit.page.locator("#leases tr").count() == len(after["held"])
    assert visit.page.locator("#topology tr").count() == len(after["connections"])
    slices = visit.page.locator("#slices span:nth-child(3n)").all_inner_texts()
    assert sum(int(count) for count in slices) == sum(after["slices"].values())


def test_a_late_viewer_sees_all_rounds(visits: Any, address: str) -> None:
    rounds = status(address)["round"]
    visit = visits()
    numbers = [int(row.split()[0]) for row in visit.page.locator("#rounds tr").all_inner_texts()]
    assert len(numbers) >= min(rounds, 100)
    assert numbers == list(range(numbers[0], numbers[0] - len(numbers), -1))
    label = visit.page.get_attribute("#loss", "aria-label") or ""
    assert "2 workers" in label
    kinds = visit.page.evaluate("[...document.querySelectorAll('#timeline rect')].map((r) => r.classList[0])")
    assert {"training", "waiting", "outer-step"} <= set(kinds)


@pytest.mark.parametrize("options", [{}, {"color_scheme": "dark"}, {"viewport": PHONE}])
def test_axe_finds_nothing_serious(visits: Any, options: dict[str, Any]) -> None:
    visit = visits(**options)
    # through the debugger, as the page's policy lets in no script of ours
    visit.page.evaluate(f"{AXE}; undefined")
    found = visit.page.evaluate("axe.run()")
    assert found["passes"]
    grave = [
        (one["id"], one["impact"], [node["html"] for node in one["nodes"]][:3])
        for one in found["violations"]
        if one["impact"] in ("serious", "critical")
    ]
    assert grave == []


def test_the_keyboard_reaches_everything(visits: Any) -> None:
    visit = visits()
    reached: list[str] = []
    for _ in range(40):
        visit.page.keyboard.press("Tab")
        name = visit.page.evaluate(
            "(e => e.id || e.getAttribute('aria-labelledby') || e.closest('ul')?.id || e.className)"
            "(document.activeElement)"
        )
        if reached and name in ("", reached[0]):
            break
        reached.append(name)
    regions = ["workers-title", "leases-title", "topology-title", "rounds-title"]
    for wanted in ("skip", "theme", "loss-legend", "timeline-rounds", *regions):
        assert wanted in reached, reached
    theme = visit.page.locator("#theme")
    theme.focus()
    visit.page.keyboard.press("Enter")
    assert visit.page.get_attribute("html", "data-theme") == "dark"
    line = visit.page.locator("#loss-legend button").first
    line.focus()
    visit.page.keyboard.press("Space")
    assert line.get_attribute("aria-pressed") == "false"


def test_a_phone_needs_no_sideways_scrolling(visits: Any) -> None:
    visit = visits(viewport=PHONE, is_mobile=True, has_touch=True)
    width = visit.page.evaluate("document.documentElement.scrollWidth")
    assert width <= 390


def test_nothing_moves_for_who_wants_no_motion(visits: Any) -> None:
    visit = visits(reduced_motion="reduce")
    moving = visit.page.evaluate("document.getAnimations().length")
    assert moving == 0
    assert visits().page.evaluate("document.getAnimations().length") > 0
