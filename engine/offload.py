"""Bring modules from host memory to the device for as long as they are in use. Knows no models and decides nothing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def moved_to_device(modules: Iterable[nn.Module], device: torch.device) -> Iterator[None]:
    """Within, the modules' parameters and buffers are on the device; afterwards they are the very ones from before.

    Nothing is copied back, so what is written to them within is lost. Modules that are there already stay untouched.
    """
    homes: list[tuple[dict[str, Any], str, Tensor]] = []
    guests: dict[int, Tensor] = {}
    try:
        with torch.inference_mode(False):  # tensors of that mode are no parameters
            for table, name, tensor in _tensors(modules):
                if tensor.device != device:
                    homes.append((table, name, tensor))
                    if id(tensor) not in guests:
                        guests[id(tensor)] = _copied(tensor, device)
                    table[name] = guests[id(tensor)]
        guests.clear()
        yield
    finally:
        for table, name, tensor in homes:
            table[name] = tensor


def _tensors(modules: Iterable[nn.Module]) -> Iterator[tuple[dict[str, Any], str, Tensor]]:
    """Every tensor, with the table of the module that holds it and its name there; one that is shared comes again."""
    for root in modules:
        for module in root.modules():
            for table in (module._parameters, module._buffers):
                yield from ((table, name, tensor) for name, tensor in list(table.items()) if tensor is not None)


def _copied(tensor: Tensor, device: torch.device) -> Tensor:
    copied = tensor.detach().to(device, non_blocking=True)
    return nn.Parameter(copied, requires_grad=False) if isinstance(tensor, nn.Parameter) else copied


def pin(module: nn.Module) -> None:
    """Page-lock a module's parameters in host memory, from where they reach a CUDA device several times as fast."""
    for parameter in module.parameters():
        parameter.data = parameter.data.pin_memory()
