"""Teach the transformer's image tokens where they are: an auxiliary loss of the first stage.

FLUX gives a token its position by rotary embeddings alone: it must find out where it is, and how large the image is,
by attending. A small transformer takes thousands of steps to learn that from images, and draws blobs until then; told
directly, it knows its place to a third of a token after some hundred steps. The heads are dropped after the training.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn

from training.data import Batch

WEIGHT = 0.3
"""Of this loss beside that of the images."""
FIRST_UNIT = 20
"""Tokens; what the first block tells is a position from the corner, in this unit."""


class PositionTask(nn.Module):
    """Heads that read positions from the blocks of a model; the loss is that of the watched model's last pass."""

    def __init__(self, model: FluxTransformer2DModel) -> None:
        super().__init__()
        self._seen: dict[int, Tensor] = {}
        self.heads = nn.ModuleList([nn.Linear(model.inner_dim, 18) for _ in _read_blocks(model)])

    def watch(self, model: FluxTransformer2DModel) -> None:
        """Read from this model's passes from now on."""
        for index, block in enumerate(_read_blocks(model)):
            block.register_forward_hook(_keep(self._seen, index))

    def forward(self, batch: Batch) -> Tensor:
        """The mean squared error of all heads for the batch that the model has just seen."""
        tokens = batch.positions.shape[1]
        targets = [from_corner(batch)] + [from_centre(batch)] * (len(self.heads) - 1)
        errors = []
        for index, (head, target) in enumerate(zip(self.heads, targets, strict=True)):
            states = self._seen[index][:, -tokens:].float()
            read = head(nn.functional.layer_norm(states, states.shape[-1:]))
            errors.append((read - target).square().mean())
        return torch.stack(errors).mean()


def _read_blocks(model: FluxTransformer2DModel) -> list[nn.Module]:
    return [*model.transformer_blocks, model.single_transformer_blocks[1]]


def _keep(seen: dict[int, Tensor], index: int) -> Callable[[nn.Module, object, tuple[Tensor, Tensor]], None]:
    def hook(block: nn.Module, inputs: object, outputs: tuple[Tensor, Tensor]) -> None:
        seen[index] = outputs[1]  # (prompt's states, image's states)

    return hook


def from_corner(batch: Batch) -> Tensor:
    """(B, T, 18): row and column, and waves of them."""
    return _with_waves(batch.positions[..., 1:] / FIRST_UNIT, (0.5, 1, 2, 4))


def from_centre(batch: Batch) -> Tensor:
    """(B, T, 18): row and column from the image's centre, in its short side, and waves of them."""
    width, height = (side / 16 for side in batch.size)
    centre = torch.tensor([(height - 1) / 2, (width - 1) / 2])
    places = (batch.positions[..., 1:] - centre) / min(width, height)
    return _with_waves(places, tuple(math.pi * k for k in (1, 2, 4, 6)))


def _with_waves(places: Tensor, frequencies: tuple[float, ...]) -> Tensor:
    waves = [wave(places * frequency) for frequency in frequencies for wave in (torch.sin, torch.cos)]
    return torch.cat([places, *waves], dim=-1)
