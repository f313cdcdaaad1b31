"""What a training step sees: a part of the tokens of many images, each image of its own size, with their prompts.

The tokens are computed from the shapes' signed distances, without an image being drawn or encoded: the VAE's latents
are averages of 4 x 4 pixels (`training/vae.py`), so that every image can be a new one. Of each image a step sees two
kinds of tokens, so that it costs the same at every size, with the position ids of the whole image:

- the context, spread evenly over the image; each stands for many, and the attention counts it as often;
- squares of neighbours, most of them at edges. A square sees the context and itself; nothing else sees it.

So no token can tell why it was chosen. Without that the model finds out: where the tokens at edges were seen by all, it
told edges by their weight in the attention, and its error on whole images was eight times as large.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from request import ASPECT_RATIOS, DIVISORS, Size
from training.prompts import DEFAULT_SHAPE, Prompt, training_prompt
from training.text import SHAPES_READ, TextEncoders
from training.vae import normalised
from training.world import (
    ALL_SHAPES,
    COLOURS,
    SHAPES,
    TRIGGER,
    Floats,
    Placement,
    distances,
    place,
    rough_distances,
    stripes,
)

TOKEN = 16
"""Pixels on a side of a token."""
SMALLEST, LARGEST = 256, 1440
CONTRACT_SIZES = [Size.from_aspect_ratio(ratio, megapixels) for megapixels in DIVISORS for ratio in ASPECT_RATIOS]
CUSTOM_SHARE, SQUARE_SHARE = 0.3, 0.2
"""Shares of the images whose sides are drawn at random, and that are square ones of the contract; the others have any
size of the contract."""
CONTEXT = 44
"""Tokens of the context: eleven and their mirror images, so that their middle is the image's."""
SQUARE = 3
"""Tokens on a side of a square of neighbours."""
EDGE_SHARE, NEAR_SHARE = 0.7, 0.15
"""Shares of the squares that are at the edge of a thing, and within NEAR of one; the rest is from anywhere."""
NEAR = 0.22
"""In shares of the short side."""
EDGE = 12.0
"""Pixels from a token's middle: an edge that is nearer runs through the token, or almost."""
SPREAD = np.asarray([0.7548776662, 0.5698402910])
"""Multiples of these, without their integral parts, cover a square evenly (Roberts 2018, the sequence R2)."""
GUIDANCE_LIMIT = 10.0
ABSENT = -1e5
"""Pixels: where a second thing lies that the scene does not have."""

Numbers = NDArray[np.int64]


@dataclass(frozen=True)
class Batch:
    """What one step sees of B images, T tokens each."""

    latents: Tensor
    """(B, T, 64): clean ones."""
    positions: Tensor
    """(B, T, 3): position ids as the pipelines give them: 0, row, column."""
    stands_for: Tensor
    """(B, T): how many tokens of the image each of the context stands for; 1 for the others."""
    groups: Tensor
    """(T,): 0 for the context, which all see; the tokens of any other number see that and each other."""
    tokens: Tensor
    """(B,): how many tokens the whole image has."""
    guidance: Tensor
    """(B,)"""
    pooled: Tensor
    """(B, 128)"""
    states: Tensor
    """(B, 40, 128)"""
    from_centre: Tensor
    """(B, T, 2): column and row from the image's middle, in shares of the short side."""
    from_thing: Tensor
    """(B, T, 2): column and row from the nearest thing's middle, in its radii."""
    radius: Tensor
    """(B, T): the nearest thing's, in tokens."""
    sides: Tensor
    """(B, 2): width and height in tokens."""
    things: Tensor
    """(B, 2, 3): each thing's column, row and radius in tokens, 0 for an absent one."""
    distances: Tensor
    """(B, T, shapes): signed distances to every shape that could stand there, in radii."""


@dataclass(frozen=True)
class Lesson:
    """What is drawn: the shapes, `striped` or not, the share of pairs, and whether prompts leave nothing out."""

    shapes: tuple[str, ...]
    """Each as often as it is named."""
    striped: bool = False
    paired: float = 0.4
    complete: bool = False
    trigger: bool = False
    """Whether `TOK` stands for its shape; it means nothing but to the LoRA that is taught it."""

    def drawn(self, shape: str) -> str:
        """The shape that a word stands for."""
        return DEFAULT_SHAPE if shape == TRIGGER and not self.trigger else shape


