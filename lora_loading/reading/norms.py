"""How large a file's changes are, layer by layer, computed with NumPy from the factors alone. No torch, no model.

The Frobenius norm of B A is the root of sum((B^T B) * (A A^T)): it needs matrices of the rank's size only. Kinds whose
change depends on the model's weights have no norm here: OFT and BOFT; for DoRA it is that of the inner change.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_loading.reading.header import Header
from lora_loading.reading.keys import SortedFile, SortedLayer, kind_of
from lora_loading.reading.scales import Settings, layer_names
from lora_loading.shapes import Rows

Array = NDArray[np.floating[Any]]
DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1", "U8": "u1"}
CHUNK_ROWS = 512
READ_AS = {"BF16": "<u2", "F8_E4M3": "u1", "F8_E5M2": "u1"}


@dataclass(frozen=True)
class LayerSize:
    """One layer of the model, as a file changes it."""

    component: str
    layer: str
    kind: str
    rank: int
    norm: float | None
    """Frobenius norm at scale 1; None if it depends on the model's weights, not finite if the numbers are not."""


@dataclass(frozen=True)
class Factors:
    """alpha / rank * B A of one layer of the model."""

    a: Array
    b: Array
    scale: float

    def dot(self, other: Factors) -> float:
        """The sum of the elementwise products of both changes."""
        products = (self.b.T @ other.b) * (self.a @ other.a.T)
        return float(products.sum(dtype=np.float64)) * self.scale * other.scale


class Measured:
    """A file's changes, read layer by layer."""

    def __init__(self, path: Path, header: Header, file: SortedFile, settings: Settings) -> None:
        self._path, self._header, self._file, self._settings = path, header, file, settings

    def sizes(self) -> Iterator[LayerSize]:
        """Each layer of the model that the file changes."""
        for layer in self._file.layers:
            change = next((change for change in layer.changes if change.parameter == "weight"), layer.changes[0])
            measure = _MEASURES.get(change.kind)
            for piece in layer.target.pieces:
                with np.errstate(all="ignore"):
                    norm = None if measure is None else measure(self, layer, change.rank, piece.rows)
                name = piece.layer.name
                yield LayerSize(layer.target.component, name, kind_of(layer.changes), change.rank, norm)

    def factors(self) -> dict[tuple[str, str], Factors]:
        """The low-rank changes, by component and layer."""
        found = {}
        for layer in self._file.layers:
            change = layer.changes[0]
            if change.kind != "LoRA":
                continue
            a, b, scale = self.part(layer, "a"), self.part(layer, "b"), self.scale(layer, change.rank)
            for piece in layer.target.pieces:
                found[layer.target.component, piece.layer.name] = Factors(a, _rows(b, piece.rows), scale)
        return found

    def part(self, layer: SortedLayer, part: str) -> Array:
        """The tensor of one part in float32 or better."""
        return read_array(self._path, self._header, layer.keys[part])

    def scale(self, layer: SortedLayer, rank: int) -> float:
        """alpha / rank, 1 if nothing says otherwise; rank 0 is a LoKr of two whole matrices (see `FileLayer`)."""
        if "alpha" in layer.keys:
            return float(self.part(layer, "alpha").reshape(-1)[0]) / rank if rank else 1.0
        scale = self._settings[layer.target.component].scale(layer_names(layer), rank)
        return 1.0 if scale is None else scale


def read_array(path: Path, header: Header, name: str) -> Array:
    """A tensor of a file, in float32 or float64."""
    info = header.tensors[name]
    kind = DTYPES.get(info.dtype, READ_AS.get(info.dtype, ""))
    count = math.prod(info.shape)
    raw: NDArray[Any] = np.fromfile(path, np.dtype(kind), count, offset=header.size + info.start).reshape(info.shape)
    if info.dtype == "BF16":
        wide: Array = (raw.astype(np.uint32) << 16).view(np.float32)
        return wide
    if info.dtype in READ_AS:
        decoded: Array = _float8(info.dtype)[raw]
        return decoded
    number: Array = raw if raw.dtype in (np.float32, np.float64) else raw.astype(np.float32)
    return number


