"""Decide from sizes alone what is placed on the device and what in host memory, and which precisions are served.

FLUX.1 [dev] and [schnell] take 47.6 GB in their original precision, the fp8 copy that both share 12.1 GB, the text
encoders 9.8 GB and the VAE 0.2 GB; decoding an image of 1440x1440 takes 4.2 GB more. `LAYOUTS` lists the ways to place
them, best first, and the first one that fits is the plan. A layout needs memory for what stays on the device, and for
the larger of two phases with the parts that each phase moves in: encoding a prompt, and generating an image.

LoRAs in the original precision are counted as low-rank factors beside the weights of the one transformer that runs. A
change of another kind (DoRA, LoKr, LoHa, OFT, a full difference) makes a new weight, up to 24 GB for all layers. Where
the pristine weights stay on the device these have to fit into what the plan leaves, `Plan.spare_bytes`; a stack whose
`new_weights_bytes` are more runs in fp8. Where one transformer at a time is moved in, they come in its weights' place.

Where fp8 saves memory but not time (weight-only, below compute capability 8.9) the layouts are the same: `go_fast`
still runs in fp8 with LoRAs merged, and a small card serves fp8 only. Where fp8 does not work, the working copy has
size 0 and `fast` is not served.

Knows no device: memory is a number, models are modules without weights. Moves nothing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import diffusers
import torch
from diffusers import FluxTransformer2DModel, ModelMixin
from torch import nn
from transformers import AutoConfig, CLIPTextModel, T5EncoderModel

from engine.fp8 import FP8_MULTIPLE
from engine.precision import RESERVED_RANK
from engine.profiles import ModelProfile
from engine.working_copy import BLOCKS
from errors import SettingsError
from lora_loading.applying.manager import changes_by_layer
from lora_loading.reading.adapter import Stack
from lora_loading.shapes import TRANSFORMER, ModelShapes
from request import MAX_SIDE, MULTIPLE, Size

BF16_BYTES = 2
SCALE_BYTES = 4
LARGEST = Size(MAX_SIDE, MAX_SIDE)
RESERVE_BYTES = 1_500_000_000
"""CUDA's context (0.5 GB), the libraries' workspaces (0.3 GB), DoRA's gains (0.3 GB at most), and fragmentation."""
EXACT, FAST = "exact", "fast"


class Placement(Enum):
    """Where a part is placed."""

    DEVICE = "on the device"
    ON_DEMAND = "in host memory, on the device while in use"
    HOST = "in host memory"


@dataclass(frozen=True)
class Sizes:
    """Bytes of everything that needs memory on the device."""

    pristine: tuple[int, ...]
    """Each model's transformer in bf16."""
    working_copy: int
    """The fp8 copy of the blocks, shared by all models, and each model's other layers; 0 where fp8 does not work."""
    adapters: int
    """LoRA factors beside one transformer in its original precision; in the working copy they are merged."""
    text_encoders: int
    vae: int
    checker: int
    """The safety checker's weights."""
    activations: int
    """The most that is allocated besides weights while an image is generated: see `activation_bytes`."""


@dataclass(frozen=True)
class Layout:
    """One way to place the parts. The VAE and the checker are on the device in every layout."""

    name: str
    pristine: Placement
    working_copy: Placement
    text_encoders: Placement
    precisions: tuple[str, ...]


LAYOUTS = (
    Layout("everything on the device", Placement.DEVICE, Placement.DEVICE, Placement.DEVICE, (EXACT, FAST)),
    Layout(
        "one transformer on the device at a time",
        Placement.ON_DEMAND, Placement.ON_DEMAND, Placement.DEVICE, (EXACT, FAST),
    ),
    Layout(
        "fp8 alone, so exact requests are served in fp8",
        Placement.HOST, Placement.DEVICE, Placement.ON_DEMAND, (FAST,),
    ),
)  # fmt: skip
"""Best first. Usual cards: 80 GB; 40 and 48 GB; 24 GB."""


