"""Distil guidance into the dev transformer, and few-step sampling into the schnell one, both from a trained teacher.

Guidance: the student, told g, matches v_empty + g (v_prompt - v_empty) of the teacher (classifier-free guidance in
one pass). Four steps: the student's velocity at t is the teacher's mean velocity over the next quarter, found with a
few Euler steps of the teacher (progressive distillation): one step of the student ends where the teacher's steps end.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor

from training.attention import PartialAttention, velocity
from training.data import Batch
from training.flow_matching import mix, noise_levels, weighted_error
from training.train import new_transformer

GUIDANCE_RANGE = (1.0, 6.0)
PLAIN_SHARE = 0.4
"""Share of the samples trained by plain flow matching at guidance 1."""
SCHNELL_GUIDANCE = 3.0
SCHNELL_STRIDE = 0.25
TEACHER_STEPS = 3

Loss = Callable[[Batch], Tensor]


def plain_loss(model: FluxTransformer2DModel, emphasis: float = 1.0) -> Loss:
    """Flow matching on the data at guidance 1; `emphasis` as in `noise_levels`."""
    model.set_attn_processor(PartialAttention())

    def loss(batch: Batch) -> Tensor:
        count = len(batch.latents)
        levels = noise_levels(count, batch.full_tokens, emphasis)
        noisy, target = mix(batch, levels)
        return weighted_error(velocity(model, noisy, levels, batch, torch.ones(count)), target, batch.weights)

    return loss


def guidance_loss(student: FluxTransformer2DModel, empty: tuple[Tensor, Tensor]) -> Loss:
    """Match the guided velocity of a frozen copy of the student, at a random guidance."""
    student.set_attn_processor(PartialAttention())
    teacher = copy.deepcopy(student).eval().requires_grad_(False)

    def loss(batch: Batch) -> Tensor:
        count = len(batch.latents)
        levels = noise_levels(count, batch.full_tokens, 1.0)
        noisy, target = mix(batch, levels)
        guidance = torch.empty(count).uniform_(*GUIDANCE_RANGE)
        plain = torch.rand(count) < PLAIN_SHARE
        with torch.no_grad():
            ones = torch.ones(count)
            prompted = velocity(teacher, noisy, levels, batch, ones)
            unprompted = velocity(teacher, noisy, levels, _without_prompts(batch, empty), ones)
        guided = unprompted + guidance[:, None, None] * (prompted - unprompted)
        target = torch.where(plain[:, None, None], target, guided)
        guidance = torch.where(plain, 1.0, guidance)
        return weighted_error(velocity(student, noisy, levels, batch, guidance), target, batch.weights)

    return loss


def _without_prompts(batch: Batch, empty: tuple[Tensor, Tensor]) -> Batch:
    count = len(batch.latents)
    return replace(batch, pooled=empty[0].expand(count, -1), states=empty[1].expand(count, -1, -1))


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

    def loss(batch: Batch) -> Tensor:
        count = len(batch.latents)
        grid = torch.randint(1, 5, (count,)) * SCHNELL_STRIDE
        anywhere = torch.rand(count) * 0.95 + 0.05
        levels = torch.where(torch.rand(count) < 0.75, grid, anywhere)
        noisy, _ = mix(batch, levels)
        stride = levels.clamp(max=SCHNELL_STRIDE)
        with torch.no_grad():
            target = (noisy - _teacher_path(teacher, noisy, levels, stride, batch)) / stride[:, None, None]
        return weighted_error(velocity(student, noisy, levels, batch, None), target, batch.weights)

    return loss


def _teacher_path(
    teacher: FluxTransformer2DModel, noisy: Tensor, levels: Tensor, stride: Tensor, batch: Batch
) -> Tensor:
    step = stride / TEACHER_STEPS
    for index in range(TEACHER_STEPS):
        noisy = noisy - step[:, None, None] * velocity(teacher, noisy, levels - index * step, batch, None)
    return noisy
