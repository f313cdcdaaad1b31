"""The transformer to train, and its training loop: bfloat16 passes over float32 weights, Muon, a moving average."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor

from training.data import Batch
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


class Worker:
    """A model's copy in bfloat16 that does the passes; the model itself stays in float32 and is what is trained.

    On a CPU that multiplies in bfloat16 a step takes two thirds of the time.
    """

    def __init__(self, model: FluxTransformer2DModel) -> None:
        self.model = copy.deepcopy(model).to(torch.bfloat16)
        _keep_times_exact(self.model)
        both = zip(model.parameters(), self.model.parameters(), strict=True)
        self._pairs = [(theirs, ours) for theirs, ours in both if theirs.requires_grad]

    @torch.no_grad()
    def load(self) -> None:
        """Copy the model's weights."""
        for theirs, ours in self._pairs:
            ours.copy_(theirs)

    def hand_over(self) -> None:
        """Move the gradients of the last pass to the model."""
        for theirs, ours in self._pairs:
            theirs.grad = None if ours.grad is None else ours.grad.float()
            ours.grad = None


def _keep_times_exact(model: FluxTransformer2DModel) -> None:
    """Embed noise level and guidance in float32. The model rounds both to its own dtype before it multiplies them by
    1000, and bfloat16 keeps only two or three digits."""
    given: list[Tensor] = []

    def remember(module: torch.nn.Module, inputs: object, named: dict[str, Tensor | None]) -> None:
        given[:] = [1000 * value for name in ("timestep", "guidance") if (value := named[name]) is not None]

    def restore(module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return *given, inputs[-1]

    model.register_forward_pre_hook(remember, with_kwargs=True)
    model.time_text_embed.register_forward_pre_hook(restore)


def train(
    model: FluxTransformer2DModel,
    loss_over: Callable[[FluxTransformer2DModel], Callable[[Batch], Tensor]],
    stream: Iterator[Batch],
    schedule: Schedule,
    after: Callable[[int, FluxTransformer2DModel], None] | None = None,
    helper: torch.nn.Module | None = None,
) -> FluxTransformer2DModel:
    """Run the schedule on `model` and return its moving average.

    Args:
        model: trained where its parameters require a gradient, float32.
        loss_over: gives the loss of a batch for the copy of the model that does the passes.
        stream: batches without end.
        schedule: steps and learning rates.
        after: called now and then with the step and the average.
        helper: a part of the loss with parameters of its own, trained beside the model.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    parameters += [] if helper is None else list(helper.parameters())
    optimizers = _optimizers(model, parameters, schedule)
    worker = Worker(model)
    loss_of = loss_over(worker.model)
    ema, seen, started = Ema(model), 0.0, time.monotonic()
    for step in range(schedule.steps):
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = schedule.rate(step)
            optimizer.zero_grad()
        worker.load()
        loss = loss_of(next(stream))
        torch.autograd.backward(loss)
        worker.hand_over()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer in optimizers:
            optimizer.step()
        ema.update(model)
        seen = loss.item() if step == 0 else 0.98 * seen + 0.02 * loss.item()
        if step % 50 == 49:
            rate = (time.monotonic() - started) / (step + 1)
            logger.info("step %d of %d: loss %.4f, %.2f s a step", step + 1, schedule.steps, seen, rate)
        if after is not None and step % 500 == 499:
            after(step + 1, ema.model)
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
    return [torch.optim.Muon(matrices, lr=schedule.peak, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"), adamw]
