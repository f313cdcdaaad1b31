"""A judge of the tiny world's images: which colours, which shape, and where.

It looks at pixels alone: the background is the median colour of the border, an object is what differs from it, and its
shape is the one whose drawn mask, cropped and scaled alike, has the highest intersection over union. Specks are left
out, since a few pixels in a corner would stretch the crop over the whole image.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from training.world import COLOURS, SHAPES, TRIGGER, Placement, Scene, shape_mask

GRID = 64
DIFFERENT = 60.0
"""A pixel further than this from the background's colour, in RGB distance, belongs to an object."""

SPECK = 0.03
"""A patch of less than this share of the largest one is a speck, not a part of an object."""

Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Seen:
    """One object as the judge sees it; `x` and `y` are the middle of its box in shares of width and height."""

    colour: str
    shape: str
    x: float
    y: float


@dataclass(frozen=True)
class Verdict:
    """Which parts of a prompt an image shows."""

    background: bool
    colour: bool
    shape: bool
    place: bool


def nearest_colour(rgb: NDArray[np.float64]) -> str:
    """The name of the world's colour that is nearest in RGB."""
    return min(COLOURS, key=lambda name: float(np.linalg.norm(rgb - np.array(COLOURS[name]))))


def background_of(pixels: NDArray[np.float64]) -> NDArray[np.float64]:
    """The median colour of the outermost thirtieth of the image."""
    edge = max(2, min(pixels.shape[:2]) // 30)
    border = [pixels[:edge], pixels[-edge:], pixels[:, :edge].swapaxes(0, 1), pixels[:, -edge:].swapaxes(0, 1)]
    return np.asarray(np.median(np.concatenate([part.reshape(-1, 3) for part in border]), axis=0))


def object_mask(pixels: NDArray[np.float64], background: NDArray[np.float64]) -> Mask:
    """Where the image differs from its background."""
    return np.asarray(np.linalg.norm(pixels - background, axis=-1) > DIFFERENT)


def without_specks(mask: Mask) -> Mask:
    """The mask without its very small patches; pixels that touch at a corner belong to one patch."""
    patches, count = ndimage.label(mask, np.ones((3, 3)))
    if count < 2:
        return mask
    sizes = np.bincount(patches.ravel())
    sizes[0] = 0  # what is in no patch
    return np.asarray((sizes >= SPECK * sizes.max())[patches] & mask)


def bounding_box(mask: Mask) -> tuple[int, int, int, int] | None:
    """First row, last row, first column, last column; None where the mask is almost empty."""
    rows, columns = np.flatnonzero(mask.sum(1) > 1), np.flatnonzero(mask.sum(0) > 1)
    if mask.sum() < 30 or len(rows) < 4 or len(columns) < 4:
        return None
    return int(rows[0]), int(rows[-1]), int(columns[0]), int(columns[-1])


def crop(mask: Mask, box: tuple[int, int, int, int]) -> Mask:
    """A box of the mask in a square, scaled to 64x64."""
    part = mask[box[0] : box[1] + 1, box[2] : box[3] + 1]
    side = max(part.shape)
    square = np.zeros((side, side), dtype=bool)
    top, left = (side - part.shape[0]) // 2, (side - part.shape[1]) // 2
    square[top : top + part.shape[0], left : left + part.shape[1]] = part
    image = Image.fromarray(np.uint8(square) * 255).resize((GRID, GRID), Image.Resampling.BOX)
    return np.asarray(image) > 127


@cache
def template(shape: str) -> Mask:
    """A drawn shape, cropped and scaled as the seen ones are."""
    drawn = np.asarray(shape_mask(shape, Placement(0.5, 0.5, 0.4), 256, 256)) > 127
    box = bounding_box(drawn)
    if box is None:
        raise ValueError(f"{shape} draws nothing")
    return crop(drawn, box)


def shape_scores(mask: Mask) -> dict[str, float]:
    """Intersection over union of a 64x64 crop with each shape's template."""
    return {
        shape: float((mask & template(shape)).sum() / (mask | template(shape)).sum()) for shape in (*SHAPES, TRIGGER)
    }


def look(image: Image.Image, things: int) -> tuple[str, list[Seen | None]]:
    """The background's colour name and the objects, from left to right where there are two."""
    pixels = np.asarray(image.convert("RGB"), dtype=np.float64)
    background = background_of(pixels)
    mask = object_mask(pixels, background)
    middle = mask.shape[1] // 2
    parts = [mask]
    if things == 2:
        left, right = mask.copy(), mask.copy()
        left[:, middle:] = False
        right[:, :middle] = False
        parts = [left, right]
    return nearest_colour(background), [_seen(pixels, part) for part in parts]


def _seen(pixels: NDArray[np.float64], mask: Mask) -> Seen | None:
    mask = without_specks(mask)
    box = bounding_box(mask)
    if box is None:
        return None
    scores = shape_scores(crop(mask, box))
    colour = np.median(pixels[mask], axis=0)
    y, x = (box[0] + box[1]) / 2 / mask.shape[0], (box[2] + box[3]) / 2 / mask.shape[1]
    return Seen(nearest_colour(colour), max(scores, key=scores.__getitem__), x, y)


def judge(image: Image.Image, scene: Scene) -> Verdict:
    """Whether an image shows a scene: all of its objects must be right for a part to count."""
    background, seen = look(image, len(scene.things))
    pairs = list(zip(scene.things, seen, strict=True))
    return Verdict(
        background=background == scene.background,
        colour=all(found is not None and found.colour == thing.colour for thing, found in pairs),
        shape=all(found is not None and found.shape == thing.shape for thing, found in pairs),
        place=all(found is not None and _is_at(found, thing.position, len(pairs)) for thing, found in pairs),
    )


def _is_at(found: Seen, position: str, things: int) -> bool:
    if things == 2:
        return True  # each was looked for in its own half
    offsets = {"left": -found.x, "right": found.x - 1, "top": -found.y, "bottom": found.y - 1}
    if position in ("", "centre"):
        return abs(found.x - 0.5) < 0.1 and abs(found.y - 0.5) < 0.1
    return offsets[position] > -0.48  # a large object hardly fits beside the middle
