"""The tensors of a safetensors file in memory of our own, with their numbers checked.

The whole file is read into one buffer, and the tensors are views of it: one copy, and no memory map that would change
when someone writes to the file. A tensor that is not aligned as torch aligns its own is copied, since the same numbers
give other bits in a matrix product at other addresses.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from errors import LoraFormatError
from lora_loading.reading.header import Header, TensorInfo

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
CONVERTED = {
    torch.float8_e4m3fn: torch.bfloat16,  # which represents all of its numbers
    torch.float8_e5m2: torch.bfloat16,
    torch.float64: torch.float32,  # no model works in float64; too large a number becomes infinite, and is refused
}
USED = (torch.float32, torch.float16, torch.bfloat16)
ALIGNMENT = 64
"""Bytes; torch's allocator aligns to it."""


def load_tensors(path: Path, header: Header, names: Collection[str]) -> dict[str, Tensor]:
    """The tensors of these names, on the CPU, in float32, float16 or bfloat16; alphas and markers in any real type.

    Raises:
        LoraFormatError: a tensor is of another type, or a number other than an alpha or a marker is not finite.
    """
    for name in names:
        _check_type(name, header.tensors[name].dtype)
    padding = _padding(header)
    buffer = _read(path, header.size, padding)
    tensors = {}
    for name in names:
        info = header.tensors[name]
        part = buffer[padding + info.start : padding + info.stop]
        aligned = part if (padding + info.start) % ALIGNMENT == 0 else part.clone()
        tensor = aligned.view(DTYPES[info.dtype]).reshape(info.shape)
        tensors[name] = tensor.to(CONVERTED.get(tensor.dtype, tensor.dtype))
    if not _all_finite(buffer, padding, [header.tensors[name] for name in names]):
        _check_numbers(tensors)
    return tensors


def _padding(header: Header) -> int:
    """How far into an aligned buffer the data must begin for the most bytes to be in aligned tensors."""
    byte_counts: Counter[int] = Counter()
    for info in header.tensors.values():
        byte_counts[-info.start % ALIGNMENT] += info.stop - info.start
    return byte_counts.most_common(1)[0][0] if byte_counts else 0


def _read(path: Path, offset: int, padding: int) -> Tensor:
    """All bytes after the header, behind as many bytes as the padding is long."""
    size = path.stat().st_size - offset
    pinned = torch.cuda.is_available()  # page-locked memory is copied to the device several times faster
    buffer = torch.empty(padding + size, dtype=torch.uint8, pin_memory=pinned)
    with path.open("rb", buffering=0) as file:
        file.seek(offset)
        content: Any = buffer[padding:].numpy()
        view, at = memoryview(content), 0
        while at < len(view) and (count := file.readinto(view[at:])):
            at += count
    if at < size:
        raise LoraFormatError("the file became shorter while it was read. Use the LoRA again.")
    return buffer


def _is_one_number(name: str) -> bool:
    """Whether the tensor is an alpha, or the marker of a scaled OFT."""
    return name.endswith(("alpha", ".scaled_oft"))


def _check_type(name: str, dtype: str) -> None:
    kept = DTYPES.get(dtype)
    used = kept is not None and CONVERTED.get(kept, kept) in USED
    if not used and not (_is_one_number(name) and kept is not None and not kept.is_complex):
        found = str(kept or dtype).removeprefix("torch.")
        raise LoraFormatError(f'"{name[:120]}" is of type {found}. Save it in bf16 or float32.')


def _all_finite(buffer: Tensor, padding: int, infos: Iterable[TensorInfo]) -> bool:
    """Whether all numbers are finite, asked of as long stretches as possible: a call for each tensor takes ten times as
    long. False also if one is of a type that has to be converted first.
    """
    stretches: list[tuple[str, int, int]] = []
    for info in sorted(infos, key=lambda info: info.start):
        if stretches and stretches[-1][0] == info.dtype and stretches[-1][2] == info.start:
            stretches[-1] = info.dtype, stretches[-1][1], info.stop
        else:
            stretches.append((info.dtype, info.start, info.stop))
    return all(_is_finite_stretch(buffer, padding + start, padding + stop, kind) for kind, start, stop in stretches)


def _is_finite_stretch(buffer: Tensor, start: int, stop: int, kind: str) -> bool:
    dtype = DTYPES[kind]
    if dtype not in USED or start % dtype.itemsize:
        return False
    return start == stop or _is_finite(buffer[start:stop].view(dtype))


def _check_numbers(tensors: Mapping[str, Tensor]) -> None:
    """Refuse numbers that are not finite; alphas are checked where they are used, and markers are no numbers."""
    for name, tensor in tensors.items():
        if tensor.numel() and not _is_one_number(name) and not _is_finite(tensor):
            raise LoraFormatError(
                f'"{name[:120]}" holds numbers that are not finite. Train it again, or use another checkpoint of it.'
            )


def _is_finite(tensor: Tensor) -> bool:
    """Least and greatest number: NaN wins both, and it takes a sixth of the time of `torch.isfinite`."""
    least, most = torch.aminmax(tensor)
    return bool(torch.isfinite(least) & torch.isfinite(most))
