"""The image of a request as latents, encoded once for all images that begin from it.

diffusers' pipelines take an image's latents for the image itself. Left to themselves they encode it anew for each
output, and for a mask also what the mask leaves of it, which the FLUX.1 served here does not look at.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.pipelines.flux.pipeline_flux_img2img import retrieve_latents
from torch import Tensor

from request import GenerationRequest


@dataclass(frozen=True)
class EncodedImage:
    """What a VAE made of an image: for most a distribution, of which each output draws its own latents."""

    encoded: Any
    shift: float
    scale: float

    def arguments(self, request: GenerationRequest, generator: torch.Generator) -> dict[str, Any]:
        """What a pipeline is called with. Draws from the generator what the pipeline would draw first."""
        latents = self._latents(generator)
        given = {"image": latents, "strength": request.strength}
        if request.mask is None:
            return given
        return {**given, "mask_image": request.mask, "masked_image_latents": latents}  # the last is not looked at

    def _latents(self, generator: torch.Generator) -> Tensor:
        """(1, 16, height / 8, width / 8), as the pipelines work them out."""
        latents: Tensor = (retrieve_latents(self.encoded, generator=generator) - self.shift) * self.scale
        return latents


@torch.inference_mode()
def encode_image(pipeline: DiffusionPipeline, request: GenerationRequest, device: torch.device) -> EncodedImage | None:
    """The request's image, encoded by the pipeline's VAE; None where the request has none."""
    if request.image is None:
        return None
    vae, size = pipeline.vae, request.size
    pixels = pipeline.image_processor.preprocess(request.image, height=size.height, width=size.width)
    pixels = pixels.to(device, vae.dtype)
    return EncodedImage(vae.encode(pixels), vae.config.shift_factor, vae.config.scaling_factor)
