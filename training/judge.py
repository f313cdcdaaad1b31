"""A judge of the tiny world's images: colours, shapes, places, cleanliness, and how crisp the edges are.

It looks at pixels alone. The background is the median colour of the border; an object is what differs from it; its
shape is the one whose drawn mask, cropped and scaled alike, has the highest intersection over union; its place is right
when its box is that of the drawn scene; and an image is clean when nothing else is in it.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from training.world import (
    ALL_SHAPES,
    COLOURS,
    STRIPE_SHADE,
    STRIPES,
    Floats,
    Placement,
    Scene,
    coverage,
    ideal_places,
    stripes,
)

GRID = 64
DIFFERENT = 60.0
"""A pixel further than this from the background's colour, in RGB distance, belongs to an object."""
COLOUR_TOLERANCE = 20
"""Of 255, in each channel."""
BOX_TOLERANCE = 0.05
"""In shares of the short side, for each side of an object's box."""
STRAY_TOLERANCE = 0.003
"""The area of what belongs to no object, as a share of the objects' area."""
BLOCK = 4
"""Pixels: patches that are nearer to each other than this are one."""

Mask = NDArray[np.bool_]
Pixels = NDArray[np.float64]
Box = tuple[int, int, int, int]
"""First row, last row, first column, last column."""


@dataclass(frozen=True)
class Seen:
    """One object as the judge sees it: the largest patch of its part of the image."""

    colour: tuple[float, float, float]
    shape: str
    box: Box
    stray: int
    """Pixels of the part's other patches."""
    area: int

    @property
    def colour_name(self) -> str:
        """The name of the world's colour that is nearest."""
        return nearest_colour(np.asarray(self.colour))


@dataclass(frozen=True)
class Verdict:
    """Which parts of a prompt an image shows; for two objects, both must be right."""

    background: bool
    colour: bool
    shape: bool
    place: bool
    clean: bool

    @property
    def right(self) -> bool:
        """Whether all is."""
        return all(astuple(self))


def pixels_of(image: Image.Image) -> Pixels:
    """(H, W, 3) from 0 to 255."""
    return np.asarray(image.convert("RGB"), dtype=np.float64)


def nearest_colour(rgb: Pixels) -> str:
    """The name of the world's colour that is nearest in RGB."""
    return min(COLOURS, key=lambda name: float(np.linalg.norm(rgb - np.array(COLOURS[name]))))


