"""What people do with the page, in Chromium: `script/test-studio`. In the project's own environment it is skipped."""

from __future__ import annotations

import http.server
import json
import logging
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("playwright.sync_api", reason="playwright is not in this environment: run script/test-studio")

from axe_playwright_python.sync_playwright import Axe
from PIL import Image, ImageChops
from playwright.sync_api import Browser

from tests.browser.desk import CHROMIUM, PROJECT, Studio, Tab, chromium, studio, tab, until

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium, or name one in CHROMIUM"),
]
logger = logging.getLogger(__name__)
LORAS = PROJECT / "tests" / "data" / "loras"
RULES = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa"]
GRADIOS_OWN: dict[str, str] = {}
"""Serious findings in parts of Gradio that the page cannot reach: the rule and why."""


@pytest.fixture(scope="session")
def page_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Studio]:
    with studio(tmp_path_factory.mktemp("studio")) as running:
        yield running


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    with chromium() as running:
        yield running


@pytest.fixture
def opened(browser: Browser, page_server: Studio) -> Iterator[Tab]:
    with tab(browser, page_server) as one:
        yield one
    assert [url for url in one.requests if not url.startswith((page_server.url, "data:", "blob:"))] == []
    assert one.errors == []
    until(lambda: page_server.health() == "READY", "the slot is free")


