"""FLUX.1 dev and schnell at their real sizes, without memory: models, engine, requests, LoRAs. Measures nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from torch import nn
from transformers import CLIPTokenizer, T5TokenizerFast

from benchmarks.dry_run.device import DEVICE
from benchmarks.models import MODELS, building, clip_of, t5_of, vae_of
from benchmarks.plan import RANK
from benchmarks.scales import FULL, Scale
from engine.device_thread import DeviceThread
from engine.engine import EVERYTHING_ON_THE_DEVICE, Engine
from engine.fp8 import DYNAMIC
from engine.lean_transformer import REQUEST, RequestState
from engine.loading import Model, pipelines_over
from engine.memory_plan import BF16_BYTES, Layout, Placement, Sizes, sizes_of
from engine.precision import Precision
from engine.profiles import TINY, ModelProfile
from engine.requantise import requantise
from engine.start import assemble
from lora_loading.reading.adapter import LoraAdapter
from lora_loading.reading.layers import LayerUpdate
from lora_loading.shapes import TRANSFORMER
from lora_loading.updates import Dora, LowRank
from request import Mode

HOST = torch.device("cpu")


def shortened(blocks: int, singles: int) -> Scale:
    """FLUX.1 with this many blocks of each kind."""
    return replace(FULL, transformer={**FULL.transformer, "num_layers": blocks, "num_single_layers": singles})


def build_models(layout: Layout = EVERYTHING_ON_THE_DEVICE, scale: Scale = FULL) -> dict[str, Model]:
    """Both models, placed as the engine's own loading places them; within `fake_tensors`."""
    tokenizer = CLIPTokenizer.from_pretrained(TINY / "tiny-dev", subfolder="tokenizer")
    tokenizer_2 = T5TokenizerFast.from_pretrained(TINY / "tiny-dev", subfolder="tokenizer_2")
    with building(_place(layout.pristine), torch.bfloat16):
        transformers = {
            name: FluxTransformer2DModel(**scale.transformer, guidance_embeds=guidance)
            for name, guidance in MODELS.items()
        }
    with building(_place(layout.text_encoders), torch.bfloat16):
        encoders: dict[str, nn.Module] = {"text_encoder": clip_of(scale, tokenizer), "text_encoder_2": t5_of(scale)}
    with building(DEVICE, torch.bfloat16):
        vae = vae_of(scale)
    for module in (*transformers.values(), *encoders.values(), vae):
        module.eval().requires_grad_(False)
    shared = {"vae": vae, **encoders, "tokenizer": tokenizer, "tokenizer_2": tokenizer_2}
    models = {}
    for name, transformer in transformers.items():
        scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(TINY / f"tiny-{name}", subfolder="scheduler")
        profile = ModelProfile(name, "", "", scale.text_tokens[name])
        models[name] = Model(profile, pipelines_over(transformer, {**shared, "scheduler": scheduler}))
    return models


def _place(placement: Placement) -> torch.device:
    return DEVICE if placement is Placement.DEVICE else HOST


def engine_of(
    layout: Layout = EVERYTHING_ON_THE_DEVICE,
    scale: Scale = FULL,
    *,
    compiling: bool = False,
    spare_bytes: int | None = None,
) -> Engine:
    """The engine over both models, in both precisions; it runs in the calling thread, whose tensors are fake."""
    models = build_models(layout, scale)
    engine = assemble(
        models, DYNAMIC, DEVICE, layout,
        compiling=compiling, lora_gain=1.5, rewrite=requantise, thread=DeviceThread(adopt=True),
        spare_bytes=spare_bytes,
    )  # fmt: skip
    for model in (*engine.exact.models.values(), *(engine.fast.models.values() if engine.fast else ())):
        for pipeline in model.pipelines.values():
            pipeline.set_progress_bar_config(disable=True)
    return engine


def transformer_of(engine: Engine, precision: str, model: str = "dev") -> Any:
    """A model's transformer as its pipelines call it; `precision` is "exact" or "fast"."""
    return precision_of(engine, precision).models[model].pipelines[Mode.TXT2IMG].transformer


