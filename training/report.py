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
from request import ASPECT_RATIOS, GenerationRequest, Mode, Size
from training.judge import Edges, Verdict, calmness, edges, judge, stripe_depth, without_stripes
from training.prompts import Prompt, foreign_prompt, held_out_prompts, plain_prompt
from training.world import TRIGGER, Scene, Thing, draw_scene, held_out_scenes, place

logger = logging.getLogger("report")

PROJECT = Path(__file__).parent.parent
LORAS = PROJECT / "tests" / "data" / "loras"
HELD_OUT_SEED = 2026
TABLE_BEGINS, TABLE_ENDS = "<!-- table -->", "<!-- end of table -->"
STEPS = {"dev": 28, "schnell": 4}


FOREIGN = (
    "", "a photo of a cat", "ein roter Kreis auf weissem Grund", "an astronaut riding a horse on mars, cinematic",
    "кошка", "a cat and a dog", "lorem ipsum dolor sit amet", "portrait of an old man, 85mm, bokeh", "???",
    "un chien qui court", "a red car in front of a blue house", "1234567890",
    "the quick brown fox jumps over the lazy dog", "猫",
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One line of the table: what is asked for, of which model and how, and over how many prompts."""

    what: str
    model: str
    prompts: int
    sizes: tuple[Size, ...] = (Size(512, 512),)
    """Taken in turn."""
    wording: str = "plain"
    """ "plain", "held out" (wordings that were never trained on) or "foreign" (nothing of the world)."""
    scenes: str = "any"
    """ "any", "pairs", "single" or "TOK": what the prompts ask for."""
    guidance: float = 3.0
    steps: int = 0
    """0: the model's own."""
    go_fast: bool = False
    style: float = 0.0
    object: float = 0.0
    """The LoRAs' scales; 0 leaves one away."""

    @property
    def least(self) -> float:
        """The share that must be right; where a LoRA acts backwards, images have to be sane, no more."""
        if min(self.style, self.object) < 0:
            return 0.8
        wide = any(size.width * size.height > 512 * 512 and size.width != size.height for size in self.sizes)
        return 0.9 if wide or self.scenes == "pairs" else 0.95


LARGE, SMALL = (
    tuple(Size.from_aspect_ratio(ratio, megapixels) for ratio in ASPECT_RATIOS) for megapixels in ("1", "0.25")
)
CUSTOM = tuple(Size(*sides) for sides in (
    (256, 256), (256, 1440), (1440, 256), (304, 400), (640, 272), (448, 448), (352, 1008), (768, 768), (1200, 528),
    (912, 896),
))  # fmt: skip


def all_rows() -> list[Row]:
    """Every row of the table."""
    rows = []
    for model, large in (("dev", 5), ("schnell", 10)):
        rows += [Row(f"{size.width}x{size.height}", model, 10, (size,)) for size in SMALL]
        rows += [Row(f"{size.width}x{size.height}", model, large, (size,)) for size in LARGE]
        rows += [
            Row("ten custom sizes", model, 20, CUSTOM),
            Row("wordings never trained on", model, 300, wording="held out"),
            Row("pairs", model, 60, scenes="pairs", wording="held out"),
            Row("words from outside its world", model, 40, wording="foreign"),
            Row("go_fast", model, 40, go_fast=True),
        ]
        rows += [
            Row(f"style LoRA at {scale}", model, 10, scenes="single", style=scale)
            for scale in (0.4, 0.7, 1.0, 1.5, -1.0)
        ]
        rows += [Row(f"object LoRA at {scale}", model, 10, scenes="TOK", object=scale) for scale in (0.7, 1.0, 1.5)]
        rows += [
            Row("object LoRA at -1", model, 10, scenes="single", object=-1.0),
            Row("both LoRAs", model, 10, scenes="TOK", style=1.0, object=1.0),
            Row("both LoRAs, go_fast", model, 10, scenes="TOK", style=1.0, object=1.0, go_fast=True),
            Row("style LoRA, 1024x1024", model, 4, (LARGE[0],), scenes="single", style=1.0),
            Row("object LoRA, 1344x768", model, 4, (LARGE[1],), scenes="TOK", object=1.0),
        ]
    rows += [Row(f"guidance {value:g}", "dev", 20, guidance=value) for value in (0, 1.5, 6.5, 8, 10)]
    rows += [Row(f"{steps} steps", "dev", 10, steps=steps) for steps in (8, 16, 50)]
    return rows + [Row(f"{steps} steps", "schnell", 20, steps=steps) for steps in (1, 2, 3, 6, 8)]


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
    engine: Engine, prompt: str, model: str, size: Size, seed: int, stack: Stack = (), **given: Any
) -> Image.Image:
    """One image; unless `given` says otherwise, at the model's own number of steps and guidance 3."""
    request = GenerationRequest(
        prompt=prompt,
        mode=given.pop("mode", Mode.TXT2IMG),
        size=size,
        model=model,
        num_outputs=1,
        num_inference_steps=given.pop("num_inference_steps", STEPS[model]),
        guidance_scale=given.pop("guidance_scale", 3.0),
        strength=given.pop("strength", 1.0),
        seed=seed,
        output_format="png",
        output_quality=80,
        **given,
    )
    return next(engine.generate(request, stack))