@dataclass(frozen=True)
class Plan:
    """The chosen layout with its numbers. `str()` is one line for the log."""

    layout: Layout
    sizes: Sizes
    precisions: tuple[str, ...]
    """The served precisions; a request for another one runs in the served one."""
    needed_bytes: int
    """The most that is used on the device at any time."""
    device_bytes: int | None
    """The device's memory; None for no limit."""
    reason: str
    """Why no better layout was chosen."""

    @property
    def spare_bytes(self) -> int | None:
        """How much the new weights of a stack may take on the device beside the pristine ones; None for no limit."""
        if self.device_bytes is None or self.layout.pristine is not Placement.DEVICE:
            return None
        return self.device_bytes - self.needed_bytes

    @property
    def host_bytes(self) -> int:
        """The host memory that the layout needs, without the new weights of LoRAs that are not low-rank."""
        parts = movable_parts(self.layout, self.sizes)
        return sum(size for _, placement, size in parts if placement is not Placement.DEVICE)

    def __str__(self) -> str:
        sizes, layout = self.sizes, self.layout
        limit = "without limit" if self.device_bytes is None else f"of {_gigabytes(self.device_bytes)}"
        parts = [
            *(f"{name} {_gigabytes(size)} {where.value}" for name, where, size in movable_parts(layout, sizes)),
            f"VAE {_gigabytes(sizes.vae)}, checker {_gigabytes(sizes.checker)}",
            f"LoRAs {_gigabytes(sizes.adapters)}, activations {_gigabytes(sizes.activations)}",
            f"reserve {_gigabytes(RESERVE_BYTES)}",
        ]
        if self.spare_bytes is not None:
            parts.append(f"{_gigabytes(self.spare_bytes)} are left for LoRAs that are not low-rank")
        return (
            f"{layout.name} ({self.reason}): at most {_gigabytes(self.needed_bytes)} {limit}, "
            f"{_gigabytes(self.host_bytes)} of host memory; serves {' and '.join(self.precisions)}; {'; '.join(parts)}"
        )


def plan_memory(sizes: Sizes, device_bytes: int | None) -> Plan:
    """The best layout that fits.

    Args:
        sizes: of the parts.
        device_bytes: the device's whole memory; None for a CPU, where no limit is checked.

    Raises:
        SettingsError: no layout fits.
    """
    needs: list[int] = []
    for layout in LAYOUTS:
        precisions = tuple(p for p in layout.precisions if p != FAST or sizes.working_copy)
        if not precisions:
            continue
        needed = needed_bytes(layout, sizes)
        if device_bytes is None or needed <= device_bytes:
            reason = f"the next better layout needs {_gigabytes(needs[-1])}" if needs else "it fits"
            return Plan(layout, sizes, precisions, needed, device_bytes, reason)
        needs.append(needed)
    raise SettingsError(
        f"The profile's models need a device with at least {_gigabytes(min(needs))} of memory for images up to "
        f"{LARGEST.width}x{LARGEST.height}; this one has {_gigabytes(device_bytes or 0)}. "
        "Use a larger device, or set FLUX_PROFILE to tiny."
    )


def movable_parts(layout: Layout, sizes: Sizes) -> list[tuple[str, Placement, int]]:
    """Name, placement and bytes of the parts that layouts place differently; parts of size 0 are left out."""
    parts = (
        ("transformers", layout.pristine, sum(sizes.pristine)),
        ("fp8 copy", layout.working_copy, sizes.working_copy),
        ("text encoders", layout.text_encoders, sizes.text_encoders),
    )
    return [part for part in parts if part[2]]


def needed_bytes(layout: Layout, sizes: Sizes) -> int:
    """The most that a layout has on the device at any time, with LoRAs that are low-rank."""
    staying = sum(size for _, placement, size in movable_parts(layout, sizes) if placement is Placement.DEVICE)
    staying += sizes.vae + sizes.checker + RESERVE_BYTES
    exact = max(sizes.pristine) if layout.pristine is Placement.ON_DEMAND else 0
    fast = sizes.working_copy if layout.working_copy is Placement.ON_DEMAND else 0
    beside = sizes.adapters if EXACT in layout.precisions else 0
    encoding = sizes.text_encoders if layout.text_encoders is Placement.ON_DEMAND else 0
    return staying + max(encoding, max(exact + beside, fast) + sizes.activations)


def new_weights_bytes(stack: Stack, shapes: ModelShapes) -> int:
    """The memory of the weights that a stack makes anew in a transformer in its original precision, in bf16.

    These are the weights of all layers that it changes by more than low-rank factors.

    Args:
        stack: adapters that were read for `shapes`.
        shapes: the model's.
    """
    layers = shapes.by_component[TRANSFORMER]
    changes = changes_by_layer([(adapter, scale) for adapter, scale in stack if scale], TRANSFORMER)
    return sum(BF16_BYTES * math.prod(layers[name].weight) for name, change in changes.items() if change.weight)


# Sizes


