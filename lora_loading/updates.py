"""The kinds of change that an adapter makes to one weight or bias. Knows no files, names or models.

Every kind has `delta`: the change of a weight at scale 1, computed in float32 (float64 for a float64 weight). The
caller multiplies it by the scale, so a change is linear in its scale: 0 is no change, -1 the opposite one. DoRA is not
linear in PEFT; here its change at scale 1, which is PEFT's, is scaled like any other. The exception is a
`BlendedUpdate`: see `rotations`.

A file's fused layer is cut by `take_rows`: its rows go to several layers, or in another order to one.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable
from weakref import ReferenceType, ref

import torch
from torch import Tensor

from lora_loading.shapes import Rows

WeightOf = Callable[[str], Tensor]
"""The pristine weight of a layer of the same component, by name."""


class Update(Protocol):
    """One change of a weight (out, in), of a norm's weight (size,) or of a bias (out,)."""

    def delta(self, weight: Tensor, weight_of: WeightOf) -> Tensor:
        """What is added to the pristine `weight` at scale 1; on its device."""

    def take_rows(self, rows: Rows) -> Update:
        """The part of this change that is in these rows."""

    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors that it holds; other updates may share some."""


@runtime_checkable
class BlendedUpdate(Update, Protocol):
    """A change that is not linear in its scale."""

    def blended(self, weight: Tensor, weight_of: WeightOf, scale: float) -> Tensor:
        """What is added to the pristine `weight` at a scale; on its device."""


class Gains:
    """DoRA's gains, magnitude / |V|: they depend on the pristine weights, not on a scale, so another scale reuses them.

    One for each set of pristine weights, on their device. A gain takes a number a row or column: 12 MB for a LoRA of
    494 layers, so that those of five are kept.

    Updates are held weakly: their tensors are views of their file's whole block, so that one of them would keep all of
    it in memory. The gain of an update that is gone is dropped at the next call.
    """

    def __init__(self, max_bytes: int = 2**26) -> None:
        """Start empty; beyond `max_bytes` the gains that were used least recently are dropped."""
        self._max_bytes = max_bytes
        self._bytes = 0
        self._kept: OrderedDict[int, tuple[ReferenceType[Dora], Tensor]] = OrderedDict()
        """By the update's id."""
        self._gone: deque[int] = deque()
        """The ids of updates that are gone, noted in whichever thread that happens."""

    @property
    def bytes(self) -> int:
        """The memory of all gains that are kept."""
        return self._bytes

    def of(self, update: Dora, weight: Tensor, weight_of: WeightOf) -> Tensor:
        """The update's gain for this weight, on its device."""
        while self._gone:
            self._drop(self._gone.popleft())
        key, gone = id(update), self._gone
        kept = self._kept.get(key)
        if kept is not None and kept[0]() is update:  # an id is given again once its object is gone
            self._kept.move_to_end(key)
            return kept[1].to(weight.device)
        gain = update.gain(weight, weight_of)
        self._drop(key)
        self._kept[key] = ref(update, lambda _: gone.append(key)), gain
        self._bytes += gain.nbytes
        while self._bytes > self._max_bytes:
            self._drop(next(iter(self._kept)))
        return gain

    def _drop(self, key: int) -> None:
        dropped = self._kept.pop(key, None)
        self._bytes -= 0 if dropped is None else dropped[1].nbytes


def merged(
    weight: Tensor, updates: Iterable[tuple[Update, float]], weight_of: WeightOf, gains: Gains | None = None
) -> Tensor:
    """Return weight + sum of scale * delta, in float32 (float64 for a float64 weight); `weight` is not written.

    Args:
        weight: the pristine weight.
        updates: the changes and their scales.
        weight_of: the pristine weights of the component's other layers.
        gains: where DoRA's gains for these pristine weights are kept.
    """
    total = weight.to(work_dtype(weight), copy=True)
    for update, scale in updates:
        if isinstance(update, LowRank):
            total.addmm_(like(update.b, weight), like(update.a, weight), alpha=update.scale * scale)
        elif isinstance(update, BlendedUpdate):
            total += update.blended(weight, weight_of, scale)
        elif isinstance(update, Dora):
            gain = (gains or Gains()).of(update, weight, weight_of)
            update.add_to(total, weight, weight_of, gain, scale)
        else:
            total.add_(update.delta(weight, weight_of), alpha=scale)
    return total