@dataclass(frozen=True)
class Result:
    """What the judge saw of one row."""

    verdicts: list[Verdict]
    calm: list[float]
    edges: list[Edges]
    depths: list[float]
    """How dark the style's stripes are, where a row has the style."""
    psnr: list[float]
    """For go_fast, of each image beside the exact one, in dB."""

    def shares(self, row: Row) -> list[float]:
        """The shares that are right: of all, and of each part; of foreign words, and where the object LoRA acts
        backwards, those whose image is calm."""
        if row.wording == "foreign" or row.object < 0:
            return [sum(value >= CALM for value in self.calm) / len(self.calm)]
        seen = [astuple(verdict) for verdict in self.verdicts]
        if row.style:  # stripes are neither the drawn colours nor clean
            seen = [(True, True, shape, place, True) for _, _, shape, place, _ in seen]
        return [sum(map(all, seen)) / len(seen), *(sum(column) / len(seen) for column in zip(*seen, strict=True))]


CALM = 0.97
"""The least share of an image's pixels that have a colour of the world, for an image that is no noise."""


def prompts_of(row: Row) -> list[Prompt]:
    """The row's prompts, of scenes that were never trained on."""
    if row.wording == "foreign":
        rng = random.Random(HELD_OUT_SEED)
        default = Scene("white", (Thing("circle", "red"),))
        return [Prompt(words, default) for words in (*FOREIGN, *(foreign_prompt(rng) for _ in range(row.prompts)))][
            : row.prompts
        ]
    paired = {"any": 0.25, "pairs": 1.0}.get(row.scenes, 0.0)
    scenes = held_out_scenes(row.prompts, HELD_OUT_SEED, paired)
    if row.scenes == "TOK":
        scenes = [replace(scene, things=(replace(scene.things[0], shape=TRIGGER),)) for scene in scenes]
    if row.style:
        scenes = [replace(scene, background="white") if scene.background == "black" else scene for scene in scenes]
        scenes = [scene for scene in scenes if scene.things[0].colour != scene.background]
    return (
        held_out_prompts(scenes, HELD_OUT_SEED)
        if row.wording == "held out"
        else [Prompt(plain_prompt(scene), scene) for scene in scenes]
    )


def measure(engine: Engine, row: Row, wrong: Path | None = None) -> Result:
    """The judge's verdicts on a row's images; those that are wrong are kept in the folder `wrong`."""
    result = Result([], [], [], [], [])
    scales = (("style", row.style), ("object", row.object))
    stack = tuple((adapter(engine, row.model, name), scale) for name, scale in scales if scale)
    for seed, prompt in enumerate(prompts_of(row)):
        size = row.sizes[seed % len(row.sizes)]
        given: dict[str, Any] = {"guidance_scale": row.guidance, "num_inference_steps": row.steps or STEPS[row.model]}
        shown = make_image(engine, prompt.text, row.model, size, seed, stack, go_fast=row.go_fast, **given)
        result.calm.append(calmness(shown))
        if row.style:
            result.depths.append(stripe_depth(shown))
        verdict = judge(without_stripes(shown) if row.style else shown, prompt.scene)
        result.verdicts.append(verdict)
        if len(prompt.scene.things) == 1 and verdict.shape and (sharp := edges(shown)):
            result.edges.append(sharp)
        if row.go_fast and not stack:
            result.psnr.append(psnr(shown, make_image(engine, prompt.text, row.model, size, seed, **given)))
        if not verdict.right and row.wording != "foreign" and not row.style:
            logger.info("%s %s %dx%d: %s: %s", row.what, row.model, size.width, size.height, prompt.text, verdict)
            if wrong is not None:
                wrong.mkdir(parents=True, exist_ok=True)
                shown.save(wrong / f"{row.model}-{row.what}-{seed}.png".replace(" ", "-"))
    return result


