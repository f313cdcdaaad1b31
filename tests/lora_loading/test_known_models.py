"""The shapes from configurations are those of the models themselves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from lora_loading.known_models import FLUX_1, flux_1, tiny
from lora_loading.shapes import CLIP, T5, TRANSFORMER, components_of, shapes_of
from tests.tiny_models import tiny_pipelines


def test_flux_1() -> None:
    transformer: dict[str, Any] = dict(FLUX_1[TRANSFORMER])
    with torch.device("meta"):
        clip = CLIPTextModel(CLIPTextConfig(**FLUX_1[CLIP], num_attention_heads=12))
        t5 = T5EncoderModel(T5Config(**FLUX_1[T5], feed_forward_proj="gated-gelu"))
        models = {
            "dev": FluxTransformer2DModel(**transformer),
            "schnell": FluxTransformer2DModel(**{**transformer, "guidance_embeds": False}),
        }
    for name, model in models.items():
        found = shapes_of({TRANSFORMER: model, CLIP: clip, T5: t5})
        assert set(found.layers) == set(flux_1(name).layers)
        assert len(found.layers) == len(flux_1(name).layers)


@pytest.mark.parametrize("name", ["dev", "schnell"])
def test_the_embedded_models(name: str) -> None:
    assert set(shapes_of(components_of(tiny_pipelines()[name])).layers) == set(tiny(name).layers)
