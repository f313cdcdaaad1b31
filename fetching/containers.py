"""Look into a downloaded file before anyone else does: is it one whole safetensors file, or a tar with exactly one.

Knows nothing about LoRAs. The safetensors library checks types, shapes, offsets and length when it opens a file, but it
accepts duplicate names and a million empty tensors (8 s, 861 MiB), so the header is read here first. A tar is never
extracted to a path: the bytes of its one regular `*.safetensors` member are copied, whatever the member is called.
"""

from __future__ import annotations

import json
import os
import struct
import tarfile
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from safetensors import SafetensorError, safe_open

from errors import LoraFormatError

MAX_HEADER_BYTES = 8 * 2**20
MAX_TENSORS = 20_000
MAX_MEMBERS = 10_000
MAX_TAR_HEADER_BYTES = 2**20


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
        _check_names(file.read(length))
    try:
        with safe_open(path, "np"):
            return
    except SafetensorError as error:
        found = str(error).removeprefix("Error while deserializing header: ")
        readable = "".join(c if c.isprintable() else " " for c in found[:200])
        raise LoraFormatError(_message(f"its header does not describe its content ({readable})")) from error


def _check_names(header: bytes) -> None:
    """Refuse a header that the library would accept although it names a tensor twice, too many, or unprintably.

    Names are shown in errors and logs, where a line break or an escape of terminals would forge lines.
    """
    try:
        table = json.loads(header, object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError):
        _refuse("its header cannot be read")
    if isinstance(table, dict) and not all(name.isprintable() for name in table):
        _refuse("the name of a tensor holds unprintable characters")
    count = sum(name != "__metadata__" for name in table) if isinstance(table, dict) else 0
    if count > MAX_TENSORS:
        _refuse(f"it names {count} tensors, more than {MAX_TENSORS}")


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a name occurs twice")
    return table


def _described(path: Path, size: int) -> str:
    with path.open("rb") as file:
        beginning = file.read(512).lstrip().lower()
    if beginning.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "it is a web page"
    if beginning.startswith(b"pk\x03\x04"):
        return "it is a zip file, as older PyTorch checkpoints are"
    if beginning.startswith(b"{"):
        return "it is JSON"
    return f"its {size} bytes do not begin as one does"


def _refuse(found: str) -> NoReturn:
    raise LoraFormatError(_message(found))


def _message(found: str) -> str:
    return f"The file is not a whole safetensors file: {found}. Give the address of another file."


# Tar


class _Guarded:
    """A file for a tar reader that refuses to read more at a time than any regular header needs."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= MAX_TAR_HEADER_BYTES:
            raise tarfile.ReadError("a header of more than 1 MiB")
        return self._file.read(size)

    def seek(self, position: int) -> int:
        return self._file.seek(position)

    def tell(self) -> int:
        return self._file.tell()


def copy_only_safetensors(tar: Path, target: BinaryIO) -> int:
    """Copy the bytes of the one `*.safetensors` in a tar into `target` and return how many.

    Raises:
        LoraFormatError: it is not a tar, or has none or several, or the one is not a regular file.
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
        raise LoraFormatError("The file cannot be read as a tar. Give the address of another file.") from error
    if len(found) != 1:
        _refuse_tar(f"it has {len(found)} safetensors files")
    if not found[0].isreg() or found[0].issparse():
        _refuse_tar("its safetensors file is a link or a device")
    return found[0]


def _refuse_tar(found: str) -> NoReturn:
    raise LoraFormatError(
        f"The tar cannot be used: {found}, and exactly one regular file is expected. Give the address of another tar."
    )
