"""The losses: flow matching for tiny-dev, and few-step sampling for tiny-schnell from a trained teacher.

Guidance is an input of tiny-dev from the first step: the higher it is, the less chance there is in the images that it
is shown (`looseness` in `training/world.py`). Four steps: the student's velocity at t is the teacher's mean velocity
over the next quarter, found with a few Euler steps of the teacher (progressive distillation): one step of the student
ends where the teacher's steps end.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor

from training.attention import PartialAttention, velocity
from training.data import Batch
from training.flow_matching import mix, noise_levels, squared_error
from training.train import new_transformer

SCHNELL_GUIDANCE = 5.0
SCHNELL_STRIDE = 0.25
TEACHER_STEPS = 3

Loss = Callable[[Batch], Tensor]


def flow_loss(model: FluxTransformer2DModel, emphasis: float) -> Loss:
    """Flow matching on the batch's own images and guidance; `emphasis` as in `noise_levels`."""
    model.set_attn_processor(PartialAttention())

    def loss(batch: Batch) -> Tensor:
        levels = noise_levels(batch.tokens, emphasis)
        noisy, target = mix(batch, levels)
        return squared_error(velocity(model, noisy, levels, batch, batch.guidance), target)

    return loss


@torch.no_grad()
def fold_guidance(dev: FluxTransformer2DModel, guidance: float) -> FluxTransformer2DModel:
    """A transformer without guidance input that equals `dev` at this guidance, whose embedding is added to a bias."""
    schnell = new_transformer(guidance_embeds=False)
    weights = {k: v for k, v in dev.state_dict().items() if "guidance_embedder" not in k}
    schnell.load_state_dict(weights)
    embed = dev.time_text_embed
    constant = embed.guidance_embedder(embed.time_proj(torch.tensor([guidance * 1000.0])))[0]
    schnell.time_text_embed.timestep_embedder.linear_2.bias.add_(constant)
    return schnell


def few_step_loss(student: FluxTransformer2DModel) -> Loss:
    """Match the mean velocity of a frozen copy of the student over the next stride."""
    student.set_attn_processor(PartialAttention())
    teacher = copy.deepcopy(student).eval().requires_grad_(False)
    teacher.compile_repeated_blocks(dynamic=False)

    def loss(batch: Batch) -> Tensor:
        count = len(batch.latents)
        grid = torch.randint(1, 5, (count,)) * SCHNELL_STRIDE
        anywhere = torch.rand(count) * 0.95 + 0.05
        levels = torch.where(torch.rand(count) < 0.6, grid, anywhere)
        noisy, _ = mix(batch, levels)
        stride = levels.clamp(max=SCHNELL_STRIDE)
        with torch.no_grad():
            target = (noisy - _teacher_path(teacher, noisy, levels, stride, batch)) / stride[:, None, None]
        return squared_error(velocity(student, noisy, levels, batch, None), target)

    return loss


def _teacher_path(
    teacher: FluxTransformer2DModel, noisy: Tensor, levels: Tensor, stride: Tensor, batch: Batch
) -> Tensor:
    step = stride / TEACHER_STEPS
    for index in range(TEACHER_STEPS):
        noisy = noisy - step[:, None, None] * velocity(teacher, noisy, levels - index * step, batch, None)
    return noisy
