"""An auxiliary loss: linear heads read from the blocks' states where each image token stands.

FLUX encodes positions by rotary embeddings alone, so a token can learn its absolute position only by how it attends to
the others. A small transformer takes thousands of steps for that and draws blobs until then. Here the first block is
asked for the position from the corner, the later ones for that from the middle, for the place within the nearest thing,
and for the distances to the outlines of all shapes there: with them shapes appear a thousand steps earlier. The heads
are dropped after the training.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn

from training.data import Batch

WEIGHT = 0.3
"""Of this loss, beside 1 for flow matching."""
FIRST_UNIT = 20
"""Tokens: the unit of the positions from the corner that are read from the first block."""


class PositionTask(nn.Module):
    """Linear heads on the outputs of a model's blocks; `forward` is their loss for the watched model's last pass."""

    def __init__(self, model: FluxTransformer2DModel) -> None:
        super().__init__()
        self._seen: dict[int, Tensor] = {}
        self.heads = nn.ModuleList([nn.Linear(model.inner_dim, size) for size in (18, 18, 50, 50, 50)])

    def watch(self, model: FluxTransformer2DModel) -> None:
        """Hook the blocks of this model, so that its passes are read from now on."""
        blocks = [*model.transformer_blocks, *model.single_transformer_blocks]
        for index, block in enumerate(blocks[: len(self.heads)]):
            block.register_forward_hook(_keep(self._seen, index))

    def forward(self, batch: Batch) -> Tensor:
        """The mean squared error of all heads for the batch that the model has just seen."""
        tokens = batch.positions.shape[1]
        centre = from_centre(batch)
        both = torch.cat([centre, around_thing(batch)], dim=-1)
        targets = (from_corner(batch), centre, both, both, both)
        errors = []
        for index, (head, target) in enumerate(zip(self.heads, targets, strict=True)):
            states = self._seen[index][:, -tokens:].float()
            read = head(nn.functional.layer_norm(states, states.shape[-1:]))
            errors.append((read - target).square().mean())
        return torch.stack(errors).mean()


def _keep(seen: dict[int, Tensor], index: int) -> Callable[[nn.Module, object, tuple[Tensor, Tensor]], None]:
    def hook(block: nn.Module, inputs: object, outputs: tuple[Tensor, Tensor]) -> None:
        seen[index] = outputs[1]  # (prompt's states, image's states)

    return hook


def from_corner(batch: Batch) -> Tensor:
    """(B, T, 18): row and column from the top left corner, with sines and cosines of them."""
    return _with_waves(batch.positions[..., 1:] / FIRST_UNIT, (0.5, 1, 2, 4))


def from_centre(batch: Batch) -> Tensor:
    """(B, T, 18): column and row from the middle, as shares of the short side, with sines and cosines of them."""
    return _with_waves(batch.from_centre, tuple(math.pi * k for k in (1, 2, 4, 6)))


def around_thing(batch: Batch) -> Tensor:
    """(B, T, 32): the place within the nearest thing with sines and cosines, and how near the outlines are."""
    place = _with_waves(batch.from_thing.clamp(-2, 2) / 2, (math.pi, 2 * math.pi, 4 * math.pi))  # 14
    near = batch.distances
    return torch.cat([place, near.clamp(-1, 1), (4 * near).clamp(-1, 1)], dim=-1)


def _with_waves(places: Tensor, frequencies: tuple[float, ...]) -> Tensor:
    waves = [wave(places * frequency) for frequency in frequencies for wave in (torch.sin, torch.cos)]
    return torch.cat([places, *waves], dim=-1)
