"""An auxiliary loss: linear heads read from the blocks' states where each image token and each thing stands.

FLUX encodes positions by rotary embeddings alone, so a token can learn its absolute position only by how it attends to
the others. A small transformer takes thousands of steps for that and draws blobs until then. Here the blocks are asked
for what the next one needs, places as waves of the rotations' own frequencies, since keys with the waves of a place
make queries find how far they are from it:

| block | image tokens | the prompt's tokens, on the average |
|---|---|---|
| 1 | the place from the corner | |
| 2 | the place from the middle, and the sides | the sides, the middles and radii of the things |
| 3 | the place from the nearest thing's middle, and in it | the same |
| 4, 5 | the place within the nearest thing, and how near the outlines of all shapes are | |

The heads are dropped after the training.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn

from training.data import Batch

WEIGHT = 3.0
"""Of this loss, beside 1 for flow matching."""
FREQUENCIES = tuple(10000 ** (-2 * k / 14) for k in range(4))
"""Of the model's rotations of 14 dimensions, in radians a token; those left out turn less than once in five images."""
UNIT = 20
"""Tokens: the unit of what is read as a number."""
IMAGE, PROMPT = 1, 0
"""What a block gives: the prompt's states, then the image's."""


class PositionTask(nn.Module):
    """Linear heads on the outputs of a model's blocks; `forward` is their loss for the watched model's last pass."""

    def __init__(self, model: FluxTransformer2DModel) -> None:
        super().__init__()
        self._seen: dict[int, tuple[Tensor, Tensor]] = {}
        self.heads = nn.ModuleList([nn.Linear(model.inner_dim, size) for *_, size in READINGS])

    def watch(self, model: FluxTransformer2DModel) -> None:
        """Hook the blocks of this model, so that its passes are read from now on."""
        blocks = [*model.transformer_blocks, *model.single_transformer_blocks]
        for index in {index for index, *_ in READINGS}:
            blocks[index].register_forward_hook(_keep(self._seen, index))

    def forward(self, batch: Batch) -> Tensor:
        """The mean squared error of all heads for the batch that the model has just seen."""
        targets = {target: target(batch) for target in {reading[2] for reading in READINGS}}
        errors = []
        for head, (index, stream, target, _) in zip(self.heads, READINGS, strict=True):
            states = self._seen[index][stream].float()
            states = nn.functional.layer_norm(states, states.shape[-1:])
            read = head(states if stream == IMAGE else states.mean(1))
            errors.append((read - targets[target]).square().mean())
        return torch.stack(errors).mean()


def _keep(
    seen: dict[int, tuple[Tensor, Tensor]], index: int
) -> Callable[[nn.Module, object, tuple[Tensor, Tensor]], None]:
    def hook(block: nn.Module, inputs: object, outputs: tuple[Tensor, Tensor]) -> None:
        seen[index] = outputs

    return hook


def from_corner(batch: Batch) -> Tensor:
    """(B, T, 18): row and column from the top left corner."""
    return _as_waves(batch.positions[..., 1:])


def from_centre(batch: Batch) -> Tensor:
    """(B, T, 36): column and row from the middle, as shares of the short side, with waves, and the sides."""
    shares = _with_waves(batch.from_centre, tuple(math.pi * k for k in (1, 2, 4, 6)))
    sides = _as_waves(batch.sides)[:, None].expand(-1, shares.shape[1], -1)
    return torch.cat([shares, sides], dim=-1)


def layout(batch: Batch) -> Tensor:
    """(B, 74): the sides, and the middles, radii and presence of both things; 0 for an absent one."""
    there = (batch.things[..., 2:] > 0).float()
    things = torch.cat([_as_waves(batch.things), there], dim=-1) * there
    return torch.cat([_as_waves(batch.sides), things.flatten(1)], dim=-1)


def from_thing(batch: Batch) -> Tensor:
    """(B, T, 50): from the nearest thing's middle in tokens, then as `around_thing`."""
    return torch.cat([_as_waves(batch.from_thing * batch.radius[..., None]), around_thing(batch)], dim=-1)


def around_thing(batch: Batch) -> Tensor:
    """(B, T, 32): the place within the nearest thing with sines and cosines, and how near the outlines are."""
    place = _with_waves(batch.from_thing.clamp(-2, 2) / 2, (math.pi, 2 * math.pi, 4 * math.pi))  # 14
    near = batch.distances
    return torch.cat([place, near.clamp(-1, 1), (4 * near).clamp(-1, 1)], dim=-1)


def _as_waves(places: Tensor) -> Tensor:
    """(..., N) of tokens -> (..., 9 N)."""
    return _with_waves(places / UNIT, tuple(UNIT * frequency for frequency in FREQUENCIES))


def _with_waves(places: Tensor, frequencies: tuple[float, ...]) -> Tensor:
    waves = [wave(places * frequency) for frequency in frequencies for wave in (torch.sin, torch.cos)]
    return torch.cat([places, *waves], dim=-1)


READINGS: tuple[tuple[int, int, Callable[[Batch], Tensor], int], ...] = (
    (0, IMAGE, from_corner, 18),
    (1, IMAGE, from_centre, 36),
    (1, PROMPT, layout, 74),
    (2, PROMPT, layout, 74),
    (2, IMAGE, from_thing, 50),
    (3, IMAGE, around_thing, 32),
    (4, IMAGE, around_thing, 32),
)
"""The block, its states, what is read from them, and how many numbers that are."""
