"""Flow matching: noise levels, noisy latents, and the error of a velocity. Knows no model.

Source: FLUX.1 [dev]'s scheduler in diffusers; Esser et al. 2024, section 3.1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from training.data import Batch


def shift_for(tokens: Tensor) -> Tensor:
    """The time shift of FLUX.1 [dev] for this many image tokens: exp(mu), mu linear from 0.5 at 256 to 1.15 at 4096."""
    return torch.exp(0.5 + (1.15 - 0.5) * (tokens - 256) / (4096 - 256))


def noise_levels(tokens: Tensor, emphasis: float) -> Tensor:
    """(B,) levels in (0, 1), stratified, shifted up as the scheduler will and `emphasis` times more.

    High levels decide what stands where, low ones the edges: training wants an emphasis above 1.

    Args:
        tokens: (B,), how many each image has.
        emphasis: a factor of the shift.
    """
    batch = len(tokens)
    uniform = ((torch.arange(batch) + torch.rand(batch)) / batch)[torch.randperm(batch)]
    shift = emphasis * shift_for(tokens)
    return shift * uniform / (1 + (shift - 1) * uniform)


def mix(batch: Batch, levels: Tensor) -> tuple[Tensor, Tensor]:
    """Return (noisy latents at these levels, the velocity noise - latents that leads there)."""
    noise = torch.randn_like(batch.latents)
    level = levels[:, None, None]
    return (1 - level) * batch.latents + level * noise, noise - batch.latents


def squared_error(predicted: Tensor, target: Tensor) -> Tensor:
    """Mean squared error over channels and tokens."""
    return (predicted - target).square().mean()
