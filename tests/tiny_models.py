"""The embedded models for tests of LoRAs, and the smallest random FLUX that still has every kind of layer."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from torch import nn

from engine.loading import load_models
from engine.profiles import model_profiles
from request import Mode
from settings import Settings


def tiny_pipelines() -> dict[str, Any]:
    """Pipelines of tiny-dev and tiny-schnell, loaded anew."""
    models = load_models(model_profiles("tiny", Settings()), torch.device("cpu"))
    return {name: model.pipelines[Mode.TXT2IMG] for name, model in models.items()}


def narrow_transformer(
    blocks: int = 1,
    singles: int = 1,
    heads: int = 2,
    head: int = 16,
    seed: int = 0,
    text: int = 24,
    pooled: int = 20,
    guidance: bool = True,
) -> FluxTransformer2DModel:
    """A random transformer, float32, frozen."""
    torch.manual_seed(seed)
    model = FluxTransformer2DModel(
        num_layers=blocks, num_single_layers=singles, attention_head_dim=head, num_attention_heads=heads,
        in_channels=16, joint_attention_dim=text, pooled_projection_dim=pooled, guidance_embeds=guidance,
        axes_dims_rope=(head // 4, head // 4, head // 2),
    )  # fmt: skip
    return model.eval().requires_grad_(False)


def inputs_of(model: FluxTransformer2DModel, tokens: int = 16, text: int = 4, seed: int = 0) -> dict[str, Any]:
    """Random inputs of one call with this many image tokens."""
    generator = torch.Generator().manual_seed(seed)
    config, dtype = model.config, next(model.parameters()).dtype

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    return {
        "hidden_states": random(1, tokens, config.in_channels),
        "encoder_hidden_states": random(1, text, config.joint_attention_dim),
        "pooled_projections": random(1, config.pooled_projection_dim),
        "timestep": torch.tensor([0.5], dtype=dtype),
        "guidance": torch.tensor([3.0]) if config.guidance_embeds else None,
        "img_ids": torch.zeros(tokens, 3),
        "txt_ids": torch.zeros(text, 3),
        "return_dict": False,
    }


def weights_hash(modules: Mapping[str, nn.Module]) -> str:
    """A digest of all names and bytes in the modules' state dicts, and of the classes of their layers."""
    digest = hashlib.sha256()
    for part, module in sorted(modules.items()):
        for name, tensor in module.state_dict().items():
            digest.update(f"{part}.{name}".encode())
            digest.update(tensor.detach().contiguous().view(torch.uint8).numpy().data)
        digest.update("".join(f"{n}{type(m).__name__}" for n, m in module.named_modules()).encode())
    return digest.hexdigest()
