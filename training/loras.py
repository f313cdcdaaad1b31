"""Train the two small LoRAs of the tests on tiny-dev: a style (dark stripes) and an object (a shape called `TOK`).

They are trained with PEFT at guidance 1, as trainers do, and saved in the PEFT format through diffusers. Each step's
scale is one of several, for the same images: what acts fully at 1 is then not overdone at go_fast's 1.5.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from torch import Tensor

from training.data import OBJECT, STYLE, Batch, Lesson, draw_batch, make_pool
from training.distil import flow_loss
from training.text import TextEncoders
from training.train import Schedule, train

RANK = 6
TARGETS = (
    r".*(attn\.(to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out)"
    r"|ff\.net\.0\.proj|ff\.net\.2|proj_mlp|single_transformer_blocks\.\d+\.proj_out)"
)
PROMPTS = 2000
IMAGES, SQUARES = 32, 7
LESSONS = {"tok-style": (STYLE, (1.0, 1.5), 1200), "tok-object": (OBJECT, (0.6, 1.0, 1.5), 1500)}
"""Of each LoRA: what is drawn, the scales and the steps. Half an object is none; half a style may be seen as such."""


def train_loras(dev: FluxTransformer2DModel, text: TextEncoders, work: Path, folder: Path, seed: int) -> None:
    """Train both LoRAs with checkpoints in `work`, and write them into `folder`."""
    for name, (lesson, scales, steps) in LESSONS.items():
        checkpoint, path = work / f"{name}.safetensors", folder / f"{name}.safetensors"
        train_lora(dev, text, lesson, scales, steps, checkpoint, path, seed)


def train_lora(
    dev: FluxTransformer2DModel,
    text: TextEncoders,
    lesson: Lesson,
    scales: tuple[float, ...],
    steps: int,
    checkpoint: Path,
    path: Path,
    seed: int,
) -> None:
    """Train one LoRA on a lesson and write it to `path`."""
    pool = make_pool(text, PROMPTS, lesson, f"{path.stem} {seed}")
    torch.manual_seed(seed)
    model = copy.deepcopy(dev).requires_grad_(False)
    model.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=TARGETS, init_lora_weights=True))
    model.compile_repeated_blocks(dynamic=False)
    flow = flow_loss(model, emphasis=1.0)
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]

    def loss(batch: Batch) -> Tensor:
        scale = scales[int(torch.randint(len(scales), ()))]
        for layer in layers:
            layer.set_scale("default", scale)
        return flow(batch)

    def batch_at(step: int) -> Batch:
        batch = draw_batch(pool, IMAGES, SQUARES, lesson, f"{path.stem} {seed} {step}")
        return replace(batch, guidance=torch.ones_like(batch.guidance))

    schedule = Schedule(steps=steps, peak=2e-3, warmup=30, decay=0.6)
    average = train(model, loss, batch_at, schedule, checkpoint, seed=seed)
    weights = {name: weight.half().contiguous() for name, weight in get_peft_model_state_dict(average).items()}
    FluxPipeline.save_lora_weights(path.parent, transformer_lora_layers=weights, weight_name=path.name)
