"""The small world that the embedded FLUX draws: one or two flat shapes on a plain background, and their images.

A scene is scale free: every length is a share of the image's short side, so that one scene can be drawn at any size.
Shapes are tables of signed distances, from which the drawing, the training's latents and the judge's templates are
computed alike. NumPy alone; nothing here knows about prompts' wordings (`training/prompts.py`) or about models.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image

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
ALL_SHAPES = (*SHAPES, TRIGGER)
SIZES = ("", "small", "large")
POSITIONS = ("", "left", "right", "top", "bottom", "centre", "top left", "top right", "bottom left", "bottom right")

RADIUS_ALONE = {"small": 0.17, "": 0.25, "large": 0.35}
RADIUS_PAIRED = {"small": 0.14, "": 0.17, "large": 0.20}
MARGIN = 0.06
"""The least distance of a thing from the border."""
PLACE_JITTER, RADIUS_JITTER = 0.004, 0.015
"""Random variation of a position (share of the short side) and of a radius (share of itself) at guidance 2. It must be
small: with 0.015 and 0.05 an edge's place stays open by a token until the last steps, and edges come out ragged."""

Floats = NDArray[np.float32]
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
    """One or two things on a background; of two, the first stands on the left or, `upright`, above the second."""

    background: str
    things: tuple[Thing, ...]
    upright: bool = False

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


# Scenes


def is_held_out(scene: Scene) -> bool:
    """Whether this combination is kept from every training: about one in five, by a digest of its key."""
    return hashlib.sha256(scene.key.encode()).digest()[0] % 5 == 0


def random_scene(rng: random.Random, shapes: tuple[str, ...] = SHAPES, paired: float = 0.4) -> Scene:
    """A scene drawn at random; `paired` is the share of scenes with two things."""
    background = rng.choice(list(COLOURS))
    colours = [name for name in COLOURS if name != background]
    count = 2 if rng.random() < paired else 1
    things = tuple(Thing(rng.choice(shapes), rng.choice(colours), _random_size(rng, count)) for _ in range(count))
    if count == 2:
        return Scene(background, things, upright=rng.random() < 0.4)
    position = rng.choice(POSITIONS[1:]) if rng.random() < 0.55 else ""
    return Scene(background, (Thing(things[0].shape, things[0].colour, things[0].size, position),))


def _random_size(rng: random.Random, count: int) -> str:
    return rng.choice(SIZES) if rng.random() < (1 if count == 1 else 0.3) else ""


def training_scene(rng: random.Random, shapes: tuple[str, ...] = SHAPES, paired: float = 0.4) -> Scene:
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


def looseness(guidance: float) -> float:
    """How much chance there is in places and radii at this guidance, 1 at 2: the higher it is, the less."""
    return 3 / (1 + guidance)


def place(scene: Scene, width: int, height: int, rng: random.Random, guidance: float = 2.0) -> list[Placement]:
    """Where each thing of the scene lies in an image of this size, with a little chance in it."""
    chance = looseness(guidance)
    placements = []
    for at in ideal_places(scene, width, height):
        dx, dy = (chance * rng.uniform(-PLACE_JITTER, PLACE_JITTER) for _ in range(2))
        grown = 1 + chance * rng.uniform(-RADIUS_JITTER, RADIUS_JITTER)
        placements.append(Placement(at.x + dx, at.y + dy, at.radius * grown))
    return placements


def ideal_places(scene: Scene, width: int, height: int) -> list[Placement]:
    """Where each thing of the scene lies in an image of this size, but for chance."""
    short = min(width, height)
    across, down = width / short, height / short
    radii = RADIUS_ALONE if len(scene.things) == 1 else RADIUS_PAIRED
    return [
        Placement(*_middle(scene, index, across, down, radii[thing.size]), radii[thing.size])
        for index, thing in enumerate(scene.things)
    ]


def _middle(scene: Scene, index: int, across: float, down: float, radius: float) -> tuple[float, float]:
    x, y = across / 2, down / 2
    if len(scene.things) == 2:
        share = 0.26 if index == 0 else 0.74
        return (x, share * down) if scene.upright else (share * across, y)
    words = scene.things[0].position.split()
    near_x, near_y = (max(0.25 * length, radius + MARGIN) for length in (across, down))
    if "left" in words or "right" in words:
        x = near_x if "left" in words else across - near_x
    if "top" in words or "bottom" in words:
        y = near_y if "top" in words else down - near_y
    return x, y


# Shapes


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
REACH, SIDE = 2.0, 401
"""The tables of signed distances cover [-REACH, REACH] in both directions with SIDE points."""


@cache
def distance_tables() -> Floats:
    """(shapes, SIDE, SIDE): signed distances to every shape of radius 1, rows downwards, negative inside."""
    axis = np.linspace(-REACH, REACH, SIDE)
    x, y = np.meshgrid(axis, axis)
    tables = []
    for shape in ALL_SHAPES:
        table = _to_polygon(x, y, OUTLINES[shape]())
        if shape == "ring":
            hole = _to_polygon(x, y, [(RING_HOLE * px, RING_HOLE * py) for px, py in OUTLINES[shape]()])
            table = np.maximum(table, -hole)
        tables.append(table)
    return np.asarray(tables, dtype=np.float32)


