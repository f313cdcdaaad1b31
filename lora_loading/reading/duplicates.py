"""One layer that a file changes under two names: the change counts once if both are the same, else the file is refused.

A file that holds a LoRA both as kohya's `img_attn_qkv` and as diffusers' `to_q`, `to_k` and `to_v` would act twice.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from errors import LoraFormatError
from lora_loading.reading.formats.targets import Target
from lora_loading.reading.layers import LayerUpdate
from lora_loading.updates import LowRank, Update

TOLERANCE = 5e-3
"""Relative; converters round factors to bf16."""
PROBES = 4


def without_duplicates(found: Iterable[tuple[Target, list[LayerUpdate]]]) -> tuple[list[LayerUpdate], int]:
    """The updates, each layer's once, and how many were left out because another one is the same.

    Raises:
        LoraFormatError: two updates of a layer differ.
    """
    kept: dict[tuple[str, str, str], tuple[Target, LayerUpdate]] = {}
    duplicates = 0
    for target, updates in found:
        for update in updates:
            place = update.component, update.layer, update.parameter
            if place not in kept:
                kept[place] = target, update
            elif _are_equal(kept[place][1].update, update.update):
                duplicates += 1
            else:
                names = f'"{kept[place][0].name}" and "{target.name}"'
                raise LoraFormatError(
                    f'the file changes the layer "{update.layer}" twice, as {names}, and differently. '
                    "Use a file that names each layer once."
                )
    return [update for _, update in kept.values()], duplicates


def _are_equal(one: Update, other: Update) -> bool:
    """Whether two updates of a layer are the same change; low-rank ones may be factored differently."""
    if isinstance(one, LowRank) and isinstance(other, LowRank):
        probe = torch.randn(one.a.shape[1], PROBES, generator=torch.Generator().manual_seed(0))
        first, second = _product(one, probe), _product(other, probe)
        return bool((first - second).norm() <= TOLERANCE * first.norm())
    tensors = list(zip(one.tensors(), other.tensors(), strict=False))
    same_kind = type(one) is type(other) and len(one.tensors()) == len(other.tensors())
    same_scale = getattr(one, "scale", None) == getattr(other, "scale", None)
    return same_kind and same_scale and all(torch.equal(a, b) for a, b in tensors)


def _product(update: LowRank, probe: Tensor) -> Tensor:
    return update.b.float() @ (update.a.float() @ probe) * update.scale
