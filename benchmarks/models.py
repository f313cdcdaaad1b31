"""FLUX.1 of random weights, built on the device: nothing is downloaded, and nothing is zero.

Zeros and other even numbers draw less power and run faster than a trained model's do, so weights are normally
distributed, as large as keeps states in range. The tokenizers are the embedded model's: their ids are below any
vocabulary's size, and texts are padded to FLUX.1's lengths.

Memory on an 80 GB card, in GB. The pristine weights stay for the whole run: two transformers 2 x 23.8, T5 9.5, CLIP
and VAE 0.4, together 57.5. Every contender works on `twin`s of the modules, which share these weights (but for the
VAE, whose layout in memory may be changed), so one that leaves them as they are adds nothing; ours in fp8 adds its
working copy of 11.9, the quantised peer one quantised model of 11.9 and its LoRA. No two contenders are there at the
same time: at most 69.4 and what a call needs.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5TokenizerFast

from benchmarks.scales import Scale
from engine.loading import Model, pipelines_over
from engine.profiles import TINY, ModelProfile

MODELS = {"dev": True, "schnell": False}
"""Whether each has a guidance embedder."""


@dataclass(frozen=True)
class Weights:
    """The pristine modules of both models. They are never run: contenders run twins of them."""

    transformers: Mapping[str, FluxTransformer2DModel]
    shared: Mapping[str, Any]
    """The VAE, both text encoders and tokenizers, by their names in diffusers' pipelines."""
    text_tokens: Mapping[str, int]

    def models(self, *names: str) -> dict[str, Model]:
        """Models as the engine takes them, of modules that nothing else uses; they share text encoders and VAE."""
        encoders = {part: twin(self.shared[part]) for part in ("text_encoder", "text_encoder_2")}
        parts = {**self.shared, **encoders, "vae": copy.deepcopy(self.shared["vae"])}
        return {name: self._model(name, parts) for name in names}

    def _model(self, name: str, parts: Mapping[str, Any]) -> Model:
        scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(TINY / f"tiny-{name}", subfolder="scheduler")
        pipelines = pipelines_over(twin(self.transformers[name]), {**parts, "scheduler": scheduler})
        return Model(ModelProfile(name, "", "", self.text_tokens[name]), pipelines)


def twin(module: Any) -> Any:  # noqa: ANN401 - the same class as the given
    """A module tree of its own over the same parameters: compiling or adapting it leaves the other alone."""
    return copy.deepcopy(module, {id(parameter): parameter for parameter in module.parameters()})


def build_weights(scale: Scale, device: torch.device) -> Weights:
    """Both models on the device, bf16 on CUDA and float32 elsewhere."""
    tokenizer = CLIPTokenizer.from_pretrained(TINY / "tiny-dev", subfolder="tokenizer")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with building(device, dtype):
        transformers = {
            name: FluxTransformer2DModel(**scale.transformer, guidance_embeds=guidance)
            for name, guidance in MODELS.items()
        }
        shared: dict[str, nn.Module] = {
            "vae": vae_of(scale),
            "text_encoder": clip_of(scale, tokenizer),
            "text_encoder_2": t5_of(scale),
        }
    generator = torch.Generator(device).manual_seed(0)
    for module in [*transformers.values(), *shared.values()]:
        randomise(module.eval().requires_grad_(False), generator)
    t5_tokenizer = T5TokenizerFast.from_pretrained(TINY / "tiny-dev", subfolder="tokenizer_2")
    tokenizers = {"tokenizer": tokenizer, "tokenizer_2": t5_tokenizer}
    return Weights(transformers, shared | tokenizers, scale.text_tokens)


def vae_of(scale: Scale) -> AutoencoderKL:
    """FLUX.1's VAE in these sizes."""
    blocks = len(scale.vae["block_out_channels"])
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        latent_channels=16,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
        **scale.vae,
    )


def clip_of(scale: Scale, tokenizer: Any) -> CLIPTextModel:  # noqa: ANN401 - transformers is not typed here
    """FLUX.1's first text encoder in these sizes, which ends its texts where the tokenizer does."""
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    return CLIPTextModel(CLIPTextConfig(pad_token_id=tokenizer.pad_token_id, **ends, **scale.clip))


def t5_of(scale: Scale) -> T5EncoderModel:
    """FLUX.1's second text encoder in these sizes."""
    return T5EncoderModel(T5Config(feed_forward_proj="gated-gelu", **scale.t5))


@contextmanager
def building(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Modules made inside get their parameters in this type, on this device, at once."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


@torch.no_grad()
def randomise(module: nn.Module, generator: torch.Generator) -> None:
    """Fill all parameters in place: matrices to keep the size of what they are given, norms near 1, biases near 0."""
    for name, parameter in module.named_parameters():
        if parameter.ndim > 1:
            parameter.normal_(0, parameter[0].numel() ** -0.5, generator=generator)
        else:
            parameter.normal_(float("norm" in name and name.endswith("weight")), 0.02, generator=generator)