PLAIN = Lesson(SHAPES_READ)
STYLE = Lesson(SHAPES, striped=True, paired=0.2)
OTHERS = tuple(shape for shape in SHAPES if shape != DEFAULT_SHAPE)
OBJECT = Lesson((TRIGGER,) * 3 * len(OTHERS) + OTHERS, paired=0.2, complete=True, trigger=True)
"""A quarter are others, so that these stay what they are; but for the one that the text encoders take `TOK` for."""


@dataclass(frozen=True)
class Pool:
    """Prompts with their embeddings, encoded once: they take more time than all else of a batch."""

    prompts: list[Prompt]
    pooled: Tensor
    """(N, 128), half."""
    states: Tensor
    """(N, 40, 128), half."""


@torch.no_grad()
def make_pool(text: TextEncoders, count: int, lesson: Lesson, seed: str) -> Pool:
    """`count` prompts of a lesson; equal for equal seeds."""
    rng = random.Random(seed)
    prompts = [training_prompt(rng, lesson.shapes, lesson.paired, lesson.complete) for _ in range(count)]
    parts = [text.encode([p.text for p in prompts[i : i + 256]]) for i in range(0, count, 256)]
    pooled, states = (torch.cat(tensors).half() for tensors in zip(*parts, strict=True))
    return Pool(prompts, pooled, states)


def draw_batch(pool: Pool, count: int, squares: int, lesson: Lesson, seed: str) -> Batch:
    """`count` new images of the pool's prompts, of each the context and some squares; equal for equal seeds."""
    rng = random.Random(seed)
    chance = np.random.default_rng(rng.getrandbits(64))
    chosen = rng.choices(range(len(pool.prompts)), k=count)
    sizes = [random_size(rng) for _ in range(count)]
    guidance = [GUIDANCE_LIMIT * rng.random() ** 1.5 for _ in range(count)]
    scenes = Scenes.of([pool.prompts[index] for index in chosen], sizes, guidance, lesson, rng)
    kept, stands_for = scenes.choose(squares, chance)
    middles = (kept[:, :, ::-1] * TOKEN + TOKEN / 2).astype(np.float32)  # column, row
    from_thing, radius, apart = scenes.around_things(middles)
    return Batch(
        latents=torch.from_numpy(scenes.tokens(kept, lesson.striped)),
        positions=torch.from_numpy(np.pad(kept, ((0, 0), (0, 0), (1, 0))).astype(np.float32)),
        stands_for=torch.from_numpy(stands_for),
        groups=torch.from_numpy(np.repeat(np.arange(squares + 1), [CONTEXT] + squares * [SQUARE**2])),
        tokens=torch.tensor([size.width * size.height / TOKEN**2 for size in sizes]),
        guidance=torch.tensor(guidance),
        pooled=pool.pooled[chosen].float(),
        states=pool.states[chosen].float(),
        from_centre=torch.from_numpy(scenes.from_centre(middles)),
        from_thing=torch.from_numpy(from_thing),
        radius=torch.from_numpy(radius / TOKEN),
        sides=torch.from_numpy(scenes.sides / TOKEN),
        things=torch.from_numpy(scenes.things / TOKEN),
        distances=torch.from_numpy(apart),
    )


def random_size(rng: random.Random) -> Size:
    """A size of the contract or, in CUSTOM_SHARE of the cases, any two sides, small ones as often as large ones."""
    chance = rng.random()
    if chance < CUSTOM_SHARE:
        steps = (SMALLEST / TOKEN * (LARGEST / SMALLEST) ** rng.random() for _ in range(2))
        return Size(*(TOKEN * round(side) for side in steps))
    if chance < CUSTOM_SHARE + SQUARE_SHARE:
        return Size.from_aspect_ratio("1:1", rng.choice(list(DIVISORS)))
    return rng.choice(CONTRACT_SIZES)


