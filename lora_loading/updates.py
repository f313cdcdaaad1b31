"""The kinds of change that an adapter makes to one weight or bias. Knows no files, names or models.

Every kind answers `delta`: the change of a weight at strength 1, worked out in float32 (float64 for a float64 weight).
Strengths are applied by the caller, so all kinds are linear in them: 0 is no change, -1 is the opposite one. DoRA is
not linear in PEFT; here its change at strength 1, which is PEFT's, is scaled like any other.

A file's fused layer is cut by `take_rows`: its rows go to several layers, or in another order to one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

Rows = tuple[tuple[int, int], ...]
"""Ranges of a fused layer's rows, first and one past the last, in the order in which a layer takes them."""
WeightOf = Callable[[str], Tensor]
"""The pristine weight of a layer of the same component, by name."""


class Update(Protocol):
    """One change of a weight (out, in), of a norm's weight (size,) or of a bias (out,)."""

    def delta(self, weight: Tensor, weight_of: WeightOf) -> Tensor:
        """What is added to the pristine `weight` at strength 1; on its device."""

    def take_rows(self, rows: Rows) -> Update:
        """The part of this change that falls on some rows."""

    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors that it holds; some may be shared with other updates."""


def merged(weight: Tensor, updates: Iterable[tuple[Update, float]], weight_of: WeightOf) -> Tensor:
    """Return weight + sum of strength * delta, in float32 (float64 for a float64 weight); `weight` is not written."""
    total = weight.to(_work_dtype(weight), copy=True)
    for update, strength in updates:
        if isinstance(update, LowRank):
            total.addmm_(_like(update.b, weight), _like(update.a, weight), alpha=update.scale * strength)
        else:
            total += update.delta(weight, weight_of) * strength
    return total


@dataclass(frozen=True)
class LowRank:
    """scale * B @ A. Source: LoRA, Hu et al. 2021, section 4.1.

    Its factors can also stay beside the weight: see `apply`.
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
        return (_like(self.b, weight) @ _like(self.a, weight)) * self.scale

    def take_rows(self, rows: Rows) -> LowRank:
        """Rows of B; A is shared."""
        return replace(self, b=_rows_of(self.b, rows))

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
        w1 = _like(self.w1_a, weight) @ _like(self.w1_b, weight)
        return w1 * (_like(self.w2_a, weight) @ _like(self.w2_b, weight)) * self.scale

    def take_rows(self, rows: Rows) -> LoHa:
        """Rows of both left factors."""
        return replace(self, w1_a=_rows_of(self.w1_a, rows), w2_a=_rows_of(self.w2_a, rows))

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
    """The rows of the product that are meant; a part of a Kronecker product is none itself."""

    def delta(self, weight: Tensor, weight_of: WeightOf) -> Tensor:
        """The Kronecker product's rows, scaled."""
        product = torch.kron(_product(self.w1, weight), _product(self.w2, weight)) * self.scale
        return product if self.rows is None else _rows_of(product, self.rows)

    def take_rows(self, rows: Rows) -> LoKr:
        """The same product, of which these rows are meant."""
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
        return _like(self.difference, weight)

    def take_rows(self, rows: Rows) -> Full:
        """Rows of the difference."""
        return Full(_rows_of(self.difference, rows))

    def tensors(self) -> tuple[Tensor, ...]:
        """The difference."""
        return (self.difference,)


@dataclass(frozen=True)
class Value:
    """A norm's whole new weight instead of a difference; strength 1 puts it in the old one's place."""

    value: Tensor

    def delta(self, weight: Tensor, weight_of: WeightOf) -> Tensor:
        """New minus old."""
        return _like(self.value, weight) - _like(weight, weight)

    def take_rows(self, rows: Rows) -> Value:
        """Rows of the value."""
        return Value(_rows_of(self.value, rows))

    def tensors(self) -> tuple[Tensor, ...]:
        """The value."""
        return (self.value,)


@dataclass(frozen=True)
class Dora:
    """magnitude * V / |V| - W with V = W + the inner change. Source: DoRA, Liu et al. 2024, section 4.1.

    PEFT and newer LyCORIS measure |V| a row, (out,) or (out, 1); older LyCORIS and OneTrainer a column, (1, in). A
    column of a fused layer runs through all the layers that it is cut into.
    """

    inner: Update
    magnitude: Tensor
    """(out, 1) or (1, in)"""
    column: tuple[tuple[str, Update], ...] = ()
    """For a magnitude a column: all layers that a column runs through, and their inner changes."""

    def delta(self, weight: Tensor, weight_of: WeightOf) -> Tensor:
        """The new weight minus the old one."""
        old = _like(weight, weight)
        new = old + self.inner.delta(weight, weight_of)
        norm = self._column_norm(weight_of) if self.column else torch.linalg.vector_norm(new, dim=1, keepdim=True)
        gain = torch.where(norm > 0, _like(self.magnitude, weight) / norm, 0)
        return gain * new - old

    def _column_norm(self, weight_of: WeightOf) -> Tensor:
        squares: list[Tensor] = []
        for name, inner in self.column:
            weight = weight_of(name)
            whole = _like(weight, weight) + inner.delta(weight, weight_of)
            squares.append(whole.square().sum(dim=0, keepdim=True))
        return torch.stack(squares).sum(dim=0).sqrt()

    def take_rows(self, rows: Rows) -> Dora:
        """Rows of the inner change, and of a magnitude a row."""
        magnitude = self.magnitude if self.column else _rows_of(self.magnitude, rows)
        return replace(self, inner=self.inner.take_rows(rows), magnitude=magnitude)

    def tensors(self) -> tuple[Tensor, ...]:
        """The inner change's and the magnitude."""
        return *self.inner.tensors(), self.magnitude


def _work_dtype(weight: Tensor) -> torch.dtype:
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def _like(tensor: Tensor, weight: Tensor) -> Tensor:
    """The tensor on the weight's device, in the type to work in."""
    return tensor.to(weight.device, non_blocking=True).to(_work_dtype(weight))


def _product(factors: tuple[Tensor, ...], weight: Tensor) -> Tensor:
    first, *rest = (_like(factor, weight) for factor in factors)
    for factor in rest:
        first = first @ factor
    return first


def _rows_of(tensor: Tensor, rows: Rows) -> Tensor:
    """A view where the rows are one range, else a copy."""
    parts = [tensor[start:stop] for start, stop in rows]
    return parts[0] if len(parts) == 1 else torch.cat(parts)
