"""Move modules from host memory to the device while they are in use. Knows no models and decides nothing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def moved_to_device(modules: Iterable[nn.Module], device: torch.device) -> Iterator[None]:
    """Within, the modules' parameters and buffers are on the device; afterwards the original tensors are back in place.

    Nothing is copied back: what is written to the tensors within is lost. Tensors that are on the device already stay.
    """
    originals: list[tuple[dict[str, Any], str, Tensor]] = []
    copies: dict[int, Tensor] = {}
    try:
        with torch.inference_mode(False):  # tensors made in inference mode cannot be parameters
            for table, name, tensor in _tensors(modules):
                if tensor.device != device:
                    originals.append((table, name, tensor))
                    if id(tensor) not in copies:
                        copies[id(tensor)] = _copied(tensor, device)
                    table[name] = copies[id(tensor)]
        copies.clear()
        yield
    finally:
        for table, name, tensor in originals:
            table[name] = tensor


def _tensors(modules: Iterable[nn.Module]) -> Iterator[tuple[dict[str, Any], str, Tensor]]:
    """Every parameter and buffer, with the module's table that holds it and its name; a shared one comes repeatedly."""
    for root in modules:
        for module in root.modules():
            for table in (module._parameters, module._buffers):
                yield from ((table, name, tensor) for name, tensor in list(table.items()) if tensor is not None)


def _copied(tensor: Tensor, device: torch.device) -> Tensor:
    copied = tensor.detach().to(device, non_blocking=True)
    return nn.Parameter(copied, requires_grad=False) if isinstance(tensor, nn.Parameter) else copied


def pin(module: nn.Module) -> None:
    """Move a module's parameters to page-locked host memory: copies to a CUDA device are then several times faster."""
    for parameter in module.parameters():
        parameter.data = parameter.data.pin_memory()
