"""Look into a downloaded file before anyone else does: is it one whole safetensors file, or a tar with exactly one.

Knows nothing about LoRAs. The safetensors library checks a file too when it reads it, but accepts duplicate names and
a million empty tensors, so its header is read here first. A tar is never extracted to a path: the bytes of its one
regular `*.safetensors` member are copied, whatever the member is called.
"""

from __future__ import annotations

import json
import math
import os
import struct
import tarfile
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from errors import LoraFormatError

MAX_HEADER_BYTES = 8 * 2**20
MAX_TENSORS = 20_000
MAX_MEMBERS = 10_000
MAX_TAR_HEADER_BYTES = 2**20
DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64,
}  # fmt: skip
"""The types of the safetensors format that are whole bytes, and their widths."""


def check_safetensors(path: Path) -> None:
    """Make sure that a file is a whole safetensors file: its header sound, its tensors filling it without a gap.

    Raises:
        LoraFormatError: it is not; the message says what was found.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        beginning = file.read(8)
        length = struct.unpack("<Q", beginning)[0] if len(beginning) == 8 else 0
        if length < 2 or 8 + length > size or length > MAX_HEADER_BYTES:
            _refuse(_described(path, size))
        header = _parsed(file.read(length))
    tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
    if len(tensors) > MAX_TENSORS:
        _refuse(f"it names {len(tensors)} tensors, more than {MAX_TENSORS}")
    spans = sorted(_span(name, entry) for name, entry in tensors.items())
    end = 0
    for start, stop in spans:
        if start != end:
            _refuse(f"its tensors overlap or leave a gap at byte {end}")
        end = stop
    if 8 + length + end != size:
        _refuse(f"its header describes {8 + length + end} bytes, and the file has {size}")


def _parsed(text: bytes) -> dict[str, Any]:
    try:
        header = json.loads(text, object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError):
        _refuse("its header cannot be read")
    if not isinstance(header, dict):
        _refuse("its header is no table of tensors")
    return header


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a name stands there twice")
    return table


def _span(name: str, entry: object) -> tuple[int, int]:
    """A tensor's first and last byte in the data, checked against its type and shape."""
    if not isinstance(entry, dict):
        _refuse(f'its tensor "{name[:80]}" is not described')
    bits = DTYPE_BITS.get(str(entry.get("dtype")))
    shape, offsets = _counts(entry.get("shape")), _counts(entry.get("data_offsets"))
    if bits is None:
        _refuse(f'its tensor "{name[:80]}" has the unknown type "{str(entry.get("dtype"))[:20]}"')
    if shape is None or offsets is None or len(offsets) != 2:
        _refuse(f'its tensor "{name[:80]}" has no proper shape or place')
    start, stop = offsets
    if stop - start != math.prod(shape) * bits // 8:
        _refuse(f'its tensor "{name[:80]}" does not have as many bytes as its shape needs')
    return start, stop


def _counts(values: object) -> list[int] | None:
    """The values, if they are a short list of whole numbers from 0 on."""
    if not isinstance(values, list) or len(values) > 16:
        return None
    return values if all(type(v) is int and 0 <= v < 2**48 for v in values) else None


def _described(path: Path, size: int) -> str:
    with path.open("rb") as file:
        beginning = file.read(512).lstrip().lower()
    if beginning.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "it is a web page"
    if beginning.startswith(b"pk\x03\x04"):
        return "it is a zip file, as older PyTorch checkpoints are"
    if beginning.startswith(b"{"):
        return "it is JSON"
    return f"its {size} bytes do not begin as such a file does"


def _refuse(found: str) -> NoReturn:
    raise LoraFormatError(f"The file is no whole safetensors file: {found}. Give the address of another file.")


# Tar


class _Guarded:
    """The file under a tar reader, which reads no more at a time than honest headers need."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= MAX_TAR_HEADER_BYTES:
            raise tarfile.ReadError("a header of absurd size")
        return self._file.read(size)

    def seek(self, position: int) -> int:
        return self._file.seek(position)

    def tell(self) -> int:
        return self._file.tell()


def copy_only_safetensors(tar: Path, target: BinaryIO) -> int:
    """Copy the bytes of the one `*.safetensors` in a tar into `target` and return how many.

    Raises:
        LoraFormatError: it is no tar, or has none or several, or the one is not a regular file.
    """
    with tar.open("rb") as file:
        member = _only_safetensors(file)
        if member.offset_data + member.size > tar.stat().st_size:
            _refuse_tar("it ends in the middle of its safetensors file")
        position, left = member.offset_data, member.size
        while left:
            sent = os.sendfile(target.fileno(), file.fileno(), position, min(left, 2**24))
            position, left = position + sent, left - sent
    return member.size


def _only_safetensors(file: BinaryIO) -> tarfile.TarInfo:
    found: list[tarfile.TarInfo] = []
    try:
        with tarfile.open(fileobj=_Guarded(file), mode="r:") as archive:  # type: ignore[call-overload]
            for count, member in enumerate(archive):
                if count >= MAX_MEMBERS:
                    _refuse_tar(f"it has more than {MAX_MEMBERS} members")
                if member.name.lower().endswith(".safetensors"):
                    found.append(member)
    except (tarfile.TarError, ValueError, OverflowError, OSError) as error:
        raise LoraFormatError("The file is no tar that can be read. Give the address of another file.") from error
    if len(found) != 1:
        _refuse_tar(f"it has {len(found)} safetensors files")
    if not found[0].isreg() or found[0].issparse():
        _refuse_tar("its safetensors file is a link or a device")
    return found[0]


def _refuse_tar(found: str) -> NoReturn:
    raise LoraFormatError(f"The tar cannot be used: {found}, where exactly one is expected. Give another one.")
