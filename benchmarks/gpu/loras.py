"""Random LoRAs for all linear layers of the blocks, as files in PEFT's names, and as both sides read them."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import FluxTransformer2DModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.swap import block_layers
from lora_loading.reading.adapter import LoraAdapter, read_adapter
from lora_loading.shapes import ModelShapes

CHANGE = 0.02
"""How large the change is beside the weights, as norms."""


class Loras:
    """The files of a run, each written and read when it is first asked for, and then kept in host memory."""

    def __init__(self, folder: Path, transformer: FluxTransformer2DModel, shapes: ModelShapes) -> None:
        """Take the layers of one model: the blocks of all models are the same, so all take the same LoRAs."""
        self._folder = folder
        self._transformer = transformer
        self._shapes = shapes
        self._adapters: dict[tuple[int, int], LoraAdapter] = {}

    def adapter(self, rank: int, index: int) -> LoraAdapter:
        """The LoRA of this rank and number, as ours takes it."""
        if (rank, index) not in self._adapters:
            self._adapters[rank, index] = read_adapter(self._file(rank, index), self._shapes)
        return self._adapters[rank, index]

    def state_dict(self, rank: int, index: int) -> dict[str, Tensor]:
        """The same as diffusers takes it."""
        return load_file(self._file(rank, index))

    def _file(self, rank: int, index: int) -> Path:
        path = self._folder / f"rank-{rank}-{index}.safetensors"
        if not path.exists():
            save_file(random_factors(self._transformer, rank, index), path)
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
