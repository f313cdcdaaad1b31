"""The header of a safetensors file: its tensors' names, types, shapes and offsets, and its metadata. Needs no torch."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from errors import LoraFormatError

Shape = tuple[int, ...]


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a file."""

    dtype: str
    """As safetensors spells it: "F32", "BF16", "F8_E4M3"."""
    shape: Shape
    start: int
    """Its first byte, counted from the end of the header."""
    stop: int


@dataclass(frozen=True)
class Header:
    """What a file says of its tensors and of itself."""

    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]
    size: int
    """Bytes before the data."""

    @property
    def shapes(self) -> dict[str, Shape]:
        """The shape of each tensor."""
        return {name: info.shape for name, info in self.tensors.items()}


def read_header(path: Path) -> Header:
    """Read the header; the safetensors library makes sure that it describes the file's content.

    Raises:
        LoraFormatError: it is not a whole safetensors file.
    """
    try:
        with safe_open(path, "np"):
            pass
        with path.open("rb") as file:
            length = struct.unpack("<Q", file.read(8))[0]
            table = json.loads(file.read(length))
    except (SafetensorError, struct.error, ValueError, RecursionError) as error:
        message = "the file is not a safetensors file, or it is damaged. Use a LoRA saved as .safetensors."
        raise LoraFormatError(message) from error
    metadata = table.pop("__metadata__", None) or {}
    return Header({name: _info(entry) for name, entry in table.items()}, metadata, 8 + length)


def _info(entry: Mapping[str, Any]) -> TensorInfo:
    """An entry of the header, whose types the library has checked."""
    start, stop = entry["data_offsets"]
    return TensorInfo(entry["dtype"], tuple(entry["shape"]), start, stop)


def holds_only_zeros(path: Path, header: Header, name: str) -> bool:
    """Whether all bytes of a tensor are zero, so that all its numbers are."""
    info = header.tensors[name]
    with path.open("rb") as file:
        file.seek(header.size + info.start)
        left = info.stop - info.start
        while left:
            block = file.read(min(left, 2**20))
            if not block or block.count(0) != len(block):
                return False
            left -= len(block)
    return True
