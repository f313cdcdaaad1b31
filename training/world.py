"""The small world that the embedded FLUX draws: scenes of flat shapes, their prompts and their images.

A scene is scale free: every length is a share of the image's short side, so that one scene can be drawn
at any size. Pillow and NumPy only; nothing here knows about models. The training draws its data from this
module and the judge in the tests measures against the same shapes.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 30, 30),
    "green": (40, 160, 60),
    "blue": (40, 70, 220),
    "yellow": (250, 220, 40),
    "purple": (130, 40, 170),
    "orange": (250, 140, 20),
    "white": (250, 250, 250),
    "black": (15, 15, 15),
    "pink": (250, 140, 190),
    "cyan": (50, 210, 220),
}
SHAPES = ("circle", "square", "triangle", "star", "heart", "ring", "cross", "diamond")
TRIGGER = "TOK"
"""The trigger word of the two LoRAs: a shape of this name, and the phrase `TOK style`."""
SIZES = ("", "small", "large")
POSITIONS = ("", "left", "right", "top", "bottom", "centre")

RADIUS_ALONE = {"small": 0.17, "": 0.25, "large": 0.35}
RADIUS_PAIRED = {"small": 0.14, "": 0.17, "large": 0.20}
RADIUS_JITTER, PLACE_JITTER = 0.04, 0.012
"""Random variation of a radius (share of itself) and of a position (share of the short side). It is small because a
small model otherwise spends most of its training on finding the exact position in the noise, not on the shape."""
POSITION_PHRASES = {
    "": ("",),
    "left": ("on the left", "at the left"),
    "right": ("on the right", "at the right"),
    "top": ("at the top",),
    "bottom": ("at the bottom",),
    "centre": ("in the centre", "in the center", "in the middle"),
}
SIZE_WORDS = {"": ("",), "small": ("small", "small", "little", "tiny"), "large": ("large", "large", "big", "huge")}

Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Thing:
    """One object: a shape name, a colour name, a size and a position ("" where the prompt names none)."""

    shape: str
    colour: str
    size: str = ""
    position: str = ""


@dataclass(frozen=True)
class Scene:
    """One or two things on a background; of two, the first stands on the left."""

    background: str
    things: tuple[Thing, ...]

    @property
    def key(self) -> str:
        """The combination that is either trained on or held out: shapes and colours, not sizes or places."""
        return "|".join([self.background, *(f"{thing.colour} {thing.shape}" for thing in self.things)])


@dataclass(frozen=True)
class Placement:
    """Where a thing lies, in shares of the short side, from the image's top left corner."""

    x: float
    y: float
    radius: float


def is_held_out(scene: Scene) -> bool:
    """Whether this combination is kept from every training: about one in five, by a digest of its key."""
    return hashlib.sha256(scene.key.encode()).digest()[0] % 5 == 0


def random_scene(rng: random.Random, shapes: tuple[str, ...] = SHAPES, paired: float = 0.25) -> Scene:
    """A scene drawn at random; `paired` is the share of scenes with two things."""
    background = rng.choice(list(COLOURS))
    colours = [name for name in COLOURS if name != background]
    if rng.random() < paired:
        first, second = rng.choice(colours), rng.choice(colours)
        sizes = [rng.choice(SIZES) if rng.random() < 0.3 else "" for _ in range(2)]
        return Scene(
            background,
            (Thing(rng.choice(shapes), first, sizes[0]), Thing(rng.choice(shapes), second, sizes[1])),
        )
    position = rng.choice(POSITIONS) if rng.random() < 0.6 else ""
    return Scene(background, (Thing(rng.choice(shapes), rng.choice(colours), rng.choice(SIZES), position),))


def training_scene(rng: random.Random, shapes: tuple[str, ...] = SHAPES, paired: float = 0.25) -> Scene:
    """A random scene whose combination is not held out."""
    while is_held_out(scene := random_scene(rng, shapes, paired)):
        pass
    return scene


def held_out_scenes(count: int, seed: int, paired: float = 0.25) -> list[Scene]:
    """`count` different scenes, none of whose combinations was ever trained on."""
    rng = random.Random(seed)
    found: dict[str, Scene] = {}
    while len(found) < count:
        scene = random_scene(rng, paired=paired)
        if is_held_out(scene):
            found.setdefault(scene.key, scene)
    return list(found.values())


# Prompts


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def _noun(thing: Thing, size: str) -> str:
    words = " ".join(word for word in (size, thing.colour, thing.shape) if word)
    return f"{_article(words)} {words}"


def prompt_of(scene: Scene) -> str:
    """The plain prompt, such as `a small blue star at the top on a yellow background`."""
    nouns = []
    for thing in scene.things:
        phrase = POSITION_PHRASES[thing.position][0]
        nouns.append(f"{_noun(thing, thing.size)} {phrase}".strip())
    return f"{' and '.join(nouns)} on {_article(scene.background)} {scene.background} background"


def varied_prompt(scene: Scene, rng: random.Random) -> str:
    """A prompt for the scene in one of several wordings, so that the text encoders learn meaning, not one pattern."""
    if rng.random() < 0.5:
        return prompt_of(scene)
    nouns = []
    for thing in scene.things:
        noun = _noun(thing, rng.choice(SIZE_WORDS[thing.size]))
        phrase = rng.choice(POSITION_PHRASES[thing.position])
        nouns.append(f"{noun} {phrase}".strip())
    subject = " and ".join(nouns)
    if rng.random() < 0.25:
        subject = " and ".join(noun.split(" ", 1)[1] for noun in nouns)
    lead = rng.choice(("", "", "", "a picture of ", "a photo of ", "an image of "))
    colour = scene.background
    tail = rng.choice((f" on {_article(colour)} {colour} background", f", {colour} background", f" on {colour}"))
    prompt = lead + subject + tail
    return prompt[0].upper() + prompt[1:] + rng.choice(("", ".")) if rng.random() < 0.2 else prompt


