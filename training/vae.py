"""The tiny VAE: diffusers' AutoencoderTiny, 8 x smaller, 16 latent channels, whose encoder is set and not trained.

The encoder averages 4 x 4 pixels: a latent holds the colours of its 2 x 2 averages in 12 of its 16 channels. So the
latents are a small image; what the transformer gets wrong in them are soft edges, not strange colours, and the training
can compute them without an encoder. The decoder is trained to draw crisp edges from them, also where they are softened
or noisy. A learnt encoder gave ragged, coloured edges; AutoencoderKL failed at this size, since its GroupNorm throws
the colour of a flat image away. Knows the world's images, nothing of prompts or of the transformer.
"""

from __future__ import annotations

import logging
import math
import random
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderTiny
from diffusers.models.unets.unet_2d_blocks import AutoencoderTinyBlock
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from training.checkpoints import Resumable
from training.world import ALL_SHAPES, COLOURS, STRIPES, Floats, distances, stripes

logger = logging.getLogger(__name__)

MEAN, SCALE = 0.5, 2.75
"""`shift_factor` and `scaling_factor`: latents as the transformer sees them are (value - MEAN) * SCALE."""
CELL = 4
"""Pixels on a side of what a latent's value is the average of."""
CHANNELS = 32
DECODER_BLOCKS = (3, 3, 2, 1)
"""From an eighth of the size up to the whole."""
STEPS = 10_000
BATCH = 8
CROP = 96
PEAK_RATE = 2e-3
LEAST_CONTRAST = 0.3
"""Of a crop's colours, in RGB distance from 0 to 1: the error is measured in units of the contrast, or edges of colours
that are near to each other stay soft."""


def normalised(values: Floats) -> Floats:
    """Colours from 0 to 1 as the transformer sees them."""
    return (values - MEAN) * SCALE


def new_vae() -> AutoencoderTiny:
    """A VAE with the encoder set and the decoder untrained."""
    vae = AutoencoderTiny(
        latent_channels=16,
        encoder_block_out_channels=(12,) * 4,
        decoder_block_out_channels=(CHANNELS,) * 4,
        num_encoder_blocks=(0, 0, 0, 0),
        num_decoder_blocks=DECODER_BLOCKS,
        force_upcast=False,
        scaling_factor=SCALE,
        shift_factor=MEAN,
    )
    _set_encoder(vae)
    for module in vae.decoder.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                torch.nn.init.zeros_(module.bias)
        if isinstance(module, AutoencoderTinyBlock):
            module.conv[-1].weight.data.mul_(0.25)  # each block begins near the identity
    vae.decoder.layers[-1].weight.data.mul_(0.25)
    return vae


@torch.no_grad()
def _set_encoder(vae: AutoencoderTiny) -> None:
    """Set the convolutions: the first passes the three colours on, the next two halve the image by averages, the fourth
    puts the 2 x 2 of a latent side by side, the last passes these on; unused channels are MEAN, which becomes 0."""
    copy, halve, again, gather, last = (m for m in vae.encoder.modules() if isinstance(m, torch.nn.Conv2d))
    for module in (copy, halve, again, gather, last):
        module.weight.zero_()
        if module.bias is not None:
            module.bias.zero_()
    for colour in range(3):
        copy.weight[colour, colour, 1, 1] = 1
        for average in (halve, again):
            average.weight[colour, colour, 1:, 1:] = 0.25
        for row in range(2):
            for column in range(2):
                gather.weight[(2 * row + column) * 3 + colour, colour, 1 + row, 1 + column] = 1
    for channel in range(12):
        last.weight[channel, channel, 1, 1] = 1
    torch.nn.init.constant_(torch.as_tensor(last.bias)[12:], MEAN)


# Its training