@cache
def _float8(dtype: str) -> Array:
    """The numbers that the 256 bytes stand for."""
    exponent_bits, mantissa_bits = (4, 3) if dtype == "F8_E4M3" else (5, 2)
    bias = 2 ** (exponent_bits - 1) - 1
    table = np.zeros(256, np.float32)
    for byte in range(256):
        exponent = byte >> mantissa_bits & (2**exponent_bits - 1)
        mantissa = byte & (2**mantissa_bits - 1)
        fraction = mantissa / 2**mantissa_bits + (exponent > 0)
        table[byte] = (-1) ** (byte >> 7) * fraction * 2.0 ** (max(exponent, 1) - bias)
    if dtype == "F8_E4M3":
        table[[0x7F, 0xFF]] = np.nan
    else:
        table[[0x7C, 0xFC]] = np.inf, -np.inf
        table[[*range(0x7D, 0x80), *range(0xFD, 0x100)]] = np.nan
    return table


def _rows(array: Array, rows: Rows) -> Array:
    parts = [array[start:stop] for start, stop in rows]
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _low_rank(file: Measured, layer: SortedLayer, rank: int, rows: Rows) -> float:
    factors = Factors(file.part(layer, "a"), _rows(file.part(layer, "b"), rows), file.scale(layer, rank))
    return _root(factors.dot(factors))


def _loha(file: Measured, layer: SortedLayer, rank: int, rows: Rows) -> float:
    """The product itself, some rows at a time: its norm does not follow from the factors' own."""
    w1_a, w2_a = (_rows(file.part(layer, f"hada_{side}_a"), rows) for side in ("w1", "w2"))
    w1_b, w2_b = (file.part(layer, f"hada_{side}_b") for side in ("w1", "w2"))
    square = 0.0
    for start in range(0, len(w1_a), CHUNK_ROWS):
        chunk = slice(start, start + CHUNK_ROWS)
        square += float(np.square((w1_a[chunk] @ w1_b) * (w2_a[chunk] @ w2_b)).sum(dtype=np.float64))
    return _root(square) * abs(file.scale(layer, rank))


def _lokr(file: Measured, layer: SortedLayer, rank: int, rows: Rows) -> float:
    """The squares of a Kronecker product's rows are the products of those of its sides' rows."""
    squares = [np.square(_side(file, layer, side)).sum(axis=1, dtype=np.float64) for side in ("w1", "w2")]
    product = np.outer(squares[0], squares[1]).reshape(-1)
    return _root(float(_rows(product, rows).sum())) * abs(file.scale(layer, rank))


def _side(file: Measured, layer: SortedLayer, side: str) -> Array:
    if f"lokr_{side}" in layer.keys:
        return file.part(layer, f"lokr_{side}")
    return file.part(layer, f"lokr_{side}_a") @ file.part(layer, f"lokr_{side}_b")


def _difference(file: Measured, layer: SortedLayer, rank: int, rows: Rows) -> float:
    return float(np.linalg.norm(_rows(file.part(layer, "diff"), rows)))


def _bias(file: Measured, layer: SortedLayer, rank: int, rows: Rows) -> float:
    part = "diff_b" if "diff_b" in layer.keys else "bias"
    norm = float(np.linalg.norm(_rows(file.part(layer, part), rows)))
    return norm * abs(file.scale(layer, rank)) if rank else norm


def _root(square: float) -> float:
    return math.sqrt(max(square, 0.0)) if math.isfinite(square) else square


_MEASURES: dict[str, Callable[[Measured, SortedLayer, int, Rows], float]] = {
    "LoRA": _low_rank,
    "LoHa": _loha,
    "LoKr": _lokr,
    "full difference": _difference,
    "bias": _bias,
}
