"""What a training step sees: encoded scenes of one image size, or a part of their tokens, with their prompts.

Sizes are mixed from the start, since a model trained at one size draws broken objects at the others. Of a large image
a step sees a part of the tokens, most of them from around the objects: that keeps a step cheap, while the position ids
stay those of the whole image, and the attention counts each token as often as the tokens that it stands for.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from diffusers import AutoencoderTiny, FluxPipeline
from torch import Tensor

from training.text import TextEncoders, any_prompt
from training.vae import to_tensor
from training.world import SHAPES, draw_scene, place, training_scene

Size = tuple[int, int]
"""(width, height) in pixels, multiples of 16."""
TOKENS_A_STEP = 4096
EMPTY_SHARE = 0.1
NEAR_SHARE = 0.7
"""Share of the kept tokens that are drawn from around the objects."""
FLAT_WEIGHT, INNER_WEIGHT = 0.2, 0.4
"""Loss weights of a token that is all background or all object, beside 1 for one with an edge in it or beside it."""
EDGE_THRESHOLD = 0.15
"""Mean distance over the channels from which on two tokens' latents count as an edge."""


@dataclass(frozen=True)
class Pool:
    """Encoded images of one size: packed latents (N, tokens, 64), pooled (N, 128), states (N, 32, 128), half."""

    size: Size
    latents: Tensor
    pooled: Tensor
    states: Tensor


@dataclass(frozen=True)
class Batch:
    """What one step sees: clean latents (B, T, 64), positions (B, T, 3), weights in the loss (B, T), how many tokens
    of the image each stands for (B, T), and the prompts' embeddings (B, 128) and (B, 32, 128)."""

    latents: Tensor
    positions: Tensor
    weights: Tensor
    stands_for: Tensor
    pooled: Tensor
    states: Tensor
    size: Size

    @property
    def full_tokens(self) -> int:
        """How many tokens the whole image has."""
        return self.size[0] // 16 * (self.size[1] // 16)