def background_of(pixels: Pixels) -> Pixels:
    """The median colour of the outermost thirtieth of the image."""
    edge = max(2, min(pixels.shape[:2]) // 30)
    border = [pixels[:edge], pixels[-edge:], pixels[:, :edge].swapaxes(0, 1), pixels[:, -edge:].swapaxes(0, 1)]
    return np.asarray(np.median(np.concatenate([part.reshape(-1, 3) for part in border]), axis=0))


def object_mask(pixels: Pixels, background: Pixels) -> Mask:
    """Where the image differs from its background."""
    return np.asarray(np.linalg.norm(pixels - background, axis=-1) > DIFFERENT)


def patches(mask: Mask) -> list[Mask]:
    """The connected parts of the mask, the largest first."""
    rows, columns = -(-mask.shape[0] // BLOCK), -(-mask.shape[1] // BLOCK)
    padded = np.pad(mask, ((0, rows * BLOCK - mask.shape[0]), (0, columns * BLOCK - mask.shape[1])))
    coarse = padded.reshape(rows, BLOCK, columns, BLOCK).any((1, 3))
    left = set(map(tuple, np.argwhere(coarse)))
    parts = []
    while left:
        part, border = np.zeros(coarse.shape, dtype=bool), [left.pop()]
        while border:
            row, column = border.pop()
            part[row, column] = True
            near = {(row + i, column + j) for i in (-1, 0, 1) for j in (-1, 0, 1)} & left
            left -= near
            border += near
        fine = part.repeat(BLOCK, 0).repeat(BLOCK, 1)[: mask.shape[0], : mask.shape[1]]
        parts.append(mask & fine)
    return sorted(parts, key=np.count_nonzero, reverse=True)


def box_of(mask: Mask) -> Box:
    """The box around a mask that is not empty."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return int(rows[0]), int(rows[-1]), int(columns[0]), int(columns[-1])


def crop(mask: Mask) -> Mask:
    """The mask's box in a square, scaled to 64x64."""
    top, bottom, left, right = box_of(mask)
    part = mask[top : bottom + 1, left : right + 1]
    side = max(part.shape)
    square = np.zeros((side, side), dtype=bool)
    top, left = (side - part.shape[0]) // 2, (side - part.shape[1]) // 2
    square[top : top + part.shape[0], left : left + part.shape[1]] = part
    image = Image.fromarray(np.uint8(square) * 255).resize((GRID, GRID), Image.Resampling.BOX)
    return np.asarray(image) > 127


@cache
def template(shape: str) -> Mask:
    """A drawn shape, cropped and scaled as the seen ones are."""
    return crop(np.asarray(coverage(shape, Placement(0.5, 0.5, 0.4), 256, 256) > 0.5))


def shape_scores(mask: Mask) -> dict[str, float]:
    """Intersection over union of a 64x64 crop with each shape's template."""
    return {shape: float((mask & template(shape)).sum() / (mask | template(shape)).sum()) for shape in ALL_SHAPES}


def look(image: Image.Image, things: int, upright: bool = False) -> tuple[Pixels, list[Seen | None]]:
    """The background's colour and the objects, each looked for in its own half where there are two."""
    pixels = pixels_of(image)
    background = background_of(pixels)
    mask = object_mask(pixels, background)
    parts = [mask]
    if things == 2:
        first = np.zeros_like(mask)
        if upright:
            first[: mask.shape[0] // 2] = True
        else:
            first[:, : mask.shape[1] // 2] = True
        parts = [mask & first, mask & ~first]
    return background, [_seen(pixels, part) for part in parts]


def _seen(pixels: Pixels, mask: Mask) -> Seen | None:
    found = patches(mask)
    if not found or found[0].sum() < 30:
        return None
    scores = shape_scores(crop(found[0]))
    red, green, blue = np.median(pixels[found[0]], axis=0)
    area = int(found[0].sum())
    stray = int(mask.sum()) - area
    return Seen((red, green, blue), max(scores, key=scores.__getitem__), box_of(found[0]), stray, area)


def judge(image: Image.Image, scene: Scene) -> Verdict:
    """Whether an image shows a scene: all of its objects must be right for a part to count."""
    background, seen = look(image, len(scene.things), scene.upright)
    found = [thing for thing in seen if thing is not None]
    if len(found) < len(scene.things):
        return Verdict(_is_colour(background, scene.background), False, False, False, False)
    pairs = list(zip(scene.things, found, strict=True))
    return Verdict(
        background=_is_colour(background, scene.background),
        colour=all(_is_colour(np.asarray(one.colour), thing.colour) for thing, one in pairs),
        shape=all(one.shape == thing.shape for thing, one in pairs),
        place=all(_is_at(one.box, box, min(image.size)) for one, box in zip(found, _boxes(scene, image), strict=True)),
        clean=sum(one.stray for one in found) <= STRAY_TOLERANCE * sum(one.area for one in found),
    )


def _is_colour(rgb: Pixels, name: str) -> bool:
    return bool(np.abs(rgb - np.asarray(COLOURS[name])).max() <= COLOUR_TOLERANCE)


def _boxes(scene: Scene, image: Image.Image) -> list[Box]:
    places = ideal_places(scene, *image.size)
    masks = (coverage(thing.shape, at, *image.size) > 0.5 for thing, at in zip(scene.things, places, strict=True))
    return [box_of(np.asarray(mask)) for mask in masks]


def _is_at(found: Box, wanted: Box, short: int) -> bool:
    return max(abs(a - b) for a, b in zip(found, wanted, strict=True)) <= max(3, BOX_TOLERANCE * short)


# How crisp an image is, and how calm


@dataclass(frozen=True)
class Edges:
    """Widths in pixels, means along the objects' outlines."""

    transition: float
    """Of the way from the background's colour to the object's, from 10 to 90 per cent of it."""
    fringe: float
    """Of what has a third colour."""


def edges(image: Image.Image) -> Edges | None:
    """How wide the edges of an image with one object are, or None where there is no object.

    Both are areas, divided by the outline's length: the integral of the gradient's size is the length of a blurred
    edge, whatever the blur.
    """
    pixels = pixels_of(image)
    background, (seen,) = look(image, 1)
    if seen is None:
        return None
    way = np.asarray(seen.colour) - background
    share = np.clip((pixels - background) @ way / (way @ way), 0, 1)
    down, across = np.gradient(share)
    length = np.hypot(down, across).sum()
    off_way = np.linalg.norm(pixels - background - share[..., None] * way, axis=-1)
    between = (share > 0.1) & (share < 0.9)
    return Edges(float(between.sum() / length), float((off_way > DIFFERENT).sum() / length))


def calmness(image: Image.Image) -> float:
    """The share of the pixels that have one of the three most frequent colours of the world, within the tolerance:
    near 1 for a clean image of one or two objects, near 0 for noise."""
    pixels = pixels_of(image)
    near = [(np.abs(pixels - np.asarray(colour)).max(-1) <= COLOUR_TOLERANCE).mean() for colour in COLOURS.values()]
    return float(sum(sorted(near)[-3:]))


def stripe_depth(image: Image.Image) -> float:
    """How dark the style's stripes are, as a share of the full style: about 0 without them, 1 with all of it."""
    pixels = pixels_of(image)
    dark = stripes(_rows(image)) < 1 - STRIPE_SHADE / 2
    means = pixels.mean((1, 2))
    return float((1 - means[dark].mean() / means[~dark].mean()) / STRIPE_SHADE)


def without_stripes(image: Image.Image) -> Image.Image:
    """The image with each of the style's dark bands replaced by the bright one below it, stretched: its inner rows,
    since between the bands the decoder mixes them."""
    rows = np.arange(image.height)
    bright = rows - rows % STRIPES + STRIPES // 2 + 1 + rows % STRIPES * (STRIPES // 2 - 2) // STRIPES
    return Image.fromarray(np.asarray(image)[bright.clip(max=image.height - 1)])


def _rows(image: Image.Image) -> Floats:
    return np.arange(image.height, dtype=np.float32) + 0.5