def profile_sizes(profiles: Sequence[ModelProfile], fp8: bool, checker_bytes: int) -> Sizes:
    """The sizes of a profile's parts, from their configs.

    Args:
        profiles: their sources are local folders; only the configs in them are read.
        fp8: whether fp8 works on the device, for computing or for storage alone.
        checker_bytes: the memory that the safety checker uses on the device.
    """
    shared = profiles[0].shared_source
    with torch.device("meta"):
        transformers = [
            FluxTransformer2DModel.from_config(FluxTransformer2DModel.load_config(p.source, subfolder="transformer"))
            for p in profiles
        ]
        clip = CLIPTextModel(AutoConfig.from_pretrained(shared, subfolder="text_encoder"))
        t5 = T5EncoderModel(AutoConfig.from_pretrained(shared, subfolder="text_encoder_2"))
        vae_config = json.loads((Path(shared) / "vae" / "config.json").read_text(encoding="utf-8"))
        vae = getattr(diffusers, vae_config["_class_name"]).from_config(vae_config)
    text_tokens = max(profile.max_prompt_tokens for profile in profiles)
    return sizes_of(transformers, [clip, t5], vae, text_tokens, fp8=fp8, checker_bytes=checker_bytes)


def sizes_of(
    transformers: Sequence[FluxTransformer2DModel],
    text_encoders: Sequence[nn.Module],
    vae: ModelMixin,
    text_tokens: int,
    *,
    fp8: bool,
    checker_bytes: int,
) -> Sizes:
    """The sizes of modules, which may be on the meta device; see `profile_sizes`."""
    return Sizes(
        pristine=tuple(map(_bf16_bytes, transformers)),
        working_copy=working_copy_bytes(transformers) if fp8 else 0,
        adapters=max(adapter_bytes(transformer, RESERVED_RANK) for transformer in transformers),
        text_encoders=sum(map(_bf16_bytes, text_encoders)),
        vae=_bf16_bytes(vae),
        checker=checker_bytes,
        activations=max(activation_bytes(transformer, vae, LARGEST, text_tokens) for transformer in transformers),
    )


def working_copy_bytes(transformers: Sequence[nn.Module]) -> int:
    """The fp8 copy: large weights of the blocks take 1 byte per value and a float32 scale per row, the rest is bf16.

    The blocks exist once; the embedders, the last norm and the last projection once per model.
    """
    blocks = [block for name in BLOCKS for block in transformers[0].get_submodule(name).modules()]
    saved = sum(_saved_by_fp8(layer) for layer in blocks if isinstance(layer, nn.Linear))
    own = sum(
        _bf16_bytes(part) for model in transformers[1:] for name, part in model.named_children() if name not in BLOCKS
    )
    return _bf16_bytes(transformers[0]) - saved + own


def _saved_by_fp8(layer: nn.Linear) -> int:
    rows, columns = layer.weight.shape
    if rows % FP8_MULTIPLE or columns % FP8_MULTIPLE:
        return 0
    return rows * columns * (BF16_BYTES - 1) - rows * SCALE_BYTES


def adapter_bytes(transformer: nn.Module, rank: int) -> int:
    """LoRA factors of this rank for every linear layer of the blocks, in bf16: rank * (in + out) values each."""
    layers = [layer for name in BLOCKS for layer in transformer.get_submodule(name).modules()]
    return sum(BF16_BYTES * rank * sum(layer.weight.shape) for layer in layers if isinstance(layer, nn.Linear))


def activation_bytes(transformer: FluxTransformer2DModel, vae: ModelMixin, size: Size, text_tokens: int) -> int:
    """The most that is allocated besides weights while one image is generated: the larger of two peaks.

    Transformer: the unit is a block's states, (tokens, width) in bf16. Before its last product a single block holds the
    states (1), the attention's output (1), the MLP's (4) and both joined (5). Without a compiler, quantising the joined
    tensor makes two float32 copies (20) and one in fp8 (2.5), and the product adds 1: under 40 in all. A compiled fp8
    block holds about 15. The attention scores are never stored as a whole.

    VAE: the unit is the widest full-size feature map of the last block, (channels, height, width) in bf16, with the
    channels of the block before. Its first convolution holds its input, the residual, a copy of the input in the
    convolution's layout, and outputs of half the channels: 4. Encoding has half as many channels.
    """
    tokens = (size.width // MULTIPLE) * (size.height // MULTIPLE) + text_tokens
    width = transformer.config.num_attention_heads * transformer.config.attention_head_dim
    states = BF16_BYTES * tokens * width
    widest = vae.config.block_out_channels[:2][-1]
    maps = BF16_BYTES * widest * size.width * size.height
    return int(max(40 * states, 4 * maps))


def _bf16_bytes(module: nn.Module) -> int:
    return BF16_BYTES * sum(parameter.numel() for parameter in module.parameters())


def _gigabytes(size_bytes: int) -> str:
    return f"{size_bytes / 1e9:.1f} GB"
