"""OFT and BOFT: changes that rotate the rows or the columns of a weight in blocks. Knows no files, names or models.

The blocks are orthogonal: Cayley transforms of skew-symmetric matrices Q. LyCORIS and kohya rotate rows, PEFT columns.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lora_loading.shapes import Rows
from lora_loading.updates import WeightOf, like, rows_of, work_dtype


@dataclass(frozen=True)
class RowRotation:
    """OFT or BOFT over the rows of the file's layer, as LyCORIS and kohya write them: W' = rescale * R W.

    Each stage multiplies blocks of rows by orthogonal matrices, the Cayley transforms (I + Q) / (I - Q) of
    Q = blocks - blocks^T. OFT has one stage and multiplies by the transposes; BOFT has several, between which the rows
    are interleaved. At a scale s each stage is I + s (R - I), and the rescaling 1 + s (rescale - 1): linear in s for
    one stage without rescaling alone. Source: OFT, Qiu et al. 2023; BOFT, Liu et al. 2023; LyCORIS, `functional.boft`.
    """

    blocks: Tensor
    """(stages, blocks, size, size)"""
    constraint: float | None
    """The greatest norm of Q over all blocks, None for no limit."""
    butterfly: bool
    """BOFT."""
    rescale: Tensor | None = None
    """(rows, 1)"""
    sources: tuple[tuple[str, Rows], ...] = ()
    """For a file's layer that is not one layer of the model: the layers, and their rows in it."""
    rows: Rows | None = None
    """The rows of the file's layer that are used; None for all."""

    def delta(self, weight: Tensor, weight_of: WeightOf) -> Tensor:
        """The rotated rows minus the old ones."""
        return self.blended(weight, weight_of, 1.0)

    def blended(self, weight: Tensor, weight_of: WeightOf, scale: float) -> Tensor:
        """The change at a scale."""
        old = new = self._file_weight(weight, weight_of)
        identity = torch.eye(self.blocks.shape[-1], dtype=old.dtype, device=old.device)
        for stage, rotation in enumerate(_cayley(self._skew(weight))):
            blended = identity + scale * (rotation - identity)
            new = _butterfly(new, blended, stage) if self.butterfly else _blockwise(new, blended.mT)
        if self.rescale is not None:
            new = new * (1 + scale * (like(self.rescale, weight) - 1))
        return new - old if self.rows is None else rows_of(new - old, self.rows)

    def _skew(self, weight: Tensor) -> Tensor:
        blocks = like(self.blocks, weight)
        skew = blocks - blocks.mT
        if self.constraint is None:
            return skew
        norm: Tensor = torch.linalg.vector_norm(skew)
        return skew * (self.constraint / (norm + 1e-8)).clamp(max=1)

    def _file_weight(self, weight: Tensor, weight_of: WeightOf) -> Tensor:
        """The weight as the file sees it: (rows, in)."""
        if not self.sources:
            return like(weight, weight)
        count = sum(stop - start for _, rows in self.sources for start, stop in rows)
        whole = torch.empty(count, weight.shape[1], dtype=work_dtype(weight), device=weight.device)
        for name, rows in self.sources:
            piece, at = like(weight_of(name), weight), 0
            for start, stop in rows:
                whole[start:stop] = piece[at : at + stop - start]
                at += stop - start
        return whole

    def take_rows(self, rows: Rows) -> RowRotation:
        """The same rotation, of which these rows are used."""
        return replace(self, rows=rows)

    def tensors(self) -> tuple[Tensor, ...]:
        """The blocks, and the rescaling if there is one."""
        return (self.blocks,) if self.rescale is None else (self.blocks, self.rescale)


@dataclass(frozen=True)
class ColumnRotation:
    """OFT or BOFT over the columns of a layer, as PEFT writes them: W' = row_scale * W R^T.

    R is block-diagonal in each stage, of the Cayley transforms (I - Q) / (I + Q), or for OFT of their series in Q. PEFT
    defines no scale; here the change is linear in it. Source: PEFT, `tuners.oft.layer` and `tuners.boft.layer`.
    """

    skew: Tensor
    """(stages, blocks, size, size): Q. One block stands for all if it alone does not cover the columns."""
    neumann_terms: int | None
    """How many terms of the series, None for the exact transform."""
    row_scale: Tensor | None
    """(out, 1)"""

    def delta(self, weight: Tensor, weight_of: WeightOf) -> Tensor:
        """The layer with rotated columns minus the old one."""
        old = like(weight, weight)
        new = old.T
        skew = like(self.skew, weight)
        rotations = _cayley(-skew) if self.neumann_terms is None else _neumann(skew, self.neumann_terms)
        for stage, rotation in enumerate(rotations):
            new = _butterfly_sorted(new, rotation, stage) if len(rotations) > 1 else _blockwise(new, rotation)
        new = new.T if self.row_scale is None else new.T * like(self.row_scale, weight)
        return new - old

    def take_rows(self, rows: Rows) -> ColumnRotation:
        """The same rotation, since it acts on each row alike, and the rows' scales."""
        return self if self.row_scale is None else replace(self, row_scale=rows_of(self.row_scale, rows))

    def tensors(self) -> tuple[Tensor, ...]:
        """The blocks, and the rows' scales if there are any."""
        return (self.skew,) if self.row_scale is None else (self.skew, self.row_scale)


def _cayley(skew: Tensor) -> Tensor:
    """(I + Q) / (I - Q) for each block: orthogonal, since Q is skew-symmetric."""
    identity = torch.eye(skew.shape[-1], dtype=skew.dtype, device=skew.device)
    rotation: Tensor = torch.linalg.solve(identity - skew, identity + skew)
    return rotation


def _neumann(skew: Tensor, terms: int) -> Tensor:
    """PEFT's series of the transform: I + 2 Q + ... + 2 Q^(n-2) + Q^(n-1); it computes three terms as four."""
    last = terms - 1 if terms != 3 else 3
    total = torch.eye(skew.shape[-1], dtype=skew.dtype, device=skew.device).expand_as(skew)
    power = skew
    for exponent in range(1, last + 1):
        total = total + power * (1 if exponent == last > 1 else 2)
        power = power @ skew
    return total


def _blockwise(rows: Tensor, blocks: Tensor) -> Tensor:
    """Each block of rows multiplied from the left by its matrix; one matrix may stand for all."""
    size = blocks.shape[-1]
    return (blocks @ rows.reshape(-1, size, rows.shape[1])).flatten(0, 1)


def _butterfly(rows: Tensor, blocks: Tensor, stage: int) -> Tensor:
    """A stage of LyCORIS' BOFT: rows that are 2^stage half blocks apart are neighbours while the blocks act."""
    apart, columns = 2**stage * blocks.shape[-1] // 2, rows.shape[1]
    paired = rows.reshape(-1, 2, apart, columns).transpose(1, 2).flatten(0, 2)
    return _blockwise(paired, blocks).reshape(-1, apart, 2, columns).transpose(1, 2).flatten(0, 2)


def _butterfly_sorted(rows: Tensor, blocks: Tensor, stage: int) -> Tensor:
    """A stage of PEFT's BOFT: in groups of 2^stage blocks, the even half blocks come before the odd ones."""
    half = blocks.shape[-1] // 2
    order = torch.arange(rows.shape[0], device=rows.device).reshape(-1, 2**stage, 2, half)
    order = order.transpose(1, 2).reshape(-1)
    unsorted = torch.empty_like(rows)
    unsorted[order] = rows
    return _blockwise(unsorted, blocks)[order]