def _to_polygon(x: NDArray[np.float64], y: NDArray[np.float64], points: Points) -> NDArray[np.float64]:
    """The signed distance to a polygon: the least to its edges, negative where a ray crosses an odd number of them."""
    nearest, inside = np.full(x.shape, np.inf), np.zeros(x.shape, dtype=bool)
    for (ax, ay), (bx, by) in zip(points, points[1:] + points[:1], strict=True):
        dx, dy = bx - ax, by - ay
        along = np.clip(((x - ax) * dx + (y - ay) * dy) / (dx * dx + dy * dy), 0, 1)
        nearest = np.minimum(nearest, np.hypot(x - ax - along * dx, y - ay - along * dy))
        if dy != 0:
            inside ^= ((ay > y) != (by > y)) & (x < ax + (y - ay) / dy * dx)
    return np.where(inside, -nearest, nearest)


def distances(shape: NDArray[np.int64], x: Floats, y: Floats) -> Floats:
    """Signed distances at (x, y), in radii from a shape's middle, to the shapes with these indices of `ALL_SHAPES`.

    The three arrays broadcast. Between the tables' points they are interpolated, outside of the tables prolonged.
    """
    u, v = np.clip(x, -REACH, REACH), np.clip(y, -REACH, REACH)
    beyond = np.hypot(x - u, y - v)
    u, v = (u + REACH) * ((SIDE - 1) / (2 * REACH)), (v + REACH) * ((SIDE - 1) / (2 * REACH))
    column, row = (np.minimum(np.floor(value).astype(np.int64), SIDE - 2) for value in (u, v))
    u, v = (u - column).astype(np.float32), (v - row).astype(np.float32)
    flat = distance_tables().reshape(-1)
    start = (shape * SIDE + row) * SIDE + column
    upper = flat[start] * (1 - u) + flat[start + 1] * u
    lower = flat[start + SIDE] * (1 - u) + flat[start + SIDE + 1] * u
    return np.asarray(upper * (1 - v) + lower * v + beyond, dtype=np.float32)


def rough_distances(shape: NDArray[np.int64], x: Floats, y: Floats) -> Floats:
    """`distances` at the tables' nearest points, within 0.01: a quarter of the time."""
    u, v = np.clip(x, -REACH, REACH), np.clip(y, -REACH, REACH)
    column, row = ((value * ((SIDE - 1) / (2 * REACH)) + (SIDE / 2)).astype(np.int32) for value in (u, v))
    near = distance_tables().reshape(-1)[(shape * SIDE + row) * SIDE + column]
    return np.asarray(near + np.abs(x - u) + np.abs(y - v), dtype=np.float32)


# Images


def coverage(shape: str, placement: Placement, width: int, height: int) -> Floats:
    """(height, width): how much of each pixel the shape covers."""
    short = min(width, height)
    x, y = (
        (((np.arange(side) + 0.5) / short - middle) / placement.radius).astype(np.float32)
        for side, middle in ((width, placement.x), (height, placement.y))
    )
    apart = distances(np.asarray(ALL_SHAPES.index(shape)), x[None, :], y[:, None])
    return np.asarray(np.clip(0.5 - apart * placement.radius * short, 0, 1))


def draw_scene(
    scene: Scene, width: int, height: int, placements: list[Placement], striped: bool = False
) -> Image.Image:
    """The scene as an RGB image; `striped` draws it in the style that the LoRA `tok-style` stands for."""
    pixels = np.empty((height, width, 3), dtype=np.float32)
    pixels[:] = COLOURS[scene.background]
    for thing, placement in zip(scene.things, placements, strict=True):
        covered = coverage(thing.shape, placement, width, height)[..., None]
        pixels += covered * (np.asarray(COLOURS[thing.colour], dtype=np.float32) - pixels)
    if striped:
        pixels *= stripes(np.arange(height, dtype=np.float32) + 0.5)[:, None, None]
    return Image.fromarray(np.uint8(np.rint(pixels)))


STRIPES = 16
"""Pixels from one dark band to the next: a token, so that each looks alike. Bands whose place depends on the image's
sides, eight to the short one, were more than a small LoRA learns in its minutes: it drew none."""
STRIPE_SHADE = 0.5


def stripes(rows: Floats) -> Floats:
    """What the style multiplies the colours by at these rows, in pixels: horizontal bands across the whole image, every
    second one darkened by half."""
    wave = np.sin(rows * (2 * math.pi / STRIPES)) * STRIPES / (2 * math.pi)
    return np.asarray(1 - STRIPE_SHADE * np.clip(wave + 0.5, 0, 1), dtype=np.float32)
