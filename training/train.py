"""The transformer to train, and its training loop: compiled blocks, Muon, a moving average.

Weights are float32, matrix products bfloat16: on two cores of an EPYC with AVX-512's bfloat16 a step takes 115 ms. In
float32 it was twice as much. Compiled blocks take two thirds of the time.
"""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor

from training.checkpoints import Resumable
from training.data import Batch
from training.muon import Muon
from training.text import WIDTH

logger = logging.getLogger(__name__)


def new_transformer(guidance_embeds: bool) -> FluxTransformer2DModel:
    """An untrained FLUX: 3 double and 3 single blocks, 4 heads of 32."""
    return FluxTransformer2DModel(
        in_channels=64,
        num_layers=3,
        num_single_layers=3,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        guidance_embeds=guidance_embeds,
        axes_dims_rope=(4, 14, 14),
    )


@dataclass(frozen=True)
class Schedule:
    """Learning rate: linear warm-up to `peak`, flat, then linear down to a twentieth over the last `decay` share.

    With `muon` the blocks' matrices are trained by Muon, at AdamW's size of a step, and only the rest by AdamW.
    """

    steps: int
    peak: float
    warmup: int = 0
    decay: float = 0.0
    muon: bool = False

    def rate(self, step: int) -> float:
        """The learning rate at a step, counted from 0."""
        rising = min(1.0, (step + 1) / (self.warmup + 1))
        tail = self.decay * self.steps
        falling = 1.0 if tail == 0 else min(1.0, max(0.05, (self.steps - step) / tail))
        return self.peak * min(rising, falling)


class Ema:
    """An exponential moving average of a model's weights, shorter at the beginning; its `model` is the result."""

    def __init__(self, model: torch.nn.Module, decay: float = 0.998) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay
        self.updates = 0

    @torch.no_grad()
    def update(self, model: torch.nn.Module) -> None:
        """Move the average a little towards `model`."""
        self.updates += 1
        decay = min(self.decay, self.updates / (self.updates + 10))
        torch._foreach_lerp_(list(self.model.parameters()), list(model.parameters()), 1 - decay)


def train(
    model: FluxTransformer2DModel,
    loss_of: Callable[[Batch], Tensor],
    batch_at: Callable[[int], Batch],
    schedule: Schedule,
    checkpoint: Path,
    helper: torch.nn.Module | None = None,
    seed: int = 0,
    keep_every: int = 500,
) -> FluxTransformer2DModel:
    """Run the schedule on `model` and return its moving average.

    Args:
        model: trained where its parameters require a gradient, float32.
        loss_of: the loss of a batch, from the model's passes.
        batch_at: the batch of each step, counted from 0.
        schedule: steps and learning rates.
        checkpoint: a file that the state is kept in on the way; where there is one, its run is continued.
        helper: a part of the loss with parameters of its own, trained beside the model.
        seed: of the noise; each step draws its own, whether the run was interrupted or not.
        keep_every: steps between two checkpoints.
    """
    helper = helper or torch.nn.Module()
    parameters = [p for p in (*model.parameters(), *helper.parameters()) if p.requires_grad]
    optimizers = _optimizers(model, parameters, schedule)
    ema = Ema(model)
    resumable = Resumable(checkpoint, {"model": model, "average": ema.model, "helper": helper}, optimizers)
    begun = ema.updates = resumable.load()
    seen, started = 0.0, time.monotonic()
    for step in range(begun, schedule.steps):
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = schedule.rate(step)
        torch.manual_seed(seed << 32 | step)
        batch = batch_at(step)
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(batch)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        ema.update(model)
        seen = loss.item() if step == begun else 0.98 * seen + 0.02 * loss.item()
        if step % 50 == 49:
            rate = (time.monotonic() - started) / (step + 1 - begun)
            logger.info("step %d of %d: loss %.4f, %.3f s a step", step + 1, schedule.steps, seen, rate)
        if step % keep_every == keep_every - 1:
            resumable.save(step + 1)
    return ema.model


def _optimizers(
    model: FluxTransformer2DModel, parameters: list[torch.nn.Parameter], schedule: Schedule
) -> list[torch.optim.Optimizer]:
    matrices = [p for name, p in model.named_parameters() if schedule.muon and p.ndim == 2 and "blocks." in name]
    by_muon = {id(p) for p in matrices}
    rest = [p for p in parameters if id(p) not in by_muon]
    adamw = torch.optim.AdamW(rest, lr=schedule.peak, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    if not matrices:
        return [adamw]
    return [Muon(matrices, lr=schedule.peak, weight_decay=0.01, ns_steps=4), adamw]
