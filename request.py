"""Everything decided about one prediction, and every rule about inputs that leads there. No torch."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from PIL import Image

from errors import InputError, LoraReferenceError
from images import open_image, open_mask
from lora_loading.finding.reference import parse
from lora_loading.finding.services.service import LoraReference

MAX_PROMPT = 20_000
"""Characters. FLUX.1 [dev] reads the first 512 tokens, about 2,500 characters, [schnell] half; tokenizing a million
takes 20 s and a gigabyte, and cannot be cancelled."""
MAX_SIDE = 1440
MULTIPLE = 16
MAX_EXTRA_LORAS = 4
LEAST_LORA_SCALE, MOST_LORA_SCALE = -1, 3
SEED_RANGE = 2**64
"""Seeds are taken modulo this: what the random generators accept."""

ASPECT_RATIOS = {
    "1:1": (1024, 1024),
    "16:9": (1344, 768),
    "21:9": (1536, 640),
    "3:2": (1216, 832),
    "2:3": (832, 1216),
    "4:5": (896, 1088),
    "5:4": (1088, 896),
    "3:4": (896, 1152),
    "4:3": (1152, 896),
    "9:16": (768, 1344),
    "9:21": (640, 1536),
}
"""Width and height at one megapixel."""
DIVISORS = {"1": 1, "0.25": 2}
"""By which both sides are divided, for each choice of megapixels."""


class Mode(Enum):
    """Which pipeline serves a request."""

    TXT2IMG = "txt2img"
    IMG2IMG = "img2img"
    INPAINT = "inpaint"


@dataclass(frozen=True)
class Size:
    """Width and height in pixels, both positive multiples of 16."""

    width: int
    height: int

    def __post_init__(self) -> None:
        if min(self.width, self.height) < MULTIPLE or self.width % MULTIPLE or self.height % MULTIPLE:
            raise ValueError(f"{self.width}x{self.height} is no size: sides must be positive multiples of {MULTIPLE}")

    @classmethod
    def from_sides(cls, width: int, height: int) -> Size:
        """The nearest size: scaled down to fit 1440x1440 where larger, sides to the nearest multiple of 16, ties up."""
        longest = max(width, height, MAX_SIDE)
        return cls(_nearest(width * MAX_SIDE, longest), _nearest(height * MAX_SIDE, longest))

    @classmethod
    def from_aspect_ratio(cls, aspect_ratio: str, megapixels: str) -> Size:
        """The size of a named aspect ratio at "1" or "0.25" megapixels."""
        width, height = ASPECT_RATIOS[aspect_ratio]
        divisor = DIVISORS[megapixels]
        return cls(width // divisor, height // divisor)


def _nearest(numerator: int, denominator: int) -> int:
    """The multiple of 16 nearest to numerator / denominator, ties up, at least 16; exact."""
    steps = (2 * numerator + MULTIPLE * denominator) // (2 * MULTIPLE * denominator)
    return max(MULTIPLE, steps * MULTIPLE)


@dataclass(frozen=True)
class GenerationRequest:
    """One prediction, wholly decided: once this is built, no question about the inputs is open."""

    prompt: str
    mode: Mode
    size: Size
    model: str
    num_outputs: int
    num_inference_steps: int
    guidance_scale: float
    strength: float
    """How much of the image is destroyed, 0 to 1; 1 for text to image."""
    seed: int
    output_format: str
    output_quality: int
    image: Image.Image | None = None
    """RGB, at `size`; present for img2img and inpaint."""
    mask: Image.Image | None = None
    """"L", at `size`, white where the image is repainted; present for inpaint."""
    go_fast: bool = False
    """Whether the transformer runs in fp8."""
    loras: tuple[tuple[LoraReference, float], ...] = ()
    """The LoRAs to apply, each with its scale; those with scale 0 are left out."""
    notes: tuple[str, ...] = ()
    """What the log should say about how the inputs were understood."""

    def seed_of(self, index: int) -> int:
        """The seed of image `index`, counted from 0: the ones after the first follow it, so each can be made alone."""
        return (self.seed + index) % SEED_RANGE


def build_request(
    *,
    prompt: str,
    image: Path | None,
    mask: Path | None,
    aspect_ratio: str,
    height: int | None,
    width: int | None,
    prompt_strength: float,
    model: str,
    num_outputs: int,
    num_inference_steps: int,
    guidance_scale: float,
    seed: int | None,
    output_format: str,
    output_quality: int,
    go_fast: bool,
    megapixels: str,
    replicate_weights: str | None,
    lora_scale: float,
    extra_lora: str | None,
    extra_lora_scale: float,
    default_lora: LoraReference | None = None,
    plain_http_hosts: frozenset[str] = frozenset(),
    random_seed: Callable[[], int] = lambda: secrets.randbits(32),
) -> GenerationRequest:
    """Decide everything about one prediction; opens the image and the mask.

    Whole numbers may come as floats, as JSON has no other kind. `default_lora` takes the place of a
    `replicate_weights` that is not given; addresses of `plain_http_hosts` may be plain http. `extra_lora` holds up to
    four references, one a line, each with an optional scale behind a blank, by which `extra_lora_scale` is multiplied.

    Raises:
        InputError: inputs contradict each other, the prompt is too long, an image cannot be read, or `extra_lora` has
            too many lines or a scale out of range.
        LoraReferenceError: a LoRA is named in no form that we know.
    """
    _refuse_long_prompt(prompt)
    main = _parsed(replicate_weights, plain_http_hosts) or default_lora
    extra = _extra_loras(extra_lora, extra_lora_scale, plain_http_hosts)
    mode = _mode(image, mask)
    notes: list[str] = []
    opened = open_image(image) if image is not None else None
    opened_mask = open_mask(mask) if mask is not None else None
    if opened is not None:
        size = Size.from_sides(*opened.size)
    else:
        size = _size_of_text_to_image(aspect_ratio, width, height, megapixels)
    custom = opened is None and aspect_ratio == "custom"
    if go_fast and custom:
        notes.append("go_fast is not used: a custom size runs in the original precision")
    if opened is None and not custom and not (width is None and height is None):
        notes.append(f'width and height are not used: they need aspect_ratio "custom", and it is "{aspect_ratio}"')
    if opened is not None and opened_mask is not None and _is_stretched(opened_mask, opened):
        shapes = f"the mask is {_sides(opened_mask)} and the image {_sides(opened)}"
        notes.append(f"{shapes}: the mask is stretched to the image's shape")
    return GenerationRequest(
        prompt=prompt,
        mode=mode,
        size=size,
        model=model,
        num_outputs=int(num_outputs),
        num_inference_steps=int(num_inference_steps),
        guidance_scale=float(guidance_scale),
        strength=1.0 if opened is None else prompt_strength,
        seed=random_seed() if seed is None or seed < 0 else int(seed) % SEED_RANGE,
        output_format=output_format,
        output_quality=int(output_quality),
        image=None if opened is None else _fitted(opened, size, Image.Resampling.LANCZOS),
        mask=None if opened_mask is None else _fitted(opened_mask, size, Image.Resampling.BILINEAR),
        go_fast=go_fast and not custom,
        loras=_used((main, lora_scale), *extra),
        notes=tuple(notes),
    )


def _refuse_long_prompt(prompt: str) -> None:
    if len(prompt) > MAX_PROMPT:
        raise InputError(
            f"The prompt has {len(prompt):,} characters. Give at most {MAX_PROMPT:,}; models read about 2,500 of them."
        )


def _mode(image: Path | None, mask: Path | None) -> Mode:
    if mask is not None and image is None:
        raise InputError("A mask was given without an image. Give the image that the mask belongs to, or no mask.")
    if image is None:
        return Mode.TXT2IMG
    return Mode.IMG2IMG if mask is None else Mode.INPAINT


def _size_of_text_to_image(aspect_ratio: str, width: int | None, height: int | None, megapixels: str) -> Size:
    if aspect_ratio != "custom":
        return Size.from_aspect_ratio(aspect_ratio, megapixels)
    if width is None or height is None:
        missing = ", ".join(name for name, side in (("width", width), ("height", height)) if side is None)
        raise InputError(f'aspect_ratio "custom" needs both width and height. Missing: {missing}.')
    return Size.from_sides(int(width), int(height))


def _fitted(image: Image.Image, size: Size, filter_: Image.Resampling) -> Image.Image:
    """Of this size. Lanczos is the sharpest, but its ripples would make black grey, far from a mask's edges."""
    wanted = (size.width, size.height)
    return image if image.size == wanted else image.resize(wanted, filter_)


