"""Judge the embedded model over held-out prompts and draw its contact sheets: `python -m training.report`.

Writes the table in `engine/tiny/README.md` and the images under `docs/`. Takes about an hour on 2 cores; `--quick`
judges some 120 images, `--sheets` none.
"""

from __future__ import annotations

import argparse
import logging
import math
import random
import statistics
import textwrap
import time
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from engine.engine import Engine
from logs import configure_logging
from lora_loading.reading.adapter import LoraAdapter, Stack, read_adapter
from predict import Predictor
from request import GenerationRequest, Mode, Size
from training.judge import Verdict, judge
from training.world import Scene, Thing, draw_scene, held_out_scenes, place, prompt_of

logger = logging.getLogger("report")

PROJECT = Path(__file__).parent.parent
LORAS = PROJECT / "tests" / "data" / "loras"
HELD_OUT_SEED = 2026
TABLE_BEGINS, TABLE_ENDS = "<!-- table -->", "<!-- end of table -->"
STEPS = {"dev": 28, "schnell": 4}


@dataclass(frozen=True)
class Row:
    """One line of the table: a model at a size in a precision, and over how many held-out prompts."""

    model: str
    size: tuple[int, int]
    prompts: int
    go_fast: bool = False


ROWS = [
    Row(model, size, prompts)
    for model, many, few in (("dev", 200, 8), ("schnell", 200, 20))
    for size, prompts in (
        ((512, 512), many), ((256, 256), many), ((1024, 1024), few), ((1344, 768), few), ((768, 1344), few),
    )
] + [Row("dev", (256, 256), 50, go_fast=True), Row("schnell", (512, 512), 50, go_fast=True)]  # fmt: skip


def tiny_engine() -> Engine:
    """The engine of the tiny profile, without progress bars."""
    predictor = Predictor()
    predictor.setup()
    for precision in filter(None, (predictor.engine.exact, predictor.engine.fast)):
        for model in precision.models.values():
            for pipeline in model.pipelines.values():
                pipeline.set_progress_bar_config(disable=True)
    return predictor.engine


def make_image(
    engine: Engine, prompt: str, model: str, size: tuple[int, int], seed: int, stack: Stack = (), **given: Any
) -> Image.Image:
    """One image at the model's own number of steps and guidance 3."""
    request = GenerationRequest(
        prompt=prompt,
        mode=given.pop("mode", Mode.TXT2IMG),
        size=Size(*size),
        model=model,
        num_outputs=1,
        num_inference_steps=STEPS[model],
        guidance_scale=3.0,
        strength=given.pop("strength", 1.0),
        seed=seed,
        output_format="png",
        output_quality=80,
        **given,
    )
    return next(engine.generate(request, stack))


def verdicts(engine: Engine, row: Row, scenes: list[Scene]) -> tuple[list[Verdict], list[float]]:
    """The judge's verdict on each scene's image; for go_fast also their PSNR beside the exact images, in dB."""
    found, nearness = [], []
    for seed, scene in enumerate(scenes):
        shown = make_image(engine, prompt_of(scene), row.model, row.size, seed, go_fast=row.go_fast)
        found.append(judge(shown, scene))
        if row.go_fast:
            nearness.append(psnr(shown, make_image(engine, prompt_of(scene), row.model, row.size, seed)))
        if not all(astuple(found[-1])):
            logger.info("%s %dx%d: %s: %s", row.model, *row.size, prompt_of(scene), found[-1])
    return found, nearness


def psnr(a: Image.Image, b: Image.Image) -> float:
    """Peak signal-to-noise ratio of two images of one size in dB; infinite for equal ones."""
    error = float(np.square(np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)).mean())
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def share(flags: list[bool]) -> str:
    """How many of the flags are set, in per cent."""
    return f"{100 * sum(flags) / len(flags):.1f}" if flags else "-"


def quick_rows() -> list[Row]:
    """The rows of a few minutes: at most 24 prompts, and without dev's largest sizes."""
    small = [row for row in ROWS if row.model == "schnell" or max(row.size) <= 512]
    return [replace(row, prompts=24 if max(row.size) <= 512 else 8) for row in small]