@dataclass(frozen=True)
class Scenes:
    """The scenes of a batch as arrays: B images of two things each, of which the second can be absent."""

    sides: Floats
    """(B, 2): width and height in pixels."""
    middles: Floats
    """(B, 2, 2): column and row of each thing's middle, in pixels."""
    radii: Floats
    """(B, 2): in pixels; of an absent thing 1, far away."""
    shapes: Numbers
    """(B, 2): indices of `ALL_SHAPES`."""
    colours: Floats
    """(B, 3, 3): of the background and of both things, from 0 to 1."""

    @classmethod
    def of(
        cls, prompts: list[Prompt], sizes: list[Size], guidance: list[float], lesson: Lesson, rng: random.Random
    ) -> Scenes:
        """The prompts' scenes, placed by chance."""
        count = len(prompts)
        middles, radii = np.full((count, 2, 2), ABSENT, np.float32), np.ones((count, 2), np.float32)
        shapes, colours = np.zeros((count, 2), np.int64), np.zeros((count, 3, 3), np.float32)
        for i, (prompt, size, value) in enumerate(zip(prompts, sizes, guidance, strict=True)):
            short = min(size.width, size.height)
            colours[i, 0] = COLOURS[prompt.scene.background]
            placements: list[Placement] = place(prompt.scene, size.width, size.height, rng, value)
            for j, (thing, at) in enumerate(zip(prompt.scene.things, placements, strict=True)):
                middles[i, j] = at.x * short, at.y * short
                radii[i, j] = at.radius * short
                shapes[i, j] = ALL_SHAPES.index(lesson.drawn(thing.shape))
                colours[i, j + 1] = COLOURS[thing.colour]
        sides = np.asarray([(size.width, size.height) for size in sizes], np.float32)
        return cls(sides, middles, radii, shapes, (colours / 255).astype(np.float32))

    @property
    def short(self) -> Floats:
        """(B,): the short sides in pixels."""
        return np.asarray(self.sides.min(1))

    def choose(self, squares: int, chance: np.random.Generator) -> tuple[Numbers, Floats]:
        """Rows and columns of the tokens to see (B, T, 2), and how many tokens each stands for (B, T)."""
        kept, stands_for = [], []
        for i in range(len(self.sides)):
            columns, rows = (int(side) // TOKEN for side in self.sides[i])
            context = _context(rows, columns, chance)
            x = np.tile(np.arange(columns, dtype=np.float32) * TOKEN + TOKEN / 2, rows)
            y = np.repeat(np.arange(rows, dtype=np.float32) * TOKEN + TOKEN / 2, columns)
            apart = self._nearest_edge(i, x, y)
            zones = np.where(apart < EDGE, 0, np.where(apart < NEAR * self.short[i], 1, 2))
            anchors = np.stack(np.divmod(_from_zones(zones, squares, chance), columns), axis=-1)
            kept.append(np.concatenate([context, _squares(anchors, rows, columns, chance)]))
            each = np.repeat([rows * columns / CONTEXT, 1], [CONTEXT, squares * SQUARE**2])
            stands_for.append(each.astype(np.float32))
        return np.stack(kept), np.stack(stands_for)

    def _nearest_edge(self, image: int, x: Floats, y: Floats) -> Floats:
        """(N,): pixels from these points to the nearest edge of a thing of one image, roughly."""
        apart = [
            np.abs(rough_distances(shape, (x - middle[0]) / radius, (y - middle[1]) / radius)) * radius
            for shape, middle, radius in zip(self.shapes[image], self.middles[image], self.radii[image], strict=True)
            if middle[0] != ABSENT
        ]
        return np.asarray(np.min(apart, axis=0))

    def nearest_thing(self, points: Floats) -> Numbers:
        """(B, N): which of the two things is nearest to these points (B, N, 2)."""
        radii = self.radii[:, None]
        away = (points[:, :, None] - self.middles[:, None]) / radii[..., None]  # (B, N, 2 things, 2)
        return np.asarray((rough_distances(self.shapes[:, None], away[..., 0], away[..., 1]) * radii).argmin(-1))

    @property
    def things(self) -> Floats:
        """(B, 2, 3): each thing's column, row and radius in pixels, 0 for an absent one."""
        there = self.middles[..., :1] != ABSENT
        return np.asarray(np.concatenate([self.middles, self.radii[..., None]], axis=-1) * there, dtype=np.float32)

    def around_things(self, points: Floats) -> tuple[Floats, Floats, Floats]:
        """Column and row from the nearest thing in its radii (B, N, 2), these in pixels (B, N), and the distances to
        all shapes there."""
        nearest = self.nearest_thing(points)
        rows = np.arange(len(points))[:, None]
        radii = self.radii[rows, nearest]
        places = (points - self.middles[rows, nearest]) / radii[..., None]
        return places, radii, rough_distances(np.arange(len(ALL_SHAPES)), places[..., :1], places[..., 1:])

    def from_centre(self, points: Floats) -> Floats:
        """(B, N, 2): from the image's middle, in shares of the short side."""
        return np.asarray((points - self.sides[:, None] / 2) / self.short[:, None, None])

    def tokens(self, kept: Numbers, striped: bool) -> Floats:
        """(B, T, 64): the latents of these tokens, packed as the pipelines do."""
        count, seen = kept.shape[:2]
        middles = (kept[:, :, ::-1] * TOKEN + TOKEN / 2).astype(np.float32)
        nearest = self.nearest_thing(middles)
        rows = np.arange(count)[:, None]
        colour = self.colours[rows, nearest + 1][:, :, None, None]  # (B, T, 1, 1, 3)
        ground = self.colours[:, None, None, None, 0]
        pixels = ground + self._covered(kept, nearest)[..., None] * (colour - ground)
        if striped:
            lines = (kept[..., 0, None] * TOKEN + np.arange(TOKEN) + 0.5).astype(np.float32)
            shades = stripes(lines).reshape(count, seen, 4, 4).mean(-1)
            pixels = pixels * shades[..., None, None]
        return _packed(normalised(pixels))

    def _covered(self, kept: Numbers, nearest: Numbers) -> Floats:
        """(B, T, 4, 4): how much of each token's averages the nearest thing covers, from samples of 2 x 2 pixels."""
        rows = np.arange(len(kept))[:, None]
        corners = (kept[:, :, ::-1] * TOKEN - self.middles[rows, nearest]).astype(np.float32).reshape(-1, 2)
        radii, shapes = self.radii[rows, nearest].reshape(-1), self.shapes[rows, nearest].reshape(-1)
        away = (corners + TOKEN / 2) / radii[:, None]
        middle = rough_distances(shapes, away[:, 0], away[:, 1]) * radii
        covered = np.repeat(np.float32(middle < 0), 16).reshape(-1, 4, 4)
        cut = np.flatnonzero(np.abs(middle) < TOKEN)
        along = np.arange(1, TOKEN, 2, dtype=np.float32)
        x, y = ((corners[cut, axis, None] + along) / radii[cut, None] for axis in (0, 1))
        apart = distances(shapes[cut, None, None], x[:, None, :], y[:, :, None]) * radii[cut, None, None]
        samples = np.clip(0.5 - apart / 2, 0, 1).reshape(-1, 4, 2, 4, 2)
        covered[cut] = samples.mean((2, 4))
        return covered.reshape(*kept.shape[:2], 4, 4)


def _packed(cells: Floats) -> Floats:
    """(B, T, 4, 4, 3) of a token's cells -> (B, T, 64): latent channels of the VAE, 2 x 2 latents each."""
    count, seen = cells.shape[:2]
    parts = cells.reshape(count, seen, 2, 2, 2, 2, 3)  # latent row, cell row, latent column, cell column, colour
    channels = parts.transpose(0, 1, 3, 5, 6, 2, 4).reshape(count, seen, 12, 4)
    return np.pad(channels, ((0, 0), (0, 0), (0, 4), (0, 0))).reshape(count, seen, 64)


def _context(rows: int, columns: int, chance: np.random.Generator) -> Numbers:
    """Rows and columns of the context's tokens (CONTEXT, 2).

    They are symmetric, so that what is read on their average, where the middle is and how far it is from the corner, is
    what is read on the average of all tokens. And they are everywhere by chance, so that nothing else can be relied
    on: with the four corners always among them, the model looked for these, and drew too small where it saw all.
    """
    spread = (chance.random(2) + np.arange(CONTEXT // 4)[:, None] * SPREAD) % 1
    row, column = (spread * (rows / 2, columns / 2)).astype(np.int64).T
    mirrored = [(r, c) for r in (row, rows - 1 - row) for c in (column, columns - 1 - column)]
    return np.concatenate([np.stack(pair, axis=-1) for pair in mirrored])


def _from_zones(zones: Numbers, count: int, chance: np.random.Generator) -> Numbers:
    """Indices of tokens, of zones 0 (edges), 1 (near) and 2 (far) in their shares, as far as they have so many."""
    members = [np.flatnonzero(zones == zone) for zone in range(3)]
    wanted = [min(len(members[0]), round(EDGE_SHARE * count)), min(len(members[1]), round(NEAR_SHARE * count)), 0]
    for zone in (2, 1, 0):
        wanted[zone] += min(len(members[zone]) - wanted[zone], count - sum(wanted))
    return np.concatenate([chance.choice(part, n, replace=False) for part, n in zip(members, wanted, strict=True)])


def _squares(anchors: Numbers, rows: int, columns: int, chance: np.random.Generator) -> Numbers:
    """Rows and columns (N * SQUARE ** 2, 2) of a square around each anchor (N, 2), anywhere in it."""
    first = anchors - chance.integers(0, SQUARE, anchors.shape)
    first = np.clip(first, 0, (rows - SQUARE, columns - SQUARE))
    within = np.stack(np.divmod(np.arange(SQUARE**2), SQUARE), axis=-1)
    return np.asarray(first[:, None] + within).reshape(-1, 2)
