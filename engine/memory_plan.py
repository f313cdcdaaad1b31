"""Decide from sizes alone what of a profile lives on the device, what in host memory, and which precisions that serves.

FLUX.1 [dev] and [schnell] in their original precision take 47.6 GB, the fp8 copy that both share 12.1 GB, the text
encoders 9.8 GB and the VAE 0.2 GB; an image of 1440x1440 takes 4.2 GB more while it is decoded. `LAYOUTS` says how that
is laid out, best first, and the first row that fits is the plan. A row needs room for what stays on the device, and
beside it for the larger of two moments, with what has to come in for each: a prompt is encoded, or an image is made.

Where fp8 saves memory but no time (weight-only, below compute capability 8.9) the rows are the same: `go_fast` stays a
precision of its own, which merges LoRAs, and a small card serves nothing but fp8. Where fp8 does not work at all, what
needs it falls away.

Knows no device: the memory is a number, the models are modules without weights. Moves nothing.
"""

from __future__ import annotations

import json
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
from request import MAX_SIDE, MULTIPLE, Size

BF16_BYTES = 2
SCALE_BYTES = 4
LARGEST = Size(MAX_SIDE, MAX_SIDE)
RESERVE_BYTES = 1_500_000_000
"""CUDA's context (0.5 GB), the libraries' workspaces (0.3 GB), and what fragmentation costs."""
EXACT, FAST = "exact", "fast"


class Placement(Enum):
    """Where a part lives."""

    DEVICE = "on the device"
    ON_DEMAND = "in host memory, on the device while in use"
    HOST = "in host memory"


@dataclass(frozen=True)
class Sizes:
    """Bytes of everything that wants to be on the device."""

    pristine: tuple[int, ...]
    """Each model's transformer in bf16."""
    working_copy: int
    """The fp8 copy of the blocks that all models share, and each model's other layers; 0 where fp8 does not work."""
    adapters: int
    """LoRAs beside one pristine transformer; the working copy has them merged."""
    text_encoders: int
    vae: int
    checker: int
    """The safety checker's weights."""
    activations: int
    """The most that is alive besides weights while an image is made: see `activation_bytes`."""


@dataclass(frozen=True)
class Layout:
    """One way to lay the parts out. The VAE and the checker stay on the device in all of them."""

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
    """What lives where. Its text is one line for the log."""

    row: Layout
    sizes: Sizes
    precisions: tuple[str, ...]
    """What is served; a request for another precision gets the one that is."""
    needed_bytes: int
    """Of the device at the most."""
    device_bytes: int | None
    """What the device has; None where that is no limit."""
    reason: str
    """Why no better row is taken."""

    @property
    def host_bytes(self) -> int:
        """What has to fit into the host's memory."""
        return sum(size for _, home, size in movable_parts(self.row, self.sizes) if home is not Placement.DEVICE)

    def __str__(self) -> str:
        sizes, row = self.sizes, self.row
        there = "without limit" if self.device_bytes is None else f"of {_gigabytes(self.device_bytes)}"
        parts = [
            *(f"{name} {_gigabytes(size)} {home.value}" for name, home, size in movable_parts(row, sizes)),
            f"VAE {_gigabytes(sizes.vae)}, checker {_gigabytes(sizes.checker)}",
            f"LoRAs {_gigabytes(sizes.adapters)}, activations {_gigabytes(sizes.activations)}",
            f"reserve {_gigabytes(RESERVE_BYTES)}",
        ]
        return (
            f"{row.name} ({self.reason}): at most {_gigabytes(self.needed_bytes)} {there}, "
            f"{_gigabytes(self.host_bytes)} of host memory; serves {' and '.join(self.precisions)}; {'; '.join(parts)}"
        )