def table(engine: Engine, rows: list[Row]) -> str:
    """The accuracy table as Markdown."""
    lines = [
        "| model | precision | size | prompts | background % | colour % | shape % | place % | both of two objects % "
        "| PSNR beside exact, dB: median, least |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        scenes = held_out_scenes(row.prompts, HELD_OUT_SEED)
        started = time.monotonic()
        found, nearness = verdicts(engine, row, scenes)
        columns = [share(list(column)) for column in zip(*map(astuple, found), strict=True)]
        pairs = [all(astuple(v)) for v, scene in zip(found, scenes, strict=True) if len(scene.things) == 2]
        near = f"{statistics.median(nearness):.1f}, {min(nearness):.1f}" if nearness else ""
        size, precision = f"{row.size[0]}x{row.size[1]}", "go_fast" if row.go_fast else "exact"
        cells = [f"tiny-{row.model}", precision, size, str(len(scenes)), *columns, share(pairs), near]
        lines.append(f"| {' | '.join(cells)} |")
        logger.info("%s in %.0f s", lines[-1], time.monotonic() - started)
    return "\n".join(lines) + "\n"


def write_table(lines: str) -> None:
    """Put the table between its two marks in the checkpoints' README."""
    page = PROJECT / "engine" / "tiny" / "README.md"
    before, _, rest = page.read_text().partition(TABLE_BEGINS)
    _, _, after = rest.partition(TABLE_ENDS)
    page.write_text(f"{before}{TABLE_BEGINS}\n\n{lines}\n{TABLE_ENDS}{after}")


def contact_sheet(images: list[tuple[str, Image.Image]], columns: int, side: int = 192) -> Image.Image:
    """Images in a grid, each with its caption below."""
    gap, caption = 8, 26
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * (side + gap) + gap, rows * (side + caption + gap) + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for index, (words, shown) in enumerate(images):
        x, y = gap + index % columns * (side + gap), gap + index // columns * (side + caption + gap)
        fitted = shown.copy()
        fitted.thumbnail((side, side), Image.Resampling.LANCZOS)
        sheet.paste(fitted, (x + (side - fitted.width) // 2, y + (side - fitted.height) // 2))
        draw.text((x, y + side + 1), textwrap.fill(words, 36), fill=(60, 60, 60), font_size=10)
    return sheet


def sheets(engine: Engine, folder: Path) -> None:
    """Write the contact sheets of both models and of the modes."""
    folder.mkdir(exist_ok=True)
    scenes = held_out_scenes(18, HELD_OUT_SEED)
    for model in STEPS:
        shown = [
            (prompt_of(s), make_image(engine, prompt_of(s), model, (512, 512), seed)) for seed, s in enumerate(scenes)
        ]
        contact_sheet(shown, 6).save(folder / f"tiny-{model}.webp", quality=85, method=6)
    contact_sheet(modes(engine), 6).save(folder / "modes.webp", quality=85, method=6)
    contact_sheet(loras(engine), 4, 224).save(folder / "loras.webp", quality=85, method=6)


def modes(engine: Engine) -> list[tuple[str, Image.Image]]:
    """An input, image to image at three strengths, a mask, and what is painted into it."""
    size = (512, 512)
    scene = Scene("white", (Thing("square", "blue"),))
    source = draw_scene(scene, *size, place(scene, *size, random.Random(1)))
    shown = [("the input image", source)]
    for strength in (0.5, 0.8, 0.95):
        prompt = "a red star on a yellow background"
        made = make_image(engine, prompt, "dev", size, 3, mode=Mode.IMG2IMG, image=source, strength=strength)
        shown.append((f"a red star on a yellow background, strength {strength}", made))
    mask = Image.new("L", size, 0)
    ImageDraw.Draw(mask).rectangle((96, 96, 416, 416), fill=255)
    prompt = "a red heart on a white background"
    made = make_image(engine, prompt, "dev", size, 3, mode=Mode.INPAINT, image=source, mask=mask, strength=1.0)
    return [*shown, ("the mask: white is repainted", mask.convert("RGB")), (prompt, made)]


def adapter(engine: Engine, model: str, name: str) -> LoraAdapter:
    """One of the two LoRAs of the tests: "style" or "object"."""
    return read_adapter(LORAS / f"tok-{name}.safetensors", engine.shapes(model))


def loras(engine: Engine) -> list[tuple[str, Image.Image]]:
    """Each model without a LoRA, with the style, the object, and both, on one seed."""
    shown = []
    for model in STEPS:
        for name, words in (
            ("no LoRA", "a red TOK on a white background"),
            ("style", "a large red circle on a white background"),
            ("object", "a red TOK on a white background"),
            ("style and object", "a red TOK on a white background"),
        ):
            stack = [(adapter(engine, model, part), 1.0) for part in ("style", "object") if part in name]
            made = make_image(engine, words, model, (512, 512), 3, stack)
            shown.append((f"tiny-{model}, {name}: {words}", made))
    return shown


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Judge the embedded model and draw its contact sheets.")
    parser.add_argument("--quick", action="store_true", help="judge a few prompts, and dev not at its largest sizes")
    parser.add_argument("--sheets", action="store_true", help="draw the sheets alone")
    arguments = parser.parse_args()
    configure_logging()
    engine = tiny_engine()
    sheets(engine, PROJECT / "docs")
    if not arguments.sheets:
        write_table(table(engine, quick_rows() if arguments.quick else ROWS))


if __name__ == "__main__":
    main()
