"""Load a profile's models from local folders and build the diffusers pipelines."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import (
    AutoModel,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxImg2ImgPipeline,
    FluxInpaintPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
)
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

from engine.profiles import ModelProfile
from request import Mode

logger = logging.getLogger(__name__)

PIPELINES: Mapping[Mode, type[DiffusionPipeline]] = {
    Mode.TXT2IMG: FluxPipeline,
    Mode.IMG2IMG: FluxImg2ImgPipeline,
    Mode.INPAINT: FluxInpaintPipeline,
}


@dataclass(frozen=True)
class Model:
    """One loaded model: one pipeline per mode, all over the same weights, each with its own scheduler."""

    profile: ModelProfile
    pipelines: Mapping[Mode, DiffusionPipeline]


def load_models(
    profiles: tuple[ModelProfile, ...],
    device: torch.device,
    transformers_at: torch.device | None = None,
    text_encoders_at: torch.device | None = None,
) -> dict[str, Model]:
    """Load all models of a profile by name; text encoders, tokenizers and VAE are loaded once for all of them.

    Args:
        profiles: their sources are local folders.
        device: where the models run: in bf16 on CUDA, in float32 elsewhere.
        transformers_at: where the transformers are loaded; None for `device`.
        text_encoders_at: where the text encoders are loaded; None for `device`.
    """
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    shared: dict[str, dict[str, Any]] = {}
    models = {}
    for profile in profiles:
        started = time.monotonic()
        source = profile.shared_source
        if source not in shared:
            shared[source] = _load_shared(source, device, text_encoders_at or device, dtype)
        transformer = _loaded(FluxTransformer2DModel, profile.source, "transformer", transformers_at or device, dtype)
        scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(profile.source, subfolder="scheduler")
        parts = {"scheduler": scheduler, **shared[source]}
        models[profile.name] = Model(profile, pipelines_over(transformer, parts))
        logger.info("loaded %s in %.1f s", profile.name, time.monotonic() - started)
    return models


def _load_shared(
    source: str, device: torch.device, text_encoders_at: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    return {
        "vae": _loaded(AutoModel, source, "vae", device, dtype),
        "text_encoder": _loaded(CLIPTextModel, source, "text_encoder", text_encoders_at, dtype),
        "text_encoder_2": _loaded(T5EncoderModel, source, "text_encoder_2", text_encoders_at, dtype),
        "tokenizer": CLIPTokenizer.from_pretrained(source, subfolder="tokenizer"),
        "tokenizer_2": T5TokenizerFast.from_pretrained(source, subfolder="tokenizer_2"),
    }


def _loaded(kind: Any, source: str, part: str, device: torch.device, dtype: torch.dtype) -> Any:  # noqa: ANN401
    """A frozen module from safetensors, on the device.

    Loaded straight to a GPU, not through host memory: published figures for FLUX's transformer are 1.09 s and 4.86 s.
    """
    straight = device if device.type == "cuda" else None
    typed = {"torch_dtype" if kind in (AutoModel, FluxTransformer2DModel) else "dtype": dtype}
    module = kind.from_pretrained(source, subfolder=part, use_safetensors=True, device_map=straight, **typed)
    return module.to(device).eval().requires_grad_(False)


def pipelines_over(transformer: FluxTransformer2DModel, parts: Mapping[str, Any]) -> dict[Mode, DiffusionPipeline]:
    """A pipeline per mode over a transformer and the other components, named as in diffusers; with new schedulers."""
    own = {name: part for name, part in parts.items() if name not in ("transformer", "scheduler")}
    return {
        mode: pipeline(
            transformer=transformer,
            scheduler=FlowMatchEulerDiscreteScheduler.from_config(parts["scheduler"].config),
            **own,
        )
        for mode, pipeline in PIPELINES.items()
    }