def train_vae(folder: Path, steps: int = STEPS, seed: int = 0) -> None:
    """Train the decoder from nothing, and save the VAE to `folder`, in half."""
    torch.manual_seed(seed)
    vae = new_vae()
    vae.encoder.requires_grad_(False)
    vae.decoder.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(vae.decoder.parameters(), lr=PEAK_RATE, weight_decay=1e-4, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_RATE, total_steps=steps, pct_start=0.1)
    resumable = Resumable(folder.with_suffix(".safetensors"), {"vae": vae}, [optimizer])
    begun = resumable.load()
    for _ in range(begun):
        schedule.step()
    for step in range(begun, steps):
        images, latents = draw_crops(seed, step)
        with torch.autocast("cpu", torch.bfloat16):
            restored = vae.decoder(latents.contiguous(memory_format=torch.channels_last))
        error = (restored.float() - images) / _contrasts(images)
        loss = error.abs().mean() + 2 * error.square().mean()
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(vae.decoder.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 99:
            logger.info("vae step %d of %d: mean squared error %.5f", step + 1, steps, error.square().mean().item())
        if step % 500 == 499:
            resumable.save(step + 1)
    vae.half().save_pretrained(folder)


def _contrasts(images: Tensor) -> Tensor:
    """(B, 1, 1, 1): how far apart the colours of each image in [-1, 1] are, in RGB distance of colours from 0 to 1."""
    spans = images.amax((2, 3), keepdim=True) - images.amin((2, 3), keepdim=True)
    return torch.clamp(spans.square().sum(1, keepdim=True).sqrt() / 2, min=LEAST_CONTRAST)


def draw_crops(seed: int, step: int) -> tuple[Tensor, Tensor]:
    """A batch of images (B, 3, CROP, CROP) in [-1, 1], and latents (B, 16, CROP / 8, CROP / 8) as a transformer might
    give them: a little soft, a little noisy."""
    rng = random.Random(f"vae {seed} {step}")
    chance = np.random.default_rng(rng.getrandbits(64))
    images = np.stack([_crop(rng, chance) for _ in range(BATCH)])
    cells = functional.avg_pool2d(torch.from_numpy(images), CELL)
    strengths = torch.tensor([rng.choice((0.0, rng.uniform(0, 0.35))) for _ in range(BATCH)])
    cells = _softened(cells, strengths)
    noise = torch.from_numpy(chance.standard_normal(cells.shape, dtype=np.float32))
    cells = cells + noise * torch.tensor([rng.choice((0.0, 0.01, 0.03)) for _ in range(BATCH)])[:, None, None, None]
    parts = cells.view(BATCH, 3, CROP // 8, 2, CROP // 8, 2)  # latent row, cell row, latent column, cell column
    latents = parts.permute(0, 3, 5, 1, 2, 4).flatten(1, 3)
    rest = torch.full((BATCH, 4, *latents.shape[2:]), MEAN)
    return torch.from_numpy(images) * 2 - 1, torch.cat([latents, rest], dim=1)


def _softened(cells: Tensor, strengths: Tensor) -> Tensor:
    """Mixed with the average of the neighbours, which moves each value by up to `strengths` of the difference."""
    around = functional.avg_pool2d(functional.pad(cells, (1, 1, 1, 1), mode="replicate"), 3, 1)
    return torch.lerp(cells, around, 2 * strengths[:, None, None, None])


def _crop(rng: random.Random, chance: np.random.Generator) -> Floats:
    """(3, CROP, CROP) from 0 to 1: a part of a scene around an edge or, one in five, coarse noise, for other images."""
    if rng.random() < 0.2:
        return _coarse_noise(rng, chance)
    colours = np.asarray(rng.sample(list(COLOURS.values()), 2), np.float32) / 255
    radius = math.exp(rng.uniform(math.log(30), math.log(360)))
    shape = np.asarray(rng.randrange(len(ALL_SHAPES)))
    x, y = _edge_point(shape, rng)
    left, top = x * radius - rng.uniform(0, CROP), y * radius - rng.uniform(0, CROP)
    along = np.arange(CROP, dtype=np.float32) + 0.5
    apart = distances(shape, ((left + along) / radius)[None, :], ((top + along) / radius)[:, None]) * radius
    covered = np.clip(0.5 - apart, 0, 1)
    pixels = colours[0][:, None, None] + covered * (colours[1] - colours[0])[:, None, None]
    if rng.random() < 0.2:
        pixels = pixels * stripes(along + rng.choice((0, STRIPES / 2)))[:, None]
    return np.asarray(pixels, dtype=np.float32)


def _edge_point(shape: NDArray[np.int64], rng: random.Random) -> tuple[float, float]:
    """A point near the shape's outline, in radii."""
    while True:
        x, y = rng.uniform(-1.2, 1.2), rng.uniform(-1.2, 1.2)
        if abs(float(distances(shape, np.asarray(x, np.float32), np.asarray(y, np.float32)))) < 0.1:
            return x, y


def _coarse_noise(rng: random.Random, chance: np.random.Generator) -> Floats:
    coarse = torch.from_numpy(chance.random((1, 3, CROP // 16, CROP // 16), dtype=np.float32))
    mode = rng.choice(("bicubic", "nearest"))
    return functional.interpolate(coarse, size=(CROP, CROP), mode=mode).clamp(0, 1)[0].numpy()
