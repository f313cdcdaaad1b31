"""What everything that keeps files on this disk shares: whole writes, free space, digests, sizes in words."""

from __future__ import annotations

import hashlib
import secrets
import shutil
from pathlib import Path
from typing import BinaryIO

VERIFIED_MTIME_NS = 1_577_836_800 * 10**9
"""Sentinel modification time of every file whose digest was verified; any other time means that the file is new or was
modified, and has to be hashed."""


def write_atomically(path: Path, content: bytes) -> None:
    """Put a file in place, whole or not at all, making its folder where there is none."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    made = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        made.write_bytes(content)
        made.replace(path)
    finally:
        made.unlink(missing_ok=True)


def digest_of_file(file: BinaryIO) -> str:
    """The sha256 of a whole open file, in hexadecimal."""
    file.seek(0)
    digest = hashlib.sha256()
    while chunk := file.read(2**20):
        digest.update(chunk)
    return digest.hexdigest()


def free_bytes_of(folder: Path) -> int:
    """What the folder's disk has left; a folder that is not there yet is looked for upwards."""
    there = next(above for above in (folder, *folder.parents) if above.exists())
    return shutil.disk_usage(there).free


def megabytes(size_bytes: int) -> str:
    """A number of bytes, for people."""
    return f"{size_bytes / 1e6:.1f} MB"


def gigabytes(size_bytes: int) -> str:
    """A number of bytes, for people."""
    return f"{size_bytes / 1e9:.2f} GB"
