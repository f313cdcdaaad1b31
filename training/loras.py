"""Train the two small LoRAs of the tests on tiny-dev: a style (dark stripes) and an object (a shape called `TOK`).

They are trained with PEFT at guidance 1, as trainers do, and saved in the PEFT format through diffusers.
"""

from __future__ import annotations

import copy
import random
from pathlib import Path

import torch
from diffusers import AutoencoderTiny, FluxPipeline, FluxTransformer2DModel
from peft import LoraConfig, get_peft_model_state_dict

from training.data import Bucket, batches, make_pool
from training.distil import plain_loss
from training.text import TextEncoders
from training.train import Schedule, train
from training.world import SHAPES, TRIGGER

RANK = 6
TARGETS = (
    r".*(attn\.(to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out)"
    r"|ff\.net\.0\.proj|ff\.net\.2|proj_mlp|single_transformer_blocks\.\d+\.proj_out)"
)
SCHEDULE = Schedule(steps=600, peak=2e-3, warmup=30, decay=0.6)
BUCKETS = [
    Bucket((256, 256), 0.5, 500, keep=96),
    Bucket((512, 512), 0.5, 250, keep=160),
]


def train_lora(
    dev: FluxTransformer2DModel, vae: AutoencoderTiny, text: TextEncoders, path: Path, *, style: bool, seed: int
) -> None:
    """Train one LoRA and write it to `path`: the striped style, or the arrow as the shape `TOK`."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    shapes = SHAPES if style else (TRIGGER,)
    pools = [make_pool(vae, text, b.size, b.images, rng, shapes, striped=style, paired=0.15) for b in BUCKETS]
    model = copy.deepcopy(dev).requires_grad_(False)
    model.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=TARGETS, init_lora_weights=True))
    average = train(model, plain_loss, batches(pools, BUCKETS, text, rng), SCHEDULE)
    layers = {name: weight.half().contiguous() for name, weight in get_peft_model_state_dict(average).items()}
    FluxPipeline.save_lora_weights(path.parent, transformer_lora_layers=layers, weight_name=path.name)
