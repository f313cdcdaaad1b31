"""quantise(W + sum of strength * B @ A) in one Triton kernel: it reads the weight, writes its fp8, and nothing between.

PyTorch's operators make a float32 copy of the weight, add to it, divide and round it: eight to thirteen kernels, about
eight times the traffic. Here a program takes a group of rows and sums them up twice from the weight and the factors:
once for each row's largest number, once to quantise. The second time reads short rows from the cache.

Importing this needs Triton; `engine.fp8.choose_rewrite` decides whether it is used. Knows single matrices only.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = {"ROWS": 16, "COLUMNS": 256, "RANKS": 16}
"""A program's rows, and the columns and ranks that it takes at once; a product on the GPU takes at least 16."""
WARPS, STAGES = 4, 2


@triton.jit  # type: ignore[untyped-decorator]
def _summed(  # type: ignore[no-untyped-def]
    weight, factors, table, strengths, count, rows, columns, height, width: tl.constexpr, RANKS: tl.constexpr
) -> Any:
    """A tile of weight + sum of strength * B @ A, in float32, and which of its places exist."""
    inside = (rows[:, None] < height) & (columns[None, :] < width)
    total = tl.load(weight + rows[:, None].to(tl.int64) * width + columns[None, :], mask=inside, other=0.0)
    total = total.to(tl.float32)
    for index in range(count):
        a, b = factors + tl.load(table + 3 * index), factors + tl.load(table + 3 * index + 1)
        rank = tl.load(table + 3 * index + 2)
        change = tl.zeros_like(total)
        for begin in range(0, rank, RANKS):
            ranks = begin + tl.arange(0, RANKS)
            in_b = (rows[:, None] < height) & (ranks[None, :] < rank)
            in_a = (ranks[:, None] < rank) & (columns[None, :] < width)
            left = tl.load(b + rows[:, None] * rank + ranks[None, :], mask=in_b, other=0.0)
            right = tl.load(a + ranks[:, None] * width + columns[None, :], mask=in_a, other=0.0)
            change = tl.dot(left, right, change, input_precision="ieee")
        total += tl.load(strengths + index) * change
    return total, inside


@triton.jit  # type: ignore[untyped-decorator]
def requantise_kernel(  # type: ignore[no-untyped-def]
    weight,
    data,
    scale,
    factors,
    table,
    strengths,
    count,
    height,
    width: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANKS: tl.constexpr,
) -> None:
    """See `requantise`; a program for each group of rows."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    largest = tl.zeros([ROWS, COLUMNS], tl.float32)
    for begin in range(0, width, COLUMNS):
        columns = begin + tl.arange(0, COLUMNS)
        total, _ = _summed(weight, factors, table, strengths, count, rows, columns, height, width, RANKS)
        largest = tl.maximum(largest, tl.abs(total))
    # Divisions are rounded as PyTorch's, or bits differ.
    row_scale = tl.div_rn(tl.max(largest, 1), tl.full([ROWS], 448.0, tl.float32))
    tl.store(scale + rows, row_scale, mask=rows < height)
    divisor = tl.broadcast_to(tl.maximum(row_scale, 1.1754943508222875e-38)[:, None], [ROWS, COLUMNS])
    for begin in range(0, width, COLUMNS):
        columns = begin + tl.arange(0, COLUMNS)
        total, inside = _summed(weight, factors, table, strengths, count, rows, columns, height, width, RANKS)
        at = data + rows[:, None].to(tl.int64) * width + columns[None, :]
        tl.store(at, tl.div_rn(total, divisor).to(data.dtype.element_ty), mask=inside)


@torch.library.custom_op("flux::requantise", mutates_args=("data", "scale"))
def requantise(data: Tensor, scale: Tensor, weight: Tensor, factors: Tensor, table: Tensor, strengths: Tensor) -> None:
    """Write quantise(weight + sum of strength * B @ A) into data and scale, as `fp8.write_fp8` would.

    Args:
        data: (out, in), fp8.
        scale: (out, 1), float32.
        weight: (out, in), contiguous.
        factors: one dimension; holds all factors of all layers, each contiguous.
        table: (changes, 3), int64: where A, (rank, in), and B, (out, rank), of a change begin in `factors`; its rank.
        strengths: (changes,), float32.
    """
    height, width = weight.shape
    requantise_kernel[(triton.cdiv(height, TILE["ROWS"]),)](
        weight, data, scale, factors, table, strengths, len(strengths), height,
        width=width, **TILE, num_warps=WARPS, num_stages=STAGES,
    )  # fmt: skip


@requantise.register_fake
def _(data: Tensor, scale: Tensor, weight: Tensor, factors: Tensor, table: Tensor, strengths: Tensor) -> None:
    return None
