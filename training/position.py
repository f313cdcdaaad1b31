"""An auxiliary loss of the first stage: linear heads read each image token's position from the blocks' states.

FLUX encodes positions by rotary embeddings alone, so a token can learn its absolute position only by attending to the
others. A small transformer takes thousands of steps for that and draws blobs until then; with this loss the position
is read to a third of a token after some hundred steps. The heads are dropped after the training.
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
        self.heads = nn.ModuleList([nn.Linear(model.inner_dim, 18) for _ in _read_blocks(model)])

    def watch(self, model: FluxTransformer2DModel) -> None:
        """Hook the blocks of this model, so that its passes are read from now on."""
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
    """(B, T, 18): row and column from the top left corner, with sines and cosines of them."""
    return _with_waves(batch.positions[..., 1:] / FIRST_UNIT, (0.5, 1, 2, 4))


def from_centre(batch: Batch) -> Tensor:
    """(B, T, 18): row and column from the centre, as shares of the short side, with sines and cosines of them."""
    width, height = (side / 16 for side in batch.size)
    centre = torch.tensor([(height - 1) / 2, (width - 1) / 2])
    places = (batch.positions[..., 1:] - centre) / min(width, height)
    return _with_waves(places, tuple(math.pi * k for k in (1, 2, 4, 6)))


def _with_waves(places: Tensor, frequencies: tuple[float, ...]) -> Tensor:
    waves = [wave(places * frequency) for frequency in frequencies for wave in (torch.sin, torch.cos)]
    return torch.cat([places, *waves], dim=-1)