def plan_residency(sizes: Sizes, device_bytes: int | None) -> Plan:
    """The best row that fits.

    Args:
        sizes: of the parts.
        device_bytes: the device's whole memory; None for a CPU, where the host's memory is the device's.

    Raises:
        SettingsError: no row fits.
    """
    needs: list[int] = []
    for row in LAYOUTS:
        precisions = tuple(p for p in row.precisions if p != FAST or sizes.working_copy)
        if not precisions:
            continue
        needed = needed_bytes(row, sizes)
        if device_bytes is None or needed <= device_bytes:
            reason = f"the next better needs {_gigabytes(needs[-1])}" if needs else "it fits"
            return Plan(row, sizes, precisions, needed, device_bytes, reason)
        needs.append(needed)
    raise SettingsError(
        f"The profile's models need a device with {_gigabytes(min(needs))} of memory at least, for images up to "
        f"{LARGEST.width}x{LARGEST.height}; this one has {_gigabytes(device_bytes or 0)}. "
        "Use a larger device, or set FLUX_PROFILE to tiny."
    )


def movable_parts(row: Layout, sizes: Sizes) -> list[tuple[str, Placement, int]]:
    """Name, home and bytes of the parts whose homes differ between the rows; of those only that there are."""
    parts = (
        ("transformers", row.pristine, sum(sizes.pristine)),
        ("fp8 copy", row.working_copy, sizes.working_copy),
        ("text encoders", row.text_encoders, sizes.text_encoders),
    )
    return [part for part in parts if part[2]]


def needed_bytes(row: Layout, sizes: Sizes) -> int:
    """The most that a row has on the device at any time."""
    staying = sum(size for _, home, size in movable_parts(row, sizes) if home is Placement.DEVICE)
    staying += sizes.vae + sizes.checker + RESERVE_BYTES
    exact = max(sizes.pristine) if row.pristine is Placement.ON_DEMAND else 0
    fast = sizes.working_copy if row.working_copy is Placement.ON_DEMAND else 0
    beside = sizes.adapters if EXACT in row.precisions else 0
    encoding = sizes.text_encoders if row.text_encoders is Placement.ON_DEMAND else 0
    return staying + max(encoding, max(exact + beside, fast) + sizes.activations)


# Sizes


def profile_sizes(profiles: Sequence[ModelProfile], fp8: bool, checker_bytes: int) -> Sizes:
    """The sizes of a profile's parts, from their configs.

    Args:
        profiles: their sources are local folders, of which the configs are read.
        fp8: whether the device has a use of fp8, be it to compute with or to store.
        checker_bytes: what the safety checker has on the device.
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
    """The fp8 copy: of the blocks, each large weight 1 byte a number and a float32 scale a row; the rest bf16.

    The blocks are there once; the embedders, the last norm and the last projection for each model.
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
    """LoRA factors of this rank beside every linear layer of the blocks, in bf16: rank * (in + out) numbers each."""
    layers = [layer for name in BLOCKS for layer in transformer.get_submodule(name).modules()]
    return sum(BF16_BYTES * rank * sum(layer.weight.shape) for layer in layers if isinstance(layer, nn.Linear))


def activation_bytes(transformer: FluxTransformer2DModel, vae: ModelMixin, size: Size, text_tokens: int) -> int:
    """The most that is alive besides weights while one image is made, one at a time: the larger of two moments.

    A block of the transformer, in units of its states, (tokens, width) in bf16. Before its last product, a single block
    holds the states (1), the attention's result (1), the MLP's (4) and both joined (5). Quantised a row at a time
    without a compiler, what is joined exists in float32 twice (20) and once in fp8 (2.5), and the product adds 1:
    under 40, where an fp8 run that is compiled has about 15. The attention's scores never exist as a whole.

    The VAE's last block, in units of its widest map in full size, (channels, height, width) in bf16, with the channels
    of the block before: the first convolution has its input, what it keeps for the sum, a copy of the input in
    the convolution's own layout, and results of half the channels: 4. Encoding has half as many channels.
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
