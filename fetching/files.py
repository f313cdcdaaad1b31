"""What everything that keeps files on this disk shares: private folders, atomic writes, free space, digests, sizes."""

from __future__ import annotations

import hashlib
import logging
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

logger = logging.getLogger(__name__)

VERIFIED_MTIME_NS = 1_577_836_800 * 10**9
"""Sentinel modification time of a file in the Hub's cache whose digest was verified; any other time means that the file
is new or was modified, and has to be hashed."""

REMOVALS = 5
"""How often the removal of a folder is tried into which a thread may still write."""


class SharedFolderError(OSError):
    """A folder that other users can write to, and so one whose content cannot be trusted; `strerror` says why."""


def private_folder(folder: Path) -> Path:
    """Return the folder, created with mode 0700 if needed, after making sure that only this user can write to it.

    Raises:
        SharedFolderError: it belongs to another user, or others can write to it.
        OSError: it cannot be created.
    """
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    require_private(folder)
    return folder


def require_private(folder: Path) -> None:
    """Make sure that a folder belongs to this user and that no other user can write to it.

    Raises:
        SharedFolderError: it does not, or others can.
        FileNotFoundError: there is none.
    """
    found = folder.stat()
    if found.st_uid != os.geteuid():
        raise SharedFolderError(None, f"it belongs to another user (uid {found.st_uid})", str(folder))
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        mode = stat.S_IMODE(found.st_mode)
        raise SharedFolderError(None, f"other users can write to it (mode {mode:04o})", str(folder))
    for above in folder.resolve().parents:
        if replaceable_by_others(above):
            logger.warning("%s: other users can rename what is in it, %s included", above, folder.name)


def replaceable_by_others(folder: Path) -> bool:
    """Whether every user can rename or remove what others keep in a folder: world-writable without the sticky bit."""
    mode = folder.stat().st_mode
    return bool(mode & stat.S_IWOTH) and not mode & stat.S_ISVTX


def temporary_name(prefix: str) -> Path:
    """A path in the temporary folder that no one else can guess, for a folder that is made next.

    Unlike tempfile.mkdtemp it is known before the folder is made: a cancellation may arrive right after the making.
    """
    return Path(tempfile.gettempdir()) / f"{prefix}{secrets.token_hex(8)}"


@contextmanager
def temporary_folder(prefix: str) -> Iterator[Path]:
    """A folder for files of this user alone, removed at the end with them."""
    folder = temporary_name(prefix)
    try:
        folder.mkdir(mode=0o700)
        yield folder
    finally:
        try:
            remove_folder(folder)
        except BaseException:  # also a cancellation before its first instruction
            remove_folder(folder)
            raise


def remove_folder(folder: Path) -> None:
    """Remove a folder and the files in it, if it is there, also when a cancellation comes meanwhile.

    Cog raises a cancellation in the prediction's thread, at any instruction. Within `shutil.rmtree` it would leave
    files behind, and in Python 3.11 close a descriptor twice; here nothing is open, and the rest goes in a second try.
    """
    try:
        _remove_files(folder)
    except BaseException:
        _remove_files(folder)
        raise


def _remove_files(folder: Path) -> None:
    for _ in range(REMOVALS):
        with suppress(OSError):
            for file in folder.iterdir():
                file.unlink(missing_ok=True)
            folder.rmdir()
        if not folder.exists():
            break


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
