"""Bring a stack's low-rank factors to the device, in one copy for each block of host memory that they are views of.

A LoRA file is read into one block (`lora_loading.reading.tensors`), so a LoRA is one copy, not two for each layer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from lora_loading.reading.adapter import Stack
from lora_loading.reading.layers import LayerUpdate
from lora_loading.updates import LowRank


def uploaded(stack: Stack, component: str, device: torch.device) -> Stack:
    """The stack's changes of one component, the factors of low-rank ones on `device`: views of one block stay that."""
    blocks: dict[int, Tensor] = {}

    def moved(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in blocks:
            block = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)
            blocks[storage._cdata] = block.to(device, non_blocking=True)
        block = blocks[storage._cdata]
        typed = block[: len(block) // tensor.itemsize * tensor.itemsize].view(tensor.dtype)
        return typed.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

    return [
        (replace(adapter, layers=tuple(_moved(u, moved) for u in adapter.layers if u.component == component)), scale)
        for adapter, scale in stack
    ]


def _moved(layer: LayerUpdate, move: Callable[[Tensor], Tensor]) -> LayerUpdate:
    update = layer.update
    if not isinstance(update, LowRank):  # a DoRA's gain, for one, is kept for this very object
        return layer
    return replace(layer, update=replace(update, a=move(update.a), b=move(update.b)))