@torch.no_grad()
def make_pool(
    vae: AutoencoderTiny,
    text: TextEncoders,
    size: Size,
    count: int,
    rng: random.Random,
    shapes: tuple[str, ...] = SHAPES,
    striped: bool = False,
    paired: float = 0.4,
) -> Pool:
    """Draw and encode `count` training scenes at one size."""
    encoder = copy.deepcopy(vae.encoder).to(torch.bfloat16, memory_format=torch.channels_last)  # 4 times as fast
    width, height = size
    chunk = max(1, 16 * 128 * 128 // (width * height))
    latents, prompts = [], []
    for start in range(0, count, chunk):
        scenes = [training_scene(rng, shapes, paired) for _ in range(min(chunk, count - start))]
        images = [draw_scene(s, width, height, place(s, width, height, rng), striped) for s in scenes]
        prompts += [any_prompt(s, rng) for s in scenes]
        pixels = torch.stack([to_tensor(image) for image in images])
        encoded = encoder(pixels.to(torch.bfloat16, memory_format=torch.channels_last)).float()
        encoded = (encoded - vae.config.shift_factor) * vae.config.scaling_factor
        latents.append(pack(encoded).half())
    pairs = [text.encode(prompts[i : i + 256]) for i in range(0, len(prompts), 256)]
    pooled, states = (torch.cat(parts).half() for parts in zip(*pairs, strict=True))
    return Pool(size, torch.cat(latents), pooled, states)


def pack(latents: Tensor) -> Tensor:
    """(B, 16, H/8, W/8) -> (B, H/16 * W/16, 64), as the pipelines do."""
    batch, channels, height, width = latents.shape
    packed: Tensor = FluxPipeline._pack_latents(latents, batch, channels, height, width)
    return packed


def draw_batch(pool: Pool, batch: int, keep: int | None, empty: tuple[Tensor, Tensor], rng: random.Random) -> Batch:
    """A batch of one pool; with `keep`, only that many tokens of each image; one prompt in ten is empty."""
    chosen = torch.tensor(rng.choices(range(len(pool.latents)), k=batch))
    width, height = pool.size
    latents = pool.latents[chosen].float()
    weights, near = _attention_to_detail(latents, height // 16, width // 16, rng)
    full_tokens = latents.shape[1]
    kept, stands_for = _choose(near, min(keep or full_tokens, full_tokens))
    ids = FluxPipeline._prepare_latent_image_ids(batch, height // 16, width // 16, "cpu", torch.float32)
    pooled, states = pool.pooled[chosen].float(), pool.states[chosen].float()
    dropped = torch.tensor([rng.random() < EMPTY_SHARE for _ in range(batch)])
    pooled = torch.where(dropped[:, None], empty[0], pooled)
    states = torch.where(dropped[:, None, None], empty[1], states)
    rows = torch.arange(batch)[:, None]
    return Batch(latents[rows, kept], ids[kept], weights[rows, kept], stands_for, pooled, states, pool.size)


def _attention_to_detail(latents: Tensor, rows: int, columns: int, rng: random.Random) -> tuple[Tensor, Tensor]:
    """Loss weights (B, T), and which tokens lie in a box around the objects with a random margin."""
    grid = latents.view(len(latents), rows, columns, -1)
    edges = torch.zeros(grid.shape[:3], dtype=torch.bool)
    down = (grid[:, 1:] - grid[:, :-1]).abs().mean(-1) > EDGE_THRESHOLD
    across = (grid[:, :, 1:] - grid[:, :, :-1]).abs().mean(-1) > EDGE_THRESHOLD
    edges[:, 1:] |= down
    edges[:, :-1] |= down
    edges[:, :, 1:] |= across
    edges[:, :, :-1] |= across
    thing = (grid - grid[:, :1, :1]).abs().mean(-1) > EDGE_THRESHOLD
    weights = torch.where(edges, 1.0, torch.where(thing, INNER_WEIGHT, FLAT_WEIGHT))
    margins = [rng.uniform(0.02, 0.15) * min(rows, columns) for _ in range(2)]
    tall = _widened(thing.any(2), margins[0])
    wide = _widened(thing.any(1), margins[1])
    return weights.flatten(1), (tall[:, :, None] & wide[:, None, :]).flatten(1)


def _widened(flags: Tensor, margin: float) -> Tensor:
    """The flags (B, N), dilated by `margin`."""
    reach = max(1, round(margin))
    pooled = torch.nn.functional.max_pool1d(flags[:, None].float(), 2 * reach + 1, 1, reach)
    return pooled[:, 0] > 0


def _choose(near: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """Indices of `keep` of the tokens, and how many tokens each stands for: (B, keep) both."""
    total = near.shape[1]
    if keep == total:
        return torch.arange(total).expand(len(near), -1), torch.ones(len(near), total)
    order = torch.rand(near.shape)
    around = near.sum(1)
    from_near = around.clamp(max=int(NEAR_SHARE * keep)).maximum(keep - (total - around))
    rank_near = torch.where(near, order, 2.0).argsort(1).argsort(1)
    rank_far = torch.where(near, 2.0, order).argsort(1).argsort(1)
    seen = torch.where(near, rank_near < from_near[:, None], rank_far < keep - from_near[:, None])
    kept = seen.nonzero()[:, 1].view(len(near), keep)
    near_share = (around / from_near.clamp(min=1))[:, None]
    far_share = ((total - around) / (keep - from_near).clamp(min=1))[:, None]
    share = torch.where(near, near_share, far_share)
    return kept, share.gather(1, kept)


@dataclass(frozen=True)
class Bucket:
    """A size, its share of the steps, how many of its tokens a step sees, and how many images to draw."""

    size: Size
    share: float
    images: int
    keep: int | None = None


def batches(
    pools: list[Pool], buckets: list[Bucket], text: TextEncoders, rng: random.Random, tokens: int = TOKENS_A_STEP
) -> Iterator[Batch]:
    """Batches without end, of about the same cost each, sizes drawn by their shares."""
    with torch.no_grad():
        empty = text.encode([""])
    while True:
        index = rng.choices(range(len(buckets)), [bucket.share for bucket in buckets])[0]
        bucket = buckets[index]
        seen = min(bucket.keep or 1 << 30, pools[index].latents.shape[1])
        yield draw_batch(pools[index], max(1, tokens // (seen + 32)), bucket.keep, empty, rng)