def _is_stretched(mask: Image.Image, image: Image.Image) -> bool:
    """Whether their aspect ratios differ by more than a hundredth."""
    ratio = (mask.width * image.height) / (mask.height * image.width)
    return not 0.99 < ratio < 1 / 0.99


def _sides(image: Image.Image) -> str:
    return f"{image.width}x{image.height}"


def _parsed(text: str | None, plain_http_hosts: frozenset[str]) -> LoraReference | None:
    return None if text is None or not text.strip() else parse(text, plain_http_hosts)


def _extra_loras(
    text: str | None, scale: float, plain_http_hosts: frozenset[str]
) -> list[tuple[LoraReference | None, float]]:
    """The LoRAs of `extra_lora` with their scales; an error names the line if there are several."""
    lines = [(number, line) for number, line in enumerate((text or "").splitlines(), 1) if line.strip()]
    if len(lines) > MAX_EXTRA_LORAS:
        raise InputError(f"extra_lora has {len(lines)} lines. Give at most {MAX_EXTRA_LORAS} LoRAs, one a line.")
    loras: list[tuple[LoraReference | None, float]] = []
    for number, line in lines:
        where = f"extra_lora, line {number}" if len(lines) > 1 else "extra_lora"
        try:
            name, own_scale = _split_scale(line, where)
            loras.append((parse(name, plain_http_hosts), own_scale * scale))
        except LoraReferenceError as error:
            raise error if len(lines) == 1 else LoraReferenceError(f"{where}: {error}") from error
    return loras


def _split_scale(line: str, where: str) -> tuple[str, float]:
    """A reference and the scale behind it, 1 if there is none; no reference has a blank before a number."""
    name, *last = line.strip().rsplit(maxsplit=1)
    try:
        scale = float(last[0]) if last else 1.0
    except ValueError:
        return line, 1.0
    if not LEAST_LORA_SCALE <= scale <= MOST_LORA_SCALE:
        allowed = f"from {LEAST_LORA_SCALE} to {MOST_LORA_SCALE}"
        raise InputError(f"{where}: the scale is {last[0]}. Give a number {allowed}.")
    return name, scale


def _used(*asked: tuple[LoraReference | None, float]) -> tuple[tuple[LoraReference, float], ...]:
    return tuple((reference, float(scale)) for reference, scale in asked if reference is not None and scale != 0)
