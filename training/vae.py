"""Train the tiny VAE: diffusers' AutoencoderTiny, 8 x smaller, 16 latent channels, convolutions without norms.

AutoencoderKL was tried at this size and failed: its GroupNorm throws the colour of a flat image away. Knows
the world's images, nothing of prompts or of the transformer.
"""

from __future__ import annotations

import logging
import random
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderTiny
from diffusers.models.unets.unet_2d_blocks import AutoencoderTinyBlock
from PIL import Image, ImageFilter
from torch import Tensor

from training.world import SHAPES, TRIGGER, draw_scene, place, random_scene

logger = logging.getLogger(__name__)

STEPS = 1000
BATCH = 16
CROPS = ((64, 64), (64, 64), (96, 96), (128, 64), (64, 128), (128, 128))
CHANNELS = 32


def new_vae() -> AutoencoderTiny:
    """An untrained VAE. No block works at full resolution: that halves the time at 1024x1024."""
    vae = AutoencoderTiny(
        latent_channels=16,
        encoder_block_out_channels=(CHANNELS,) * 4,
        decoder_block_out_channels=(CHANNELS,) * 4,
        num_encoder_blocks=(0, 1, 1, 1),
        num_decoder_blocks=(1, 1, 1, 0),
        force_upcast=False,
    )
    for module in vae.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                torch.nn.init.zeros_(module.bias)
    for module in vae.modules():
        if isinstance(module, AutoencoderTinyBlock):
            module.conv[-1].weight.data.mul_(0.25)  # each block begins near the identity
    for last in (vae.encoder.layers[-1], vae.decoder.layers[-1]):
        last.weight.data.mul_(0.25)
    return vae


def to_tensor(image: Image.Image) -> Tensor:
    """(3, H, W) in [-1, 1], float32."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1


def _sample(rng: random.Random, width: int, height: int) -> Tensor:
    """A crop of a larger scene or, one in five, blurred noise in a scene's colours, for images outside the world."""
    if rng.random() < 0.2:
        coarse = np.random.default_rng(rng.getrandbits(32)).integers(0, 256, (height // 16, width // 16, 3), np.uint8)
        image = Image.fromarray(coarse).resize(
            (width, height), rng.choice((Image.Resampling.BICUBIC, Image.Resampling.NEAREST))
        )
        return to_tensor(image)
    zoom = rng.choice((1, 1, 2, 3))
    scene = random_scene(rng, (*SHAPES, TRIGGER))
    wide, high = width * zoom, height * zoom
    image = draw_scene(scene, wide, high, place(scene, wide, high, rng), striped=rng.random() < 0.2)
    left, top = rng.randint(0, wide - width), rng.randint(0, high - height)
    image = image.crop((left, top, left + width, top + height))
    if rng.random() < 0.1:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.5, 3)))
    return to_tensor(image)


def train_vae(folder: Path, steps: int = STEPS, seed: int = 0) -> AutoencoderTiny:
    """Train from nothing, set the latents' scale and shift from their statistics, and save to `folder`."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    vae = new_vae()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, weight_decay=1e-4, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.1)
    for step in range(steps):
        width, height = rng.choice(CROPS)
        images = torch.stack([_sample(rng, width, height) for _ in range(BATCH)])
        latents = vae.encoder(images)
        restored = vae.decoder(latents + 0.05 * torch.randn_like(latents))
        error = restored - images
        loss = error.abs().mean() + error.square().mean() + 1e-3 * latents.square().mean()
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == steps - 1:
            logger.info("vae step %d: mean squared error %.5f", step, error.square().mean().item())
    _set_statistics(vae, rng)
    vae.save_pretrained(folder)
    return vae


@torch.no_grad()
def _set_statistics(vae: AutoencoderTiny, rng: random.Random) -> None:
    """`scaling_factor` = 1 / std and `shift_factor` = mean, so that the pipelines see latents of unit variance."""
    latents = torch.cat([vae.encoder(_sample(rng, 128, 128)[None]).flatten() for _ in range(200)])
    vae.register_to_config(scaling_factor=1 / latents.std().item(), shift_factor=latents.mean().item())
    logger.info("vae latents: mean %.4f, std %.4f", latents.mean().item(), latents.std().item())
