"""Load a profile's models from local folders and build the diffusers pipelines."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
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
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import safe_open
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

from engine.profiles import ModelProfile
from engine.timeline import Timeline
from request import Mode

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


Shared = Mapping[str, Any]
"""The parts that models share, by their names in diffusers' pipelines."""


def load_models(
    profiles: tuple[ModelProfile, ...],
    device: torch.device,
    transformers_at: torch.device | None = None,
    text_encoders_at: torch.device | None = None,
    timeline: Timeline | None = None,
    meanwhile: Callable[[Shared], None] | None = None,
) -> dict[str, Model]:
    """Load all models of a profile by name; text encoders, tokenizers and VAE are loaded once for all of them.

    Transformers are read in threads of their own, beside each other and beside the other parts.

    Args:
        profiles: their sources are local folders.
        device: where the models run: in bf16 on CUDA, in float32 elsewhere.
        transformers_at: where the transformers are loaded; None for `device`.
        text_encoders_at: where the text encoders are loaded; None for `device`.
        timeline: to note each part in.
        meanwhile: called with the first model's shared parts while transformers are still read. Libraries that load
            parts change torch's default type for the whole process; none of them is at work then.
    """
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    timeline = timeline or Timeline()
    transformers = {profile.name: empty_transformer(profile.source) for profile in profiles}
    with ThreadPoolExecutor(len(profiles), thread_name_prefix="read") as readers:
        read = [readers.submit(_read, profile, transformers_at or device, dtype, timeline) for profile in profiles]
        shared: dict[str, Shared] = {}
        for source in dict.fromkeys(profile.shared_source for profile in profiles):
            shared[source] = _load_shared(source, device, text_encoders_at or device, dtype, timeline)
        if meanwhile is not None:
            meanwhile(shared[profiles[0].shared_source])
        # in this thread: while diffusers builds a module, parameters that are set anywhere lose their memory
        for profile, reading in zip(profiles, read, strict=True):
            transformers[profile.name].load_state_dict(reading.result(), assign=True)
    return {p.name: model_over(p, transformers[p.name], shared[p.shared_source]) for p in profiles}


def model_over(profile: ModelProfile, transformer: FluxTransformer2DModel, shared: Shared) -> Model:
    """A model with pipelines over these parts and its own schedulers."""
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(profile.source, subfolder="scheduler")
    return Model(profile, pipelines_over(transformer, {"scheduler": scheduler, **shared}))


def empty_transformer(source: str, **changed: int) -> FluxTransformer2DModel:
    """A transformer without memory, by the config in a model's folder; `changed` stands for its own values there."""
    config = FluxTransformer2DModel.load_config(source, subfolder="transformer")
    with torch.device("meta"):
        transformer = FluxTransformer2DModel.from_config({**config, **changed})
    return transformer.eval().requires_grad_(False)


def _read(profile: ModelProfile, device: torch.device, dtype: torch.dtype, timeline: Timeline) -> dict[str, Tensor]:
    """The weights of a transformer by name, on the device; touches no module.

    They go straight to a GPU, not through host memory: published figures for FLUX's transformer are 1.09 s and 4.86 s.
    In a stream of their own they do not wait for what is computed meanwhile, nor that for them.
    """
    weights: dict[str, Tensor] = {}
    with timeline.part(f"transformer {profile.name}"), _stream_of_its_own(device):
        for file in _weight_files(Path(profile.source) / "transformer"):
            with safe_open(file, framework="pt", device=str(device)) as opened:
                weights |= {name: opened.get_tensor(name).to(dtype) for name in opened.keys()}  # noqa: SIM118
    return weights


def _weight_files(folder: Path) -> list[Path]:
    """One file, or the shards that an index names."""
    index = folder / f"{SAFETENSORS_WEIGHTS_NAME}.index.json"
    if not index.exists():
        return [folder / SAFETENSORS_WEIGHTS_NAME]
    places = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
    return [folder / name for name in dict.fromkeys(places)]


@contextmanager
def _stream_of_its_own(device: torch.device) -> Iterator[None]:
    """Within, this thread's work on a CUDA device has a stream of its own; at the end that work is done."""
    if device.type != "cuda":
        yield
        return
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        yield
    stream.synchronize()


def _load_shared(
    source: str, device: torch.device, text_encoders_at: torch.device, dtype: torch.dtype, timeline: Timeline
) -> Shared:
    with timeline.part("VAE"):
        vae = _loaded(AutoModel, source, "vae", device, dtype)
    with timeline.part("text encoder CLIP"):
        clip = _loaded(CLIPTextModel, source, "text_encoder", text_encoders_at, dtype)
    with timeline.part("text encoder T5"):
        t5 = _loaded(T5EncoderModel, source, "text_encoder_2", text_encoders_at, dtype)
    with timeline.part("tokenizers"):
        tokenizer = CLIPTokenizer.from_pretrained(source, subfolder="tokenizer")
        tokenizer_2 = T5TokenizerFast.from_pretrained(source, subfolder="tokenizer_2")
    return {
        "vae": vae,
        "text_encoder": clip,
        "text_encoder_2": t5,
        "tokenizer": tokenizer,
        "tokenizer_2": tokenizer_2,
    }


def _loaded(kind: Any, source: str, part: str, device: torch.device, dtype: torch.dtype) -> Any:  # noqa: ANN401
    """A frozen module from safetensors, on the device; straight to a GPU, as `_read` does it."""
    straight = device if device.type == "cuda" else None
    typed = {"torch_dtype" if kind is AutoModel else "dtype": dtype}
    module = kind.from_pretrained(source, subfolder=part, use_safetensors=True, device_map=straight, **typed)
    placed = module if straight else module.to(device)
    return placed.eval().requires_grad_(False)


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
