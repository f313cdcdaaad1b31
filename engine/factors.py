"""The low-rank changes of a whole stack as one block of numbers and one table, as `engine.requantise` takes them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_loading.applying.manager import LayerChanges


@dataclass(frozen=True)
class Factors:
    """See `requantise` for what the tensors hold."""

    block: Tensor
    table: Tensor
    strengths: Tensor
    rows: Mapping[str, tuple[int, int]]
    """For each layer the first of its rows of the table, and one past the last."""

    def of(self, layer: str) -> tuple[Tensor, Tensor, Tensor]:
        """A layer's arguments of `requantise`: none of the rows for one without changes."""
        first, end = self.rows.get(layer, (0, 0))
        return self.block, self.table[first:end], self.strengths[first:end]


def joined_factors(changes: Mapping[str, LayerChanges], device: torch.device) -> Factors:
    """The changes of all layers that have low-rank changes of their weight alone; the others are left out.

    Args:
        changes: with tensors on `device`, as `uploaded` gives them.
        device: where the table goes.
    """
    plain = {name: layer.factors for name, layer in changes.items() if layer.factors and not layer.weight}
    plain = {n: f for n, f in plain.items() if all(u.a.is_contiguous() and u.b.is_contiguous() for u, _ in f)}
    tensors = [tensor for factors in plain.values() for update, _ in factors for tensor in (update.a, update.b)]
    block, begins = _block(tensors, device)
    table: list[tuple[int, int, int]] = []
    strengths: list[float] = []
    rows: dict[str, tuple[int, int]] = {}
    for name, factors in plain.items():
        rows[name] = (len(table), len(table) + len(factors))
        for update, strength in factors:
            table.append((_begin(update.a, begins), _begin(update.b, begins), update.rank))
            strengths.append(strength * update.scale)
    if not table:
        return Factors(block, torch.empty(0, 3, dtype=torch.int64, device=device), torch.empty(0, device=device), {})
    places = torch.tensor(table, dtype=torch.int64).to(device, non_blocking=True)
    return Factors(block, places, torch.tensor(strengths, dtype=torch.float32).to(device, non_blocking=True), rows)


def _block(tensors: list[Tensor], device: torch.device) -> tuple[Tensor, dict[tuple[int, torch.dtype], int]]:
    """All memory that the tensors are views of as one tensor, and where each part of it begins there."""
    parts: dict[tuple[int, torch.dtype], Tensor] = {}
    for tensor in tensors:
        parts.setdefault(_part(tensor), tensor)
    if not parts:
        return torch.empty(0, device=device), {}
    dtypes = {dtype for _, dtype in parts}
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    whole = [_whole(tensor) for tensor in parts.values()]
    begins, at = {}, 0
    for part, numbers in zip(parts, whole, strict=True):
        begins[part] = at
        at += len(numbers)
    return (whole[0] if len(whole) == 1 else torch.cat([numbers.to(dtype) for numbers in whole])), begins


def _part(tensor: Tensor) -> tuple[int, torch.dtype]:
    return tensor.untyped_storage()._cdata, tensor.dtype


def _begin(tensor: Tensor, begins: Mapping[tuple[int, torch.dtype], int]) -> int:
    return begins[_part(tensor)] + int(tensor.storage_offset())


def _whole(tensor: Tensor) -> Tensor:
    """The memory that a tensor is a view of, as numbers of its type."""
    count = tensor.untyped_storage().nbytes() // tensor.itemsize
    return tensor.as_strided((count,), (1,), 0)
