"""Random LoRAs for all linear layers of the blocks, as files in PEFT's names, and as both sides read them."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from diffusers import FluxTransformer2DModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.plan import RANK
from benchmarks.swap import block_layers
from lora_loading.reading.adapter import LoraAdapter, read_adapter
from lora_loading.shapes import ModelShapes

CHANGE = 0.02
"""How large the change is beside the weights, as norms."""


class Loras:
    """The files of a run, each written when it is first asked for; the blocks of all models take the same LoRAs."""

    def __init__(self, folder: Path, transformer: FluxTransformer2DModel, shapes: ModelShapes) -> None:
        self._folder = folder
        self._transformer = transformer
        self.adapter = cache(lambda index: self._adapter(index, shapes))
        """The LoRA of this number, as ours takes it."""

    def _adapter(self, index: int, shapes: ModelShapes) -> LoraAdapter:
        return read_adapter(self._file(index), shapes)

    def state_dict(self, index: int) -> dict[str, Tensor]:
        """The same as diffusers takes it."""
        return load_file(self._file(index))

    def _file(self, index: int) -> Path:
        path = self._folder / f"{index}.safetensors"
        if not path.exists():
            save_file(random_factors(self._transformer, RANK, index), path)
        return path


def random_factors(transformer: FluxTransformer2DModel, rank: int, seed: int) -> dict[str, Tensor]:
    """A and B for each linear layer of the blocks, bf16 on the CPU, by PEFT's names."""
    device = next(transformer.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)

    def factor(rows: int, columns: int, deviation: float) -> Tensor:
        return torch.randn(rows, columns, generator=generator, device=device).mul(deviation).to("cpu", torch.bfloat16)

    tensors = {}
    for name, layer in block_layers(transformer).items():
        tensors[f"transformer.{name}.lora_A.weight"] = factor(rank, layer.in_features, layer.in_features**-0.5)
        tensors[f"transformer.{name}.lora_B.weight"] = factor(layer.out_features, rank, CHANGE * rank**-0.5)
    return tensors
