"""The page in a real browser: `script/studio` started, Chromium driven, every request seen."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, BrowserContext, Page, Route, sync_playwright

PROJECT = Path(__file__).parent.parent.parent
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
PATIENCE_SECONDS = 180.0
"""For what takes seconds on a machine that does nothing else."""
PROMPT = "a red circle on a white background"


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@dataclass
class Studio:
    """A running page."""

    url: str
    root: Path
    temporary: Path
    process: subprocess.Popen[str]
    target: str = ""

    def runs(self) -> list[dict[str, Any]]:
        """The records of all kept runs, the oldest first."""
        return [json.loads((folder / "run.json").read_text()) for folder in self.folders()]

    def folders(self) -> list[Path]:
        return sorted(file.parent for file in self.root.glob("*/run.json"))

    def health(self) -> str:
        with urllib.request.urlopen(f"{self.target}/health-check", timeout=30) as answer:
            return str(json.load(answer)["status"])


@contextmanager
def studio(folder: Path, *arguments: str) -> Iterator[Studio]:
    """`script/studio` with its own server, or the one that the arguments name; ended as ctrl-C does."""
    port = free_port()
    temporary = folder / "temporary"
    temporary.mkdir(parents=True)
    environment = {**os.environ, "TMPDIR": str(temporary), "FLUX_CACHE_DIR": str(folder / "cache")}
    environment |= {"FLUX_CACHE_MIN_FREE_GB": "0"}
    command = [str(PROJECT / "script" / "studio"), "--port", str(port), "--folder", str(folder / "runs"), *arguments]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT, text=True)
    running = Studio(f"http://127.0.0.1:{port}", folder / "runs", temporary, process)
    try:
        until(lambda: answers(running.url) or process.poll() is not None, "the page answers")
        assert process.poll() is None, (folder / "log").read_text()
        printed = (folder / "log").read_text()
        running.target = next(word.rstrip(";") for word in printed.split() if word.startswith("http://127.0.0.1:"))
        yield running
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(PATIENCE_SECONDS)


def answers(url: str) -> bool:
    try:
        urllib.request.urlopen(url, timeout=30).close()
    except OSError:
        return False
    return True


def until(condition: Callable[[], Any], what: str, seconds: float = PATIENCE_SECONDS) -> float:
    """Wait until something is so, and return how long it took."""
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < seconds, f"not within {seconds:.0f} s: {what}"
        time.sleep(0.05)
    return time.monotonic() - started


@contextmanager
def chromium() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@dataclass
class Tab:
    """One browser tab with the page open."""

    page: Page
    studio: Studio
    requests: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def open(self, query: str = "") -> None:
        self.page.goto(self.studio.url + query)
        self.page.wait_for_selector("#run")
        self.page.wait_for_timeout(1000)

    def type(self, name: str, text: str) -> None:
        self.page.fill(f"#input-{name} :is(textarea, input:not([type=range]))", text)

    def choose(self, name: str, value: str) -> None:
        name = name if name.startswith("sweep-") else f"input-{name}"
        self.page.click(f"#{name} input")
        self.page.get_by_role("option", name=value, exact=True).click()

    def unfold(self, section: str) -> None:
        self.page.click(f"#section-{section} > button")
        self.page.wait_for_timeout(500)

    def quick(self, **more: str) -> None:
        """Fill in what makes an image fast."""
        self.type("prompt", PROMPT)
        self.choose("model", "schnell")
        self.type("num_inference_steps", more.pop("num_inference_steps", "4"))
        self.choose("megapixels", "0.25")
        for name, text in more.items():
            self.type(name, text)

    def run(self, button: str = "run") -> str:
        """Click, wait for the end and return what the page says then."""
        self.page.evaluate("document.querySelector('#message .message').dataset.before = 'yes'")
        self.page.click(f"#{button}")
        self.page.wait_for_selector("#message .message:not([data-before])")
        return self.ended()

    def ended(self) -> str:
        """Wait until nothing runs and return what the page says."""
        self.page.wait_for_timeout(300)
        self.page.wait_for_selector(".message:not(.running)")
        self.page.wait_for_selector("#run:not([disabled])")
        return self.message()

    def message(self) -> str:
        return str(self.page.inner_text("#message .message"))

    def give(self, name: str, file: Path) -> None:
        """Upload a file to a control, and wait until it is there."""
        self.page.set_input_files(f"#{name} input[type=file]", str(file))
        self.page.wait_for_selector(f"#{name} img")
        self.page.wait_for_selector("#input-mask .empty", state="detached")
        self.page.wait_for_timeout(2500)

    def paint(self) -> None:
        """One stroke across the middle of the mask's canvas."""
        canvas = self.page.locator("#input-mask canvas").first
        canvas.scroll_into_view_if_needed()
        box = canvas.bounding_box()
        assert box is not None
        x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        self.page.mouse.move(x - 20, y)
        self.page.mouse.down()
        self.page.mouse.move(x, y + 4, steps=6)
        self.page.mouse.move(x + 20, y, steps=6)
        self.page.mouse.up()
        self.page.wait_for_timeout(800)


@contextmanager
def tab(browser: Browser, studio: Studio, **options: Any) -> Iterator[Tab]:
    """A fresh tab; requests to other hosts are recorded and stopped."""
    context: BrowserContext = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
    context.set_default_timeout(PATIENCE_SECONDS * 1000)
    opened = Tab(context.new_page(), studio)

    def seen(route: Route) -> None:
        opened.requests.append(route.request.url)
        own = route.request.url.startswith(f"{studio.url}/")
        route.continue_() if own else route.abort()

    context.route("**/*", seen)
    opened.page.on("pageerror", lambda error: opened.errors.append(str(error)))
    opened.open()
    try:
        yield opened
    finally:
        context.close()