@dataclass(frozen=True)
class LowRank:
    """scale * B @ A. Source: LoRA, Hu et al. 2021, section 4.1.

    Its factors can also stay beside the weight: see `applying.slots.AdaptedLinear`.
    """

    a: Tensor
    """(rank, in)"""
    b: Tensor
    """(out, rank)"""
    scale: float
    """alpha / rank"""

    @property
    def rank(self) -> int:
        """The number of rows of A."""
        return self.a.shape[0]

    def delta(self, weight: Tensor, weight_of: WeightOf) -> Tensor:
        """B @ A, scaled."""
        return (like(self.b, weight) @ like(self.a, weight)) * self.scale

    def take_rows(self, rows: Rows) -> LowRank:
        """Rows of B; A is shared."""
        return replace(self, b=rows_of(self.b, rows))

    def tensors(self) -> tuple[Tensor, ...]:
        """Both factors."""
        return self.a, self.b


@dataclass(frozen=True)
class LoHa:
    """scale * (w1_a @ w1_b) * (w2_a @ w2_b), elementwise. Source: FedPara, Hyeon-Woo et al. 2021, section 2."""

    w1_a: Tensor
    """(out, rank)"""
    w1_b: Tensor
    """(rank, in)"""
    w2_a: Tensor
    w2_b: Tensor
    scale: float

    def delta(self, weight: Tensor, weight_of: WeightOf) -> Tensor:
        """The product of the two low-rank matrices, scaled."""
        w1 = like(self.w1_a, weight) @ like(self.w1_b, weight)
        return w1 * (like(self.w2_a, weight) @ like(self.w2_b, weight)) * self.scale

    def take_rows(self, rows: Rows) -> LoHa:
        """Rows of both left factors."""
        return replace(self, w1_a=rows_of(self.w1_a, rows), w2_a=rows_of(self.w2_a, rows))

    def tensors(self) -> tuple[Tensor, ...]:
        """The four factors."""
        return self.w1_a, self.w1_b, self.w2_a, self.w2_b


@dataclass(frozen=True)
class LoKr:
    """scale * kron(w1, w2), each a matrix or a product of two. Source: KronA, Edalati et al. 2022; LyCORIS."""

    w1: tuple[Tensor, ...]
    """One matrix, or two factors of it."""
    w2: tuple[Tensor, ...]
    scale: float
    rows: Rows | None = None
    """The rows of the product that are used; None for all. Rows of a Kronecker product are not one themselves."""

    def delta(self, weight: Tensor, weight_of: WeightOf) -> Tensor:
        """The Kronecker product's rows, scaled."""
        product = torch.kron(_product(self.w1, weight), _product(self.w2, weight)) * self.scale
        return product if self.rows is None else rows_of(product, self.rows)

    def take_rows(self, rows: Rows) -> LoKr:
        """The same product, of which these rows are used."""
        return replace(self, rows=rows)

    def tensors(self) -> tuple[Tensor, ...]:
        """The factors of both sides."""
        return *self.w1, *self.w2


@dataclass(frozen=True)
class Full:
    """A difference as large as the weight, the norm's weight or the bias that it changes."""

    difference: Tensor

    def delta(self, weight: Tensor, weight_of: WeightOf) -> Tensor:
        """The difference itself."""
        return like(self.difference, weight)

    def take_rows(self, rows: Rows) -> Full:
        """Rows of the difference."""
        return Full(rows_of(self.difference, rows))

    def tensors(self) -> tuple[Tensor, ...]:
        """The difference."""
        return (self.difference,)