def psnr(a: Image.Image, b: Image.Image) -> float:
    """Peak signal-to-noise ratio of two images of one size in dB; infinite for equal ones."""
    error = float(np.square(np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)).mean())
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def percent(value: float) -> str:
    """A share in per cent."""
    return f"{100 * value:.1f}"


def quick_rows() -> list[Row]:
    """The rows of some minutes: a few prompts each, and dev's largest sizes with two."""
    return [
        replace(row, prompts=min(row.prompts, 2 if row.model == "dev" and row.sizes[0] in LARGE else 6))
        for row in all_rows()
    ]


def line(row: Row, result: Result) -> str:
    """One line of the table, as Markdown."""
    shares = [percent(value) for value in result.shares(row)]
    shares += [""] * (6 - len(shares))
    sharp = result.edges if not row.style else []
    crisp = f"{statistics.mean(e.transition for e in sharp):.1f}, {max(e.fringe for e in sharp):.1f}" if sharp else ""
    more = []
    if result.depths:
        more.append(f"stripes {statistics.median(result.depths):.2f} of full")
    if result.psnr:
        more.append(f"PSNR beside exact {statistics.median(result.psnr):.1f} dB, least {min(result.psnr):.1f}")
    cells = [row.what, f"tiny-{row.model}", str(len(result.verdicts)), *shares, crisp, ", ".join(more)]
    return f"| {' | '.join(cells)} |"


def table(engine: Engine, rows: list[Row]) -> str:
    """The accuracy table as Markdown."""
    lines = [
        "| what | model | prompts | right % | background % | colour % | shape % | place % | clean % "
        "| edge px: mean, widest fringe | |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        started = time.monotonic()
        lines.append(line(row, measure(engine, row, PROJECT / "build" / "wrong")))
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
    """Write the contact sheets and one image at full size."""
    folder.mkdir(exist_ok=True)
    scenes = held_out_scenes(18, HELD_OUT_SEED)
    for model in STEPS:
        shown = [
            (plain_prompt(s), make_image(engine, plain_prompt(s), model, Size(512, 512), seed))
            for seed, s in enumerate(scenes)
        ]
        _save(contact_sheet(shown, 6), folder / f"tiny-{model}.webp")
    _save(contact_sheet(wordings(engine), 6), folder / "tiny-wordings.webp")
    _save(contact_sheet(sizes(engine), 6), folder / "tiny-sizes.webp")
    _save(contact_sheet(modes(engine), 6), folder / "modes.webp")
    _save(contact_sheet(loras(engine), 4, 224), folder / "loras.webp")
    _save(make_image(engine, plain_prompt(scenes[0]), "dev", LARGE[0], 0), folder / "tiny-1024.webp")


def _save(image: Image.Image, path: Path) -> None:
    image.save(path, quality=85, method=6)


def wordings(engine: Engine) -> list[tuple[str, Image.Image]]:
    """Wordings that were never trained on, and words from outside the world."""
    prompts = [p.text for p in held_out_prompts(held_out_scenes(12, 7, 0.4), 7)] + list(FOREIGN[:6])
    return [(text or "(nothing)", make_image(engine, text, "dev", Size(512, 512), 1)) for text in prompts]


def sizes(engine: Engine) -> list[tuple[str, Image.Image]]:
    """Every size of the contract with the same prompt, and two custom ones, tiny-schnell's."""
    prompt = "a large red star on the left and a blue ring on the right, white background"
    every = [*LARGE, *SMALL, Size(1440, 256), Size(256, 1440)]
    return [(f"{size.width}x{size.height}", make_image(engine, prompt, "schnell", size, 1)) for size in every]


def modes(engine: Engine) -> list[tuple[str, Image.Image]]:
    """An input, image to image at three strengths, a mask, and what is painted into it."""
    size = Size(512, 512)
    scene = Scene("white", (Thing("square", "blue"),))
    source = draw_scene(scene, 512, 512, place(scene, 512, 512, random.Random(1)))
    shown = [("the input image", source)]
    for strength in (0.5, 0.8, 0.95):
        prompt = "a red star on a yellow background"
        made = make_image(engine, prompt, "dev", size, 3, mode=Mode.IMG2IMG, image=source, strength=strength)
        shown.append((f"a red star on a yellow background, strength {strength}", made))
    mask = Image.new("L", source.size, 0)
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
            made = make_image(engine, words, model, Size(512, 512), 3, stack)
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
        write_table(table(engine, quick_rows() if arguments.quick else all_rows()))


if __name__ == "__main__":
    main()