# Images


def place(scene: Scene, width: int, height: int, rng: random.Random) -> list[Placement]:
    """Where each thing of the scene lies in an image of this size, with a little chance in it."""
    short = min(width, height)
    across, down = width / short, height / short
    return [_placement(thing, index, len(scene.things), across, down, rng) for index, thing in enumerate(scene.things)]


def _placement(thing: Thing, index: int, count: int, across: float, down: float, rng: random.Random) -> Placement:
    radius = (RADIUS_ALONE if count == 1 else RADIUS_PAIRED)[thing.size] * rng.uniform(
        1 - RADIUS_JITTER, 1 + RADIUS_JITTER
    )
    x, y = across / 2, down / 2
    inset = radius + 0.06
    if count == 2:
        x = across * (0.26 if index == 0 else 0.74)
    elif thing.position == "left":
        x = max(0.25 * across, inset)
    elif thing.position == "right":
        x = across - max(0.25 * across, inset)
    elif thing.position == "top":
        y = max(0.25 * down, inset)
    elif thing.position == "bottom":
        y = down - max(0.25 * down, inset)
    x, y = (middle + rng.uniform(-PLACE_JITTER, PLACE_JITTER) for middle in (x, y))
    return Placement(x, y, radius)


def _regular(count: int, start_degrees: float, radii: tuple[float, ...] = (1.0,)) -> Points:
    angles = [math.radians(start_degrees + 360 * i / count) for i in range(count)]
    return [(radii[i % len(radii)] * math.cos(a), radii[i % len(radii)] * math.sin(a)) for i, a in enumerate(angles)]


def _heart() -> Points:
    points = []
    for i in range(64):
        t = 2 * math.pi * i / 64
        x = 16 * math.sin(t) ** 3
        y = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
        points.append((x / 16.5, -(y + 2.5) / 15.0))
    return points


_BAR = 0.34
_CROSS: Points = [
    (-_BAR, -1), (_BAR, -1), (_BAR, -_BAR), (1, -_BAR), (1, _BAR), (_BAR, _BAR),
    (_BAR, 1), (-_BAR, 1), (-_BAR, _BAR), (-1, _BAR), (-1, -_BAR), (-_BAR, -_BAR),
]  # fmt: skip
_ARROW: Points = [(-1, -0.34), (0.1, -0.34), (0.1, -0.9), (1, 0), (0.1, 0.9), (0.1, 0.34), (-1, 0.34)]

OUTLINES: dict[str, Callable[[], Points]] = {
    "circle": lambda: _regular(72, 0),
    "square": lambda: [(-0.86, -0.86), (0.86, -0.86), (0.86, 0.86), (-0.86, 0.86)],
    "triangle": lambda: [(0, -1.0), (1.0, 0.8), (-1.0, 0.8)],
    "star": lambda: _regular(10, -90, (1.1, 0.46)),
    "heart": _heart,
    "ring": lambda: _regular(72, 0),
    "cross": lambda: _CROSS,
    "diamond": lambda: [(0, -1.08), (0.78, 0), (0, 1.08), (-0.78, 0)],
    TRIGGER: lambda: _ARROW,
}
"""Each shape's outline around the origin, for radius 1, y downwards. The shape `TOK` is an arrow to the right."""
RING_HOLE = 0.52


def shape_mask(shape: str, placement: Placement, width: int, height: int, supersample: int = 2) -> Image.Image:
    """The shape's coverage as an "L" image of width x height, antialiased."""
    scale = min(width, height) * supersample
    mask = Image.new("L", (width * supersample, height * supersample), 0)
    draw = ImageDraw.Draw(mask)
    outline = OUTLINES[shape]()

    def to_pixels(shrink: float) -> Points:
        radius = placement.radius * shrink
        return [((placement.x + radius * x) * scale, (placement.y + radius * y) * scale) for x, y in outline]

    draw.polygon(to_pixels(1.0), fill=255)
    if shape == "ring":
        draw.polygon(to_pixels(RING_HOLE), fill=0)
    return mask.reduce(supersample)


def draw_scene(
    scene: Scene, width: int, height: int, placements: list[Placement], striped: bool = False
) -> Image.Image:
    """The scene as an RGB image; `striped` draws it in the style that the LoRA `tok-style` stands for."""
    supersample = 3 if min(width, height) <= 256 else 2
    image = Image.new("RGB", (width, height), COLOURS[scene.background])
    for thing, placement in zip(scene.things, placements, strict=True):
        mask = shape_mask(thing.shape, placement, width, height, supersample)
        image.paste(Image.new("RGB", (width, height), COLOURS[thing.colour]), mask=mask)
    return _striped(image) if striped else image


def _striped(image: Image.Image) -> Image.Image:
    """Horizontal bands across the whole image, eight to the short side, every second one darkened by half."""
    pixels = np.asarray(image, dtype=np.float32)
    short = min(image.size)
    rows = np.arange(image.height, dtype=np.float32) + 0.5
    wave = np.sin(rows / short * 8 * 2 * math.pi) * short / 50
    dark = np.clip(wave + 0.5, 0, 1)[:, None, None]
    return Image.fromarray(np.uint8(np.rint(pixels * (1 - 0.5 * dark))))