@dataclass(frozen=True)
class Value:
    """A norm's new weight instead of a difference; at scale 1 it replaces the old one."""

    value: Tensor

    def delta(self, weight: Tensor, weight_of: WeightOf) -> Tensor:
        """New minus old."""
        return like(self.value, weight) - like(weight, weight)

    def take_rows(self, rows: Rows) -> Value:
        """Rows of the value."""
        return Value(rows_of(self.value, rows))

    def tensors(self) -> tuple[Tensor, ...]:
        """The value."""
        return (self.value,)


@dataclass(frozen=True)
class Dora:
    """magnitude * V / |V| - W with V = W + the inner change. Source: DoRA, Liu et al. 2024, section 4.1.

    PEFT and newer LyCORIS take |V| of each row, (out,) or (out, 1); older LyCORIS and OneTrainer of each column,
    (1, in). A column of a fused layer runs through all the layers that it is cut into.
    """

    inner: Update
    magnitude: Tensor
    """(out, 1) or (1, in)"""
    column: tuple[tuple[str, Update], ...] = ()
    """For a magnitude of columns: all layers that a column runs through, and their inner changes."""

    def delta(self, weight: Tensor, weight_of: WeightOf) -> Tensor:
        """The new weight minus the old one: (gain - 1) * W + gain * the inner change."""
        gain = self.gain(weight, weight_of)
        return (gain - 1) * like(weight, weight) + gain * self.inner.delta(weight, weight_of)

    def gain(self, weight: Tensor, weight_of: WeightOf) -> Tensor:
        """magnitude / |V|, of the magnitude's shape; 0 where V is 0."""
        if self.column:
            norm = self._column_norm(weight_of)
        else:
            new = like(weight, weight) + self.inner.delta(weight, weight_of)
            norm = torch.linalg.vector_norm(new, dim=1, keepdim=True)
        return torch.where(norm > 0, like(self.magnitude, weight) / norm, 0)

    def add_to(self, total: Tensor, weight: Tensor, weight_of: WeightOf, gain: Tensor, scale: float) -> None:
        """Add the change at a scale to `total`, with its gain known: no more work than a LoRA's."""
        total.addcmul_(like(weight, weight), gain - 1, value=scale)
        if isinstance(self.inner, LowRank):
            a, b, factor = like(self.inner.a, weight), like(self.inner.b, weight), self.inner.scale * scale
            b, a = (b * gain, a) if gain.shape[1] == 1 else (b, a * gain)
            total.addmm_(b, a, alpha=factor)
        else:
            total.addcmul_(self.inner.delta(weight, weight_of), gain, value=scale)

    def _column_norm(self, weight_of: WeightOf) -> Tensor:
        squares: list[Tensor] = []
        for name, inner in self.column:
            weight = weight_of(name)
            whole = like(weight, weight) + inner.delta(weight, weight_of)
            squares.append(whole.square().sum(dim=0, keepdim=True))
        return torch.stack(squares).sum(dim=0).sqrt()

    def take_rows(self, rows: Rows) -> Dora:
        """Rows of the inner change, and of the magnitude if it has rows."""
        magnitude = self.magnitude if self.column else rows_of(self.magnitude, rows)
        return replace(self, inner=self.inner.take_rows(rows), magnitude=magnitude)

    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors of the inner change, and the magnitude."""
        return *self.inner.tensors(), self.magnitude


def work_dtype(weight: Tensor) -> torch.dtype:
    """In which type changes of a weight are computed."""
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def like(tensor: Tensor, weight: Tensor) -> Tensor:
    """The tensor on the weight's device, in the type to work in."""
    return tensor.to(weight.device, non_blocking=True).to(work_dtype(weight))


def _product(factors: tuple[Tensor, ...], weight: Tensor) -> Tensor:
    first, *rest = (like(factor, weight) for factor in factors)
    for factor in rest:
        first = first @ factor
    return first


def rows_of(tensor: Tensor, rows: Rows) -> Tensor:
    """A view where the rows are one range, else a copy."""
    parts = [tensor[start:stop] for start, stop in rows]
    return parts[0] if len(parts) == 1 else torch.cat(parts)