def precision_of(engine: Engine, name: str) -> Precision:
    """The engine's precision "exact" or "fast"."""
    return engine.fast if name == "fast" and engine.fast is not None else engine.exact


def flux_sizes(scale: Scale = FULL) -> Sizes:
    """What the memory plan is made from; no checker."""
    with torch.device("meta"):
        transformers = [FluxTransformer2DModel(**scale.transformer, guidance_embeds=g) for g in MODELS.values()]
        encoders = [clip_of(FULL, CLIPTokenizer.from_pretrained(TINY / "tiny-dev", subfolder="tokenizer")), t5_of(FULL)]
        vae = vae_of(FULL)
    return sizes_of(transformers, encoders, vae, max(FULL.text_tokens.values()), fp8=True, checker_bytes=0)


def loras(engine: Engine, count: int, rank: int = RANK) -> list[tuple[LoraAdapter, float]]:
    """A stack of LoRAs for all linear layers of the blocks, their factors in host memory."""
    layers = engine.exact.adapters["dev"].shapes.by_component[TRANSFORMER].values()
    wanted = [(layer.name, layer.weight) for layer in layers if len(layer.weight) == 2 and "blocks" in layer.name]
    return [(_lora(f"lora {index}", wanted, rank), 1.0 - 0.3 * index) for index in range(count)]


def dora(engine: Engine, most_bytes: float) -> list[tuple[LoraAdapter, float]]:
    """A DoRA of as many linear layers of the blocks as have weights of at most so many bytes together."""
    ((adapter, scale),) = loras(engine, 1)
    changes, left = [], most_bytes
    for layer in adapter.layers:
        a, b = layer.update.tensors()
        new_bytes = BF16_BYTES * len(b) * a.shape[1]
        if new_bytes <= left:
            left -= new_bytes
            magnitude = torch.empty(len(b), 1, dtype=torch.bfloat16, device=HOST)
            changes.append(replace(layer, update=Dora(layer.update, magnitude)))
    return [(LoraAdapter("dora", "random", tuple(changes)), scale)]


def _lora(digest: str, layers: Sequence[tuple[str, Sequence[int]]], rank: int) -> LoraAdapter:
    """As it is read from a file: all factors are views of one block of memory."""
    sizes = [rank * side for _, (rows, columns) in layers for side in (columns, rows)]
    parts = iter(torch.empty(sum(sizes), dtype=torch.bfloat16, device=HOST).split(sizes))  # type: ignore[no-untyped-call]
    updates = tuple(
        LayerUpdate(TRANSFORMER, name, "weight", LowRank(next(parts).view(rank, -1), next(parts).view(-1, rank), 1.0))
        for name, _ in layers
    )
    return LoraAdapter(digest, "random", updates)


def request_state(steps: int) -> dict[str, RequestState]:
    """What the steps of a new request share, with a schedule on the device."""
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(TINY / "tiny-schnell", subfolder="scheduler")
    scheduler.timesteps = torch.empty(steps, device=DEVICE)
    scheduler.set_begin_index(0)
    return {REQUEST: RequestState(scheduler)}


@torch.inference_mode()
def take_step(
    transformer: Any, image_tokens: int = 4096, text_tokens: int = 512, shared: dict[str, RequestState] | None = None
) -> None:
    """One denoising step, as a pipeline calls for it; `shared` is what the engine has the steps of a request share."""

    def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(*shape, device=DEVICE, dtype=dtype)

    transformer(
        hidden_states=empty(1, image_tokens, 64),
        timestep=empty(1),
        guidance=empty(1, dtype=torch.float32) if transformer.config.guidance_embeds else None,
        pooled_projections=empty(1, 768),
        encoder_hidden_states=empty(1, text_tokens, 4096),
        txt_ids=empty(text_tokens, 3),
        joint_attention_kwargs=shared,
        img_ids=empty(image_tokens, 3),
        return_dict=False,
    )


@torch.inference_mode()
def decode(vae: Any, height: int, width: int) -> None:
    """Decode latents of this size, as the pipelines do."""
    vae.decode(torch.empty(1, 16, height, width, dtype=torch.bfloat16, device=DEVICE), return_dict=False)
