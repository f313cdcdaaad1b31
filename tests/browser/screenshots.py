"""The images of the documentation: `script/test-studio --screenshots` drives the page as its tests do."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser

from tests.browser.desk import PROJECT, Studio, Tab, chromium, studio, tab

DOCS = PROJECT / "docs"
SCENE = "a large red circle on a white background"


def shot(opened: Tab, name: str) -> None:
    """Write what the tab shows to docs/<name>.webp."""
    opened.page.wait_for_timeout(1500)
    with tempfile.TemporaryDirectory() as folder:
        opened.page.screenshot(path=Path(folder) / "shot.png", timeout=180_000)
        with Image.open(Path(folder) / "shot.png") as image:
            image.convert("RGB").save(DOCS / f"{name}.webp", quality=80, method=6)
    sys.stdout.write(f"docs/{name}.webp\n")


def take(browser: Browser, running: Studio) -> None:
    """Take all screenshots."""
    with tab(browser, running, viewport={"width": 1280, "height": 1000}) as opened:
        opened.quick(seed="7")
        opened.type("prompt", SCENE)
        opened.choose("model", "dev")
        opened.unfold("sweep")
        opened.choose("sweep-input", "guidance_scale")
        opened.page.fill("#sweep-values :is(textarea, input)", "0, 1, 3, 6")
        opened.type("num_inference_steps", "12")
        opened.run("sweep")
        opened.page.evaluate("window.scrollTo(0, 0)")
        shot(opened, "studio")
        for position, side in ((3, "left"), (0, "right")):
            opened.page.locator("#history .grid-container button").nth(position).click()
            opened.page.wait_for_timeout(1500)
            opened.page.click(f"#{side}")
            opened.page.wait_for_selector(f"#compare-{side} img")
        opened.page.locator("#differences").scroll_into_view_if_needed()
        shot(opened, "studio-compare")
    with tab(browser, running, viewport={"width": 1280, "height": 1000}) as opened:
        opened.quick(seed="7")
        opened.type("prompt", "a red square on a white background")
        opened.unfold("image")
        opened.give("input-image", PROJECT / "examples" / "photo.jpg")
        opened.paint()
        opened.run()
        opened.page.evaluate("window.scrollTo(0, 0)")
        shot(opened, "studio-mask")
    with tab(browser, running, viewport={"width": 390, "height": 800}, color_scheme="dark") as opened:
        shot(opened, "studio-narrow")


def main() -> None:
    """Start the page and write the images."""
    with tempfile.TemporaryDirectory() as folder, chromium() as browser, studio(Path(folder) / "desk") as running:
        take(browser, running)


if __name__ == "__main__":
    main()