def photograph(path: Path, size: tuple[int, int], **options: Any) -> Path:
    """A photograph as far as pixels go: no two places are alike, and it is quickly encoded."""
    Image.effect_noise((size[0] // 8, size[1] // 8), 80).resize(size).convert("RGB").save(path, **options)
    return path


def mask_of_the_last_run(running: Studio) -> Image.Image:
    return Image.open(running.folders()[-1] / "mask.png")


def test_the_first_minute(opened: Tab, page_server: Studio) -> None:
    opened.type("prompt", "a large red circle on a white background")
    opened.choose("model", "schnell")
    opened.type("num_inference_steps", "4")
    assert opened.run().startswith("1 image in ")
    opened.page.wait_for_selector("#images img")
    run = page_server.runs()[-1]
    assert run["inputs"]["prompt"] == "a large red circle on a white background"
    assert str(run["inputs"]["seed"]) in opened.message()


def test_progress_is_shown_step_by_step_and_two_clicks_start_one_run(opened: Tab, page_server: Studio) -> None:
    before = len(page_server.folders())
    opened.quick(num_inference_steps="30")
    opened.page.evaluate("for (let i = 0; i < 2; i++) document.querySelector('#run').click()")
    seen: set[str] = set()

    def ended() -> bool:
        seen.add(opened.message())
        return opened.message().startswith("1 image in")

    until(ended, "an end")
    assert len({message for message in seen if message.startswith("Step ")}) > 1, seen
    opened.ended()
    assert len(page_server.folders()) == before + 1


@pytest.mark.parametrize("size", [(1024, 1024), (1344, 768), (2000, 3000)])
def test_a_painted_mask_has_the_upright_images_size(
    opened: Tab, page_server: Studio, tmp_path: Path, size: tuple[int, int]
) -> None:
    exif = Image.Exif()
    if size == (2000, 3000):
        exif[0x0112] = 6
    stored = size if not exif else (size[1], size[0])
    opened.quick(num_inference_steps="1")
    opened.choose("output_format", "png")
    opened.unfold("image")
    opened.give("input-image", photograph(tmp_path / "photo.png", stored, exif=exif))
    opened.paint()
    assert opened.run().startswith("1 image in "), opened.message()
    mask = mask_of_the_last_run(page_server)
    assert (mask.size, mask.mode) == (size, "L")
    assert sorted(set(mask.tobytes())) == [0, 255]
    made = Image.open(page_server.folders()[-1] / "0.png").convert("RGB")
    if made.size == size:
        changed = ImageChops.difference(made, Image.open(tmp_path / "photo.png").convert("RGB"))
        unpainted = ImageChops.invert(mask)
        assert ImageChops.multiply(changed, Image.merge("RGB", [unpainted] * 3)).getbbox() is None
        assert changed.getbbox() is not None


def test_strokes_are_undone_cleared_and_uploaded(opened: Tab, page_server: Studio, tmp_path: Path) -> None:
    photo = photograph(tmp_path / "photo.png", (512, 512))
    drawn = Image.new("L", (512, 512))
    drawn.paste(255, (100, 120, 300, 200))
    drawn.save(tmp_path / "drawn.png")
    opened.quick(num_inference_steps="1")
    opened.unfold("image")
    opened.give("input-image", photo)
    opened.paint()
    opened.page.get_by_role("button", name="Undo").click()
    opened.run()
    assert "mask" not in page_server.runs()[-1]["inputs"]
    opened.paint()
    opened.page.click("#clear-mask")
    opened.page.wait_for_timeout(1500)
    opened.run()
    assert "mask" not in page_server.runs()[-1]["inputs"]
    opened.page.set_input_files('[data-testid="Upload a mask-upload-button"]', tmp_path / "drawn.png")
    opened.page.wait_for_timeout(2500)
    opened.run()
    assert ImageChops.difference(mask_of_the_last_run(page_server), drawn).getbbox() is None


def test_loras_are_mixed(opened: Tab, page_server: Studio) -> None:
    opened.quick()
    opened.unfold("loras")
    for name, file in (("replicate_weights", "tok-style"), ("extra_lora", "tok-object")):
        opened.type(name, f"@{LORAS / file}.safetensors")
    opened.type("extra_lora_scale", "0.5")
    message = opened.run()
    assert message.count("LoRA ") == 2, message
    assert "scale 0.5" in message


def test_a_cancel_frees_the_slot(opened: Tab, page_server: Studio) -> None:
    opened.type("prompt", "a blue star on a yellow background")
    opened.type("num_outputs", "4")
    opened.page.click("#run")
    until(lambda: "of 28" in opened.message(), "a step")
    opened.page.click("#cancel")
    clicked = time.monotonic()
    until(lambda: page_server.health() == "READY", "the slot is free")
    logger.info("slot free %.1f s after the click", time.monotonic() - clicked)
    assert opened.ended() == "Cancelled."


def test_closing_the_tab_frees_the_slot(browser: Browser, page_server: Studio) -> None:
    with tab(browser, page_server) as closing:
        closing.type("prompt", "a blue star on a yellow background")
        closing.type("num_outputs", "4")
        closing.page.click("#run")
        until(lambda: "of 28" in closing.message(), "a step")
    seconds = until(lambda: page_server.health() == "READY", "the slot is free")
    logger.info("slot free %.1f s after the tab closed", seconds)


def test_what_the_server_refuses_marks_its_field(opened: Tab) -> None:
    opened.quick(seed="seven")
    assert 'seed: "seven" is not of type' in opened.run()
    assert opened.page.locator("#input-seed.refused").count() == 1
    opened.type("seed", "7")
    assert "seed 7" in opened.run()
    assert opened.page.locator(".refused").count() == 0


def test_a_failure_is_said_in_words(opened: Tab) -> None:
    opened.quick()
    opened.unfold("loras")
    opened.type("replicate_weights", "nonsense")
    assert opened.run().startswith('Cannot read LoRA "nonsense"')
    assert opened.page.locator(".message.error").count() == 1


def test_runs_survive_a_reload_and_are_compared(opened: Tab, page_server: Studio) -> None:
    opened.quick(seed="1")
    opened.unfold("sweep")
    opened.type("prompt", "a green heart on a white background")
    opened.page.fill("#sweep-values textarea, #sweep-values input", "11, 12")
    assert "seed 12" in opened.run("sweep")
    assert opened.page.locator("#images img").count() == 2
    opened.open()
    opened.page.wait_for_selector("#history img")
    thumbnails = opened.page.locator("#history .grid-container button")
    for position, side in ((0, "right"), (1, "left")):
        thumbnails.nth(position).click()
        until(lambda at=position: str(12 - at) in opened.page.inner_text("#facts"), "the facts")  # type: ignore[misc]
        opened.page.click(f"#{side}")
        opened.page.wait_for_selector(f"#compare-{side} img")
    until(lambda: "11" in opened.page.inner_text("#differences"), "the differences")
    assert opened.page.inner_text("#differences").split() == ["input", "left", "right", "seed", "11", "12"]
    opened.page.click("#again")
    until(lambda: opened.page.input_value("#input-seed :is(textarea, input)") == "11", "the seed in the form")
    assert opened.page.input_value("#input-prompt textarea") == "a green heart on a white background"
    opened.page.get_by_role("tab", name="Copy as a program").click()
    assert "green heart" in opened.page.inner_text("#copy-curl")
    opened.page.click("#use")
    opened.unfold("image")
    opened.page.wait_for_selector("#input-image img")


def test_a_token_is_sent_and_kept_nowhere(opened: Tab, page_server: Studio) -> None:
    opened.quick()
    opened.unfold("tokens")
    opened.type("hf_api_token", "hf_secret123")
    opened.run()
    assert page_server.runs()[-1]["secrets"] == ["hf_api_token"]
    files = [file for file in page_server.root.rglob("*") if file.is_file()]
    assert not any(b"hf_secret123" in file.read_bytes() for file in files)
    opened.page.get_by_role("tab", name="Copy as a program").click()
    assert "$HF_API_TOKEN" in opened.page.inner_text("#copy-curl")
    assert "hf_secret123" not in opened.page.inner_text("body")


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_no_rule_of_wcag_aa_is_broken_seriously(opened: Tab, theme: str) -> None:
    opened.open(f"?__theme={theme}")
    for section in ("image", "loras", "tokens", "sweep"):
        opened.unfold(section)
    found = Axe().run(opened.page, options={"runOnly": RULES}).response["violations"]
    serious = {
        rule["id"]: [node["html"][:200] for node in rule["nodes"]]
        for rule in found
        if rule["impact"] in ("serious", "critical") and rule["id"] not in GRADIOS_OWN
    }
    assert serious == {}, json.dumps(serious, indent=1)


def test_a_narrow_window_needs_no_sideways_scrolling(browser: Browser, page_server: Studio) -> None:
    with tab(browser, page_server, viewport={"width": 390, "height": 800}) as narrow:
        for section in ("image", "loras", "tokens", "sweep"):
            narrow.unfold(section)
        assert narrow.page.evaluate("document.documentElement.scrollWidth") <= 390


def test_a_page_of_another_origin_is_refused(browser: Browser, page_server: Studio) -> None:
    html = b"<!doctype html><title>elsewhere</title>"

    class Elsewhere(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(html)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Elsewhere)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    page = browser.new_page()
    statuses: list[tuple[str, int]] = []
    page.on("response", lambda answer: statuses.append((answer.url, answer.status)))
    page.goto(f"http://127.0.0.1:{server.server_port}")
    page.evaluate(
        """async (url) => {
            const body = JSON.stringify({data: [], fn_index: 0, session_hash: "x"});
            for (const [path, more] of [["/", {}], ["/config", {}],
                ["/gradio_api/queue/join", {method: "POST", body}], ["/gradio_api/upload", {method: "POST", body}]])
                await fetch(url + path, {mode: "no-cors", ...more}).catch(() => 0);
            const frame = document.body.appendChild(document.createElement("iframe"));
            frame.src = url;
            await new Promise(done => { frame.onload = frame.onerror = done; setTimeout(done, 3000); });
        }""",
        page_server.url,
    )
    own = [(url, status) for url, status in statuses if url.startswith(page_server.url)]
    assert len(own) >= 4
    assert {status for _, status in own} == {403}
    page.close()
    server.shutdown()
    server.server_close()


def test_a_vanished_server_is_said_and_nothing_is_left(browser: Browser, tmp_path: Path) -> None:
    with studio(tmp_path) as own:
        target = own.target
        with studio(tmp_path / "second", "--target", target) as other, tab(browser, other) as one:
            assert list(other.temporary.iterdir()) != []
            one.quick()
            own.process.terminate()
            own.process.wait(60)
            assert one.run().startswith(f"No server answers at {target}")
        assert list(other.temporary.iterdir()) == []
    assert list(own.temporary.iterdir()) == []
